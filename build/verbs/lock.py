"""Locks: make and renew them, fill a store of packages for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from build import wire
from build.engine import lockfile
from build.engine.console import size
from build.engine.errors import BuildError
from build.engine.lockfile import Change, Lock
from build.engine.pipeline import Build
from build.engine.resolution import Package, Resolution

SHOWN = 12
"""Lines of a changelog that are printed for one source package."""


def lock(build: Build, update: bool, names: str, dry_run: bool, json: bool) -> None:
    """Write the lock, or renew it, and show what is new."""
    wanted = [name for name in re.split(r"[,\s]+", names) if name]
    held = _held(build, anew=update and not wanted)
    if wanted and not held:
        raise BuildError(f"there is no {build.lock_file} to be renewed", "run: inv lock")
    if held and not update and _fits(held, build):
        if json:
            build.console.json(
                lock=str(build.lock_file), written=False, packages=len(held.packages), changes=[]
            )
            return
        there = build.again(f"{held.title} is there; to renew it: inv lock --update")
        build.console.step("ok", "lock", 0.0, there)
        return
    if build.flags.offline or (build.flags.frozen and held):
        raise BuildError("a lock is renewed by what a mirror has today", "leave --offline and --frozen out")
    keeps = held if wanted or not update else None
    found = build.renewed(keeps, wanted) if keeps else build.unlocked()
    made = lockfile.of(build.settings, found)
    changes = lockfile.changes(held.packages if held else (), found.packages)
    if held and not changes:
        made = replace(made, epoch=held.epoch)
    rows = _news(build, changes, found) if held else []
    if not dry_run:
        lockfile.write(build.lock_file, made)
    if json:
        build.console.json(
            lock=str(build.lock_file), written=not dry_run, packages=len(made.packages), changes=rows
        )
        return
    _show(build, rows)
    what = "would be" if dry_run else "is"
    changed = f", {len(changes)} of them changed" if held else ""
    build.console.line(f"{build.lock_file} {what} of {len(made.packages)} packages{changed}")


def _held(build: Build, anew: bool) -> Lock | None:
    """The lock that is there; one that cannot be used counts as none where it is written anew."""
    try:
        held = lockfile.read(build.lock_file)
        if held:
            lockfile.check_kind(held, build.settings)
    except BuildError as error:
        if not anew:
            raise
        build.console.note(f"{error.what}: written anew")
        return None
    return held


def _fits(held: Lock, build: Build) -> bool:
    try:
        lockfile.check(held, build.settings)
    except BuildError:
        return False
    return True


def _news(build: Build, changes: Sequence[Change], found: Resolution) -> list[dict[str, object]]:
    """What each change is, with what the changelog of its source package says."""
    after = {(package.name, package.arch): package for package in found.packages}
    updates = tuple(
        wire.Update(change.old, after[change.name, change.arch].__dict__)
        for change in changes
        if change.old and change.new and change.old != change.new
    )
    request = wire.Changes(updates, build.debs, build.settings.apt_proxy)
    news = {each.source: each for each in (build.host.ask(request, build.follow) if updates else ())}
    none = wire.News("", "", (), ())
    return [
        {
            "package": change.name,
            "arch": change.arch,
            "source": change.source,
            "old": change.old,
            "new": change.new,
            "urgency": news.get(change.source, none).urgency,
            "cves": list(news.get(change.source, none).cves),
            "changelog": list(news.get(change.source, none).lines),
        }
        for change in changes
    ]


def _show(build: Build, rows: Sequence[dict[str, object]]) -> None:
    build.console.done()
    if not rows:
        return
    build.console.table(
        ("PACKAGE", "OLD", "NEW", "URGENCY", "CVE"),
        [
            (
                row["package"],
                row["old"] or "-",
                row["new"] or "-",
                row["urgency"] or "-",
                _joined(row["cves"]),
            )
            for row in rows
        ],
    )
    told: set[object] = set()
    for row in rows:
        lines = row["changelog"]
        if isinstance(lines, list) and lines and row["source"] not in told:
            told.add(row["source"])
            build.console.line(f"{row['source']}:")
            for line in lines[:SHOWN]:
                build.console.line(f"  {line}")
            if lines[SHOWN:]:
                build.console.line(f"  and {len(lines) - SHOWN} lines more")


def _joined(names: object) -> str:
    return ", ".join(names) if isinstance(names, list) and names else "-"


def fetch(build: Build, locks: str, check: bool, prune: bool, json: bool) -> None:
    """Bring the packages of one or more locks into the store, or say whether they are there."""
    packages = _named(build, locks)
    records = tuple(dict(package.__dict__) for package in packages)
    if not check and not prune:
        build.order("packages", build.fetch_request(records))
        if not json:
            total = size(sum(package.size for package in packages))
            build.console.line(f"{build.debs} holds {len(packages)} packages, {total}")
            return
    found = build.host.ask(wire.Stock(records, build.debs, prune), build.follow)
    if json:
        build.console.json(store=build.debs, **wire.dump(found))
    else:
        _report(build, found, prune)
    if found.missing or found.damaged:
        raise BuildError(f"{build.debs} does not hold all of them", "run: inv fetch")


def _report(build: Build, found: wire.Stocked, prune: bool) -> None:
    for name in found.missing:
        build.console.line(f"missing  {name}")
    for name in found.damaged:
        build.console.line(f"damaged  {name}")
    verb = "removed" if prune else "not needed:"
    build.console.line(
        f"{found.whole} packages are whole, {len(found.missing)} missing, {len(found.damaged)} damaged; "
        f"{verb} {len(found.others)} others, {size(found.bytes)}"
    )


def _named(build: Build, locks: str) -> tuple[Package, ...]:
    """Packages of these locks (files, set apart by commas), each once; of this image's without any."""
    files = [name for name in locks.split(",") if name]
    if not files:
        return build.resolution.packages
    found: dict[tuple[str, str, str], Package] = {}
    for name in files:
        held = lockfile.read(Path(name))
        if held is None:
            raise BuildError(f"there is no lock {name}", "correct the name, or run: inv lock")
        for package in build.locked(held, build.site, build.flags.offline).packages:
            found[package.name, package.version, package.arch] = package
    return tuple(found.values())
