"""Run `inv` as a user does, and look at what comes back."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.waiting import LONG
from tests.warm import Warm

CHECKOUT = Path(__file__).resolve().parents[1]
INV = (sys.executable, "-m", "invoke")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of its user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SYSTEMVM_")}
    return {**kept, "COLUMNS": "120", **(extra or {})}


def inv(
    *arguments: str,
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    checkout: Path = CHECKOUT,
) -> subprocess.CompletedProcess[str]:
    """Run one command line to its end, in this checkout or another with a `.venv` of its own."""
    own = INV if checkout == CHECKOUT else (str(checkout / ".venv/bin/python"), *INV[1:])
    if own == INV and (server := _server(tuple(prefix), env or {})):
        return _forked(server, arguments, environment(env))
    return subprocess.run(
        [*prefix, *own, *arguments],
        cwd=checkout,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


_servers: dict[tuple[str, ...], Warm] = {}
_WARM: set[tuple[str, ...]] = {()}
"""Beginnings of command lines that have a server of their own: many tests begin so."""
_COLD = ("PYTHON", "LC_", "LANG")
"""Variables that Python reads before its first line."""


@contextmanager
def warm(prefix: Sequence[str]) -> Iterator[None]:
    """Have the command lines that begin so forked from one process; see tests.warm."""
    _WARM.add(tuple(prefix))
    try:
        yield
    finally:
        _WARM.discard(tuple(prefix))
        if server := _servers.pop(tuple(prefix), None):
            server.close()


def cool() -> None:
    """End the servers."""
    while _servers:
        _servers.popitem()[1].close()


def _server(prefix: tuple[str, ...], env: Mapping[str, str]) -> Warm | None:
    if prefix not in _WARM or any(name.startswith(_COLD) for name in env):
        return None
    if prefix not in _servers:
        _servers[prefix] = Warm(prefix)
    return _servers[prefix]


def _forked(
    server: Warm, arguments: Sequence[str], env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
        open(os.devnull) as nothing,
    ):
        status = server.run(arguments, env, (nothing.fileno(), out.fileno(), errors.fileno()))
        for stream in (out, errors):
            stream.seek(0)
        return subprocess.CompletedProcess([*INV, *arguments], status, out.read(), errors.read())


def _hear() -> None:
    """Undo what a shell without job control, and nohup, make all below deaf to."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(
    *arguments: str, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start one in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [*prefix, *INV, *arguments],
        cwd=CHECKOUT,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        start_new_session=True,
        preexec_fn=_hear,
    )


def on_terminal(
    argv: Sequence[str], answers: Sequence[tuple[str, str]], env: Mapping[str, str], seconds: float = LONG
) -> tuple[int, str]:
    """Run a command line on a terminal of its own and type answers to questions, each once and in this order.

    Answers its status and all that was shown; fails when it shows nothing for so long.
    """
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        ["setsid", "--ctty", *argv], cwd=CHECKOUT, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    waiting, shown, answered = list(answers), b"", 0
    while select.select([ours], [], [], seconds)[0]:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed: it has ended
            os.close(ours)
            return child.wait(LONG), shown.decode()
        if waiting and waiting[0][0].encode() in shown[answered:]:
            os.write(ours, waiting.pop(0)[1].encode() + b"\n")
            answered = len(shown)
    child.kill()
    raise AssertionError(f"shows nothing more: {shown.decode()}")


def succeed(*arguments: str, **where: Any) -> str:
    """Run one that must end well; answers what it printed."""
    done = inv(*arguments, **where)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def refuse(*arguments: str, **where: Any) -> str:
    """Run one that must be refused with one clear error, a hint and no traceback; answers the error."""
    done = inv(*arguments, **where)
    assert done.returncode not in (0, -9), done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: "), done.stderr
    assert lines[-1].startswith("  hint: "), done.stderr
    return done.stderr


def states(output: str) -> dict[str, str]:
    """Read `built|cached NAME 1.2s` lines."""
    words = [line.split() for line in output.splitlines()]
    return {row[1]: row[0] for row in words if len(row) > 2 and row[0] in ("built", "cached")}
