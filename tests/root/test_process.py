"""Short commands of the agent: each ends, and takes along what it left."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.agent import process
from build.agent.events import Failure
from tests.waiting import Deadline, until


def wait_until_gone(pid: int) -> None:
    """Wait for a process to end, or to be a zombie until whoever inherited it looks."""
    status = Path("/proc", str(pid), "status")
    until(lambda: not status.exists() or "State:\tZ" in status.read_text())


def test_what_a_command_leaves_running_neither_holds_us_up_nor_stays(tmp_path: Path) -> None:
    """As a helper of `unshare --map-auto` does that lost its parent: it keeps the descriptors for ever."""
    deadline = Deadline(30)
    done = process.run(["sh", "-c", f"sleep 300 & echo $! >{tmp_path}/pid; echo said; echo told >&2"])
    assert not deadline.over()
    assert (done.stdout, done.stderr, done.returncode) == ("said\n", "told\n", 0)
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    line = ["sh", "-c", f"trap '' TERM; sleep 301 & echo $! >{tmp_path}/pid; wait"]
    with pytest.raises(Failure, match=r"sh: no end within 1 s") as failed:
        process.run(line, check=False, deadline=1)
    assert "sleep 301" in failed.value.hint
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_what_goes_in_comes_out_whole() -> None:
    text = "ä line\n" * 200_000
    assert process.run(["cat"], text=text).stdout == text
    assert process.run(["cat"]).stdout == ""
    assert process.run(["printf", r"\377"]).stdout == "\ufffd"


def test_a_failure_says_the_last_line() -> None:
    with pytest.raises(Failure, match="sh: second"):
        process.run(["sh", "-c", "echo first >&2; echo second >&2; exit 3"])
    assert process.run(["sh", "-c", "exit 3"], check=False).returncode == 3
