"""Verb: which of these layers are finished here."""

from __future__ import annotations

from build import wire
from build.agent import store
from build.agent.events import Emit
from build.agent.sandbox import BuildPaths


def run(request: wire.Cached, emit: Emit) -> tuple[str, ...]:
    """Look each up."""
    place = BuildPaths.of(request.place)
    found = tuple(key for key in request.keys if store.has(place, key))
    if request.use:
        for key in found:
            store.use(place, key)
    return found
