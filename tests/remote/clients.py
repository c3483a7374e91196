"""Clients of the build host: who sits there, where their builds lie, and how they are cut off."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from build.engine import compressors
from tests import cli
from tests.buildhost import HOST, PASSWORD, USERS, Buildhost
from tests.images import TINY, Built

FLAGS = (*TINY, "--frozen")
ALL = ("root", *USERS)


def whereabouts(there: Buildhost, user: str, name: str) -> tuple[str, Path]:
    """Where a LOCATION of this user's lies: there, and as seen from here."""
    if user == "carol":
        return f"/home/{user}/{name}", there.folder / "home" / user / name
    return f"/var/lib/images/{name}", there.folder / "images" / name


def provide(tiny: Built, there: Buildhost, user: str, name: str) -> tuple[str, Path]:
    """A LOCATION of this user's that knows the package set of the shared build: its path there, and here."""
    shown, here = whereabouts(there, user, name)
    for folder in ("resolutions", "debs"):
        shutil.copytree(tiny.location / folder, here / folder)
    if user == "carol":
        for path in (here, *here.rglob("*")):
            os.chown(path, USERS[user], USERS[user])
    return shown, here


def start(there: Buildhost, user: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a client of this user's; bob's sits at a terminal, where his password is typed."""
    line = ("-H", f"{user}@{HOST}", *arguments)
    if user != "bob":
        return cli.start(*line, prefix=there.prefix, env=there.env)
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*there.prefix, *cli.INV, *line],
        cwd=cli.CHECKOUT,
        env=cli.environment(there.env),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    threading.Thread(target=_answer, args=(ours,), daemon=True).start()
    return child


def _answer(ours: int) -> None:
    shown, answered = b"", False
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 4096):
            shown += chunk
            if not answered and b"sudo password of bob" in shown:
                answered = True
                os.write(ours, f"{PASSWORD}\n".encode())
    os.close(ours)


def run(there: Buildhost, user: str, *arguments: str) -> str:
    """Run a command line to its good end; every line it prints names the host."""
    said = cli.succeed("-H", f"{user}@{HOST}", *arguments, prefix=there.prefix, env=there.env)
    assert all(line.startswith(f"{user}@{HOST} | ") for line in said.splitlines()), said
    return said


def begun(location: Path) -> Callable[[], object]:
    """Tells whether the lowest layer is in the making."""
    return lambda: list(location.glob("cache/*/.debootstrap-*.part/tree"))


def is_free(location: Path) -> bool:
    """Whether nobody holds LOCATION's lock."""
    with (location / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


ASK = """
import json, platform, sys
print(json.dumps({
    "version": sys.version_info[:3], "implementation": sys.implementation.name,
    "machine": platform.machine(), "libc": platform.libc_ver()}))
"""


def pip(*arguments: str) -> None:
    """Have pip do something with wheels of the lock alone."""
    line = [sys.executable, "-I", "-m", "pip", "-q", *arguments]
    subprocess.run([*line, "--no-deps", "--only-binary=:all:", "--require-hashes"], check=True)


def download(host: Buildhost, pins: Path, folder: Path) -> Path:
    """Fill a folder with what an index holds of the compressors that suits a host."""
    asked = compressors.asked(json.loads(host.inside("python3", "-I", "-c", ASK)))
    pip("download", f"--dest={folder}", *asked, f"--requirement={pins}")
    return folder
