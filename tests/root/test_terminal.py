"""What a person sees: on a real terminal, on one that knows no escapes, on an output that takes nothing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import cli
from tests.agent import CHECKOUT

Screen = Callable[..., list[list[str]]]
BARS = r"""
import time
from build.engine.console import Console
console = Console(HOST)
for label, tenths in WORK:
    for moment in range(tenths):
        console.progress(label, moment, tenths)
        if moment == tenths - 3:
            console.line("a line between")
        time.sleep(0.1)
    console.done()
    console.table(("STATE", "CHECK", "FOUND"), [("ok", label, "here")])
"""


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    """Run Python on a terminal of 80 columns; gives what was seen on it, again and again."""
    socket = str(tmp_path / "tmux")

    def tmux(*words: str) -> str:
        return subprocess.run(
            ["tmux", "-S", socket, *words], check=True, capture_output=True, text=True
        ).stdout

    def watch(program: str) -> list[list[str]]:
        line = shlex.join(["env", f"PYTHONPATH={CHECKOUT}", sys.executable, "-B", "-c", program])
        tmux(
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            f"{line}; echo over; exec sleep 60",
        )
        seen: list[list[str]] = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            seen.append([row.rstrip() for row in tmux("capture-pane", "-p").rstrip().splitlines()])
            if seen[-1][-1:] == ["over"]:
                return seen
            time.sleep(0.1)
        raise AssertionError(seen[-1])

    yield watch
    subprocess.run(["tmux", "-S", socket, "kill-server"], check=False)


@pytest.mark.parametrize("host", ["", "bh"])
def test_only_long_work_gets_a_bar_and_none_stays(screen: Screen, host: str) -> None:
    work = [("doctor", 12), ("convert", 40), ("verify", 12)]
    seen = screen(BARS.replace("HOST", repr(host)).replace("WORK", repr(work)))
    prefix = f"{host} | " if host else ""

    def told(label: str) -> list[str]:
        width = max(len(label), len("CHECK"))
        rows = (("STATE", "CHECK", "FOUND"), ("ok", label, "here"))
        return [f"{prefix}{state:5}  {check:{width}}  {found}" for state, check, found in rows]

    between = f"{prefix}a line between"
    assert seen[-1] == [*(row for label, _ in work for row in (between, *told(label))), "over"]
    bars = [row for rows in seen for row in rows if "%" in row]
    assert bars
    assert all(row.startswith(f"{prefix}convert ") and len(row) <= 80 for row in bars)
    assert not [row for row in bars if int(row.split("%")[0].split()[-1]) < 40]


def test_a_dumb_terminal_gets_no_escapes() -> None:
    env = {**cli.environment(), "TERM": "dumb"}
    status, shown = cli.on_terminal([*cli.INV, "config"], [], env)
    assert status == 0
    assert "IMAGENAME" in shown
    assert "\x1b" not in shown
    line = [sys.executable, "-c", BARS.replace("HOST", "''").replace("WORK", "[('convert', 30)]")]
    status, shown = cli.on_terminal(line, [], {**env, "PYTHONPATH": str(CHECKOUT)})
    assert (status, shown.splitlines()[0]) == (0, "a line between")
    assert "\x1b" not in shown


@pytest.mark.parametrize("verb", [("config",), ("params", "router"), ("plan", "--script")], ids=" ".join)
@pytest.mark.parametrize("buffered", [True, False])
def test_an_output_that_takes_nothing_is_told_in_one_line(verb: tuple[str, ...], buffered: bool) -> None:
    env = {name: value for name, value in cli.environment().items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*cli.INV, *verb],
            cwd=CHECKOUT,
            env=env if buffered else {**env, "PYTHONUNBUFFERED": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    told = "error: standard output: No space left on device\n  hint: look at where the output goes\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_a_reader_that_leaves_hears_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            [*cli.INV, "config"],
            cwd=CHECKOUT,
            env=cli.environment(),
            stdout=gone,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")
