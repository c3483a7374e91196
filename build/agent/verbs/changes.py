"""Verb: what updates bring, read from the changelogs in the packages themselves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from build import wire
from build.agent import deb
from build.agent.debian import web
from build.agent.events import Emit
from build.agent.verbs import fetch

WORKERS = 4


def run(request: wire.Changes, emit: Emit) -> tuple[wire.News, ...]:
    """Return one News for each source package; raises Failure for a package that cannot be fetched."""
    sources: dict[str, list[wire.Update]] = {}
    for update in sorted(request.updates, key=lambda update: str(update.package["source"])):
        sources.setdefault(update.package["source"], []).append(update)
    emit("work", name="changelogs", last=None)
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            return tuple(pool.map(partial(_news, request), sources, sources.values()))
    finally:
        web.hang_up()


def _news(request: wire.Changes, source: str, updates: list[wire.Update]) -> wire.News:
    """Read the changelog in the smallest package that has it; some point to another package's."""
    for update in sorted(updates, key=lambda update: int(update.package["size"])):
        path = Path(request.debs) / fetch.filename(update.package)
        if not update.old or (request.offline and not fetch.is_whole(path, update.package)):
            continue
        if not request.offline:
            fetch.one(update.package, Path(request.debs), request.apt_proxy)
        if text := deb.changelog(path, update.package["name"]):
            found = deb.between(text, update.old)
            lines = tuple(f"{entry.version}: {line}" for entry in found for line in entry.lines)
            return wire.News(source, deb.urgency(found), tuple(deb.cves(found)), lines)
    return wire.News(source, "", (), ())
