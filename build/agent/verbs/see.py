"""Verb: what the archives of a locked set say of themselves today. The set itself needs none of it."""

from __future__ import annotations

from build import wire
from build.agent.debian import archives, web
from build.agent.events import Emit, Failure


def run(request: wire.See, emit: Emit) -> wire.Seen:
    """Return where the suites lie and the dates of their Release files; why not, when they cannot be had."""
    mirrors = request.mirrors
    default = archives.image_mirror(mirrors)
    main, guards = archives.mirror_of(mirrors), archives.security_places(mirrors)
    places = {mirrors.suite: main, f"{mirrors.suite}-updates": main}
    places |= {f"{mirrors.suite}-security": guard for guard in guards[:1]}
    if request.offline:
        return wire.Seen(places, {}, default, "nobody was asked")
    try:
        found = archives.find(mirrors, emit)
    except Failure as failure:
        return wire.Seen(places, {}, default, failure.message)
    finally:
        web.hang_up()
    places |= {archive.suite: archive.mirror for archive in found}
    return wire.Seen(places, {archive.suite: archive.release.date for archive in found}, default)
