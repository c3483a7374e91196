"""Whether a host shows the key that it is known by: known_hosts files, as sshd(8) defines them.

Pure. Lines with @cert-authority are passed over: their hosts count as unknown unless they have a line of
their own.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One line: the names that it is for, the key, and where it stands."""

    names: str
    kind: str
    key: str
    """Base64, as it stands there."""
    file: str
    line: int
    revoked: bool = False

    def covers(self, name: str) -> bool:
        """Whether it is for this name."""
        if self.names.startswith("|1|"):
            return _hashed(self.names, name)
        patterns = self.names.split(",")
        denied = any(_like(pattern[1:], name) for pattern in patterns if pattern.startswith("!"))
        return not denied and any(_like(pattern, name) for pattern in patterns)


def parse(text: str, file: str) -> list[Entry]:
    """Read a file's lines; what is no entry is passed over."""
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) < 3 or words[0].startswith("#") or marker not in ("", "@revoked"):
            continue
        entries.append(Entry(words[0], words[1], words[2], file, number, bool(marker)))
    return entries


def judge(entries: Iterable[Entry], names: Iterable[str], kind: str, key: bytes) -> tuple[str, list[Entry]]:
    """Say `known`, `revoked`, `changed` or `unknown`, and the lines that say so.

    `names` are tried in turn: a port that is not 22 first with it, then without, as ssh does.
    """
    entries, encoded = list(entries), base64.b64encode(key).decode("ascii")
    if refused := [entry for entry in entries if entry.revoked and entry.key == encoded]:
        return "revoked", refused
    others: list[Entry] = []
    for number, name in enumerate(names):
        about = [entry for entry in entries if not entry.revoked and entry.covers(name)]
        if same := [entry for entry in about if entry.key == encoded]:
            return "known", same
        others = about if number == 0 else others
    return ("changed" if others else "unknown"), others


def kinds(entries: Iterable[Entry], names: Iterable[str]) -> list[str]:
    """Types of the keys that a host is known by: what to ask it for first."""
    names = list(names)
    return list(dict.fromkeys(e.kind for e in entries if not e.revoked and any(map(e.covers, names))))


def fingerprint(key: bytes) -> str:
    """What ssh shows of a key."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode("ascii").rstrip("=")


def _like(pattern: str, name: str) -> bool:
    """Match ssh_config(5)'s patterns: * and ? only, letters of any case."""
    parts = (".*" if letter == "*" else "." if letter == "?" else re.escape(letter) for letter in pattern)
    return re.fullmatch("".join(parts), name, re.IGNORECASE) is not None


def _hashed(field: str, name: str) -> bool:
    try:
        _, _, salt, digest = field.split("|")
        made = hmac.new(base64.b64decode(salt), name.encode(), hashlib.sha1).digest()
        return hmac.compare_digest(made, base64.b64decode(digest))
    except ValueError:
        return False
