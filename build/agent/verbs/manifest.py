"""Verb: what lies at an image's path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from build import wire
from build.agent.events import Emit, Failure
from build.agent.verbs import disk


def run(request: wire.Manifest, emit: Emit) -> dict[str, Any]:
    """Read it; raises Failure if there is no image."""
    image = Path(request.image)
    if not image.is_file():
        raise Failure(f"there is no image at {image}", "run: inv build")
    try:
        manifest: dict[str, Any] = json.loads(disk.manifest_path(image).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest
