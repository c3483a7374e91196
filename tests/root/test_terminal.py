"""What a person sees: on a real terminal, on one that knows no escapes, on an output that takes nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import cli
from tests.agent import CHECKOUT
from tests.images import STEPS, TINY, Built, copied_resolution
from tests.waiting import Deadline

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
    """Run a command line on a terminal of 80 columns; gives what was seen on it, again and again.

    `look` is called with each.
    """
    socket = str(tmp_path / "tmux")

    def tmux(*words: str) -> str:
        done = subprocess.run(["tmux", "-S", socket, *words], check=True, capture_output=True, text=True)
        return done.stdout

    def watch(argv: Sequence[str], look: Callable[[list[str]], object] = len) -> list[list[str]]:
        size = ("-x", "80", "-y", "40", "-c", str(CHECKOUT))
        tmux("-f", "/dev/null", "new-session", "-d", *size, f"{shlex.join(argv)}; echo over; exec sleep 60")
        seen: list[list[str]] = []
        deadline = Deadline(240)
        while not deadline.over():
            seen.append([row.rstrip() for row in tmux("capture-pane", "-p").rstrip().splitlines()])
            if seen[-1][-1:] == ["over"]:
                return seen
            look(seen[-1])
            time.sleep(0.1)
        raise AssertionError(seen[-1])

    yield watch
    subprocess.run(["tmux", "-S", socket, "kill-server"], check=False)


def python(program: str) -> list[str]:
    return ["env", f"PYTHONPATH={CHECKOUT}", sys.executable, "-B", "-c", program]


@pytest.mark.slow(25, reason="a build as long as it takes")
def test_a_long_build_says_what_it_does_and_so_does_status(
    screen: Screen, tiny: Built, tmp_path: Path
) -> None:
    """How far, and how long it took last time, in one line of which nothing stays."""
    location = copied_resolution(tiny, tmp_path / "again")
    (location / "paces.json").write_text('{"debootstrap": 83.0, "disk": 62.0}')
    told: list[str] = []

    def look(rows: list[str]) -> None:
        if not told and any(row.startswith("debootstrap: ") and "%" in row for row in rows):
            told.extend(cli.succeed("status", *TINY, "--set", f"location={location}").splitlines())

    seen = screen([*cli.INV, "initramfs", *TINY, "--frozen", "--set", f"location={location}"], look)
    lines = [row for rows in seen for row in rows if " last time)" in row]
    assert any(
        re.match(r"debootstrap: \w+ +\d+% \|.*\| \d\d:\d\d \(01:23 last time\)$", row) for row in lines
    )
    assert (
        max(len(row) for rows in seen for row in rows if "sha256" not in row and "resolve" not in row) <= 80
    )
    assert [row.split()[1] for row in seen[-1] if row.startswith("built ")] == list(STEPS[:2])
    assert not [row for row in seen[-1] if "last time" in row]
    assert told[0] == "no build was left to this host"
    assert re.match(r".* is held by .*, inv debootstrap, for \d+ s\)$", told[1])
    assert re.match(r"debootstrap: \w+ \d+%, \d\d:\d\d so far \(01:23 last time\)$", told[2])
    paces = json.loads((location / "paces.json").read_text())
    assert set(paces) == {*STEPS[:2], "disk"}
    assert (paces["debootstrap"] != 83.0, paces["disk"]) == (True, 62.0)


@pytest.mark.parametrize("host", ["", "bh"])
def test_only_long_work_gets_a_bar_and_none_stays(screen: Screen, host: str) -> None:
    work = [("doctor", 12), ("convert", 40), ("verify", 12)]
    seen = screen(python(BARS.replace("HOST", repr(host)).replace("WORK", repr(work))))
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
