"""Children of the agent: each dies with it, none reads its stdin, none outlives a request."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from build.agent import ending, memory
from build.agent.events import Failure

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

DEADLINE = 60.0
"""Seconds after which a short command counts as hung: the slowest hosts take a few."""

_running: set[subprocess.Popen[Any]] = set()


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A closed environment: the same for a local run and a remote one."""
    base = {
        "PATH": PATH,
        "LC_ALL": "C.UTF-8",
        "HOME": os.environ.get("HOME", "/"),
        "DEBIAN_FRONTEND": "noninteractive",
    }
    return {**base, **(extra or {})}


ALIVE = '[ "$PPID" = "$1" ] || exit 75; shift; exec "$@"'
"""Goes on only if its parent is still there. A death signal that is asked for too late never comes."""


def tied(argv: Sequence[str]) -> list[str]:
    """Command line of a child that is killed when this process dies, be it before the child has begun.

    The signal (prctl(2), PR_SET_PDEATHSIG) follows the thread that starts the child: start long-lived
    children from the main thread.
    """
    return ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", ALIVE, "tied", str(os.getpid()), *argv]


def start(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start a command that is killed when the agent dies, whatever kills the agent.

    Raises Failure when a tool is missing.
    """
    options.setdefault("stdin", subprocess.DEVNULL)
    try:
        child = subprocess.Popen(
            tied(argv),
            env=environment(env),
            start_new_session=True,
            **options,
        )
    except FileNotFoundError as error:
        raise Failure("setpriv is missing", "install util-linux") from error
    _running.add(child)
    return child


def finish(child: subprocess.Popen[Any]) -> int:
    """Wait for a child and forget it."""
    try:
        return child.wait()
    finally:
        _running.discard(child)


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    text: str = "",
    env: Mapping[str, str] | None = None,
    deadline: float | None = DEADLINE,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end and capture what it prints; `text` is its stdin.

    Whatever it leaves running in its process group ends with it, and so it does itself after `deadline`
    seconds (None: whenever it likes). It writes into memory: a pipe would have to be read for as long as
    anything that it left holds the other end, as a helper of util-linux 2.41's unshare does.
    Raises Failure with the command's last line of stderr when `check` is set and it does not end with 0,
    and always when it was killed, or its time is up.
    """
    killed = memory.kills()
    with _memory() as into, _memory() as out, _memory() as err:
        into.write(text.encode())
        into.seek(0)
        child = start(argv, env=env, stdin=into, stdout=out, stderr=err, pass_fds=pass_fds)
        try:
            late = _end_of(child, deadline)
        finally:
            stop(child)
        said, complained = _text(out), _text(err)
    if late:
        raise Failure(f"{argv[0]}: no end within {deadline:.0f} s", f"try it by hand: {shlex.join(argv)}")
    starved = memory.kills() > killed
    status = child.returncode if starved else min(child.returncode, 0)  # of a shell there is none in between
    if end := ending.told(argv[0], status, starved):
        raise Failure(end, ending.MORE_MEMORY if starved else "run it again")
    if check and child.returncode:
        last = (complained or said).strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise Failure(f"{argv[0]}: {last[0]}")
    return subprocess.CompletedProcess(list(argv), child.returncode, said, complained)


def _end_of(child: subprocess.Popen[Any], deadline: float | None) -> bool:
    """Wait for a child, not yet reaped: until then its id is nobody else's. Says whether its time ran out."""
    late = threading.Event()

    def end() -> None:
        late.set()
        _kill_group(child)

    clock = threading.Timer(deadline, end) if deadline is not None else None
    if clock:
        clock.daemon = True
        clock.start()
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    finally:
        if clock:
            clock.cancel()
    return late.is_set()


def _memory() -> BinaryIO:
    return open(os.memfd_create("nameless"), "w+b")


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@contextlib.contextmanager
def nameless(content: bytes = b"") -> Iterator[int]:
    """Give the descriptor of a file in memory that only we may open, so that nothing can be left of it.

    A child to which it is passed opens it as /proc/self/fd/N. Python's own temporary files are no way to
    it: the first one tries the folder out with a file that has a name.
    """
    with _memory() as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        yield file.fileno()


def stop(child: subprocess.Popen[Any]) -> None:
    """Kill a child and its process group, and reap it."""
    _kill_group(child)
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    child.wait()
    _running.discard(child)


def _kill_group(child: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def stop_all(report: Callable[[str], None] | None = None) -> None:
    """Kill every child that still runs."""
    for child in list(_running):
        if report:
            report(f"ending {child.args!r}")
        stop(child)
