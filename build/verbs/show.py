"""Verbs that only look: settings, plan, and why a step is not cached."""

from __future__ import annotations

import json
from typing import Any

from build import wire
from build.engine import pipeline, script
from build.engine.errors import BuildError
from build.engine.pipeline import Build


def config(build: Build) -> None:
    """Print KEY VALUE ORIGIN for every setting; the password only as set or empty."""
    site = build.prospect
    shown = build.settings.shown()
    for key, value in (
        ("location", site.place.location),
        ("mountpoint", site.place.mountpoint),
        ("imageloc", site.image),
    ):
        shown[key] = value
    rows = [(key.upper(), _short(value), build.loaded.origins[key]) for key, value in shown.items()]
    build.console.table(("SETTING", "VALUE", "ORIGIN"), rows)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def plan(build: Build, scripts: bool) -> None:
    """Print the steps with keys and states; with `scripts` the text of each."""
    resolution = build.stored_resolution()
    if resolution is None:
        build.console.line(build.again("not resolved yet: keys are known after `inv resolve` or `inv build`"))
        resolution = pipeline.UNRESOLVED
        present: set[str] = set()
        layers = build.plan(resolution, build.prospect.digests)
    else:
        layers = build.plan(resolution, build.prospect.digests)
        present = build.present(layers, build.prospect)
    if not scripts:
        unknown = resolution is pipeline.UNRESOLVED
        rows = [
            (
                layer.step.name,
                "?" if unknown else layer.key,
                "cached" if layer.key in present else "to build",
                len(layer.step.files),
            )
            for layer in layers
        ]
        build.console.table(("STEP", "KEY", "STATE", "FILES"), rows)
        return
    for layer in layers:
        print(f"# ---- {layer.step.name}: {', '.join(map(repr, layer.step.files)) or 'no files'}")
        print(script.render(layer.step.script))


def why(build: Build, name: str) -> None:
    """Print the inputs of a step that differ from its newest stored layer."""
    resolution = build.stored_resolution()
    if resolution is None:
        raise BuildError("nothing is resolved yet", "run: inv build")
    layer = build.layer(name, build.plan(resolution, build.prospect.digests))
    if build.present([layer], build.prospect):
        build.console.line(f"{name}: cached as {layer.key}; nothing changed")
        return
    stored = build.host.ask(wire.Records(build.prospect.place, name))
    if not stored:
        build.console.line(f"{name}: was never built here")
        return
    build.console.line(f"{name}: {stored[-1]['key']} -> {layer.key}")
    for line in pipeline.why(layer, stored[-1]) or ["a secret, the header or the epoch changed"]:
        build.console.line(f"  {line}")
