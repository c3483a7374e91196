"""Verb: read every layer in full, and take those out of use that are not as they were made."""

from __future__ import annotations

from build import wire
from build.agent import store
from build.agent.events import Emit
from build.agent.sandbox import BuildPaths
from build.wire import Check

SHOWN = 3
"""Names that are told of a layer."""


def run(request: wire.Audit, emit: Emit) -> tuple[Check, ...]:
    """Do it under LOCATION's lock; a row for each layer, those at fault with what differs."""
    place = BuildPaths.of(request.place)
    if not place.store.is_dir():
        return ()
    store.lock(place.location, emit, "doctor")
    layers = [path.name for path, _ in store.every(place.store)]
    broken = [path for path in store.parts(place.store) if not path.name.startswith(".")]
    rows = [Check(path.name, False, "not whole", "inv clean") for path in broken]
    for done, key in enumerate(layers):
        emit("progress", label="layers", done=done, total=len(layers))
        rows.append(_row(place, key))
    store.drop(place, *(store.path(place, row.name) for row in rows if not row.ok))
    return tuple(rows)


def _row(place: BuildPaths, key: str) -> Check:
    fix = "inv build"  # which makes it again
    if fault := store.faults(place, [key]).get(key):
        return Check(key, False, f"taken out of use: {fault}", fix)
    differ = store.changed(place, key)
    if differ is None:
        return Check(key, True, "whole by its record; what its files hold was not listed yet")
    if differ:
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        return Check(key, False, f"taken out of use: changed: {', '.join(differ[:SHOWN])}{more}", fix)
    return Check(key, True, "as it was made")
