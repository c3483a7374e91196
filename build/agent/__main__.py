"""Serve one client: requests come in on stdin, events go out on stdout, and all ends with the client.

Started as `python3 -I -B .../build/agent/__main__.py serve` (a session), `... send` (the bytes of one file),
`... exec VERB REQUEST` for the verbs that take over the terminal (`shell`, `boot`), or by a session as
`... job FOLDER`: a build that goes on when its client has gone.
"""

from __future__ import annotations

import json
import math
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from build.agent import process, verbs
from build.agent.events import Emit, Failure, emit
from build.agent.verbs import job, send, terminal
from build.formats.lib.errors import Unsupported
from build.printable import LINES, printable

HEARTBEAT_TIMEOUT = 10.0
"""Seconds without a beat after which a client behind a network counts as gone (it beats every 2 s).

One on this machine may be stopped, or starve, for as long as it likes: the kernel tells of its end.
"""
BEAT = 2.0
"""Seconds between our own signs of life, by which the client knows that the network is there."""

Request = dict[str, Any]


def serve(patience: float) -> int:
    """Answer requests one after another until the client says goodbye, goes away or is silent for so long."""
    asked = requests(patience)
    emit("ready", pid=os.getpid())
    threading.Thread(target=_beat, daemon=True).start()
    while (request := asked.get()) is not None:
        _answer(request)
    return 0


def requests(patience: float = HEARTBEAT_TIMEOUT) -> queue.Queue[Request | None]:
    """Listen on stdin; this process and its children end when the client says goodbye or is gone."""
    asked: queue.Queue[Request | None] = queue.Queue()
    threading.Thread(target=_listen, args=(asked, patience), daemon=True).start()
    return asked


def _beat() -> None:
    while True:
        time.sleep(BEAT)
        emit("beat")


def _listen(requests: queue.Queue[Request | None], patience: float) -> None:
    """Read stdin; on end of file, or on silence, end every child and this process at once."""
    stream = sys.stdin.fileno()
    pending = b""
    heard = time.monotonic()
    while True:
        ready, _, _ = select.select([stream], [], [], 1.0)
        if not ready:
            if time.monotonic() - heard > patience:
                break
            continue
        heard = time.monotonic()
        chunk = os.read(stream, 1 << 20)
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            # Anything else is not for us, and must not be shown: a password that sudo did not want.
            if line.startswith(b"{"):
                requests.put(json.loads(line))
    process.stop_all()
    os._exit(75)


def _answer(request: Request) -> None:
    answer = _attempt(request, emit)
    emit(answer.pop("event"), **answer)


def _attempt(request: Request, tell: Emit) -> dict[str, Any]:
    """Do what a request asks; answers the event of its result or its failure.

    A request's `compressors` is the folder of those that came along.
    """
    folder = request.pop("compressors", "")
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return {"event": "result", "value": verbs.call(request.pop("verb"), request, tell)}
    except Failure as failure:
        return {"event": "failure", "message": failure.message, "hint": failure.hint, **failure.details}
    except Unsupported as error:
        return {"event": "failure", "message": error.message, "hint": error.hint}
    except OSError as error:
        return {
            "event": "failure",
            "message": _say(error),
            "hint": "free some space" if error.errno == 28 else "",
            "trace": traceback.format_exc(),
        }
    except Exception as error:
        return {
            "event": "failure",
            "message": f"{type(error).__name__}: {error}",
            "hint": "this is a defect: run again with --debug and report it",
            "trace": traceback.format_exc(),
        }


def _say(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def execute(name: str, source: str) -> int:
    """Run the program that a terminal verb describes; `source` is a request's file, or a session's token.

    A session's program ends with the session. This process stays above it: nothing between the network and
    here, sudo least of all, passes a death on.
    """
    session = None
    try:
        if "/" in source:
            asked = json.loads(Path(source).read_text(encoding="utf-8"))
            Path(source).unlink()
        else:
            asked, session = terminal.claim(source)
        argv, env = verbs.command(name, asked)
    except (Failure, Unsupported) as failure:
        text = f"error: {failure.message}" + (f"\n  hint: {failure.hint}" if failure.hint else "")
        print(printable(text, LINES), file=sys.stderr)  # on the user's terminal, past the client
        return 1
    # What the keyboard sends is for the program; a handler, unlike SIG_IGN, is not inherited.
    for sign in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(sign, lambda *_: None)
    child = subprocess.Popen(argv, env=process.environment(env))
    if session is not None:
        threading.Thread(target=_end_with, args=(session, child), daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


def _end_with(session: socket.socket, child: subprocess.Popen[bytes]) -> None:
    session.recv(1)
    child.kill()
    os._exit(75)


def main() -> int:
    """Read the command line."""
    if sys.argv[1:2] == ["exec"] and len(sys.argv) == 4:
        return execute(sys.argv[2], sys.argv[3])
    if sys.argv[1:2] == ["job"] and len(sys.argv) == 3:
        return job.work(Path(sys.argv[2]), _attempt)
    if sys.argv[1:] not in (["serve"], ["serve", "--local"], ["send"]):
        print(
            "usage: agent serve [--local] | send | exec VERB REQUEST.json|TOKEN | job FOLDER", file=sys.stderr
        )
        return 2
    # The client decides what an interrupt means; it reaches us as the end of stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.argv[1] == "send":
        return send.stream(requests())
    return serve(math.inf if "--local" in sys.argv else HEARTBEAT_TIMEOUT)


if __name__ == "__main__":
    sys.exit(main())
