"""In which order tests run, and beside which others.

What takes longest begins first, and what is over in a moment fills the gaps at the end. Tests of a module
with fixtures of its own stay together: these would be made once in each worker otherwise. Most tests compute;
a worker for each core runs these. A few mostly wait - for a packet that does not come, for a time that has to
pass - and have workers of their own beside them (`pytestmark = pytest.mark.waits`).

Where the tests are given out, only their ids are known; so a module's text tells what it is.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from build.engine.rings import WAITING

CHECKOUT = Path(__file__).resolve().parents[1]
RINGS = ("boot", "remote", "root", "golden", "unit")
"""In the order in which their tests begin."""
SHORT = ("golden", "unit")
"""Rings whose modules are run as a whole: each test of theirs is over in no time."""


@functools.cache
def _text(module: str) -> str:
    return (CHECKOUT / module).read_text(encoding="utf-8")


def waits(nodeid: str) -> bool:
    """Whether a test is of those that mostly wait."""
    return "pytest.mark.waits" in _text(nodeid.partition("::")[0])


def group(nodeid: str) -> str:
    """Return the name of what a test stays together with: its module, or nothing but itself."""
    module = nodeid.partition("::")[0]
    together = module.split("/")[1] in SHORT or 'scope="module"' in _text(module)
    return module if together else nodeid


def arrange(items: list[pytest.Item]) -> None:
    """Sort the tests, those of a group behind one another."""
    costs: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("slow") or item.get_closest_marker("soak")
        costs[group(item.nodeid)] += mark.args[0] if mark else 0
    ring = {name: number for number, name in enumerate(RINGS)}
    items.sort(key=lambda item: (-costs[group(item.nodeid)], ring[item.path.parent.name], group(item.nodeid)))


class Lanes(LoadScopeScheduling):
    """Gives a worker the first group of its lane, or of the other one when its own is empty."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        lane = int(node.gateway.id.removeprefix("gw")) < WAITING
        own = (name for name, tests in self.workqueue.items() if waits(next(iter(tests))) == lane)
        if name := next(own, None):
            self.workqueue.move_to_end(name, last=False)
        super()._assign_work_unit(node)
