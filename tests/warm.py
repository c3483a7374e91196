"""`inv` without its half second of imports: a process that has them forks for each command line.

What comes of a fork is a process of its own like any other: its environment, folder, descriptors and exit
status are those of a new `python -m invoke`. Only what Python reads before its first line (PYTHON*, the
locale) is the server's, so a command line that sets any of these is started afresh; tests/cli.py decides.

    python -m tests.warm DESCRIPTOR       serves until that socket's other end is closed
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from runpy import run_module
from typing import ClassVar

from tests.waiting import LONG

CHECKOUT = Path(__file__).resolve().parents[1]
LIMIT = 1 << 20
"""Bytes of a request: arguments and environment."""
LIBRARIES = (
    *("fabric", "invoke.main"),
    *("build.verbs", "build.engine.pipeline", "build.engine.recipe", "build.engine.remote"),
)
"""What tasks.py imports, and what verbs import late; not tasks.py: Invoke reads it for each command line."""


class Warm:
    """A server of command lines."""

    spent: ClassVar[float] = 0.0
    """Seconds of processor time that the command lines of all servers took."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LIMIT)
        number = theirs.fileno()
        argv = [*prefix, sys.executable, "-B", "-m", "tests.warm", str(number)]
        self._server = subprocess.Popen(argv, cwd=CHECKOUT, stdin=subprocess.DEVNULL, pass_fds=(number,))
        theirs.close()

    def run(self, argv: Sequence[str], env: Mapping[str, str], files: tuple[int, int, int]) -> int:
        """Run `inv` with these arguments and standard descriptors.

        Returns the exit status, or minus the signal's number when one ended it.
        """
        os.umask(mask := os.umask(0o077))
        request = json.dumps([list(argv), dict(env), mask]).encode()
        answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answer:
            socket.send_fds(self._line, [request], (theirs.fileno(), *files))
            theirs.close()
            status, seconds = json.loads(answer.recv(100))
        Warm.spent += seconds
        return int(status)

    def close(self) -> None:
        """End the server; what it has started goes on."""
        self._line.close()
        self._server.wait(LONG)


def serve(line: socket.socket) -> list[str]:
    """Fork for each request until there are no more; return the arguments in the one that runs them."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those below
    while True:
        request, descriptors, _, _ = socket.recv_fds(line, LIMIT, 4)
        if not request:
            sys.exit()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            line.close()
            return _take(request, socket.socket(fileno=descriptors[0]), descriptors[1:])
        for descriptor in descriptors:
            os.close(descriptor)


def _take(request: bytes, answer: socket.socket, files: Sequence[int]) -> list[str]:
    """Fork once more: one becomes what was asked for, its parent reports how that ended."""
    if child := os.fork():
        for descriptor in files:
            os.close(descriptor)
        _, status, used = os.wait4(child, 0)
        seconds = round(used.ru_utime + used.ru_stime, 3)
        with suppress(OSError):
            answer.send(json.dumps([os.waitstatus_to_exitcode(status), seconds]).encode())
        os._exit(0)
    answer.close()
    argv, env, umask = json.loads(request)
    for target, descriptor in enumerate(files):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(env)
    return list(argv)


def main() -> None:
    """Serve; in a fork, be `python -m invoke`."""
    for module in LIBRARIES:
        import_module(module)
    sys.argv[1:] = serve(socket.socket(fileno=int(sys.argv[1])))
    run_module("invoke", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
