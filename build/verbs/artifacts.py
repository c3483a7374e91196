"""Files that a build made: where they lie there, and how they come home."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build import wire
from build.engine import fetch
from build.engine.hosts.host import CHECKOUT
from build.engine.pipeline import Build

FACTS = ("format", "state", "size", "allocated", "virtual_size", "md5", "sha256", "sha512")
"""What is told of a converted file, beside where it lies."""


def manifest(path: str) -> str:
    """Where the manifest of an image or of a converted file lies."""
    return f"{path}.json"


def need_image(build: Build) -> dict[str, Any]:
    """Return the manifest of the raw image there; fails where there is none."""
    return build.host.ask(wire.Manifest(build.prospect.image))


def files(result: Any) -> list[str]:
    """Paths of the files of an order's result that people take away."""
    match result:
        case wire.Converted(files=files, folder=folder):
            return [f"{folder}/{file['file']}" for file in files]
        case wire.Disk(image=image):
            return [image]
    return []


def texts(result: Any) -> dict[str, str]:
    """Texts that an order wrote beside its files, by path."""
    if not isinstance(result, wire.Converted):
        return {}
    return {f"{result.folder}/{name}": text for name, text in result.beside.items()}


def home(build: Build) -> Path:
    """Where this host's files belong here: dist/ or the folder of --to; of several hosts each has its own."""
    folder = Path(build.flags.to) if build.flags.to else CHECKOUT / "dist"
    return (
        folder / re.sub(r"[^A-Za-z0-9._@-]", "_", build.host.name) if len(build.flags.hosts) > 1 else folder
    )


def bring_home(build: Build, *results: Any) -> dict[str, str]:
    """Fetch what orders on a remote host made, unless it is here already, and what belongs beside it.

    Returns where each file lies here, by its path there; nothing of files that stay there (--no-fetch).
    """
    paths = [path for result in results for path in files(result)]
    beside = {path: text for result in results for path, text in texts(result).items()}
    if not build.host.remote:
        return {path: path for path in (*paths, *beside)}
    if not paths:
        return {}
    if build.flags.no_fetch:
        for path in (*paths, *beside):
            build.console.line(f"left there: {path}")
        return {}
    folder = home(build)
    for artifact in build.host.ask(wire.Send(tuple(paths))):
        started = time.monotonic()
        here = fetch.is_here(artifact, folder)
        if not here:
            label = f"fetch {fetch.name(artifact)}"
            fetch.fetch(
                build.host, artifact, folder, lambda *told, label=label: build.console.progress(label, *told)
            )
        state = "cached" if here else "fetched"
        build.console.step(state, "fetch", time.monotonic() - started, str(folder / fetch.name(artifact)))
    for path, text in beside.items():
        fetch.put(folder / os.path.basename(path), text)
    return {path: os.path.abspath(folder / os.path.basename(path)) for path in (*paths, *beside)}


def converted(made: wire.Converted, here: Mapping[str, str]) -> dict[str, Any]:
    """What `--json` tells of a conversion; `here` as `bring_home` returns it."""
    rows = []
    for file in made.files:
        path = f"{made.folder}/{file['file']}"
        row = {"path": path, "here": here.get(path), "manifest": manifest(path)}
        took = 0.0 if file["state"] == "cached" else file["seconds"]
        rows.append({**row, **{name: file[name] for name in FACTS}, "seconds": took})
    beside = [{"path": path, "here": here.get(path)} for path in texts(made)]
    return {"artifacts": rows, "beside": beside}
