"""Tar archives by position: what an OVA is, and other ways to hand over a disk. Nothing is ever unpacked.

Layouts: ustar and pax from POSIX.1-2001 (pax, "ustar Interchange Format" and "pax Header Block"); GNU's
numbers in base 256, long names and sparse members from GNU tar's manual ("Basic Tar Format", "Storing
Sparse Files"); the form before them, of Unix Version 7, has the fields up to the link's name.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from build.formats.lib import pieces
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.inner import Inner
from build.formats.lib.platforms import EVERY_READER, VSPHERE, Affected
from build.formats.lib.reader import BoundedReader

BLOCK = 512
RECORD = 10240
LARGEST_MEMBER = 8 << 30
"""Bytes of a file from which on its size has no place in eleven octal digits."""
MOST_MEMBERS = 1000
_LARGEST_EXTENSION = 1 << 20
"""Bytes of a long name or of pax records; real ones have some hundreds."""
_MOST_EXTENSIONS = 8
"""Headers of this kind in front of one file; there are two or three."""
_LONGEST_NAME = 4096
_LARGEST_SPARSE = 64 << 40
"""Bytes of a sparse file, as many as the largest disk of any format has."""
_KEYS = ("path", "size", "uid", "gid", "sparse")
"""Pax records that matter here; `sparse` stands for all of GNU tar's about holes."""
_MOST_EXTENTS = 1 << 20
"""Parts of a sparse file; GNU tar makes one for each run of blocks that are not zero."""
_OCTAL = re.compile(rb"[0-7]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ")

Form = Literal["ustar", "v7", "gnu", "pax"]
_FORMS: tuple[Form, ...] = ("ustar", "v7", "gnu", "pax")
"""From the one that every importer takes to the one that the fewest take."""

GROUP = Group("TAR", "Tar archives, of an OVA, a box, an export", "POSIX.1-2001; GNU tar's manual")
_READER = (EVERY_READER,)
_COPY = "copy the file again: it is cut off or damaged"
NO_FILE = Damage("TAR001", "long names or pax headers follow each other without a file")
CHECKSUM = Damage("TAR002", "a tar header's checksum is wrong", _READER, _COPY)
LONG_EXTENSION = Damage("TAR003", "a name or pax header of {size} bytes", _READER, _COPY)
BAD_RECORD = Damage("TAR004", "a pax header holds a record that is none", _READER, _COPY)
PAX_SPARSE = Damage(
    "TAR005",
    "a file is stored without its holes in pax form, which is not read here",
    (Affected("reader", case="but GNU tar"),),
    "pack it with --format=ustar and without --sparse",
)
LARGE_SPARSE = Damage("TAR006", "a sparse file of {size} bytes", _READER, _COPY)
CUT_MEMBER = Damage("TAR007", "a file of {size} bytes reaches past the end of the archive", _READER, _COPY)
LONG_NAME = Damage("TAR008", "a name of {count} characters", _READER, _COPY)
BAD_PAX_NUMBER = Damage("TAR009", "the pax header's {key} is no number", _READER, _COPY)
BAD_NUMBER = Damage(
    "TAR010", "a tar header holds numbers that are neither octal nor base 256", _READER, _COPY
)
NEGATIVE = Damage("TAR011", "a size of {size} bytes", _READER, _COPY)
MANY_PARTS = Damage("TAR012", "a sparse file of more than {most} parts")
BAD_MAP = Damage("TAR013", "the map of a sparse file is no map", _READER, _COPY)
SHORT_SPARSE = Damage("TAR014", "a sparse file is longer than its content", _READER, _COPY)
MANY_MEMBERS = Damage("TAR015", "more than {most} files in the archive", (VSPHERE,))
NO_END = Code("TAR016", "error", "the archive has no end", (VSPHERE,), _COPY, repair="end")


def member_header(name: str, size: int, epoch: int) -> bytes:
    """The header of a plain file of nobody's, mode 0644: ustar, or GNU's where a size has no room in that.

    vSphere's importers take both (vmware/open-vmdk, pull request 65).
    """
    large = size >= LARGEST_MEMBER
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        b"\x80" + size.to_bytes(11, "big") if large else b"%011o\0" % size,
        b"%011o\0" % epoch,
        b" " * 8,
        b"0".ljust(101, b"\0"),
        b"ustar  \0" if large else b"ustar\x0000",
    )
    head = b"".join(fields).ljust(BLOCK, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def padded(size: int) -> int:
    """Bytes that a member of `size` bytes takes, whole blocks."""
    return -(-size // BLOCK) * BLOCK


def archive_size(end: int) -> int:
    """Bytes of an archive whose members take `end`: two blocks of zeros follow, to whole records."""
    return -(-(end + 2 * BLOCK) // RECORD) * RECORD


@dataclass(frozen=True)
class Member:
    """A file in the archive and what its headers say."""

    name: str
    header_at: int
    """Of its own header, behind those with its long name or pax records."""
    offset: int
    size: int
    """Bytes that are stored."""
    kind: str
    """Type flag: `0` or a zero byte for a plain file, `S` for one that GNU tar stored without its holes."""
    owner: tuple[int, int]
    form: Form = "ustar"
    virtual_size: int | None = None
    """Bytes of a sparse file with its holes; None for others."""


@dataclass
class Walk:
    """The members of an archive one by one, none kept; raises Damaged."""

    reader: BoundedReader
    ended: bool = False
    """Whether the archive's end was met; False while there is more, and when it is cut off."""

    def __iter__(self) -> Iterator[Member]:
        offset, names = 0, _Extensions()
        shared: dict[str, bytes] = {}
        while offset + BLOCK <= self.reader.size:
            head = self.reader.read(offset, BLOCK)
            if head[0] == 0 and not any(head):
                self.ended = True
                return
            kind, form = _check(head, offset)
            if kind in b"LKxgX":
                content, offset = _extension(self.reader, head, offset)
                if kind == b"g":
                    shared |= _records(content, offset)
                else:
                    names.add(kind, content, offset)
                names.form = "gnu" if kind in b"LK" and names.form != "pax" else "pax"
                continue
            member = _member(self.reader, head, offset, form, names, {**shared, **names.records})
            names = _Extensions()
            yield member
            offset = member.offset + padded(member.size)


@dataclass
class _Extensions:
    """What stands in front of a member and belongs to it."""

    name: bytes = b""
    records: dict[str, bytes] = field(default_factory=dict)
    form: Form | None = None
    count: int = 0

    def add(self, kind: bytes, content: bytes, offset: int) -> None:
        self.count += 1
        if self.count > _MOST_EXTENSIONS:
            raise Damaged(NO_FILE, at(offset))
        if kind == b"L":
            self.name = content.split(b"\0")[0]
        elif kind != b"K":
            self.records |= _records(content, offset)


def _check(head: bytes, offset: int) -> tuple[bytes, Form]:
    """Type flag and form of a header whose checksum is right; raises Damaged."""
    try:
        stored = octal(head[148:156])
    except ValueError:
        stored = -1
    if stored not in _sums(head):
        raise Damaged(CHECKSUM, at(offset + 148))
    magic = head[257:265]
    form: Form = "ustar" if magic[:6] == b"ustar\0" else "gnu" if magic[:6] == b"ustar " else "v7"
    return head[156:157], form


def _sums(head: bytes) -> tuple[int, int]:
    """The checksum with bytes as they are, and as some old tars add them: with their sign."""
    blank = head[:148] + b" " * 8 + head[156:BLOCK]
    plain = sum(blank)
    return plain, plain - 256 * sum(byte > 127 for byte in blank) if not blank.isascii() else plain


def _extension(reader: BoundedReader, head: bytes, offset: int) -> tuple[bytes, int]:
    """Content of a header that says more of the next, and the offset behind it."""
    size = _field(head, 124, 12, offset)
    if size > _LARGEST_EXTENSION:
        raise Damaged(LONG_EXTENSION, at(offset + 124), size=size)
    return reader.read(offset + BLOCK, size), offset + BLOCK + padded(size)


def _records(content: bytes, offset: int) -> dict[str, bytes]:
    """The records of a pax header, `LENGTH KEY=VALUE` and a line end each; raises Damaged."""
    records, start = {}, 0
    while start < len(content) and content[start]:
        match = _RECORD.match(content, start)
        end = start + int(match[1]) if match else 0
        key, found, value = content[match.end() : end - 1].partition(b"=") if match else (b"", b"", b"")
        if not found or end > len(content) or content[end - 1 : end] != b"\n":
            raise Damaged(BAD_RECORD, at(offset))
        name = "sparse" if key.startswith(b"GNU.sparse.") else key.decode("utf-8", "replace")
        if name in _KEYS:
            records[name] = value
        start = end
    return records


def _member(
    reader: BoundedReader,
    head: bytes,
    offset: int,
    form: Form,
    names: _Extensions,
    records: Mapping[str, bytes],
) -> Member:
    if "sparse" in records:
        raise Damaged(PAX_SPARSE, at(offset))
    kind = head[156:157].decode("latin-1")
    size = _decimal(records, "size", offset, _field(head, 124, 12, offset))
    if kind in "123456":  # links, devices and folders have no content, whatever stands there
        size = 0
    start, whole = offset + BLOCK, None
    if kind == "S":
        whole = _field(head, 483, 12, offset)
        if whole > _LARGEST_SPARSE:
            raise Damaged(LARGE_SPARSE, at(offset + 483), size=whole)
        start = _behind_map(reader, head, offset)
    if start + size > reader.size:
        raise Damaged(CUT_MEMBER, at(offset + 124), size=size)
    owner = (
        _decimal(records, "uid", offset, _field(head, 108, 8, offset, negative=True)),
        _decimal(records, "gid", offset, _field(head, 116, 8, offset, negative=True)),
    )
    prefix = head[345:500].split(b"\0")[0] if form == "ustar" else b""
    plain = b"/".join(filter(None, (prefix, head[:100].split(b"\0")[0])))
    name = (records.get("path") or names.name or plain).decode("utf-8", "replace")
    if len(name) > _LONGEST_NAME:
        raise Damaged(LONG_NAME, at(offset), count=len(name))
    large = form == "ustar" and any(head[place] & 0x80 for place in (108, 116, 124))
    form = names.form or ("pax" if records else "gnu" if large else form)
    return Member(name, offset, start, size, kind, owner, form, whole)


def _decimal(records: Mapping[str, bytes], key: str, offset: int, usual: int) -> int:
    value = records.get(key)
    if not value:  # an empty one takes a value of a global header back
        return usual
    if not re.fullmatch(rb"[0-9]{1,20}", value):
        raise Damaged(BAD_PAX_NUMBER, at(offset), key=key)
    return int(value)


def _field(head: bytes, start: int, length: int, offset: int, negative: bool = False) -> int:
    try:
        value = number(head[start : start + length])
    except ValueError:
        raise Damaged(BAD_NUMBER, at(offset + start)) from None
    if value < 0 and not negative:
        raise Damaged(NEGATIVE, at(offset + start), size=value)
    return value


def _behind_map(reader: BoundedReader, head: bytes, offset: int) -> int:
    """Where the content of a sparse member begins: behind the blocks that go on with its map."""
    start, more = offset + BLOCK, head[482]
    while more:
        more = reader.read(start, BLOCK)[504]
        start += BLOCK
        if start - offset > _MOST_EXTENTS // 21 * BLOCK:
            raise Damaged(MANY_PARTS, at(offset), most=_MOST_EXTENTS)
    return start


class SparseFile:
    """A disk that GNU tar stored without its holes, piece by piece; raises Damaged."""

    def __init__(self, reader: BoundedReader, member: Member) -> None:
        self.reader = reader.window(member.offset, member.size)
        self.size = member.virtual_size or 0
        self.places, self.stored = array("Q"), array("Q", [0])
        end = 0
        for place, length in _extents(reader, member):
            if place < end or place + length > self.size:
                raise Damaged(BAD_MAP, at(member.header_at + 386))
            end = place + length
            self.places.append(place)
            self.stored.append(self.stored[-1] + length)
            if self.stored[-1] > member.size:
                raise Damaged(SHORT_SPARSE, at(member.header_at + 386))

    def piece(self, index: int) -> bytes | None:
        """Bytes of a piece; None for a hole."""
        start, length = index * pieces.PIECE, pieces.length(index, self.size)
        first = max(bisect_right(self.places, start) - 1, 0)
        out: bytearray | None = None
        for number in range(first, len(self.places)):
            place, begin = self.places[number], self.stored[number]
            if place >= start + length:
                break
            low, high = max(place, start), min(place + self.stored[number + 1] - begin, start + length)
            if low < high:
                out = bytearray(length) if out is None else out
                out[low - start : high - start] = self.reader.read(begin + low - place, high - low)
        return None if out is None else bytes(out)

    def facts(self) -> dict[str, str]:
        """Nothing: it is a raw disk."""
        return {}


def _extents(reader: BoundedReader, member: Member) -> Iterator[tuple[int, int]]:
    """Place and length of each part: four in the header, 21 in every block that goes on with the map."""
    head = reader.read(member.header_at, BLOCK)
    rest = reader.read(member.header_at + BLOCK, member.offset - member.header_at - BLOCK)
    tables = [head[386:482], *(rest[start : start + 504] for start in range(0, len(rest), BLOCK))]
    for table in tables:
        for start in range(0, len(table), 24):
            if not table[start + 12]:  # a length, be it of nothing, begins with a digit
                return
            place = _field(table, start, 12, member.header_at)
            yield place, _field(table, start + 12, 12, member.header_at)


@dataclass
class Archive:
    """The members of an archive by position; nothing is ever unpacked."""

    reader: BoundedReader
    members: list[Member] = field(default_factory=list)
    """Files, folders and links; headers that only say more of the next one are none."""
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        walk = Walk(self.reader)
        for member in walk:
            self.members.append(member)
            if len(self.members) > MOST_MEMBERS:
                raise Damaged(MANY_MEMBERS, at(member.header_at), most=MOST_MEMBERS)
        if not walk.ended:
            self.findings.append(no_end(self.reader))

    @property
    def form(self) -> Form:
        """Of the header that the fewest readers take: ustar, v7, gnu or pax."""
        return max((member.form for member in self.members), key=_FORMS.index, default="ustar")

    def find(self, suffix: str) -> Member | None:
        """First member whose name ends so."""
        return next((member for member in self.members if member.name.lower().endswith(suffix)), None)

    def window(self, member: Member) -> BoundedReader:
        """The bytes of a member as they are stored."""
        return self.reader.window(member.offset, member.size)

    def inner(self, member: Member) -> Inner:
        """A member as a disk image, also one that is stored without its holes; raises Damaged."""
        if member.virtual_size is None:
            return Inner(member.name, (self.window(member),))
        return Inner(member.name, (), disk=SparseFile(self.reader, member))


def no_end(reader: BoundedReader) -> Finding:
    """What to say of an archive that stops without its two blocks of zeros."""
    return Finding(NO_END, at(reader.size))


def octal(field: bytes) -> int:
    """A number of a tar header, octal digits among blanks and zero bytes; ValueError for anything else."""
    digits = field.strip(b"\0 ")
    if not _OCTAL.fullmatch(digits):  # Python's int() would take signs, underscores and 0o
        raise ValueError(f"{field!r} is not octal")
    return int(digits or b"0", 8)


def number(field: bytes) -> int:
    """A number of a tar header: octal, or GNU's, whose first bit is set, in base 256 with a sign."""
    if field[0] & 0x80:
        return int.from_bytes(
            bytes((field[0] & 0x7F | (field[0] & 0x40) << 1,)) + field[1:], "big", signed=True
        )
    return octal(field)


def is_tar(head: bytes) -> bool:
    """Whether a file begins with a tar header; an old one has no magic, its checksum tells."""
    try:
        stored = octal(head[148:156])
    except ValueError:
        stored = -1
    return head[257:262] == b"ustar" or (len(head) >= BLOCK and stored in _sums(head))
