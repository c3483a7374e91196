"""The agent's side of the protocol: events go out as JSON lines, failures carry a hint."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any, Protocol


class Emit(Protocol):
    """Send one event to the client."""

    def __call__(self, kind: str, **fields: Any) -> None:
        """Send an event of this kind with these fields (plain JSON values)."""


class Failure(Exception):
    """A verb cannot do what was asked: one line of what, one imperative line of what to do.

    `details` go along in the event for programs: `code` of the finding that is in the way, `guests`, `log`.
    """

    def __init__(self, message: str, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


_lock = threading.Lock()


def emit(kind: str, **fields: Any) -> None:
    """Write one event to stdout, whole, whichever thread it comes from."""
    line = json.dumps({"event": kind, **fields}) + "\n"
    with _lock:
        sys.stdout.write(line)
        sys.stdout.flush()
