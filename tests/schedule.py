"""In which order tests run, and beside which others.

What takes longest begins first, and what is over in a moment fills the gaps at the end. Tests that share a
fixture of their module stay together: it would be made once in each worker otherwise. Most tests compute; a
worker for each core runs these. A few mostly wait - for a packet that does not come, for a time that has to
pass - and have workers of their own beside them (`pytestmark = pytest.mark.waits`).
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadGroupScheduling
from xdist.workermanage import WorkerController

from build.engine.rings import WAITING

WAITS = "waits:"
"""What the name of a group that waits begins with."""
RINGS = ("boot", "remote", "root", "golden", "unit")
"""In the order in which their tests begin."""


def arrange(items: list[pytest.Item]) -> None:
    """Sort the tests, and name the group of each that stays with others."""
    costs = {group: sum(_seconds(item) for item in mine) for group, mine in _groups(items).items()}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: (-costs[_group(item)], RINGS.index(_ring(item)), _group(item)))


def _groups(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(_group(item), []).append(item)
    return found


def _group(item: pytest.Item) -> str:
    module = f"{_ring(item)}/{item.path.stem.removeprefix('test_')}"
    waits = WAITS if item.get_closest_marker("waits") else ""
    alone = _ring(item) not in ("unit", "golden") and not _shares(item)
    return f"{waits}{module}" + (f"/{item.name}" if alone else "")


def _shares(item: pytest.Item) -> bool:
    """Whether a test has fixtures of its module."""
    info = getattr(item, "_fixtureinfo", None)
    known = info.name2fixturedefs.values() if info else ()
    return any(fixture.scope == "module" for fixtures in known for fixture in fixtures)


def _ring(item: pytest.Item) -> str:
    return item.path.parent.name


def _seconds(item: pytest.Item) -> float:
    mark = item.get_closest_marker("slow") or item.get_closest_marker("soak")
    return float(mark.args[0]) if mark else 0.0


def without_group(nodeid: str) -> str:
    """Return the id of a test as pytest takes it; xdist puts `@GROUP` behind it."""
    return nodeid.rpartition("@")[0] if nodeid.rfind("@") > nodeid.rfind("]") else nodeid


class Lanes(LoadGroupScheduling):
    """Gives a worker the first group of its lane, or of the other one when its own is empty."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _assign_work_unit(self, node: WorkerController) -> None:
        waits = int(node.gateway.id.removeprefix("gw")) < WAITING
        own = (group for group in self.workqueue if group.startswith(WAITS) == waits)
        if group := next(own, None):
            self.workqueue.move_to_end(group, last=False)
        super()._assign_work_unit(node)
