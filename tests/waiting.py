"""Waits for events. A busy machine makes none of them fail: only what nobody is working on runs out of time.

Seconds are those of an idle machine: time for which something here waited for a processor does not count
(the kernel's pressure stall information, Documentation/accounting/psi.rst), up to BUSY times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LONG = 900.0
"""Seconds until what should end by itself counts as hanging, where a library wants a number."""
BUSY = 20.0
"""By how much a machine may be slower than an idle one."""
PRESSURE = Path("/proc/pressure/cpu")


def stalled() -> float:
    """Return the seconds for which something on this machine waited for a processor, since it started.

    Always 0 on a kernel that does not tell.
    """
    try:
        return int(PRESSURE.read_text().partition("total=")[2].split()[0]) / 1e6
    except (OSError, ValueError, IndexError):
        return 0.0


def tells_stalls() -> bool:
    """Whether this kernel tells them."""
    return PRESSURE.exists()


class Deadline:
    """So many seconds of an idle machine from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began, self._stalled = time.monotonic(), stalled()

    def over(self) -> bool:
        """Whether they are over."""
        passed = time.monotonic() - self._began
        if not tells_stalls():
            return passed > BUSY * self.seconds
        return passed - (stalled() - self._stalled) > self.seconds or passed > BUSY * self.seconds


def until(
    holds: Callable[[], object], seconds: float = 60, say: Callable[[], str] = lambda: "never happened"
) -> float:
    """Wait until something holds, and return when it first did (seconds of the monotonic clock)."""
    deadline = Deadline(seconds)
    while not holds():
        assert not deadline.over(), say()
        time.sleep(0.02)
    return time.monotonic()
