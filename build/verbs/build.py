"""The build, from the first check of the host to the image and its formats."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from build import wire
from build.engine.console import size
from build.engine.pipeline import Build, described
from build.verbs import artifacts, convert


def preflight(build: Build) -> None:
    """Check settings, tools, space and privileges before anything else; then resolve, before any download."""
    if build.flags.formats or build.settings.formats:
        wanted = convert.chosen(build.flags.formats, build.settings)
        convert.request(build.loaded, wanted, "", "", 0, build.settings.convert)
        build.host.ensure_compressors("convert")
    build.host.ask(wire.Preflight(build.site.place.location, build.site.image), build.follow)
    resolve(build)


def resolve(build: Build) -> None:
    """Print what the mirror has for us, or how old what we use instead is."""
    started = time.monotonic()
    found = build.resolution
    total = size(sum(package.size for package in found.packages))
    what, state = f"{len(found.packages)} packages, {total}, of {_date(found.epoch)}", "ok"
    if found.origin:
        what, state = f"{what}; {found.origin}", "locked"
    elif build.flags.frozen or build.flags.offline:
        state = "frozen"
        what += f"; frozen, the mirror was asked {_age(time.time() - found.checked)} ago"
    build.console.step(state, "resolve", time.monotonic() - started, build.again(what))


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(seconds))


def _age(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} seconds"


def mount(build: Build, keep: bool) -> None:
    """Prove the sandbox, or show the finished tree on the host."""
    if not keep:
        preflight(build)
        build.mount()
        return
    top = build.ensure("seal")
    shown = build.host.ask(wire.Keep(build.site.place, "mount", tuple(top.chain)))
    build.console.line(
        f"the finished tree is mounted read-only at {shown.mountpoint}; "
        + build.again("take it away with: inv umount")
    )


def umount(build: Build) -> None:
    """Unmount what --keep mounted."""
    shown = build.host.ask(wire.Keep(build.prospect.place, "umount"))
    build.console.line(f"unmounted {shown.mountpoint}")


def build(build: Build, json: bool) -> None:
    """Finish a build: convert to what was asked for and say where it lies."""
    here: dict[str, str] = {}
    converted = None
    if made := build.disk():
        disk = made.manifest["disk"]
        if not json:
            build.console.line(
                f"image {described(made)}  {size(disk['size'])} ({size(disk['allocated'])} on disk)  "
                f"sha256 {disk['sha256'][:16]}"
            )
        here |= artifacts.bring_home(build, made)
    if build.flags.formats or build.settings.formats:
        wanted = convert.chosen(build.flags.formats, build.settings)
        converted = convert.order(build, wanted, build.resolution.epoch)
        here |= artifacts.bring_home(build, converted)
    if json and made:
        build.console.json(**result(build, made, converted, here))


def result(
    build: Build, made: wire.Disk, converted: wire.Converted | None, here: Mapping[str, str]
) -> dict[str, Any]:
    """What `build --json` tells; `here` as `artifacts.bring_home` returns it."""
    keys = {layer.step.name: layer.key for layer in build.layers} | {"disk": made.manifest["key"]}
    disk, found = made.manifest["disk"], build.resolution
    return {
        "image": made.image,
        "here": here.get(made.image),
        "manifest": artifacts.manifest(made.image),
        **{name: disk[name] for name in ("size", "allocated", "sha256")},
        "steps": [
            {"step": name, "key": key, "state": build.ended[name][0], "seconds": build.ended[name][1]}
            for name, key in keys.items()
        ],
        "package_set": {
            "sha256": hashlib.sha256(found.lock().encode()).hexdigest(),
            "packages": len(found.packages),
            "epoch": found.epoch,
            "lock": str(build.lock_file) if build.lock else None,
        },
        **(artifacts.converted(converted, here) if converted else {"artifacts": [], "beside": []}),
    }
