"""The one error people see: what is wrong, and what to do about it."""

from __future__ import annotations

import re

from invoke import Exit

VERBS = "attach|build|cancel|clean|doctor|mount|plan|resolve|status|umount"
"""Verbs that hints name."""


class BuildError(Exit):
    """End the run with one line of what, one line of `hint:`, and a status that is not 0.

    Invoke prints it without a traceback because it is an `invoke.Exit`.
    """

    def __init__(self, what: str, hint: str = "", code: int = 1) -> None:
        self.what = what
        self.hint = hint
        super().__init__(f"error: {what}" + (f"\n  hint: {hint}" if hint else ""), code)

    def on(self, host: str) -> BuildError:
        """The same for work on a remote host, with commands that lead there."""
        what = self.what if host in self.what else f"{host}: {self.what}"
        return BuildError(what, re.sub(rf"\binv (?={VERBS})", f"inv -H {host} ", self.hint), self.code)
