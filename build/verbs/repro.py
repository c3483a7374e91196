"""Whether the same inputs give the same bytes: a second build from nothing, with other surroundings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from build import wire
from build.engine import references
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.verbs import convert

OWN = ("location", "mountpoint", "imageloc")
"""Settings that the second build has of its own."""


def repro(build: Build, vary: str, json: bool) -> None:
    """Build, build again elsewhere, compare; raises BuildError when one byte differs."""
    if build.host.remote or build.flags.detach:
        raise BuildError("repro works on the machine that it runs on", "log in there, and run: ./inv repro")
    if build.settings.password.get_secret_value():
        raise BuildError(
            "a password's salt is LOCATION's own: no other build has the same bytes",
            "give password_hash instead",
        )
    wanted = _chosen(vary)
    formats = convert.chosen(build.flags.formats, build.settings)
    made, converted = build.disk(), convert.order(build, formats, build.resolution.epoch)
    if made is None or converted is None:
        raise BuildError("there is nothing to compare", "leave --detach out")
    place = build.site.place
    request = wire.Repro(
        place=place,
        store=f"{place.location}/cache/{place.mode}{'' if place.overlay else '-copy'}",
        image=made.image,
        files=tuple(file["file"] for file in converted.files),
        layers=tuple((layer.step.name, layer.key) for layer in build.layers),
        line=tuple(_line(build, formats)),
        environment={name: text for name, text in os.environ.items() if name.startswith("SYSTEMVM_")},
        vary=wanted,
    )
    found = build.host.ask(request, build.follow)
    build.console.done()
    differing = [row.file for row in found.compared if not row.same]
    if json:
        build.console.json(**wire.dump(found), differing=differing)
    else:
        _show(build, found)
    if differing:
        raise BuildError(
            f"not reproducible: {', '.join(differing)}",
            "see above what differs; docs/reproducible.md lists what was found before",
        )


def _chosen(vary: str) -> tuple[str, ...]:
    names = [name for name in re.split(r"[,\s]+", vary) if name] or list(wire.SURROUNDINGS)
    if unknown := [name for name in names if name not in wire.SURROUNDINGS]:
        raise BuildError(
            f"nobody knows how to vary {unknown[0]}", f"choose of: {', '.join(wire.SURROUNDINGS)}"
        )
    return tuple(names)


def _line(build: Build, formats: Sequence[str]) -> Iterator[str]:
    """Words of the second build's command line; where it builds comes later."""
    yield from ("build", "--offline", "--formats", ",".join(formats))
    yield from ("--image", str(build.definition.resolve()))
    for override in build.flags.overrides:
        if override.partition("=")[0].lower() not in OWN:
            yield from ("--set", override)
    # It may lie in the first LOCATION.
    yield from ("--set", f"keyring={references.literal(build.settings.keyring)}")
    if build.flags.unlocked:
        yield "--unlocked"


def _show(build: Build, found: wire.Reproduced) -> None:
    for name, what in found.varied.items():
        build.console.line(f"varied   {name:<11} {what}")
    for name, why in found.kept.items():
        build.console.line(f"the same {name:<11} {why}")
    for row in found.compared:
        build.console.line(f"{'same' if row.same else 'DIFFERS':<8} {row.file}  {row.sha256[:16]}")
        for line in row.why:
            build.console.line(f"           {line}")
