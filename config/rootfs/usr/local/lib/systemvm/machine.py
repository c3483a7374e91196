"""The machine itself: the only module that reads, writes and runs anything. It logs, and never raises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOG = "/var/log/cloud.log"


@dataclass(frozen=True)
class Result:
    """How a command ended: its status (-1 when it could not run or took too long) and what it printed."""

    status: int
    output: bytes = b""

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.status == 0


def execute(argv: Sequence[str], text: str | None, seconds: float) -> Result:
    """Run a command without a shell and without a terminal."""
    try:
        done = subprocess.run(
            argv,
            input=(text or "").encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            env={"PATH": PATH, "LC_ALL": "C.UTF-8", "HOME": "/root"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Result(-1, str(error).encode())
    return Result(done.returncode, done.stdout)


@dataclass(frozen=True)
class Machine:
    """A root folder and a way to run commands; tests bring their own."""

    root: Path = Path("/")
    execute: Callable[[Sequence[str], str | None, float], Result] = execute
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    logged: list[str] = field(default_factory=list)

    def path(self, name: str) -> Path:
        """Where a file of the image lies."""
        return self.root / name.lstrip("/")

    def log(self, text: str) -> None:
        """A line for the journal and for CloudStack's log."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(self.now()))} {text}"
        self.logged.append(text)
        print(text, flush=True)
        try:
            with self.path(LOG).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError:
            pass

    def read_bytes(self, name: str, limit: int = 1 << 22) -> bytes:
        """Content of a file; empty when there is none."""
        try:
            with self.path(name).open("rb") as file:
                return file.read(limit)
        except OSError:
            return b""

    def read(self, name: str) -> str:
        """Text of a file; empty when there is none."""
        return self.read_bytes(name).decode("utf-8", errors="replace")

    def write(self, name: str, content: str | bytes, mode: int = 0o644) -> None:
        """Write a file aside and rename it: a power cut leaves the old one or the new one."""
        data = content if isinstance(content, bytes) else content.encode(errors="replace")
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), mode)
            os.replace(aside, path)
        except OSError as error:
            self.log(f"cannot write {name}: {error.strerror}")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as error:
            self.log(f"cannot remove {name}: {error.strerror}")

    def run(self, *argv: str, text: str | None = None, seconds: float = 60, quiet: bool = False) -> Result:
        """Run a command; a failure is logged with the last line of what it said."""
        result = self.execute(argv, text, seconds)
        if not result.ok and not quiet:
            last = result.output.decode("utf-8", errors="replace").strip().splitlines()[-1:] or [""]
            self.log(f"{' '.join(argv)}: status {result.status} {last[0]}")
        return result

    def units(self, name: str, *units: str) -> list[str]:
        """One property of several units, in their order; nothing when systemd does not answer."""
        shown = self.run("systemctl", "show", f"--property={name}", *units, quiet=True)
        return re.findall(rf"(?m)^{name}=(.*)$", shown.output.decode(errors="replace"))

    def switch(self, verb: str, *units: str) -> None:
        """Start, stop, restart or reload units without waiting: those the image has, types name others too.

        Enabled or not does not matter: what a type runs is started anew at every boot.
        """
        states = zip(units, self.units("LoadState", *units), strict=False)
        there = [unit for unit, state in states if state == "loaded"]
        if verb == "start" and set(units) - set(there):
            self.log(f"not in this image: {' '.join(unit for unit in units if unit not in there)}")
        if there:
            self.run("systemctl", verb, "--no-block", *there)


def complain(text: str) -> None:
    """A line on stderr, for verbs whose stdout is an answer."""
    print(text, file=sys.stderr)
