"""What a checker has to say about a file, and the one way in which reading a broken file ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SAME_KIND = 20
"""Findings with the same text that are told one by one; the rest is counted."""
MOST_KINDS = 100
"""Texts that count as kinds of their own; those beyond count as one kind."""
LONGEST = 500
"""Characters of what a file says that a report repeats."""


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
    lossy: bool = False
    """Whether whoever reads on gets other bytes than were written, or misses some: no conversion mends it."""

    def as_json(self) -> dict[str, Any]:
        """Plain values for the protocol and for reports."""
        told = {name: value[:LONGEST] for name, value in asdict(self).items() if name != "lossy"}
        return {**told, "lossy": self.lossy}


class Damaged(Exception):
    """A file cannot be read any further, for the reason in `finding`."""

    def __init__(self, where: str, text: str, refused_by: str = "every reader", fix: str = "") -> None:
        super().__init__(f"{where}: {text}")
        self.finding = Finding("error", where, text, refused_by, fix or "convert the disk again", lossy=True)


def at(offset: int) -> str:
    """Name a byte offset the way every finding does."""
    return f"byte {offset:#x}"


def collect(found: Iterator[Finding]) -> list[Finding]:
    """Gather findings up to the first damage, which becomes the last of them.

    A broken table could bring millions of them: those beyond SAME_KIND of a kind become one line. What loses
    data is one cause as a rule, a file that is cut off: one line tells of all of a kind, and damage that was
    met then is not told besides.
    """
    kept: list[Finding] = []
    kinds: dict[str, tuple[Finding, int]] = {}
    try:
        for finding in found:
            known = finding.text in kinds or len(kinds) < MOST_KINDS
            kind = finding.text if known else f"other {finding.severity}s"
            first, count = kinds.get(kind, (finding, 0))
            kinds[kind] = first, count + 1
            if count < (1 if finding.lossy else SAME_KIND):
                kept.append(finding)
    except Damaged as damage:
        if not any(finding.lossy for finding in kept):
            kept.append(damage.finding)
    return [
        *(_counted(finding, kinds) for finding in kept),
        *(
            Finding(first.severity, "elsewhere", f"{kind} ({count - SAME_KIND} more)", first.refused_by)
            for kind, (first, count) in kinds.items()
            if count > SAME_KIND and not first.lossy
        ),
    ]


def _counted(finding: Finding, kinds: Mapping[str, tuple[Finding, int]]) -> Finding:
    """A finding that stands for all of its kind, with their number."""
    count = kinds[finding.text][1] if finding.lossy and finding.text in kinds else 1
    return replace(finding, text=f"{finding.text} ({count} times)") if count > 1 else finding
