"""Verb: which of these layers are finished here."""

from __future__ import annotations

from typing import Any

from build.agent import store
from build.agent.events import Emit
from build.agent.sandbox import Place


def run(request: dict[str, Any], emit: Emit) -> list[str]:
    """Give the keys among `keys` that are in the cache; marks them as just used where `use` is set."""
    place = Place.from_request(request["place"])
    found = [key for key in request["keys"] if store.has(place, key)]
    if request.get("use"):
        for key in found:
            store.use(place, key)
    return found
