"""Remove what builds left."""

from __future__ import annotations

from build import wire
from build.engine.console import size
from build.engine.pipeline import Build


def clean(build: Build, what: str, dry_run: bool, json: bool) -> None:
    """Remove and say what."""
    reach: tuple[str, ...] = ()
    if what == "cache" and (resolution := build.stored_resolution()):
        reach = tuple(layer.key for layer in build.plan(resolution, build.digests(build.prospect)))
    request = wire.Clean(build.prospect.place, build.prospect.image, what, reach, dry_run=dry_run)
    rows = build.host.ask(request, build.follow).removed
    if json:
        build.console.json(dry_run=dry_run, removed=wire.dump(rows))
        return
    for row in rows:
        build.console.line(f"{'would remove' if dry_run else 'removed'} {row.path}  {size(row.bytes)}")
    build.console.line(
        f"{len(rows)} {'item' if len(rows) == 1 else 'items'}, {size(sum(row.bytes for row in rows))}"
    )
