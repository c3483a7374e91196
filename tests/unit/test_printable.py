"""Text from outside on a terminal: no byte of it moves, colours or reorders anything; ours still does."""

from __future__ import annotations

import io
import time

import colorama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from build import wire
from build.engine import console
from build.engine.console import Console
from build.engine.errors import BuildError
from build.engine.hosts.session import explain
from build.printable import LINES, printable
from build.verbs import inspect

HOSTILE = "a\x1b[2J\x9bb\u202ec\u2066d\udc80e\x07f\u2028g\r"
SPELLED = r"a\x1b[2J\x9bb\u202ec\u2066d\udc80e\x07f\u2028g\r"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_what_would_act_on_a_terminal_is_spelled_out() -> None:
    assert printable(HOSTILE) == SPELLED
    assert printable("two\n\tlines", LINES) == "two\n\tlines"
    assert printable("two\n\tlines") == r"two\n\tlines"
    assert printable(r"naïve C:\new 日本 'é'") == r"naïve C:\new 日本 'é'"


@given(text=st.text(st.characters()))
def test_nothing_gets_through_and_twice_is_once(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    shown.encode()


def test_an_agent_s_failure_with_its_log_and_its_trace() -> None:
    event = {"message": HOSTILE, "hint": HOSTILE, "tail": [f"first {HOSTILE}", "last"], "trace": HOSTILE}
    message = explain(event, debug=True).message
    assert message is not None
    assert message.replace("\n", "").isprintable()
    assert message.splitlines() == [
        f"error: {SPELLED}",
        f"    first {SPELLED}",
        "    last",
        SPELLED,
        f"  hint: {SPELLED}",
    ]


def test_lines_notes_steps_and_cells(terminal: Terminal) -> None:
    shown = Console(HOSTILE, terminal)
    shown.line(HOSTILE)
    shown.note(HOSTILE)
    shown.step("built", HOSTILE, 1.0, HOSTILE)
    shown.table((HOSTILE, "B", "C"), [("ok", HOSTILE, HOSTILE), ("\x1b[32mok", "", f"{HOSTILE}\n{HOSTILE}")])
    text = terminal.getvalue()
    green = f"{colorama.Fore.GREEN}ok{' ' * (len(SPELLED) - 2)}{colorama.Style.RESET_ALL}"
    assert green in text
    assert text.count("\x1b") == 4, "a step's state and a cell, coloured and reset"
    ours = colorama.Fore.GREEN, colorama.Style.RESET_ALL
    for code in ours:
        text = text.replace(code, "")
    assert text.replace("\n", "").isprintable()
    assert r"\x1b[32mok" in text
    assert all(line.startswith(f"{SPELLED} | ") for line in text.splitlines())


def test_labels_of_bars(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a field of the bar's own format is text, too."""
    shown = Console("bh", terminal)
    monkeypatch.setattr(console, "MOMENT", 0.0)
    began = time.time()
    shown.progress(f"{HOSTILE}{{nothing}}", 1, 2)
    shown._began = began - 1
    shown.progress(f"{HOSTILE}{{nothing}}", 2, 2)
    shown.done()
    text = terminal.getvalue()
    assert f"bh | {SPELLED}{{nothing}}" in text
    assert "\u202e" not in text
    assert "\x1b[2J" not in text


def test_what_inspect_shows_of_a_hostile_file() -> None:
    finding = wire.Finding(
        code="ANY001",
        severity="error",
        where=HOSTILE,
        text=HOSTILE,
        refused_by=HOSTILE,
        fix=HOSTILE,
        lossy=False,
        disk=None,
        fields={},
        affects=(),
        repair="",
        times=1,
    )
    facts = {HOSTILE: f"{HOSTILE}\nfindings: none"}
    seen = wire.Inspected(HOSTILE, 1, 1, "gz", "ova", 512, facts, None, (finding,))
    lines = inspect.lines(seen)
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 7
    assert lines[0] == f"{SPELLED}: ova inside gz"


def test_an_error_keeps_what_it_was_made_of() -> None:
    assert BuildError(HOSTILE, HOSTILE).on("bh").what == f"bh: {HOSTILE}"
