"""Questions on the terminal; what is answered is not shown, stored or logged."""

from __future__ import annotations

import functools
import getpass
import os
import threading

from build.engine.errors import BuildError
from build.printable import printable

_one = threading.Lock()
"""One question at a time, however many hosts ask."""


def hidden(question: str) -> str | None:
    """Ask for a secret; None where there is no terminal to ask on."""
    if not os.isatty(0):
        return None
    with _one:
        return getpass.getpass(f"{printable(question)}: ")


@functools.cache
def _once(question: str) -> str | None:
    return hidden(question)


def once(question: str) -> str | None:
    """Ask for a secret, once a run, however many hosts want to know; None where there is no terminal."""
    with _asked:
        return _once(question)


def new_password(of: str) -> str:
    """Ask for a new password twice, whichever host asks, once a run; raises BuildError."""
    with _asked:
        return _twice(of)


_asked = threading.Lock()


@functools.cache
def _twice(of: str) -> str:
    first = hidden(of)
    if first is None:
        raise BuildError(
            "--ask-password needs a terminal", "set SYSTEMVM_PASSWORD in the environment or .env"
        )
    if first != hidden("once more"):
        raise BuildError("the two passwords differ", "run it again")
    return first
