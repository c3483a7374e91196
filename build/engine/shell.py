"""Quoting, once, at the border between our values and bash."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

quote = shlex.quote
join = shlex.join


def words(values: Iterable[str]) -> str:
    """Quote each value and put blanks between them."""
    return " ".join(shlex.quote(value) for value in values)
