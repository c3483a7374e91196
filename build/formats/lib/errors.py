"""What a format cannot do."""

from __future__ import annotations


class Unsupported(Exception):
    """A format does not take a disk, an option or a file: what, in one line, and what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
