"""Verb: what a build needs from this host, checked within the first second."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from build.agent import packages
from build.agent.events import Emit, Failure

HEADROOM = 1 << 29
"""Bytes that a build needs beyond the tree and the image."""
TREE = 3 << 30
"""Bytes of layers and .debs of a first build of the full package list."""


def run(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Raise Failure for a missing tool or too little space; answers `free` bytes."""
    if missing := sorted({row.package for row in packages.missing("build")}):
        names = " ".join(missing)
        raise Failure(
            f"missing on this host: {names}", f"run: apt-get install --no-install-recommends {names}"
        )
    location = Path(request["location"])
    first = not any((location / "cache").glob("*/debootstrap-*")) if (location / "cache").is_dir() else True
    need = HEADROOM + (TREE if first else 0)
    free = shutil.disk_usage(location).free
    if free < need:
        raise Failure(
            f"{location} has {free >> 20} MiB free, a build needs about {need >> 20}",
            "free some space, run `inv clean --cache`, or set SYSTEMVM_LOCATION to a larger disk",
        )
    if not os.access(
        Path(request["image"]).parent if Path(request["image"]).parent.exists() else location, os.W_OK
    ):
        raise Failure(
            f"IMAGELOC {request['image']} is not writable", "set SYSTEMVM_IMAGELOC to a folder of yours"
        )
    return {"free": free}
