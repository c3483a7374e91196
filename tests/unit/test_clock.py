"""What a test is held to take, what it waits for, and in which order tests run."""

from __future__ import annotations

import time

import pytest

from tests import schedule, waiting
from tests.clock import Spent
from tests.waiting import BUSY, Deadline, until


@pytest.mark.parametrize(
    ("passed", "processor", "stalled", "alone"),
    [(30, 5, 0, 30), (30, 5, 28, 2.5), (30, 25, 30, 12.5), (30, 1, 10, 20), (1, 40, 0, 20)],
)
def test_a_busy_machine_makes_no_test_take_longer(
    passed: float, processor: float, stalled: float, alone: float
) -> None:
    assert Spent(passed, processor, stalled).alone == alone
    whole = Spent(passed, processor, stalled) + Spent(1, 1, 1)
    assert whole - Spent(1, 1, 1) == Spent(passed, processor, stalled)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that passed, and for which something waited for a processor."""
    now = {"passed": 100.0, "stalled": 50.0}

    def sleep(seconds: float) -> None:
        now["passed"] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now["passed"])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(waiting, "stalled", lambda: now["stalled"])
    monkeypatch.setattr(waiting, "tells_stalls", lambda: True)
    return now


def test_a_wait_is_over_after_seconds_of_an_idle_machine(clock: dict[str, float]) -> None:
    deadline = Deadline(10)
    clock |= {"passed": 109.0}
    assert not deadline.over()
    clock |= {"passed": 140.0, "stalled": 85.0}
    assert not deadline.over()
    clock |= {"stalled": 79.0}
    assert deadline.over()
    clock |= {"passed": 101 + 10 * BUSY, "stalled": 50 + 10 * BUSY}
    assert deadline.over(), "however busy it is"


def test_where_the_kernel_tells_no_stalls_a_wait_is_as_long_as_on_a_busy_machine(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "tells_stalls", lambda: False)
    deadline = Deadline(10)
    clock |= {"passed": 100 + 10 * BUSY}
    assert not deadline.over()
    clock |= {"passed": 101 + 10 * BUSY}
    assert deadline.over()


def test_a_wait_for_what_never_happens_says_so(clock: dict[str, float]) -> None:
    assert until(lambda: clock["passed"] > 103, 10) == pytest.approx(103, abs=0.1)
    with pytest.raises(AssertionError, match="nobody came"):
        until(lambda: False, 10, lambda: "nobody came")


def test_tests_of_a_module_with_a_fixture_of_its_own_stay_together() -> None:
    assert schedule.group("tests/unit/test_clock.py::test_a[x]") == "tests/unit/test_clock.py"
    assert schedule.group("tests/root/test_disk.py::test_a") == "tests/root/test_disk.py"
    alone = "tests/root/test_process.py::test_a[tests/root/test_disk.py::x]"
    assert schedule.group(alone) == alone
    assert schedule.waits("tests/root/test_keepalived_pair.py::test_a")
    assert not schedule.waits(alone)
