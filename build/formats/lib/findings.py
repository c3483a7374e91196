"""What a checker has to say about a file, and the one way in which reading a broken file ends.

Whatever can be said is a row, a Code: it stands beside the reader that says it, as a constant of its module,
and `build.formats.codes` puts all rows together. Programs decide by the code and its fields; texts are for
people alone, and any of them may be reworded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from build.formats.lib.platforms import EVERY_READER, Affected

Severity = Literal["error", "warning", "info"]
Field = str | int
Kind = tuple[object, ...]
"""What findings have in common that differ in their place alone."""
SAME_KIND = 20
"""Findings of one kind that are told one by one; the rest is counted."""
MOST_KINDS = 100
"""Kinds that count as such; those beyond count as one kind."""
LONGEST = 500
"""Characters of what a file says that a report repeats."""
SHOWN = 100
"""Characters of a field that its text shows."""


@dataclass(frozen=True)
class Group:
    """Codes that begin with the same letters."""

    prefix: str
    title: str
    source: str
    """Where its facts are written, unless a code says otherwise."""


@dataclass(frozen=True)
class Code:
    """One thing that can be said of a file. Fields stand in the texts as `{name}` (str.format)."""

    id: str
    """`OVA003`; never used again for something else."""
    severity: Severity
    text: str
    affects: tuple[Affected, ...] = ()
    """Who would refuse the file or misread it; empty when nobody is known to."""
    fix: str = ""
    """What to do, in the imperative."""
    lossy: bool = False
    """Whether whoever reads on gets other bytes than were written, or misses some: no conversion fixes it."""
    repair: str = ""
    """How `inv repair` fixes it, a key of `build.formats.lib.repair.ACTIONS`; empty: it does not."""
    source: str = ""
    """Where the fact is written; empty: where all of its group are."""


class Damage(Code):
    """A code for what ends the reading: always an error, always with a loss."""

    def __init__(
        self,
        id: str,  # noqa: A002
        text: str,
        affects: tuple[Affected, ...] = (EVERY_READER,),
        fix: str = "convert the disk again",
        repair: str = "",
        source: str = "",
    ) -> None:
        super().__init__(id, "error", text, affects, fix, True, repair, source)


@dataclass(frozen=True, init=False)
class Finding:
    """A code that applies to a file: where in it, and the fields of its text."""

    code: Code
    where: str
    """Byte offset (`byte 0x200`) or element (`Disk 'd1'`), for people; in an archive with the disk's name."""
    fields: Mapping[str, Field]
    disk: int | None
    """Which disk of an archive it is about, counted from 1; None: the file as a whole."""
    times: int
    """How many of its kind it stands for."""
    more: int
    """How many of its kind were not told, of the one that counts them."""

    def __init__(self, code: Code, where: str, /, **fields: Field) -> None:
        self._set(code=code, where=where, fields=fields, disk=None, times=1, more=0)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def but(self, **values: Any) -> Finding:
        """The same with other values of where, disk, times or more."""
        other = copy.copy(self)
        other._set(**values)
        return other

    def on(self, disk: int, name: str) -> Finding:
        """The same of a disk in an archive, by its number from 1 on and its name."""
        return self.but(disk=disk, where=f"{name[:SHOWN]}: {self.where}")

    @property
    def lossy(self) -> bool:
        """Whether data is missing or wrong."""
        return self.code.lossy

    @property
    def severity(self) -> Severity:
        """How bad it is, whoever reads the file."""
        return self.code.severity

    @property
    def kind(self) -> Kind:
        """All but the place."""
        return self.code.id, self.disk, *self.fields.items()

    @property
    def text(self) -> str:
        """What is wrong, for people."""
        counted = f" ({self.times} times)" if self.times > 1 else f" ({self.more} more)" if self.more else ""
        return self._filled(self.code.text) + counted

    @property
    def fix(self) -> str:
        """What to do, for people."""
        return self._filled(self.code.fix)

    @property
    def affects(self) -> tuple[Affected, ...]:
        """Who would refuse the file or misread it."""
        return tuple(each.filled(self.fields) for each in self.code.affects)

    @property
    def refused_by(self) -> str:
        """The same for people."""
        return ", ".join(each.title for each in self.affects)

    def _filled(self, template: str) -> str:
        shown = {
            name: value[:SHOWN] if isinstance(value, str) else value for name, value in self.fields.items()
        }
        return template.format(**shown)

    def as_json(self) -> dict[str, Any]:
        """Plain values for the protocol and for reports, as `build.wire.Finding` has them."""
        texts = {name: getattr(self, name)[:LONGEST] for name in ("where", "text", "refused_by", "fix")}
        fields = {
            name: value[:LONGEST] if isinstance(value, str) else value for name, value in self.fields.items()
        }
        return {
            "code": self.code.id,
            "severity": self.severity,
            **texts,
            "lossy": self.lossy,
            "disk": self.disk,
            "fields": fields,
            "affects": tuple(
                {name: text for name, text in vars(each).items() if text} for each in self.affects
            ),
            "repair": self.code.repair,
            "times": max(self.times, self.more),
        }


class Damaged(Exception):
    """A file cannot be read any further, for the reason in `finding`."""

    def __init__(self, code: Damage, where: str, /, **fields: Field) -> None:
        super().__init__(code, where)
        self.finding = Finding(code, where, **fields)

    @classmethod
    def by(cls, finding: Finding) -> Damaged:
        """The same for something that was found, and may be no loss by itself."""
        damage = cls.__new__(cls)
        damage.finding = finding
        return damage

    def __str__(self) -> str:
        return f"{self.finding.where}: {self.finding.text}"


def at(offset: int) -> str:
    """Name a byte offset the way every finding does."""
    return f"byte {offset:#x}"


GROUP = Group("ANY", "Any file", "build/formats/lib/findings.py, reader.py")
OTHERS: Mapping[Severity, Code] = {
    "error": Code("ANY001", "error", "other errors"),
    "warning": Code("ANY002", "warning", "other warnings"),
    "info": Code("ANY003", "info", "other infos"),
}
"""What findings of too many kinds are counted as."""
CODES = tuple(OTHERS.values())
NOT_HASHED = Code("ANY004", "info", "the disk is larger than {gib} GiB: it was not hashed")
NOT_LOOKED_INTO = Code("ANY005", "warning", "{reason}", fix="{hint}")


def collect(found: Iterator[Finding]) -> list[Finding]:
    """Gather findings up to the first damage, which becomes the last of them.

    A broken table could bring millions of them: those beyond SAME_KIND of a kind become one line. What loses
    data is one cause as a rule, a file that is cut off: one line tells of all of a kind, and damage that was
    met then, of the same disk, is not told besides.
    """
    kept: list[Finding] = []
    counts: dict[Kind, int] = {}
    firsts: dict[Kind, Finding] = {}
    try:
        for finding in found:
            kind = finding.kind
            if kind not in counts and len(counts) >= MOST_KINDS:
                kind = (OTHERS[finding.severity].id, finding.disk if finding.lossy else None, finding.lossy)
            counts[kind] = counts.get(kind, 0) + 1
            firsts.setdefault(kind, finding)
            if counts[kind] <= (1 if finding.lossy else SAME_KIND):
                kept.append(finding)
    except Damaged as damage:
        if not any(finding.lossy and finding.disk == damage.finding.disk for finding in kept):
            kept.append(damage.finding)
    return [
        *(_counted(finding, counts) for finding in kept),
        *(
            _rest(first, kind).but(where="elsewhere", more=counts[kind] - SAME_KIND)
            for kind, first in firsts.items()
            if counts[kind] > SAME_KIND and not first.lossy
        ),
    ]


def _counted(finding: Finding, counts: Mapping[Kind, int]) -> Finding:
    """A finding that stands for all of its kind, with their number."""
    return finding.but(times=counts.get(finding.kind, 1)) if finding.lossy else finding


def _rest(first: Finding, kind: Kind) -> Finding:
    """What stands for those that are only counted."""
    return first if kind == first.kind else Finding(OTHERS[first.severity], "elsewhere")
