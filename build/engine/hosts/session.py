"""The conversation with a host's agent: requests and events, one JSON object a line, and beats in between."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from invoke.exceptions import ThreadException

from build import wire
from build.agent import ending
from build.engine.errors import BuildError, HostError

BEAT = 2.0
"""Seconds between two signs of life to the agent; it gives up after 10 without one."""
HEARTBEAT_TIMEOUT = 20.0
"""Seconds without a word from a remote agent after which it counts as gone; it beats every 2 s."""
GOODBYE = 5.0
"""Seconds that an agent may take to end; a remote one that does not answer is left to its own silence."""

Event = dict[str, Any]
OnEvent = Callable[[Event], None]
Start = Callable[["_Outbox", "_Lines", "_Lines"], Any]
"""Runs the agent with these as stdin, stdout and stderr; answers Invoke's promise of its end."""


class Session:
    """A conversation with one agent process: requests go down its stdin, events come up its stdout.

    `name` of the host (empty: this machine); `stdin_preamble` goes before the first request; `start` runs the
    agent with these streams; `hang_up` cuts the connection to a remote host.
    """

    def __init__(
        self, name: str, stdin_preamble: str, start: Start, hang_up: Callable[[], None], debug: bool
    ) -> None:
        self.name = name
        self.hang_up = hang_up
        self.debug = debug
        self._requests = _Outbox()
        self._requests.put(stdin_preamble)
        self._heard = time.monotonic()
        self._events: queue.Queue[Event] = queue.Queue()
        errors = _Lines(lambda text: self._events.put({"event": "stderr", "text": text}))
        self._promise = start(self._requests, _Lines(self._take), errors)
        self._stderr: list[str] = []
        self._wait_for("ready", lambda _event: None)

    def call(self, verb: str, on_event: OnEvent, request: Mapping[str, Any]) -> Any:
        """Send one request and follow its events to the result."""
        self._requests.put(json.dumps({"verb": verb, **request}) + "\n")
        return self._wait_for("result", on_event).get("value")

    def close(self) -> None:
        """End of stdin tells the agent to end, with everything it started."""
        self._requests.end()
        limit = time.monotonic() + GOODBYE
        while not self._promise.runner.process_is_finished and time.monotonic() < limit:
            time.sleep(0.01)
        if self.name and not self._promise.runner.process_is_finished:
            self.hang_up()
        with contextlib.suppress(ThreadException):  # it wrote to what is closed
            self._promise.join()

    def _lost_touch(self) -> bool:
        """Whether a remote agent is silent for so long that the network must be gone."""
        return bool(self.name) and time.monotonic() - self._heard > HEARTBEAT_TIMEOUT

    def gone(self) -> BuildError:
        """What is to be said when the host is out of reach all at once."""
        what = f"heartbeat of {self.name} timed out after {HEARTBEAT_TIMEOUT:.0f} s: the network is lost"
        return HostError(
            what if self._lost_touch() else f"the connection to {self.name or 'the agent'} was cut",
            "run it again; what it did there has ended, and finished layers are kept",
        )

    def guard(self, ended: threading.Event) -> None:
        """Hang up when the network is lost, until `ended`: a terminal of its own does not notice."""
        while not ended.wait(1):
            if self._lost_touch():
                self.hang_up()
                return

    def _take(self, line: str) -> None:
        self._heard = time.monotonic()
        try:
            self._events.put(json.loads(line))
        except ValueError:
            self._events.put({"event": "stderr", "text": line})

    def _wait_for(self, kind: str, on_event: OnEvent) -> Event:
        while True:
            try:
                event = self._events.get(timeout=0.5)
            except queue.Empty:
                if self._promise.runner.process_is_finished and self._events.empty():
                    raise self._lost() from None
                if self._lost_touch():
                    raise self.gone() from None
                continue
            if event["event"] == kind:
                return event
            if event["event"] == "failure":
                raise explain(event, self.debug)
            if event["event"] == "stderr":
                self._stderr.append(event["text"])
            elif event["event"] != "beat":
                on_event(event)

    def _lost(self) -> BuildError:
        # Of a remote process that a signal has ended Paramiko tells no more than -1.
        status = 0 if self.name else self._promise.runner.returncode()
        return loss(self.name, self._stderr, ending.signal_of(status))


def loss(name: str, said: Sequence[str], sign: str) -> BuildError:
    """What is to be said of an agent that has ended.

    `name` of its host (empty: this machine), what it wrote to stderr, and the signal that ended it, if any.
    """
    last = next((line for line in reversed(said) if line.strip()), "")
    if unreadable := re.search(r"can't open file '(.*)': \[Errno 13\]", last):
        # It was there for the user a moment ago: his home is on a file system where root is nobody.
        return HostError(
            f"root may not read {unreadable[1]} on {name}", "log in as root, or build without: --rootless"
        )
    again = "run it again; finished layers are kept"
    told = f"it was ended by {sign}" if sign else last or "it ended without a word"
    memory = "the kernel does that where memory is short, and says so in dmesg; " if sign == "SIGKILL" else ""
    return HostError(f"the agent on {name or 'this machine'} was lost: {told}", f"{memory}{again}")


def explain(event: Event, debug: bool) -> BuildError:
    """Make the agent's failure ours: what, the log's last lines, hint."""
    parts = [event["message"], *(f"    {line}" for line in event.get("tail", ()))]
    if debug and event.get("trace"):
        parts.append(event["trace"])
    return BuildError("\n".join(parts), event.get("hint", ""))


class _Outbox:
    """The agent's stdin, as the file-like object that Invoke reads: requests, and beats between them.

    Invoke asks for one character every 10 ms; giving it more at once is what makes this quick.
    """

    def __init__(self) -> None:
        self._chunks: queue.Queue[str] = queue.Queue()
        self._beat = time.monotonic()

    def put(self, text: str) -> None:
        """Queue a text."""
        for start in range(0, len(text), 65536):
            self._chunks.put(text[start : start + 65536])

    def end(self) -> None:
        self._chunks.put("")

    def read(self, _count: int = -1) -> str | None:
        try:
            chunk = self._chunks.get_nowait()
        except queue.Empty:
            if time.monotonic() - self._beat < BEAT:
                return None
            chunk = "\n"
        self._beat = time.monotonic()
        return chunk


class _Lines:
    """A stream that hands whole lines on."""

    encoding = "utf-8"

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._pending = ""

    def write(self, text: str) -> int:
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back but half lines."""


def encode(files: Mapping[str, Any]) -> dict[str, wire.File]:
    """Write a step's files as they go over the wire."""
    return {
        name: wire.File(base64.b64encode(file.content).decode("ascii"), file.mode)
        for name, file in files.items()
    }
