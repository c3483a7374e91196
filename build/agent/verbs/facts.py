"""Verb: what host this is."""

from __future__ import annotations

from typing import Any

from build import wire
from build.agent import facts
from build.agent.events import Emit


def run(request: wire.Facts, emit: Emit) -> dict[str, Any]:
    """Gather them."""
    return facts.gather()
