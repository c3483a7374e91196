"""The doctor's answer for people: a table, and the command that fixes each gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from build import wire
from build.engine.errors import BuildError
from build.engine.hosts.host import CHECKOUT
from build.engine.pipeline import Build
from build.engine.settings import SECRETS


class Output(Protocol):
    """What the rows are shown on: the console."""

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows in columns."""

    def line(self, text: str) -> None:
        """Print a line."""


def state(row: wire.Check) -> str:
    """Say `ok`, `FAIL` (a build needs it) or `warn`."""
    return "ok" if row.ok else "FAIL" if row.needed else "warn"


def table(rows: Sequence[wire.Check]) -> list[tuple[str, str, str]]:
    """Lay out the checks: state, name, what was found."""
    return [(state(row), row.name, row.value) for row in rows]


def fixes(rows: Sequence[wire.Check]) -> list[str]:
    """One line for each gap, what a build needs first."""
    gaps = sorted((row for row in rows if not row.ok), key=lambda row: not row.needed)
    return [f"{row.name}: {row.fix}" for row in gaps]


def show(console: Output, rows: Sequence[wire.Check]) -> None:
    """Print the checks and what fixes the gaps; raises BuildError when a build lacks something."""
    console.table(("STATE", "CHECK", "FOUND"), table(rows))
    if lines := fixes(rows):
        console.line("to fix:")
        for line in lines:
            console.line(f"  {line}")
    _judge(rows, "run the commands above, then: inv doctor")


def _judge(rows: Sequence[wire.Check], hint: str) -> None:
    if lacking := [row.name for row in rows if state(row) == "FAIL"]:
        raise BuildError(f"this host cannot build yet: {', '.join(lacking)}", hint)


def doctor(build: Build, install: bool, cache: bool, json: bool) -> None:
    """Print the host's checks, with `install` after that; fails when a build lacks something.

    With `cache` every layer is read in full, and it fails when one had to be taken out of use.
    """
    if install:
        script = (CHECKOUT / "build/engine/install.sh").read_text(encoding="utf-8")
        done = build.host.ask(wire.Install(script), build.follow)
        build.console.done()
        build.console.line(f"installed: {', '.join(done.packages) or 'nothing was missing'}")
    settings = build.settings.model_dump(mode="json", exclude={*SECRETS})
    request = wire.Doctor(build.prospect.place, build.prospect.image, settings)
    rows = build.host.ask(request, build.follow)
    if cache:
        rows += build.host.ask(wire.Audit(build.prospect.place), build.follow)
    build.console.done()
    rows = tuple(replace(row, fix=build.again(row.fix)) for row in rows)
    if not json:
        show(build.console, rows)
        return
    build.console.json(checks=[{**wire.dump(row), "state": state(row)} for row in rows])
    _judge(rows, "run what stands at `fix`, then: inv doctor")
