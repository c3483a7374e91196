"""What a checker has to say about a file, and the one way in which reading a broken file ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SAME_KIND = 20
"""Findings with the same text that are told one by one; the rest is counted."""


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing about a file: where it stands, who minds, and what to do."""

    severity: Severity
    where: str
    """Byte offset (`byte 0x200`) or element (`ovf:Disk`)."""
    text: str
    refused_by: str = ""
    """Hypervisor or tool that would refuse the file or misread it; empty when nobody is known to."""
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values for the protocol and for reports."""
        return asdict(self)


class Damaged(Exception):
    """A file cannot be read any further, for the reason in `finding`."""

    def __init__(self, where: str, text: str, refused_by: str = "every reader", fix: str = "") -> None:
        super().__init__(f"{where}: {text}")
        self.finding = Finding("error", where, text, refused_by, fix or "convert the disk again")


def at(offset: int) -> str:
    """Name a byte offset the way every finding does."""
    return f"byte {offset:#x}"


def collect(found: Iterator[Finding]) -> list[Finding]:
    """Gather findings up to the first damage, which becomes the last of them.

    A broken table could bring millions of the same kind: those beyond SAME_KIND become one line.
    """
    kept: list[Finding] = []
    seen: dict[str, int] = {}
    try:
        for finding in found:
            seen[finding.text] = seen.get(finding.text, 0) + 1
            if seen[finding.text] <= SAME_KIND:
                kept.append(finding)
    except Damaged as damage:
        kept.append(damage.finding)
    return [*kept, *_rest(seen, kept)]


def _rest(seen: dict[str, int], kept: Iterable[Finding]) -> list[Finding]:
    first = {finding.text: finding for finding in reversed(list(kept))}
    return [
        Finding(
            first[text].severity, "elsewhere", f"{text} ({count - SAME_KIND} more)", first[text].refused_by
        )
        for text, count in seen.items()
        if count > SAME_KIND
    ]
