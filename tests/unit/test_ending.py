"""How the end of a child, or of the agent, is told."""

from __future__ import annotations

import signal

import pytest

from build.agent import ending
from build.engine.hosts.session import loss

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("status", "sign"),
    [
        (-9, "SIGKILL"),
        (137, "SIGKILL"),
        (-15, "SIGTERM"),
        (143, "SIGTERM"),
        (139, "SIGSEGV"),
        (-(signal.SIGRTMIN + 1), f"signal {signal.SIGRTMIN + 1}"),
        (0, ""),
        (1, ""),
        (100, ""),
        (128, ""),
        (255, ""),
    ],
)
def test_a_status_names_its_signal(status: int, sign: str) -> None:
    assert ending.signal_of(status) == sign
    assert ending.told("tweak", status, False) == (f"tweak was ended by {sign}" if sign else "")


def test_a_want_of_memory_is_the_reason_whatever_the_status() -> None:
    for status in (1, 100, 137, -9):
        assert ending.told("tweak", status, True) == "tweak was killed: out of memory"
    assert ending.told("tweak", 0, True) == ""
    assert "about 512 MiB" in ending.MORE_MEMORY


@pytest.mark.parametrize(
    ("name", "said", "sign", "told", "hint"),
    [
        ("", [], "SIGKILL", "the agent on this machine was lost: it was ended by SIGKILL", "dmesg"),
        ("", ["words", ""], "SIGTERM", "was lost: it was ended by SIGTERM", "finished layers are kept"),
        ("", ["words", ""], "", "the agent on this machine was lost: words", "finished layers are kept"),
        ("bh", [], "", "the agent on bh was lost: it ended without a word", "finished layers are kept"),
        (
            "bh",
            ["/usr/bin/python3: can't open file '/home/me/x': [Errno 13] Permission denied"],
            "",
            "root may not read /home/me/x on bh",
            "--rootless",
        ),
    ],
)
def test_a_lost_agent_is_told(name: str, said: list[str], sign: str, told: str, hint: str) -> None:
    error = loss(name, said, sign)
    assert told in error.what
    assert hint in error.hint
    assert ("dmesg" in error.hint) == (sign == "SIGKILL")
