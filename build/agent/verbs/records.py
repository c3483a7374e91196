"""Verb: what went into the stored layers of a step."""

from __future__ import annotations

from typing import Any

from build import wire
from build.agent import store
from build.agent.events import Emit
from build.agent.sandbox import BuildPaths


def run(request: wire.Records, emit: Emit) -> tuple[Any, ...]:
    """Read the record of every stored layer of the step."""
    place = BuildPaths.of(request.place)
    return tuple(told for _, told in store.records(place.store) if told.get("step") == request.step)
