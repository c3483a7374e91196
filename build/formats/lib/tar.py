"""Tar archives by position: what an OVA is, and other ways to hand over a disk. Nothing is ever unpacked.

Layout of ustar from POSIX.1-2001 (pax), "ustar Interchange Format".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, Finding, at
from build.formats.lib.reader import BoundedReader

BLOCK = 512
RECORD = 10240
LARGEST_MEMBER = 8 << 30
VSPHERE = "vSphere"


def member_header(name: str, size: int, epoch: int) -> bytes:
    """A ustar header: a plain file of nobody's, mode 0644."""
    if size >= LARGEST_MEMBER:
        raise Unsupported(
            f"{name} would have {size} bytes; a file in an OVA has less than 8 GiB", "make the disk smaller"
        )
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        b"%011o\0" % size,
        b"%011o\0" % epoch,
        b" " * 8,
        b"0".ljust(101, b"\0"),
        b"ustar\x0000",
    )
    head = b"".join(fields).ljust(BLOCK, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def padded(size: int) -> int:
    """Bytes that a member of `size` bytes takes, whole blocks."""
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Member:
    """A file in the archive and what its header says."""

    name: str
    header_at: int
    offset: int
    size: int
    kind: str
    owner: tuple[int, int]


@dataclass
class Archive:
    """The members of an OVA by position; nothing is ever unpacked."""

    reader: BoundedReader
    members: list[Member] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        offset = 0
        while offset + BLOCK <= self.reader.size:
            head = self.reader.read(offset, BLOCK)
            if not any(head):
                return
            member = self._member(head, offset)
            self.members.append(member)
            if len(self.members) > 1000:
                raise Damaged(at(offset), "more than 1000 files in an OVA", VSPHERE)
            offset = member.offset + padded(member.size)
        self.findings.append(
            Finding(
                "error",
                at(self.reader.size),
                "the archive has no end",
                VSPHERE,
                "copy the file again: it is cut off",
            )
        )

    def _member(self, head: bytes, offset: int) -> Member:
        try:
            stored, size = octal(head[148:156]), octal(head[124:136])
            owner = (octal(head[108:116]), octal(head[116:124]))
        except ValueError:
            raise Damaged(at(offset), "a tar header holds numbers that are not octal", VSPHERE) from None
        if stored != sum(head[:148]) + 8 * 32 + sum(head[156:]):
            raise Damaged(at(offset + 148), "a tar header's checksum is wrong", VSPHERE)
        if offset + BLOCK + size > self.reader.size:
            raise Damaged(
                at(offset + 124), f"a file of {size} bytes reaches past the end of the archive", VSPHERE
            )
        prefix = head[345:500].split(b"\0")[0] if head.startswith(b"ustar\0", 257) else b""
        name = b"/".join(filter(None, (prefix, head[:100].split(b"\0")[0]))).decode("utf-8", "replace")
        return Member(name, offset, offset + BLOCK, size, head[156:157].decode("latin-1"), owner)

    def find(self, suffix: str) -> Member | None:
        """First member whose name ends so."""
        return next((member for member in self.members if member.name.lower().endswith(suffix)), None)

    def window(self, member: Member) -> BoundedReader:
        """The bytes of a member."""
        return self.reader.window(member.offset, member.size)


def octal(field: bytes) -> int:
    """A number of a tar header, octal digits among blanks and zero bytes; ValueError for anything else."""
    digits = field.strip(b"\0 ")
    if not re.fullmatch(rb"[0-7]*", digits):  # Python's int() would take signs, underscores and 0o
        raise ValueError(f"{field!r} is not octal")
    return int(digits or b"0", 8)


def is_tar(head: bytes) -> bool:
    """Whether a file begins with a tar header; an old one has no magic, its checksum tells."""
    try:
        stored = octal(head[148:156])
    except ValueError:
        stored = -1
    old = len(head) >= 512 and stored == sum(head[:148]) + 8 * 32 + sum(head[156:512])
    return head[257:262] == b"ustar" or old
