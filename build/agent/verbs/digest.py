"""Verb: digest secrets under LOCATION's own, which `location` has made."""

from __future__ import annotations

from pathlib import Path

from build import wire
from build.agent import secret
from build.agent.events import Emit, Failure


def run(request: wire.Digest, emit: Emit) -> dict[str, str]:
    """Digest each; raises Failure when somebody took LOCATION's secret away meanwhile."""
    key = secret.key(Path(request.location), create=False)
    if not key:
        raise Failure(f"{request.location}/secret went away", "run it again")
    return {name: secret.digest(key, value) for name, value in request.secrets.items()}
