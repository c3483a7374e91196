"""What people see: a line a step, bars for long work, colours on terminals only."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TextIO

import colorama
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

_writing = threading.RLock()
"""One line at a time, whichever host it is of."""


class Console:
    """Writes for one host; `prefix` names it where there is more than one place the work could be.

    `row` is where its progress is shown when several hosts work side by side.
    """

    def __init__(self, prefix: str = "", stream: TextIO | None = None, row: int = 0) -> None:
        self.row = row
        self.prefix = f"{prefix} | " if prefix else ""
        self.stream = stream or sys.stdout
        self.lively = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.coloured = self.lively and "NO_COLOR" not in os.environ
        self._bar: tqdm[Any] | None = None
        self._label, self._began = "", 0.0
        if self.coloured:
            colorama.just_fix_windows_console()

    def line(self, text: str) -> None:
        """Print a line above whatever bar is showing."""
        with _writing, tqdm.external_write_mode(self.stream) if self.lively else nullcontext():
            self.stream.write(f"{self.prefix}{text}\n")
            self.stream.flush()

    def step(self, state: str, name: str, seconds: float, extra: str = "") -> None:
        """Print how a step ended: `built|cached NAME 12.3s`."""
        self.done()
        self.line(
            f"{self.paint(state, f'{state:<7}')} {name:<18} {seconds:6.1f}s{f'  {extra}' if extra else ''}"
        )

    def note(self, text: str) -> None:
        """Print something worth knowing about the work that is going on."""
        self.line(f"        {text}")

    def progress(self, label: str, done: int, total: int) -> None:
        """Show true progress of what takes longer than a moment; nothing where it cannot be drawn over."""
        if not self.lively or total <= 0:
            return
        with _writing:
            if self._label != label:
                self.done()
                self._label, self._began = label, time.time()
            if self._bar is None:
                if time.time() - self._began < MOMENT:
                    return
                self._bar = self._draw(label, total)
            self._bar.total = total
            self._bar.n = min(done, total)
            self._bar.refresh()

    def _draw(self, label: str, total: int) -> tqdm[Any]:
        # tqdm's own `delay` does not hold back a refresh, and what it thinks it never drew it leaves there.
        bar = tqdm(
            total=total,
            desc=f"{self.prefix}{label}",
            leave=False,
            file=self.stream,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}",
            position=self.row,
        )
        bar.start_t = self._began
        return bar

    def done(self) -> None:
        """Take the bar away."""
        with _writing:
            if self._bar is not None:
                self._bar.close()
            self._bar, self._label = None, ""

    def paint(self, state: str, text: str) -> str:
        """Colour a text by the state it tells."""
        return (
            f"{_COLOURS[state]}{text}{colorama.Style.RESET_ALL}"
            if self.coloured and state in _COLOURS
            else text
        )

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows in columns as wide as their widest cell."""
        texts = [[str(cell) for cell in row] for row in [head, *rows]]
        widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
        for row in texts:
            cells = [self.paint(cell, cell.ljust(width)) for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join(cells).rstrip())


def size(count: float) -> str:
    """Write a number of bytes for people (binary units)."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
