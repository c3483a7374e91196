"""The doctor's answer for people: a table, and the command that mends each gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from build.engine.errors import BuildError

Row = Mapping[str, Any]


class Output(Protocol):
    """What the rows are shown on: the console."""

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows in columns."""

    def line(self, text: str) -> None:
        """Print a line."""


def state(row: Row) -> str:
    """Say `ok`, `FAIL` (a build needs it) or `warn`."""
    return "ok" if row["ok"] else "FAIL" if row["needed"] else "warn"


def table(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Lay out the checks: state, name, what was found."""
    return [(state(row), row["name"], row["value"]) for row in rows]


def fixes(rows: Sequence[Row]) -> list[str]:
    """One line for each gap, what a build needs first."""
    gaps = sorted((row for row in rows if not row["ok"]), key=lambda row: not row["needed"])
    return [f"{row['name']}: {row['fix']}" for row in gaps]


def show(console: Output, rows: Sequence[Row]) -> None:
    """Print the checks and what mends the gaps; raises BuildError when a build lacks something."""
    console.table(("STATE", "CHECK", "FOUND"), table(rows))
    if lines := fixes(rows):
        console.line("to mend:")
        for line in lines:
            console.line(f"  {line}")
    lacking = [row["name"] for row in rows if state(row) == "FAIL"]
    if lacking:
        raise BuildError(
            f"this host cannot build yet: {', '.join(lacking)}", "run the commands above, then: inv doctor"
        )
