"""Rings, and what each may do. A test belongs to the ring of its folder; none is ever skipped.

One marked `soak(SECONDS)`, its cost on two idle cores, is left to `./inv test --ring soak`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
from xdist.remote import Producer

from build.engine.rings import NOTHING_RAN, PRIVILEGED, RINGS
from tests import cli, clock, schedule
from tests.images import system as system  # for every ring that needs a built image
from tests.images import tiny as tiny
from tests.images import tiny_of_user as tiny_of_user
from tests.soak import slice_of

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `./inv test --ring soak` passes on."""
    parser.addoption(
        "--soak-seconds", type=int, help="play a random slice of the soak ring that takes so long"
    )
    parser.addoption("--soak-seed", type=int, default=0, help="what chooses it, and what the cases draw from")
    parser.addoption("--clock", help="a file that gets a line of JSON for each test: what it took")


def pytest_configure(config: pytest.Config) -> None:
    """Measure each test, and let none of Hypothesis' examples fail because the machine is busy."""
    clock.register(config)
    hypothesis.settings.register_profile(
        "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("tests")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remove the temporary files of a run in which nothing failed; pytest does so in its own folder only."""
    folder = session.config.getoption("basetemp")
    if folder and exitstatus in (0, NOTHING_RAN) and not os.environ.get("PYTEST_XDIST_WORKER"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> schedule.Lanes | None:
    """Give tests that wait workers of their own."""
    if config.getoption("dist") != "loadscope":
        return None
    config.option.loadscopereorder = False
    return schedule.Lanes(config, log)


@pytest.fixture(autouse=True, scope="session")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """End the processes that `inv` is forked from."""
    yield
    cli.cool()


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """What a soak case draws its moments from."""
    return int(request.config.getoption("--soak-seed"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the ring of its folder, and keep of the soak ring the slice that was asked for."""
    for item in items:
        ring = item.path.relative_to(HERE).parts[0]
        if ring not in RINGS:
            raise pytest.UsageError(f"{item.nodeid} is in no ring: move it to tests/{{{','.join(RINGS)}}}")
        item.add_marker(ring)
    costs = {item.nodeid: _cost(*mark.args) for item in items if (mark := item.get_closest_marker("soak"))}
    if seconds := config.getoption("--soak-seconds"):
        chosen = slice_of(costs, seconds, config.getoption("--soak-seed"))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]
    schedule.arrange(items)


def _cost(seconds: int) -> int:
    """Read a soak mark; raises TypeError for one that says no cost."""
    return seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count a skipped test as failed: what cannot run here has not been shown to work."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which counts as failed: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Count a skipped module as failed, too."""
    report = yield
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, which counts as failed: {report.longrepr}"
    return report


@pytest.fixture(autouse=True, scope="session")
def _open(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the ordinary users that tests become walk into their temporary folders, and read what is there."""
    os.umask(0o022)
    _open_up(tmp_path_factory.getbasetemp())


def _open_up(base: Path) -> None:
    roof = Path(tempfile.gettempdir())
    for path in (base, *base.parents):
        if roof in path.parents and os.geteuid() == path.stat().st_uid:
            path.chmod(0o755)


@pytest.fixture(autouse=True)
def _ring(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Hold a test to its ring, away from the settings of whoever runs it."""
    _open_up(tmp_path_factory.getbasetemp())  # pytest closes what its runs share when another one begins
    for name in [name for name in os.environ if name.startswith("SYSTEMVM_")]:
        monkeypatch.delenv(name)
    # Whatever leads to the network from here, the tests' own servers are not behind it.
    monkeypatch.setenv("no_proxy", ",".join([*filter(None, [os.environ.get("no_proxy")]), "127.0.0.1"]))
    ring = next(ring for ring in RINGS if request.node.get_closest_marker(ring))
    if ring in PRIVILEGED and os.geteuid() != 0:
        pytest.fail(f"the {ring} ring needs root: `./inv test` asks sudo for it", pytrace=False)
    if ring == "unit":
        _forbid(monkeypatch)


def _forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse what a unit test may not do: start a process, open a connection."""

    def refused(*arguments: Any, **_options: Any) -> NoReturn:
        pytest.fail(f"a unit test may not start processes or open connections: {arguments[1:] or arguments}")

    for owner, names in {
        subprocess.Popen: ("__init__",),
        socket.socket: ("connect", "connect_ex", "bind"),
        os: ("system", "fork", "forkpty", "posix_spawn", "posix_spawnp", "execv", "execve"),
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, refused)
