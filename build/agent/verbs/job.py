"""Verb: builds that go on without a client: start one, tell how it is, follow it, end it.

LOCATION/jobs/alive     locked for as long as the build runs; the kernel gives it back, whatever ends it
LOCATION/jobs/events    what it said, a JSON object a line: first who and what, then events, last how it ended

A build is a list of orders, requests to the agent's verbs. They come in on stdin and are never written
down, for they hold secrets.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from build import wire
from build.agent import files, process, store
from build.agent.events import Emit, Failure

MAIN = Path(__file__).parents[1] / "__main__.py"
LOOK = 0.1
"""Seconds between two looks at what a build has said."""
PATIENCE = 20.0
"""Seconds until a build that was killed has let go of its lock."""


def run(request: wire.Job, emit: Emit) -> dict[str, Any]:
    """Do it."""
    location = Path(request.place.location)
    folder = location / "jobs"
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        "start": lambda: _start(folder, request),
        "status": lambda: {
            **_state(folder),
            "lock": store.holder(location),
            "work": store.work(location),
        },
        "follow": lambda: _follow(folder, emit),
        "cancel": lambda: _cancel(folder),
    }
    return actions[request.action]()


def _state(folder: Path) -> dict[str, Any]:
    """How the last build is, as far as this user may know: another's is his own affair."""
    if folder.exists() and not os.access(folder, os.X_OK):
        return {"state": "hidden"}
    return _tell(folder) or {"state": "none"}


def _start(folder: Path, request: wire.Job) -> dict[str, Any]:
    """Start a process that neither our end nor the session's reaches."""
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    job = subprocess.Popen(
        [sys.executable, "-I", "-B", str(MAIN), "job", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=process.environment({name: os.environ[name] for name in ("SUDO_USER",) if name in os.environ}),
        cwd="/",
        start_new_session=True,
    )
    told = {"what": request.what, "orders": request.orders}
    assert job.stdin is not None
    assert job.stdout is not None
    with job.stdin, job.stdout:
        job.stdin.write(json.dumps(told).encode())
        job.stdin.close()
        said = job.stdout.read()  # it lets go of its end when it has begun
    if said.strip() != b"ready":
        raise Failure(
            f"a build runs there already: {_name(_tell(folder) or {})}", "run: inv attach, or inv cancel"
        )
    return _told(folder)


def work(folder: Path, attempt: Callable[[dict[str, Any], Emit], dict[str, Any]]) -> int:
    """Be the process of a build: `attempt` makes an event of a request, its result or its failure."""
    asked = json.load(sys.stdin)
    alive = os.open(folder / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("busy", flush=True)
        return 1
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    aside = folder / f".events.{os.getpid()}"
    with open(aside, "w", encoding="utf-8") as sink:
        writing = threading.Lock()

        def emit(kind: str, **fields: Any) -> None:
            with writing:
                sink.write(json.dumps({"event": kind, **fields}) + "\n")
                sink.flush()

        emit("job", pid=os.getpid(), user=store.user(), what=asked["what"], since=int(time.time()))
        os.replace(aside, folder / "events")
        print("ready", flush=True)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        for order in asked["orders"]:
            emit("order", verb=order["verb"], name=order["name"])
            answer = attempt({"verb": order["verb"], **order["request"]}, emit)
            emit(answer.pop("event"), verb=order["verb"], name=order["name"], **answer)
            if "value" not in answer:
                emit("end", state="failed", until=int(time.time()))
                return 1
        emit("end", state="finished", until=int(time.time()))
    return 0


def _events(folder: Path) -> Iterator[dict[str, Any]]:
    """What was said so far."""
    with contextlib.suppress(OSError), open(folder / "events", encoding="utf-8") as lines:
        yield from _whole(lines)


def _whole(lines: IO[str]) -> Iterator[dict[str, Any]]:
    """Read as many whole lines as there are."""
    while True:
        before = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(before)
            return
        with contextlib.suppress(ValueError):  # a line that a kill cut in two
            yield json.loads(line)


def _tell(folder: Path) -> dict[str, Any] | None:
    """How the last build is; None if there was none."""
    told: dict[str, Any] = {}
    running = _runs(folder)  # asked first: one that ends meanwhile has then said so
    for event in _events(folder):
        match event["event"]:
            case "job":
                told = {**event, "state": "running" if running else "killed", "results": []}
            case "order":
                told["step"] = event["name"]
            case "result":
                told["results"].append({name: event[name] for name in ("verb", "name", "value")})
            case "failure":
                told["failure"] = event
            case "end":
                told |= {"state": event["state"], "until": event["until"]}
    return told or None


def _told(folder: Path) -> dict[str, Any]:
    told = _tell(folder)
    if told is None:
        raise Failure("no build was left to itself there", "run: inv build --detach")
    return told


def _runs(folder: Path) -> bool:
    return files.is_held(folder / "alive")


def _follow(folder: Path, emit: Emit) -> dict[str, Any]:
    """Pass on what was said, of progress only where it is now, and what is being said until the end."""
    _told(folder)
    with open(folder / "events", encoding="utf-8") as lines:
        progress = None
        for event in _whole(lines):
            progress = event if event["event"] == "progress" else None
            if progress is None:
                emit("job", told=event)
        if progress:
            emit("job", told=progress)
        running = True
        while running:
            running = _runs(folder)
            for event in _whole(lines):
                emit("job", told=event)
            if running:
                time.sleep(LOOK)
    return _told(folder)


def _cancel(folder: Path) -> dict[str, Any]:
    """Kill the build; its children go with it."""
    told = _told(folder)
    if told["state"] != "running":
        raise Failure(f"no build runs there: the last one {told['state']}", "run: inv status")
    try:
        os.kill(told["pid"], signal.SIGKILL)
    except PermissionError:
        raise Failure(f"the build belongs to {_name(told)}", "ask them, or become root") from None
    except ProcessLookupError:
        pass
    limit = time.monotonic() + PATIENCE
    while _runs(folder) and time.monotonic() < limit:
        time.sleep(LOOK)
    with open(folder / "events", "a", encoding="utf-8") as lines:
        event = {"event": "end", "state": "cancelled", "until": int(time.time())}
        lines.write("\n" + json.dumps(event) + "\n" if _torn(folder) else json.dumps(event) + "\n")
    return _told(folder)


def _torn(folder: Path) -> bool:
    """Whether the kill cut a line in two."""
    return not (folder / "events").read_bytes().endswith(b"\n")


def _name(told: dict[str, Any]) -> str:
    ago = int(time.time()) - told.get("since", int(time.time()))
    return f"{told.get('user', 'somebody')} ({told.get('what', '?')}, for {ago} s)"
