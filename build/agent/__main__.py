"""Serve one client: requests come in on stdin, events go out on stdout, and all ends with the client.

Started as `python3 -I -B .../build/agent/__main__.py serve` (a session), or `... exec VERB REQUEST.json`
for the verbs that take over the terminal (`shell`, `boot`).
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from build.agent import process
from build.agent.events import Failure, emit

SILENCE = 10.0
"""Seconds without a beat after which the client counts as gone (it beats every 2 s)."""

Request = dict[str, Any]


def serve() -> int:
    """Answer requests one after another until the client says goodbye or goes away."""
    requests: queue.Queue[Request | None] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    emit("ready", pid=os.getpid())
    while (request := requests.get()) is not None:
        _answer(request)
    return 0


def _listen(requests: queue.Queue[Request | None]) -> None:
    """Read stdin; on end of file, or on silence, end every child and this process at once."""
    stream = sys.stdin.fileno()
    pending = b""
    heard = time.monotonic()
    while True:
        ready, _, _ = select.select([stream], [], [], 1.0)
        if not ready:
            if time.monotonic() - heard > SILENCE:
                break
            continue
        heard = time.monotonic()
        chunk = os.read(stream, 1 << 20)
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                requests.put(json.loads(line))
    process.stop_all()
    os._exit(75)


def _answer(request: Request) -> None:
    try:
        emit("result", value=_verb(request.pop("verb")).run(request, emit))
    except Failure as failure:
        emit("failure", message=failure.message, hint=failure.hint, **failure.details)
    except OSError as error:
        emit(
            "failure",
            message=_say(error),
            hint="free some space" if error.errno == 28 else "",
            trace=traceback.format_exc(),
        )
    except Exception as error:
        emit(
            "failure",
            message=f"{type(error).__name__}: {error}",
            hint="this is a defect: run again with --debug and report it",
            trace=traceback.format_exc(),
        )


def _say(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _verb(name: str) -> Any:
    if not re.fullmatch(r"[a-z_]+", name):
        raise Failure(f"no verb {name!r}")
    return importlib.import_module(f"build.agent.{name}")


def execute(name: str, request: Path) -> int:
    """Become the program that a terminal verb describes; the request file is removed first."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    request.unlink()
    try:
        argv, env = _verb(name).command(asked)
    except Failure as failure:
        print(
            f"error: {failure.message}" + (f"\n  hint: {failure.hint}" if failure.hint else ""),
            file=sys.stderr,
        )
        return 1
    return os.execvpe(argv[0], argv, process.environment(env))


def main() -> int:
    """Read the command line."""
    if sys.argv[1:2] == ["exec"] and len(sys.argv) == 4:
        return execute(sys.argv[2], Path(sys.argv[3]))
    if sys.argv[1:] != ["serve"]:
        print("usage: agent serve | agent exec VERB REQUEST.json", file=sys.stderr)
        return 2
    # The client decides what an interrupt means; it reaches us as the end of stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return serve()


if __name__ == "__main__":
    sys.exit(main())
