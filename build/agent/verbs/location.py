"""Verb: settle where and how this host builds, before anything is planned.

Defaults that depend on the host (who we are, his data directory, whether overlayfs works) are decided here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from build import wire
from build.agent import facts, process, sandbox, secret, store
from build.agent.events import Emit, Failure


def run(request: wire.Location, emit: Emit) -> wire.Located:
    """Settle it; with `create` the location is made and proved (writable, privileges, overlay)."""
    known = facts.gather()
    root = known["uid"] == 0
    location = Path(request.location or (store.ROOT_LOCATION if root else f"{known['data_dir']}/systemvm"))
    mountpoint = Path(request.mountpoint or f"/mnt/{request.imagename}")
    image = Path(request.imageloc or location / f"{request.imagename}.img")
    mode = "root" if root else "user"
    visible = (*request.keep_visible, str(image.parent))
    place = wire.BuildPaths(str(location), str(mountpoint), mode, True, visible)
    if request.create:
        _make(location)
        store.sweep(sandbox.BuildPaths.of(place))
        if refusal := _refusal(mode, known):
            raise refusal
        place = replace(place, overlay=sandbox.overlay_works(location, mode))
        sandbox.mountpoint_lines(sandbox.BuildPaths.of(place))
        if not place.overlay:
            emit("note", text=f"overlayfs does not work on {location}: every layer is a full copy")
    elif location.is_dir() and os.access(location, os.W_OK) and not _refusal(mode, known):
        # Where nothing can be tried, a look at the layers assumes what most hosts can do.
        place = replace(place, overlay=sandbox.overlay_works(location, mode))
    key = secret.key(location, request.create) if request.salted else b""
    return wire.Located(place, str(image), secret.salt(key, request.imagename) if key else "")


PRIVATE = ("cache", "logs", "jobs")
"""Folders of LOCATION for our eyes only: a layer holds setuid programs, of old versions, too."""


def _make(location: Path) -> None:
    try:
        if not location.is_dir():
            _safe(location)
            location.mkdir(parents=True)
            location.chmod(0o755)  # whoever waits for it may read who holds it, whatever our umask
        _safe(location)
        for name in PRIVATE:
            folder = location / name
            folder.mkdir(mode=0o700, exist_ok=True)
            if stat.S_IMODE(folder.stat().st_mode) != 0o700:
                folder.chmod(0o700)
        tempfile.TemporaryFile(dir=location).close()
    except OSError as error:
        raise Failure(
            f"LOCATION {location} is not writable: {error.strerror}",
            "set SYSTEMVM_LOCATION to a folder of yours, or give it to you",
        ) from error


def _safe(location: Path) -> None:
    """Refuse a LOCATION whose content another user could put links into, or swap.

    It is ours, and everything above it root's or ours, with no way for others to rename what we use.
    """
    real = Path(os.path.realpath(location))
    for path in dict.fromkeys((location, real, *location.parents, *real.parents)):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            itself = path in (location, real)
            if status.st_uid not in ((os.geteuid(),) if itself else (os.geteuid(), 0)):
                raise Failure(
                    f"LOCATION {location}: {path} belongs to {facts.name_of(status.st_uid)}",
                    "set SYSTEMVM_LOCATION to a folder of yours, below folders of root's or yours",
                )
            if _is_open(status) and (itself or not status.st_mode & stat.S_ISVTX):
                raise Failure(
                    f"LOCATION {location}: others may write to {path}",
                    f"run: chmod go-w {shlex.quote(str(path))}, or set SYSTEMVM_LOCATION to another folder",
                )


def _is_open(status: os.stat_result) -> bool:
    """Whether others may rename what lies in a folder."""
    group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
    return stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_IWOTH or group)


def _refusal(mode: str, known: dict[str, Any]) -> Failure | None:
    """Open the namespaces once, the only way to know that they open; return why they do not."""
    user = known["user"]
    if not shutil.which("unshare", path=process.PATH):
        return Failure("unshare is missing", "install util-linux")
    if mode == "user" and not known["uidmap"]:
        return Failure(
            "newuidmap is missing, without which an ordinary user cannot build", "run: inv doctor --install"
        )
    done = process.run([*sandbox.namespaces(mode), "true"], check=False)
    if done.returncode == 0:
        return None
    if mode == "user" and not known["subids"]:
        return Failure(
            f"{user} has no sub-id range to build as an ordinary user",
            f"run: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
        )
    reason = done.stderr.strip().splitlines()[-1:] or ["unshare failed"]
    return Failure(f"this host does not let {user} open namespaces: {reason[0]}", "run: inv doctor")
