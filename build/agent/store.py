"""Layers on disk: found by key, built aside, renamed when done, and dropped when nobody needs them.

LOCATION/cache/<root|user|root-copy|user-copy>/KEY/tree        what the step added (an overlay upper)
LOCATION/cache/<...>/KEY/layer.json                            what went into it (for `inv why`)
LOCATION/cache/<...>/.KEY.part/                                a step that is being built, or was cut off
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.agent import facts, files
from build.agent.events import Emit, Failure
from build.agent.sandbox import BuildPaths, Tree

ROOT_LOCATION = "/var/lib/images/systemvm"
"""Where root builds, unless told otherwise."""
SIZE = 1024
"""Bytes of what a lock's file says."""


@dataclass(frozen=True)
class Held:
    """A lock that this process holds, and what its file says of us."""

    handle: int
    holder: Mapping[str, Any]


_held: dict[Path, Held] = {}
"""Locks live as long as this process: the kernel gives them back, whatever ends it."""


def lock(location: Path, emit: Emit, what: str) -> None:
    """Hold LOCATION for the rest of this process; wait for another holder and say who it is."""
    if location in _held:
        return
    handle = os.open(location / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.suppress(PermissionError):
        os.fchmod(handle, 0o644)  # whoever waits may read who holds it, whatever our umask
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        emit("note", text=f"waiting: {location} is in use by {_holder(handle)}")
        fcntl.flock(handle, fcntl.LOCK_EX)
    holder = {
        "user": user(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "what": what,
        "since": int(time.time()),
    }
    _held[location] = Held(handle, holder)
    tell(location, None)


def tell(location: Path, work: Mapping[str, Any] | None) -> None:
    """Note in the lock that we hold, for whoever reads it, what we are doing; nothing if we hold none."""
    if held := _held.get(location):
        # One write of one length: a reader sees the old or the new.
        text = json.dumps({**held.holder, "work": work}).encode()
        with contextlib.suppress(OSError):
            os.pwrite(held.handle, text.ljust(SIZE)[:SIZE], 0)
            os.ftruncate(held.handle, SIZE)


def work(location: Path) -> dict[str, Any] | None:
    """What the process that holds LOCATION is doing, as it told; None if nobody holds it or tells."""
    if not is_locked(location):
        return None
    try:
        told: dict[str, Any] | None = json.loads(files.read(location / "lock"))["work"]
    except (ValueError, KeyError, TypeError):
        return None
    return told


def _holder(handle: int) -> str:
    try:
        told = json.loads(os.pread(handle, SIZE, 0))
        since = int(time.time()) - told["since"]
        return f"{told['user']} (pid {told['pid']} on {told['host']}, {told['what']}, for {since} s)"
    except (ValueError, KeyError):
        return "another build"


def user() -> str:
    """Who builds: the name of the user, and of who became it by sudo."""
    name, caller = facts.user_name(), os.environ.get("SUDO_USER", "")
    return f"{caller} as {name}" if caller and caller != name else name


def holder(location: Path) -> str:
    """Who holds LOCATION, in words; empty if nobody does."""
    if not is_locked(location):
        return ""
    handle = os.open(location / "lock", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _holder(handle)
    finally:
        os.close(handle)


def is_locked(location: Path) -> bool:
    """Tell whether a build of another process runs there."""
    return location not in _held and is_held(location / "lock")


def is_held(file: Path) -> bool:
    """Tell whether a process holds this file's lock; one that is not there is nobody's."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def path(place: BuildPaths, key: str) -> Path:
    """Directory of a finished layer."""
    return place.store / key


def part(place: BuildPaths, key: str) -> Path:
    """Directory of a layer in the making."""
    return place.store / f".{key}.part"


def has(place: BuildPaths, key: str) -> bool:
    """Tell whether a layer is finished."""
    return (path(place, key) / "layer.json").is_file()


def use(place: BuildPaths, key: str) -> None:
    """Mark a layer as just used, by its record's time; those not used for longest go first (`inv clean`)."""
    with contextlib.suppress(OSError):
        os.utime(path(place, key) / "layer.json")


def record(place: BuildPaths, key: str) -> dict[str, Any]:
    """What went into a layer; raises Failure if it is gone."""
    try:
        told: dict[str, Any] = json.loads((path(place, key) / "layer.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"layer {key} is not in the cache", "run: inv build") from error
    return told


def view(place: BuildPaths, chain: Sequence[str]) -> Tree:
    """The finished tree of a chain of keys (lowest first), read-only."""
    if not place.overlay:
        return Tree(lower=(path(place, chain[-1]) / "tree",))
    return Tree(lower=tuple(path(place, key) / "tree" for key in reversed(chain)))


def every(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Finished layers in a store with their records, the least recently used first."""
    for entry in sorted(folder.glob("*/layer.json"), key=lambda file: file.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ValueError):
            yield entry.parent, json.loads(entry.read_text(encoding="utf-8"))


def parts(folder: Path) -> list[Path]:
    """Leftovers in a store of steps that were cut off."""
    return sorted(folder.glob(".*.part"))
