"""Verbs that only look: settings, plan, and why a step is not cached."""

from __future__ import annotations

from json import dumps
from typing import Any

from build import wire
from build.engine import pipeline, script
from build.engine.errors import BuildError
from build.engine.pipeline import Build


def config(build: Build, json: bool) -> None:
    """Print KEY VALUE ORIGIN for every setting; the password only as set or empty."""
    site = build.prospect
    shown = build.settings.shown()
    for key, value in (
        ("location", site.place.location),
        ("mountpoint", site.place.mountpoint),
        ("imageloc", site.image),
    ):
        shown[key] = value
    if json:
        settings = {
            key: {"value": value, "origin": build.loaded.origins[key]} for key, value in shown.items()
        }
        build.console.json(settings=settings)
        return
    rows = [(key.upper(), _short(value), build.loaded.origins[key]) for key, value in shown.items()]
    build.console.table(("SETTING", "VALUE", "ORIGIN"), rows)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def plan(build: Build, scripts: bool, json: bool) -> None:
    """Print the steps with keys and states; with `scripts` the text of each."""
    found = build.stored_resolution()
    layers = build.plan(found or pipeline.UNRESOLVED, build.digests(build.prospect))
    present = build.present(layers, build.prospect) if found else set()
    if found is None:
        hint = "not resolved yet: keys are known after `inv resolve` or `inv build`"
        (build.console.note if json else build.console.line)(build.again(hint))
    if scripts:
        for layer in layers:
            print(f"# ---- {layer.step.name}: {', '.join(map(repr, layer.step.files)) or 'no files'}")
            print(script.render(layer.step.script))
        return
    rows = [
        (
            layer.step.name,
            layer.key if found else "?",
            "cached" if layer.key in present else "to build",
            len(layer.step.files),
        )
        for layer in layers
    ]
    if json:
        steps = [
            {"step": name, "key": key if found else None, "cached": state == "cached", "files": files}
            for name, key, state, files in rows
        ]
        build.console.json(resolved=found is not None, epoch=found.epoch if found else None, steps=steps)
        return
    build.console.table(("STEP", "KEY", "STATE", "FILES"), rows)


def why(build: Build, name: str, json: bool) -> None:
    """Print the inputs of a step that differ from its newest stored layer."""
    resolution = build.stored_resolution()
    if resolution is None:
        raise BuildError("nothing is resolved yet", "run: inv build")
    layer = build.layer(name, build.plan(resolution, build.digests(build.prospect)))
    cached = bool(build.present([layer], build.prospect))
    stored = () if cached else build.host.ask(wire.Records(build.prospect.place, name))
    before = layer.key if cached else stored[-1]["key"] if stored else None
    changes = (
        pipeline.why(layer, stored[-1]) or ["a secret, the header or the epoch changed"] if stored else []
    )
    if json:
        build.console.json(step=name, key=layer.key, cached=cached, built=before, changes=changes)
    elif cached:
        build.console.line(f"{name}: cached as {layer.key}; nothing changed")
    elif before is None:
        build.console.line(f"{name}: was never built here")
    else:
        build.console.line(f"{name}: {before} -> {layer.key}")
        for line in changes:
            build.console.line(f"  {line}")
