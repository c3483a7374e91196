"""The files that a CloudStack management server wants beside its templates: sums and metadata.ini, as texts.

They name what lies in the folder now, was made from this very disk and was not touched since, as its manifest
tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SUMS = {"md5sum.txt": "md5", "sha512sum.txt": "sha512"}
METADATA = "metadata.ini"


def texts(folder: Path, spec: Mapping[str, Any], source: Mapping[str, int]) -> dict[str, str]:
    """What each file has to say.

    `spec`: version, checksum (`md5` or `sha512`), every_section, and `sections` with section, format, file
    and keys, as `build.engine.cloudstack.metadata` makes them. `source` is the disk, as manifests have it.
    """
    made = {row["file"]: _artifact(folder, row["file"], row["format"], source) for row in spec["sections"]}
    blocks = [f"[default]\nversion = {spec['version']}\n"]
    for row in spec["sections"]:
        artifact = made[row["file"]]
        if artifact or spec["every_section"]:
            keys = {**row["keys"], "checksum": artifact.get(spec["checksum"], "")}
            lines = "".join(f"{key} = {value}\n" for key, value in keys.items())
            blocks.append(f"[{row['section']}]\n{lines}")
    there = sorted(file for file, artifact in made.items() if artifact)
    sums = {name: "".join(f"{made[file][kind]}  {file}\n" for file in there) for name, kind in SUMS.items()}
    return {**sums, METADATA: "\n".join(blocks)}


def naming(folder: Path, files: Iterable[str]) -> list[Path]:
    """Those of the files in `folder` that name one of `files`."""
    names = list(files)
    found = []
    for path in (folder / name for name in (*SUMS, METADATA)):
        try:
            words = path.read_text(encoding="utf-8", errors="replace").split()
        except OSError:
            continue
        if any(name in words for name in names):
            found.append(path)
    return found


def _artifact(folder: Path, file: str, name: str, source: Mapping[str, int]) -> dict[str, str]:
    """What the manifest of a file tells of it; empty unless it is this format, of this disk and untouched."""
    try:
        manifest = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
        now = (folder / file).stat()
        stamp = {"size": now.st_size, "mtime_ns": now.st_mtime_ns}
        artifact: dict[str, str] = manifest["artifact"]
        same = (manifest["source"], manifest["stamp"], artifact["format"]) == (source, stamp, name)
        return artifact if same and all(artifact[kind] for kind in SUMS.values()) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
