"""Verb: which converted files lie in a folder, and what their manifests tell."""

from __future__ import annotations

import json
from pathlib import Path

from build import wire
from build.agent.events import Emit


def run(request: wire.Made, emit: Emit) -> tuple[wire.Artifact, ...]:
    """Look at each."""
    return tuple(_row(Path(request.folder), name) for name in request.files)


def _row(folder: Path, name: str) -> wire.Artifact:
    try:
        now = (folder / name).stat()
    except FileNotFoundError:
        return wire.Artifact(name, "missing")
    try:
        manifest = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if manifest["stamp"] != {"size": now.st_size, "mtime_ns": now.st_mtime_ns}:
            return wire.Artifact(name, "changed")
        return wire.Artifact(name, "made", manifest["artifact"])
    except (OSError, ValueError, KeyError, TypeError):
        return wire.Artifact(name, "changed")
