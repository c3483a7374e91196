"""How the end of a process by a signal is told."""

from __future__ import annotations

import signal

SHELL = 128
"""What a shell adds to the number of the signal that ended its command (POSIX, Shell Command Language, 2.8.2;
bash(1), EXIT STATUS)."""


def ended_by(status: int) -> str:
    """Name of the signal that an exit status tells of, `SIGKILL`; empty: it was none.

    Negative, as Python's subprocess has it; or what a shell makes of its command's end.
    """
    number = -status if status < 0 else status - SHELL
    if number in signal.valid_signals():
        return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    return ""
