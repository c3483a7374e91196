"""Verb: show a finished tree on the host itself, or take it away again: the one mount that stays."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from build import wire
from build.agent import process, store
from build.agent.events import Emit, Failure
from build.agent.sandbox import BuildPaths


def run(request: wire.Keep, emit: Emit) -> wire.Kept:
    """Mount the chain read-only at MOUNTPOINT in the host's own namespace (`action` mount), or umount."""
    place = BuildPaths.of(request.place)
    if place.mode != "root":
        raise Failure("only root can show the tree on the host", "look inside with: inv shell")
    target = str(place.mountpoint)
    if request.action == "umount":
        if target not in kept(place.location):
            raise Failure(f"nothing of ours is mounted at {target}", "run: inv mount --keep")
        process.run(["umount", target])
        _, *made = _marker(place).read_text(encoding="utf-8").splitlines()
        with contextlib.suppress(OSError):  # somebody else uses them now
            for folder in made:
                Path(folder).rmdir()
        _marker(place).unlink(missing_ok=True)
        return wire.Kept(target)
    if os.path.ismount(target):
        raise Failure(f"{target} is in use already", "run: inv umount")
    missing = [folder for folder in (place.mountpoint, *place.mountpoint.parents) if not folder.exists()]
    place.mountpoint.mkdir(parents=True, exist_ok=True)
    env = {"ROOT": target}
    store.vouch(place, request.chain)
    _marker(place).write_text("\n".join([target, *map(str, missing)]) + "\n", encoding="utf-8")
    process.run(["bash", "-euc", "\n".join(store.view(place, request.chain).mount(place))], env=env)
    return wire.Kept(target)


def _marker(place: BuildPaths) -> Path:
    return place.location / "kept-mount"


def kept(location: Path) -> list[str]:
    """Mount points on the host that `inv mount --keep` made for this location and that still stand."""
    marker = location / "kept-mount"
    if not marker.exists():
        return []
    target = marker.read_text(encoding="utf-8").splitlines()[0]
    return [target] if os.path.ismount(target) else []
