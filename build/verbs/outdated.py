"""Whether a lock or an image is behind the security updates of its suite, for cron."""

from __future__ import annotations

import time
from pathlib import Path

from build import wire
from build.engine import lockfile
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.verbs.convert import disk_number

BEHIND = 10
"""Exit status when there are updates."""


def outdated(build: Build, file: str, disk: str, json: bool) -> int:
    """Print the updates that are missing; returns the exit status."""
    held = None
    if not file or file.endswith(".lock"):
        path = Path(file) if file else build.lock_file
        held = lockfile.read(path)
        if held is None:
            raise BuildError(f"there is no lock {path}", "make one: inv lock; or name an image file")
    settings = build.settings
    request = wire.Outdated(
        mirrors=build.mirrors(build.site, held.suite if held else settings.suite),
        arch=held.arch if held else settings.arch,
        components=held.components if held else tuple(settings.components),
        packages=held.records() if held else (),
        debs=build.debs,
        file="" if held else file if build.host.remote else str(Path(file).resolve()),
        disk=disk_number(disk),
    )
    found = build.host.ask(request, build.follow)
    name = held.title if held else file
    if json:
        build.console.json(file=file or str(build.lock_file), behind=bool(found.updates), **wire.dump(found))
    else:
        _show(build, name, found)
    return BEHIND if found.updates else 0


def _show(build: Build, name: str, found: wire.Behind) -> None:
    build.console.done()
    if found.updates:
        build.console.table(
            ("PACKAGE", "OLD", "NEW", "CVE"),
            [(row.package, row.old, row.new, ", ".join(row.cves) or "-") for row in found.updates],
        )
    dated = time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(found.date))
    build.console.line(
        f"{name}: {len(found.updates) or 'none'} of {found.packages} packages "
        f"{'have' if len(found.updates) != 1 else 'has'} an update in {found.suite} of {dated}"
    )
