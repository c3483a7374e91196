"""How far long work is, and how long the same took on this host last time.

The client draws its line from what is emitted; `inv status` of another terminal reads the same from the
lock of LOCATION. LOCATION/paces.json holds the seconds of the last run, by work.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from build.agent import files, store
from build.agent.events import Emit

FILE = "paces.json"
PAUSE = 0.5
"""Seconds between two notes of progress in the lock."""


@contextlib.contextmanager
def work(location: Path | None, name: str, emit: Emit, what: str = "") -> Iterator[Emit]:
    """Tell that work begins, with the seconds of its last run, and give what its progress is told to.

    `name` is shown; `what` tells work of one name apart by how long it takes. Only an end without an
    exception counts as a run.
    """
    if location is None:  # nothing is kept between two runs
        yield emit
        return
    paces = _paces(location)
    key, began, told = f"{name} {what}".strip(), time.monotonic(), 0.0
    state = {"name": name, "since": int(time.time()), "last": paces.get(key)}

    def follow(kind: str, **fields: Any) -> None:
        nonlocal told
        emit(kind, **fields)
        if kind == "progress" and time.monotonic() - told > PAUSE:
            told = time.monotonic()
            store.tell(location, {**state, **fields})

    emit("work", name=name, last=state["last"])
    store.tell(location, state)
    try:
        yield follow
    finally:
        store.tell(location, None)
    paces[key] = round(time.monotonic() - began, 1)
    with contextlib.suppress(OSError):
        files.write(location / FILE, json.dumps(paces, sort_keys=True).encode())


def _paces(location: Path) -> dict[str, float]:
    try:
        told = json.loads(files.read(location / FILE) or "{}")
        return {str(key): float(seconds) for key, seconds in told.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


class Progress:
    """Counts bytes from any thread and tells the client at each half percent."""

    def __init__(self, label: str, total: int, emit: Emit) -> None:
        self.label, self.total, self.emit = label, total, emit
        self.done = self.told = 0
        self.lock = threading.Lock()

    def add(self, length: int) -> None:
        """Count bytes that are finished."""
        with self.lock:
            self.done += length
            if self.done < self.total and self.done - self.told < max(self.total // 200, 1 << 20):
                return
            self.told = self.done
        self.emit("progress", label=self.label, done=self.told, total=self.total)
