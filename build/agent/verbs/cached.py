"""Verb: which of these layers are finished here, and fit for what will be done with them."""

from __future__ import annotations

from pathlib import Path

from build import wire
from build.agent import store
from build.agent.events import Emit
from build.agent.sandbox import BuildPaths
from build.agent.verbs import disk


def run(request: wire.Cached, emit: Emit) -> tuple[str, ...]:
    """Look each up; with `use`, and unless all is done already, look into each, and drop those at fault."""
    place = BuildPaths.of(request.place)
    found = tuple(key for key in request.keys if store.has(place, key))
    if not request.use:
        return found
    done = not request.disk or disk.finished(Path(request.image), request.disk)
    if found and not (done and len(found) == len(request.keys)):
        store.lock(place.location, emit, request.what)
        bad = store.faults(place, found)
        for key, fault in bad.items():
            emit("note", text=f"{key} is built again: {fault}")
            store.drop(place, store.path(place, key))
        found = tuple(key for key in found if key not in bad)
    for key in found:
        store.use(place, key)
        store.settle(place, key)
    return found
