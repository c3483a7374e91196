"""Verb: what lies at an image's path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from build.agent import disk
from build.agent.events import Emit, Failure


def run(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Give the manifest of `image`, an empty one if it has none; raises Failure if there is no image."""
    image = Path(request["image"])
    if not image.is_file():
        raise Failure(f"there is no image at {image}", "run: inv build")
    try:
        manifest: dict[str, Any] = json.loads(disk.manifest_path(image).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest
