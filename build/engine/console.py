"""What people see: a line a step, bars for long work, colours on terminals only."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TextIO

import colorama

from build.printable import LINES, printable

if TYPE_CHECKING:
    from tqdm import tqdm

_COLOURS = {
    "built": colorama.Fore.GREEN,
    "cached": colorama.Fore.CYAN,
    "ok": colorama.Fore.GREEN,
    "FAIL": colorama.Fore.RED,
    "warn": colorama.Fore.YELLOW,
    "error": colorama.Fore.RED,
}


MOMENT = 2.0
"""Seconds that work takes before it gets a bar."""

_NARROW = 20
"""Columns that a terminal must leave to a table's last cell for it to be folded."""

_writing = threading.RLock()
"""One line at a time, whichever host it is of."""


class Painted(str):
    """Text that a terminal may get as it is: colours of ours around what is printable."""


class Console:
    """Writes for one host; `prefix` names it where there is more than one place the work could be.

    `row` is where its progress is shown when several hosts work side by side; `quiet` leaves out what
    tells how the work goes.
    """

    def __init__(
        self, prefix: str = "", stream: TextIO | None = None, row: int = 0, quiet: bool = False
    ) -> None:
        self.row, self.quiet, self.host = row, quiet, prefix
        self.results = 0
        """Lines of JSON that were printed."""
        self.prefix = f"{printable(prefix)} | " if prefix else ""
        self.stream = stream or sys.stdout
        self.lively = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.coloured = self.lively and "NO_COLOR" not in os.environ
        self._bar: tqdm[Any] | None = None
        self._work = self._label = self._share = ""
        self._began = 0.0
        self._last: float | None = None
        self._over = threading.Event()
        if self.coloured:
            colorama.just_fix_windows_console()

    def line(self, *parts: str) -> None:
        """Print a line above whatever bar is showing; whoever wrote it, it moves nothing on the terminal."""
        text = "".join(part if isinstance(part, Painted) else printable(part, LINES) for part in parts)
        with _writing, _tqdm().external_write_mode(self.stream) if self.lively else nullcontext():
            self.stream.write(f"{self.prefix}{text}\n")
            self.stream.flush()

    def json(self, **fields: Any) -> None:
        """Print a result for programs: one line, whichever host it is of."""
        self.done()
        self.results += 1
        with _writing:
            print(json.dumps({"host": self.host, **fields}), flush=True)

    def step(self, state: str, name: str, seconds: float, extra: str = "") -> None:
        """Print how a step ended: `built|cached NAME 12.3s`."""
        self.done()
        if self.quiet:
            return
        more = f"  {extra}" if extra else ""
        self.line(self.paint(state, f"{state:<7}"), f" {name:<17} {seconds:6.1f}s{more}")

    def note(self, text: str) -> None:
        """Print something worth knowing about the work that is going on."""
        if not self.quiet:
            self.line(f"        {text}")

    def work(self, name: str, last: float | None) -> None:
        """Show that work began, and go on showing how long it takes; `last`: seconds of its last run here."""
        self.done()
        if self.quiet or not self.lively:
            return
        with _writing:
            self._work, self._label, self._began, self._last = name, name, time.time(), last
            self._over = threading.Event()
            threading.Thread(target=self._tick, args=(self._over,), daemon=True).start()

    def progress(self, label: str, done: int, total: int) -> None:
        """Show true progress of what takes longer than a moment; nothing where it cannot be drawn over."""
        if self.quiet or not self.lively or total <= 0:
            return
        with _writing:
            if not self._work and self._label != label:
                self.done()
                self._began = time.time()
            self._label = label
            self._show(min(done, total), total)

    def _tick(self, over: threading.Event) -> None:
        while not over.wait(1.0):
            with _writing:
                if not over.is_set():
                    self._show()

    def _show(self, done: int = 0, total: int = 0) -> None:
        """Draw the line anew, unless it is too early for one."""
        if time.time() - self._began < MOMENT:
            return
        if self._bar is None:
            # tqdm's own `delay` does not hold back a refresh, and what it thinks it never drew stays.
            self._bar = _tqdm()(total=1, leave=False, file=self.stream, position=self.row, bar_format=" ")
        bar = self._bar
        if total:
            bar.total, bar.n = total, done
            self._share = " {percentage:3.0f}% |{bar}|"
        bar.start_t = self._began
        label = self._label if self._label == self._work or not self._work else f"{self._work}: {self._label}"
        times = "{elapsed}" if self._work else "{elapsed}<{remaining}"
        if self._work and self._last:
            times += f" ({clock(self._last)} last time)"
        shown = f"{self.prefix}{printable(label)}".replace("{", "{{").replace("}", "}}")
        bar.bar_format = f"{shown}{self._share} {times}"
        bar.refresh()

    def done(self) -> None:
        """Take the line away."""
        with _writing:
            self._over.set()
            if self._bar is not None:
                self._bar.close()
            self._bar, self._label, self._work, self._share = None, "", "", ""

    def paint(self, state: str, text: str) -> Painted:
        """Colour a text by the state it tells."""
        shown = printable(text, LINES)
        return Painted(
            f"{_COLOURS[state]}{shown}{colorama.Style.RESET_ALL}"
            if self.coloured and state in _COLOURS
            else shown
        )

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows in columns as wide as their widest cell; a terminal folds the last one within itself."""
        texts = [[printable(cell) for cell in row] for row in [head, *rows]]
        widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
        before = sum(widths[:-1]) + 2 * len(widths[:-1])
        room = shutil.get_terminal_size().columns - len(self.prefix) - before if self.lively else 0
        for row in texts:
            *first, last = row
            cells = [self.paint(cell, cell.ljust(width)) for cell, width in zip(first, widths, strict=False)]
            long = _NARROW <= room < len(last)
            folded = textwrap.wrap(last, room, break_on_hyphens=False) if long else [last]
            self.line(Painted("  ".join([*cells, folded[0]]).rstrip()))
            for more in folded[1:]:
                self.line(" " * before + more)


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds."""
    return str(_tqdm().format_interval(max(0.0, seconds)))


def _tqdm() -> type[tqdm[Any]]:
    """The bar's class, loaded when there is a bar: it is slow to load, and most verbs show none."""
    from tqdm import tqdm

    return tqdm


def size(count: float) -> str:
    """Write a number of bytes for people (binary units)."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
