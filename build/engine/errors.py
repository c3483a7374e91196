"""The one error people see: what is wrong, and what to do about it."""

from __future__ import annotations

import re
import shlex

from invoke import Exit

from build.printable import LINES, printable


class BuildError(Exit):
    """End the run with one line of what, one line of `hint:`, and a status that is not 0.

    Invoke prints it without a traceback because it is an `invoke.Exit`; what hosts, files and guests have
    said in it is printable by then.
    """

    names_host = False
    """Whether it says itself which host it is about."""

    def __init__(self, what: str, hint: str = "", code: int = 1) -> None:
        self.what = what
        self.hint = hint
        text = f"error: {what}" + (f"\n  hint: {hint}" if hint else "")
        super().__init__(printable(text, LINES), code)

    def on(self, host: str, image: str = "") -> BuildError:
        """The same for work on a host (empty: here) with --image: it names the host, its hint leads there."""
        what = f"{host}: {self.what}" if host and not self.names_host else self.what
        return BuildError(what, again(self.hint, host, image), self.code)


class HostError(BuildError):
    """One that says itself which host it is about."""

    names_host = True


def again(text: str, host: str, image: str = "") -> str:
    """A text whose command lines `inv VERB` go to the same host and image definition as what was run.

    In hints, `inv` before a word is a command line.
    """
    pairs = (("-H", host), ("--image", image))
    flags = "".join(f"{flag} {shlex.quote(value)} " for flag, value in pairs if value)
    return re.sub(r"\binv (?=[a-z])", lambda _: f"inv {flags}", text)
