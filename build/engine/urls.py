"""URLs as people write them: what is wrong with one, and how what is nearly one is written in full."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

_BEGINNING = re.compile(r"([a-z]+)://+|(https?|file):/*|//+", re.IGNORECASE)
"""How a text begins that names a scheme, if in a wrong way, or leaves it out together with its colon."""


def fault(url: str, schemes: Sequence[str]) -> str:
    """Say what is wrong with a URL of one of these schemes; nothing is of a good one."""
    if not url.startswith(tuple(f"{scheme}://" for scheme in schemes)):
        return f"use a URL that starts with {' or '.join(f'{scheme}://' for scheme in schemes)}"
    if not re.fullmatch(r"[^\s\"'\[\]]+", url):
        return "use a URL without blanks, quotes or brackets"
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:
        port = 0
    if port == 0:
        return "the URL names no host or no port that there can be"
    return "" if host or (parts.scheme == "file" and parts.path) else "the URL names no host"


def in_full(text: str, schemes: Sequence[str]) -> str:
    """The URL that a text was meant for, as `http://deb.example.org/debian`; empty where none is near.

    One without a scheme, or with another one, gets the first of `schemes`.
    """
    found = _BEGINNING.match(text)
    named = (found[1] or found[2] or "").lower() if found else ""
    rest = text[found.end() :] if found else text
    if named == "file" or (text.startswith("/") and not found):
        url = f"file:///{rest.lstrip('/')}"
    else:
        url = f"{named if named in schemes else schemes[0]}://{rest}"
        if not re.match(r"([^/@]*@)?\w[\w.-]*(:[0-9]+)?(/|$)", rest):
            return ""
    return "" if fault(url, schemes) else url
