"""How a child's end is told that it did not choose itself: a signal, or the kernel for lack of memory."""

from __future__ import annotations

import signal

from build.agent import memory

SHELL = 128
"""What a shell adds to the number of the signal that ended its command (bash(1), EXIT STATUS)."""
MORE_MEMORY = (
    f"give this machine or container more memory (a build needs about {memory.NEEDED >> 20} MiB), "
    "or build elsewhere: inv -H HOST build"
)


def signal_of(status: int) -> str:
    """Name of the signal that ended a child of this exit status, as `SIGKILL`; empty: none did.

    Python tells of a signal by a negative status, a shell by one above 128.
    """
    number = -status if status < 0 else status - SHELL
    if number not in signal.valid_signals():
        return ""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


def told(what: str, status: int, starved: bool) -> str:
    """What is to be said of a child that was killed; empty: it ended by itself.

    `starved`: meanwhile the kernel killed for lack of memory, the child or one of its own.
    """
    if status and starved:
        return f"{what} was killed: out of memory"
    sign = signal_of(status)
    return f"{what} was ended by {sign}" if sign else ""
