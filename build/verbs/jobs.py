"""Builds that were left to their host."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from build import wire
from build.engine.console import clock
from build.engine.errors import BuildError
from build.engine.hosts.session import explain
from build.engine.pipeline import Build
from build.verbs import artifacts


def status(build: Build, json: bool) -> None:
    """Print how the build is that was left to the host, and who holds LOCATION."""
    told = build.host.ask(wire.Job(build.prospect.place, "status"))
    if json:
        fields = ("state", "what", "user", "since", "until", "step", "lock", "work")
        location = build.prospect.place.location
        build.console.json(location=location, **{name: told.get(name) or None for name in fields})
        return
    if told["state"] == "none":
        build.console.line("no build was left to this host")
    elif told["state"] == "hidden":
        build.console.line("what was left to this host is for the owner of LOCATION to see")
    else:
        end = told.get("until") or time.time()
        lasted = f"{int(end - told['since'])} s"
        step = f" at {told['step']}" if told["state"] != "finished" and "step" in told else ""
        build.console.line(f"{told['state']}{step} after {lasted}: {told['what']}, by {told['user']}")
    if told["lock"]:
        build.console.line(f"{build.prospect.place.location} is held by {told['lock']}")
    if work := told.get("work"):
        build.console.line(describe(work, time.time()))


def describe(work: Mapping[str, Any], now: float) -> str:
    """Say what is being done there, how far it is, and how long it took last time."""
    label = work.get("label", work["name"])
    what = work["name"] if label == work["name"] else f"{work['name']}: {label}"
    share = f" {100 * work['done'] // work['total']}%" if work.get("total") else ""
    last = f" ({clock(work['last'])} last time)" if work.get("last") else ""
    return f"{what}{share}, {clock(now - work['since'])} so far{last}"


def attach(build: Build) -> None:
    """Show what a build without us does until it ends, then bring home what it made; fails as it fails."""

    def show(event: dict[str, Any]) -> None:
        told = event.get("told", event)
        if told["event"] == "result":
            build.show(told["name"], result(told))
        else:
            build.follow(told)

    try:
        told = build.host.ask(wire.Job(build.prospect.place, "follow"), show)
    except KeyboardInterrupt:
        raise BuildError("no longer attached", "the build goes on; come back with: inv attach", 130) from None
    build.console.done()
    if failure := told.get("failure"):
        raise explain(failure, build.host.debug)
    if told["state"] != "finished":
        raise BuildError(f"the build was {told['state']}", "run: inv build; finished layers are kept")
    artifacts.bring_home(build, *map(result, told["results"]))


def result(told: Mapping[str, Any]) -> Any:
    """Make of what a build has told the result of an order; raises BuildError when it is not understood."""
    try:
        return wire.result(told["verb"], told["value"])
    except (StopIteration, ValueError) as error:
        raise BuildError(
            f"this build was left there by another version: {error}", "attach with that one, or: inv cancel"
        ) from None


def cancel(build: Build) -> None:
    """End the build that was left to the host."""
    told = build.host.ask(wire.Job(build.prospect.place, "cancel"))
    build.console.line(f"cancelled {told['what']}, by {told['user']}")
