"""Text from outside as a terminal may get it: what would act there is spelled out. Standard library only."""

from __future__ import annotations

LINES = "\n\t"
"""What text of several lines keeps."""


def printable(text: object, keep: str = "") -> str:
    r"""A text in which whatever Unicode does not call printable is an escape, `\x1b` or `\u202e`.

    That is every control character, C1 too, every mark that changes the direction of writing, lone
    surrogates, and separators other than the blank. A backslash stays as it is: escaping twice is
    escaping once.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() or char in keep else _escape(char) for char in shown)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
