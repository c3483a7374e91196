"""Verb: assemble the raw disk image from a finished tree, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from build import wire
from build.agent import files, pace, sandbox, store
from build.agent.events import Emit
from build.agent.sandbox import BuildPaths
from build.agent.verbs import layer


def run(request: wire.Assemble, emit: Emit) -> wire.Disk:
    """Write it; it gets its name after its data is on disk."""
    place = BuildPaths.of(request.place)
    image = Path(request.image)
    store.lock(place.location, emit, request.what)
    if known := finished(image, request.key):
        return wire.Disk("cached", 0.0, str(image), known, mode=_mode(image, request))
    with pace.work(place.location, "disk", emit) as follow:
        return _assemble(place, image, request, follow)


def _assemble(place: BuildPaths, image: Path, request: wire.Assemble, emit: Emit) -> wire.Disk:
    started = time.monotonic()
    store.vouch(place, request.chain)
    image.parent.mkdir(parents=True, exist_ok=True)
    part = image.parent / f".{image.name}.part"
    sandbox.remove(place, part)
    for name in ("files", "scratch"):
        (part / name).mkdir(parents=True)
    layer.write_files(part / "files", request.files)
    out = part / image.name
    if request.private:  # the script writes into what is there
        open(out, "xb", opener=files.opener(private=True)).close()
    log = place.location / "logs" / "disk.log"
    variables = layer.variables(part, request.epoch, {"OUT": str(out), "SEED": request.seed})
    outcome = sandbox.run(
        place,
        store.view(place, request.chain),
        request.script,
        part=part,
        variables=variables,
        log=log,
        emit=emit,
        label="disk",
    )
    layer.check(place, part, outcome, "disk", log, request.script)
    told = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    manifest = {
        **request.manifest,
        "disk": told,
        "key": request.key,
        "seconds": round(time.monotonic() - started, 3),
    }
    _publish(out, image, manifest)
    sandbox.remove(place, part)
    seconds, notes = time.monotonic() - started, tuple(outcome.notes)
    return wire.Disk("built", seconds, str(image), manifest, notes, _mode(image, request))


def _mode(image: Path, request: wire.Assemble) -> str:
    return f"{stat.S_IMODE(image.stat().st_mode):04o}" if request.private else ""


def finished(image: Path, key: str) -> dict[str, Any] | None:
    """The manifest of an image that holds this key and was not touched since."""
    try:
        manifest: dict[str, Any] = json.loads(manifest_path(image).read_text(encoding="utf-8"))
        now = image.stat()
    except (OSError, ValueError):
        return None
    same = manifest.get("key") == key and manifest.get("file") == _identity(now)
    return manifest if same else None


def manifest_path(image: Path) -> Path:
    """The JSON manifest beside an image."""
    return image.with_name(f"{image.name}.json")


def _identity(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _publish(out: Path, image: Path, manifest: dict[str, Any]) -> None:
    """Bring each file to the disk and give it its name; the manifest, which vouches for all, comes last."""
    manifest["file"] = _identity(out.stat())
    sums = image.with_name(f"{image.name}.sha256")
    for stale in (manifest_path(image), sums):
        stale.unlink(missing_ok=True)
    files.sync(image.parent)  # a power cut must not bring them back beside what they do not speak of
    files.publish(out, image)
    files.write(sums, f"{manifest['disk']['sha256']}  {image.name}\n".encode())
    files.write(manifest_path(image), (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
    shutil.rmtree(out.parent, ignore_errors=True)
