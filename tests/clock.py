"""What each test takes, in seconds and in processor time, and who takes too much.

A row a test, a line of JSON each, goes to the file of `--clock` as tests end; the end of a run shows the
most expensive ones. What a fixture of a wider scope than one test takes is a row of its own: it is shared.

A test that takes more than LIMIT seconds fails, unless `@pytest.mark.slow(SECONDS, reason=...)` says why it
may. Seconds are those of two cores that have nothing else to do, as far as they can be known: half of the
processor time, or the time that passed without that for which something here waited for a processor (the
kernel's pressure stall information, Documentation/accounting/psi.rst). So a busy machine makes no test fail.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import stalled
from tests.warm import Warm

CORES = 2
"""Of the machine that seconds are meant for."""
LIMIT = 20.0
"""Seconds that a test may take without a reason."""
SHOWN = 30
"""Rows at the end of a run."""
ROW = "clock"
"""Name of the property by which a worker passes a row on."""


@dataclass(frozen=True)
class Spent:
    """Seconds: passed, of processor time (with all that was started and has ended), and stalled."""

    passed: float = 0.0
    processor: float = 0.0
    stalled: float = 0.0

    def __sub__(self, other: Spent) -> Spent:
        return Spent(
            self.passed - other.passed, self.processor - other.processor, self.stalled - other.stalled
        )

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.passed + other.passed, self.processor + other.processor, self.stalled + other.stalled
        )

    @property
    def alone(self) -> float:
        """Seconds that it takes on an idle machine of CORES, at least."""
        return max(self.processor / CORES, self.passed - self.stalled)


def now() -> Spent:
    """Return what this process has spent so far."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime + Warm.spent
    return Spent(time.monotonic(), processor, stalled())


@dataclass(eq=False)
class Clock:
    """Measures in whichever process runs the tests."""

    shared: Spent = field(default_factory=Spent)
    """What fixtures of a wider scope took since the last test began."""
    _depth: int = 0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Begin a test."""
        self.shared = Spent()
        item.stash[BEGAN] = now()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """Take what is shared out of the test that happened to be the first to ask for it."""
        if fixturedef.scope == "function" or self._depth:
            return (yield)
        self._depth, began = 1, now()
        try:
            return (yield)
        finally:
            self._depth = 0
            self.shared += now() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Fail a test that took too long, and note the row."""
        report = yield
        if call.when != "call":
            return report
        spent = now() - item.stash[BEGAN] - self.shared
        row = {"test": item.nodeid, "ring": ring_of(item), **rounded(spent)}
        row |= {"shared": round(self.shared.processor, 2)}
        row |= {"worker": os.environ.get("PYTEST_XDIST_WORKER", "")}
        item.user_properties.append((ROW, row))
        report.user_properties = list(item.user_properties)
        mark = item.get_closest_marker("slow") or item.get_closest_marker("soak")
        if report.passed and spent.alone > LIMIT and not mark:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} takes {spent.alone:.1f} s, of {spent.passed:.1f} that passed; "
                f"{LIMIT:.0f} are allowed: make it quicker, or mark it slow with a reason (docs/tests.md)"
            )
        return report


BEGAN = pytest.StashKey[Spent]()


def rounded(spent: Spent) -> dict[str, float]:
    """Return the seconds as a row has them."""
    return {name: round(value, 2) for name, value in asdict(spent).items()}


def ring_of(item: pytest.Item) -> str:
    """Return the ring, or the folder, of a test."""
    return item.path.parent.name


@dataclass(eq=False)
class Rows:
    """Gathers rows where the run is steered from, writes them as they come, and shows the top at its end."""

    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the row of a test that has ended."""
        if report.when != "call":
            return
        for name, row in report.user_properties:
            if name == ROW and isinstance(row, dict):
                self.rows.append(row)
                if self.file:
                    with self.file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(row) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show what was most expensive, and the sums of the rings."""
        if len(self.rows) < 2:
            return
        terminalreporter.section("seconds: of processor time, passed")
        for row in sorted(self.rows, key=lambda row: -row["processor"] - row["passed"] / 10)[:SHOWN]:
            terminalreporter.write_line(f"{row['processor']:8.1f} {row['passed']:8.1f}  {row['test']}")
        sums: Counter[str] = Counter()
        for row in self.rows:
            sums[row["ring"]] += row["processor"] + row["shared"]
        said = ", ".join(f"{ring} {seconds:.0f}" for ring, seconds in sums.most_common())
        terminalreporter.write_line(f"processor time by ring, with what its tests share: {said}")


def register(config: pytest.Config) -> None:
    """Install the clock, and where a run is steered from what gathers its rows."""
    if config.getoption("numprocesses", None) is None or os.environ.get("PYTEST_XDIST_WORKER"):
        config.pluginmanager.register(Clock(), "clock")
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        file = config.getoption("--clock")
        config.pluginmanager.register(Rows(Path(file) if file else None), "clock rows")
