"""Verb: what went into the stored layers of a step."""

from __future__ import annotations

from typing import Any

from build.agent import store
from build.agent.events import Emit
from build.agent.sandbox import Place


def run(request: dict[str, Any], emit: Emit) -> list[dict[str, Any]]:
    """Give the records of every stored layer of `step`, the most recently used last."""
    place = Place.from_request(request["place"])
    return [told for _, told in store.every(place.store) if told.get("step") == request["step"]]
