"""Verb: take away what is left over, what no plan reaches, or everything."""

from __future__ import annotations

from pathlib import Path

from build import wire
from build.agent import sandbox, store
from build.agent.events import Emit, Failure
from build.agent.sandbox import BuildPaths
from build.agent.verbs import keep


def run(request: wire.Clean, emit: Emit) -> wire.Cleaned:
    """Remove per `what`: `parts`, `cache` (layers not in `reach`), `all`, or `limit` (see `bytes`).

    `limit` drops the layers that were not used for longest, `reach` excepted, until what stays is within
    `bytes`. Answers `removed`: rows of path and bytes. `dry_run` only lists.
    """
    given = BuildPaths.of(request.place)
    if not given.location.is_dir():
        return wire.Cleaned(())
    if not request.dry_run:
        store.lock(given.location, emit, "clean")
    reach = set(request.reach)
    stores = sorted((given.location / "cache").glob("*")) if given.mode == "root" else [given.store]
    doomed: list[Path] = []
    if request.what == "all":
        if kept := keep.kept(given.location):
            raise Failure(f"the tree is still mounted at {kept[0]}", "run: inv umount")
        doomed = [path for path in sorted(given.location.iterdir()) if path.name != "lock"]
    elif request.what == "limit":
        for folder in stores:
            doomed += store.parts(folder) + _beyond(folder, reach, request.bytes)
    else:
        for folder in stores:
            doomed += store.parts(folder)
            if request.what == "cache":
                doomed += [path for path, _ in store.every(folder) if path.name not in reach]
        doomed += _leftovers(given.location, Path(request.image))
    rows = tuple(wire.Removed(str(path), sandbox.disk_usage(given, path)) for path in doomed)
    if not request.dry_run:
        store.drop(given, *doomed)
    return wire.Cleaned(rows)


def _leftovers(location: Path, image: Path) -> list[Path]:
    """Run folders of agents that were killed, half images and half artifacts."""
    patterns = (".run-*", ".probe-*", ".shell-*", ".repro-*", ".*.part")
    found = [path for pattern in patterns for path in location.glob(pattern)]
    if image.parent != location and image.parent.is_dir():
        found.append(image.parent / f".{image.name}.part")
    for folder in ("debs", "logs", "resolutions"):
        found += (location / folder).glob(".*")
    return sorted(path for path in set(found) if path.exists())


def _beyond(folder: Path, reach: set[str], limit: int) -> list[Path]:
    """The least recently used layers outside `reach`, until what stays is within `limit` bytes."""
    layers = list(store.every(folder))
    excess = sum(told["bytes"] for _, told in layers) - limit
    doomed = []
    for path, told in layers:
        if excess <= 0:
            break
        if path.name not in reach:
            doomed.append(path)
            excess -= told["bytes"]
    return doomed
