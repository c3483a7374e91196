"""Layers on disk: found by key, built aside, renamed when done, and dropped when nobody needs them.

LOCATION/cache/<root|user|root-copy|user-copy>/KEY/tree        what the step added (an overlay upper)
LOCATION/cache/<...>/KEY/layer.json                            what went into it, and what it holds
LOCATION/cache/<...>/KEY/synced                                it is on the disk, and outlives a power cut
LOCATION/cache/<...>/KEY/content                               every entry, with the digest of what it holds
LOCATION/cache/<...>/.KEY.*part/                               a step that is being built, or was cut off

What stands under a final name is whole. A layer that is not yet on the disk is one only until the kernel that
made it ends. What is removed loses its name first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.agent import facts, files, process, sandbox
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
    handle = os.open(location / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
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
    return location not in _held and files.is_held(location / "lock")


def path(place: BuildPaths, key: str) -> Path:
    """Directory of a finished layer."""
    return place.store / key


def part(place: BuildPaths, key: str) -> Path:
    """Directory of a layer in the making."""
    return place.store / f".{key}.part"


def boot() -> str:
    """Name of the running kernel's boot (random(4)), empty where it has none."""
    return files.read("/proc/sys/kernel/random/boot_id").strip()


def has(place: BuildPaths, key: str) -> bool:
    """Tell whether a layer is finished, and nothing of it can have been lost in a power cut."""
    folder = path(place, key)
    return _is_whole(folder, _told(folder))


def _is_whole(folder: Path, told: Mapping[str, Any]) -> bool:
    """The same of a layer's folder and its record."""
    known = told.keys() >= {"bytes", "entries", "digest", "boot"}
    return known and ((folder / "synced").exists() or told["boot"] == (boot() or None))


def _told(folder: Path) -> dict[str, Any]:
    """A layer's record; empty when there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((folder / "layer.json").read_text(encoding="utf-8"))
        return told if isinstance(told, dict) else {}
    return {}


def commit(place: BuildPaths, key: str, told: Mapping[str, Any]) -> None:
    """Give a part its name as a layer, with its record, and have it brought to the disk meanwhile."""
    folder, final = part(place, key), path(place, key)
    (seen,) = _look(place, [folder / "tree"])
    if fault := seen.get("error"):
        raise Failure(f"the new layer cannot be read: {fault}", "run it again")
    record = {**told, **seen, "key": key, "made": int(time.time()), "boot": boot()}
    (folder / "layer.json").write_text(json.dumps(record), encoding="utf-8")
    if os.path.lexists(final):
        drop(place, final)
    folder.rename(final)
    _sound.add(final)
    settle(place, key)


def settle(place: BuildPaths, key: str) -> None:
    """Bring a layer to the disk without waiting for it, then list what it holds; nothing if that was done.

    What is cut off is done when the layer is used next. To be called from the main thread (process.tied).
    """
    folder = path(place, key)
    if (folder / "content").exists() or folder in _settling:
        return
    names = [str(folder / name) for name in ("tree", "content", "synced")]
    quiet = subprocess.DEVNULL  # what it inherited is the client's pipe
    child = process.start(["nice", *_reader(place, "keep", *names)], stdout=quiet, stderr=quiet)
    if boot():
        _settling[folder] = child
    else:
        process.finish(child)


_sound: set[Path] = set()
"""Layers that this process has made or looked at; while it holds LOCATION nobody changes them."""
_settling: dict[Path, subprocess.Popen[Any]] = {}
"""What brings layers to the disk, by their folders."""


def _reader(place: BuildPaths, *arguments: str) -> list[str]:
    program = str(Path(__file__).with_name("content.py"))
    return [*sandbox.as_owner(place), sys.executable, "-I", "-B", "-S", program, *arguments]


def _look(place: BuildPaths, trees: Iterable[Path]) -> list[dict[str, Any]]:
    done = process.run(_reader(place, "look", *map(str, trees)), deadline=None)
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(place: BuildPaths, keys: Iterable[str]) -> dict[str, str]:
    """Say what is wrong with layers that are about to be mounted, by key, as far as stat(2) tells."""
    found = {}
    keys = list(dict.fromkeys(keys))
    for key in keys:
        if not has(place, key):
            left = path(place, key).exists()
            found[key] = "it was not on the disk when the machine stopped" if left else "it is not there"
    unknown = [key for key in keys if key not in found and path(place, key) not in _sound]
    seen = _look(place, [path(place, key) / "tree" for key in unknown]) if unknown else []
    for key, now in zip(unknown, seen, strict=True):
        told = record(place, key)
        if "error" in now:
            found[key] = now["error"]
        elif (now["entries"], now["digest"]) != (told["entries"], told["digest"]):
            found[key] = f"{told['entries']} entries were recorded, {now['entries']} are there"
            if now["entries"] == told["entries"]:
                found[key] = "entries of it were changed"
        else:
            _sound.add(path(place, key))
    return found


def vouch(place: BuildPaths, keys: Iterable[str]) -> None:
    """Raise Failure when a layer that is about to be mounted is not what was recorded.

    It is a layer no more then, unless another process holds LOCATION.
    """
    for key, fault in faults(place, keys).items():
        if place.location in _held:
            drop(place, path(place, key))
        raise Failure(f"layer {key} cannot be used: {fault}", "run: inv build")


def changed(place: BuildPaths, key: str) -> list[str] | None:
    """Read a layer in full: names that are not as they were; None when they were never listed."""
    folder = path(place, key)
    if not (folder / "content").exists():
        return None
    done = process.run(
        _reader(place, "compare", str(folder / "tree"), str(folder / "content")), deadline=None
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def drop(place: BuildPaths, *paths: Path) -> None:
    """Remove what stands under final names: first all lose them, on the disk as well, then they go."""
    aside = []
    for found in paths:
        if not os.path.lexists(found):
            continue
        if found.name.startswith("."):  # a part: nobody takes it for finished
            aside.append(found)
            continue
        if child := _settling.pop(found, None):  # it would vouch for what gets this name next
            process.stop(child)
        aside.append(found.with_name(f".{found.name}.{secrets.token_hex(4)}.part"))
        found.rename(aside[-1])
        _sound.discard(found)
    for folder in {one.parent for one in aside}:
        files.sync(folder)
    sandbox.remove(place, *aside)


SCRATCH = (".run-*", ".probe-*", ".shell-*", ".repro-*", "resolutions/.solve-*", "logs/.*-*")
"""Folders below LOCATION that `files.scratch` makes."""
YOUNG = 60.0
"""Seconds in which a folder's maker may not have come to lock it."""


_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.part")
"""Names that `drop` gives."""


def sweep(place: BuildPaths) -> None:
    """Remove folders of work whose process is gone, and what lost its name and was not removed in time."""
    if not is_locked(place.location):
        aside = [*place.location.glob(".*.part"), *place.store.glob(".*.part")]
        sandbox.remove(place, *(path for path in aside if _ASIDE.fullmatch(path.name)))
    for found in (path for pattern in SCRATCH for path in place.location.glob(pattern)):
        with contextlib.suppress(OSError):
            status = found.lstat()
            old = stat.S_ISDIR(status.st_mode) and time.time() - status.st_mtime > YOUNG
            if old and not files.is_held(found):
                sandbox.remove(place, found)


def use(place: BuildPaths, key: str) -> None:
    """Mark a layer as just used, by its record's time; those not used for longest go first (`inv clean`)."""
    with contextlib.suppress(OSError):
        os.utime(path(place, key) / "layer.json")


def record(place: BuildPaths, key: str) -> dict[str, Any]:
    """What went into a layer; raises Failure if it is gone."""
    if told := _told(path(place, key)):
        return told
    raise Failure(f"layer {key} is not in the cache", "run: inv build")


def view(place: BuildPaths, chain: Sequence[str]) -> Tree:
    """The finished tree of a chain of keys (lowest first), read-only."""
    if not place.overlay:
        return Tree(lower=(path(place, chain[-1]) / "tree",))
    return Tree(lower=tuple(path(place, key) / "tree" for key in reversed(chain)))


def every(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Finished layers in a store with their records, the least recently used first."""
    return ((path, told) for path, told in records(folder) if _is_whole(path, told))


def records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Whatever in a store has a record, be it fit for use or not."""
    for entry in sorted(folder.glob("*/layer.json"), key=lambda file: file.stat().st_mtime_ns):
        if told := _told(entry.parent):
            yield entry.parent, told


def parts(folder: Path) -> list[Path]:
    """Leftovers in a store: of steps and removals that were cut off, and layers that a power cut has hit."""
    named = (path for path in folder.glob("*") if not path.name.startswith("."))
    broken = (path for path in named if not _is_whole(path, _told(path)))
    return sorted([*folder.glob(".*.part"), *broken])
