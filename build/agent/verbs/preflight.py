"""Verb: what a build needs from this host, checked within the first second."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from build import wire
from build.agent import memory
from build.agent.debian import packages
from build.agent.events import Emit, Failure

HEADROOM = 1 << 29
"""Bytes that a build needs beyond the tree and the image."""
TREE = 3 << 30
"""Bytes of layers and .debs of a first build of the full package list."""


def run(request: wire.Preflight, emit: Emit) -> wire.Space:
    """Raise Failure for a missing tool, too little memory or space."""
    if missing := sorted({row.package for row in packages.missing("build")}):
        names = " ".join(missing)
        raise Failure(
            f"missing on this host: {names}", f"run: apt-get install --no-install-recommends {names}"
        )
    if (available := memory.available()) < memory.NEEDED:
        raise Failure(
            f"{available >> 20} MiB of memory are free, a build needs about {memory.NEEDED >> 20}",
            "end other programs, raise the limit of this container or control group, "
            "or build elsewhere: inv -H HOST build",
        )
    location = Path(request.location)
    first = not any((location / "cache").glob("*/debootstrap-*")) if (location / "cache").is_dir() else True
    need = HEADROOM + (TREE if first else 0)
    free = shutil.disk_usage(location).free
    if free < need:
        raise Failure(
            f"{location} has {free >> 20} MiB free, a build needs about {need >> 20}",
            "free some space, run `inv clean --cache`, or set SYSTEMVM_LOCATION to a larger disk",
        )
    if not os.access(
        Path(request.image).parent if Path(request.image).parent.exists() else location, os.W_OK
    ):
        raise Failure(
            f"IMAGELOC {request.image} is not writable", "set SYSTEMVM_IMAGELOC to a folder of yours"
        )
    return wire.Space(free)
