"""Verb: prove the host: open the sandbox, mount a tree at MOUNTPOINT in it, say what is there, leave."""

from __future__ import annotations

from build import wire
from build.agent import files, sandbox, store
from build.agent.events import Emit, Failure
from build.agent.sandbox import BuildPaths, Tree

PROBE = r"""
tell() { printf 'note\t%s\n' "$*" >&3; }
tell "$(findmnt --noheadings --output TARGET,FSTYPE,OPTIONS --mountpoint "$ROOT")"
"""


def run(request: wire.Mount, emit: Emit) -> wire.Mounted:
    """Mount, look, leave; raises Failure when it cannot be mounted."""
    place = BuildPaths.of(request.place)
    place.store.mkdir(parents=True, exist_ok=True)
    store.vouch(place, request.chain)
    with files.scratch(place.location, ".probe-") as folder:
        tree = store.view(place, request.chain) if request.chain else Tree(upper=folder)
        log = place.location / "logs" / "mount.log"
        outcome = sandbox.run(
            place,
            tree,
            PROBE,
            part=folder,
            variables={},
            log=log,
            emit=lambda *_args, **_fields: None,
            label="mount",
        )
    if outcome.status or not outcome.notes:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [
            "no reason given"
        ]
        raise Failure(
            f"cannot mount a tree at {place.mountpoint}: {tail[0]}", "run: inv doctor", log=str(log)
        )
    return wire.Mounted(" ".join(outcome.notes[0].split())[:160])
