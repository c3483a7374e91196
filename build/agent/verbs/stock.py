"""Verb: whether a folder of packages holds what it should, and nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build import wire
from build.agent.events import Emit
from build.agent.verbs import fetch


def run(request: wire.Stock, emit: Emit) -> wire.Stocked:
    """Read every package in full; with `prune`, remove what is damaged or named by nobody."""
    folder = Path(request.debs)
    wanted = {fetch.filename(package): package for package in request.packages}
    there = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    mine = [name for name in there if name in wanted]
    emit("work", name="packages", last=None)
    with ThreadPoolExecutor(fetch.WORKERS) as pool:
        whole = list(pool.map(lambda name: fetch.is_whole(folder / name, wanted[name]), mine))
    damaged = tuple(name for name, right in zip(mine, whole, strict=True) if not right)
    others = tuple(name for name in there if name not in wanted)
    size = sum((folder / name).stat().st_size for name in (*damaged, *others))
    if request.prune:
        for name in (*damaged, *others):
            (folder / name).unlink()
    missing = tuple(sorted(wanted.keys() - set(mine)))
    return wire.Stocked(len(mine) - len(damaged), missing, damaged, others, size)
