"""Children of the agent: each dies with it, none reads its stdin, none outlives a request."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from build.agent.events import Failure

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

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
    text: str | None = None,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end and capture what it prints; `text` goes to its stdin.

    Raises Failure with the command's last line of stderr when `check` is set and it does not end with 0.
    """
    child = start(
        argv,
        env=env,
        stdin=subprocess.PIPE if text is not None else subprocess.DEVNULL,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        **options,
    )
    try:
        out, err = child.communicate(text)
    finally:
        _running.discard(child)
    if check and child.returncode:
        last = (err or out or "").strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise Failure(f"{argv[0]}: {last[0]}")
    return subprocess.CompletedProcess(list(argv), child.returncode, out or "", err or "")


@contextlib.contextmanager
def nameless(content: bytes = b"") -> Iterator[int]:
    """Give the descriptor of a file that has no name, so that nothing can be left of it.

    A child to which it is passed opens it as /proc/self/fd/N.
    """
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.fileno()


def stop(child: subprocess.Popen[Any]) -> None:
    """Kill a child and its process group, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    child.wait()
    _running.discard(child)


def stop_all(report: Callable[[str], None] | None = None) -> None:
    """Kill every child that still runs."""
    for child in list(_running):
        if report:
            report(f"ending {child.args!r}")
        stop(child)
