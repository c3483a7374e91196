"""The structures of a VHD and their reader: footer, dynamic header, block table.

Microsoft's "Virtual Hard Disk Image Format Specification" 1.0; big-endian, and a block is 2 MiB as a rule.
"""

from __future__ import annotations

import math
import struct
import time
import uuid
from array import array
from dataclasses import dataclass
from typing import Literal, NamedTuple

from build.formats.lib import pieces
from build.formats.lib.findings import Damage, Damaged, Group, at
from build.formats.lib.platforms import EVERY_IMPORTER, HYPERV, XENSERVER, Affected
from build.formats.lib.reader import BoundedReader
from build.formats.lib.words import read_words
from build.formats.lib.writer import derive

SECTOR = 512
BLOCK = pieces.PIECE
EPOCH_2000 = 946684800
STAMP = 1262304000 - EPOCH_2000
"""2010-01-01 UTC in VHD's seconds since 2000. Fixed, because XenServer refuses a file "from the future" and
an operator's host may have a clock that lags behind the build host's by years."""
ABSENT = 0xFFFFFFFF
MOST_BLOCKS = 1 << 21
_LAST_EXACT = 32_130
"""MiB of the largest disk of a size that is a multiple of 63 MiB and exact."""
_TAIL = 1 << 20
"""Bytes at the end in which a footer is looked for that is not the last sector."""
TABLE = 1536

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sBB426x")
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256x")

GROUP = Group(
    "VHD",
    "VHD",
    "Microsoft, Virtual Hard Disk Image Format Specification 1.0; libvhd of XenServer's blktap; QEMU, vpc.c",
)
_TEMPLATES = (Affected("importer", case="of templates"),)
_WHOLE = "export it as one whole disk"
SHORT_FIXED = Damage("VHD001", "a fixed VHD of {size} bytes has {data} bytes of data")
NEEDS_PARENT = Damage("VHD002", "this VHD needs its parent disk{parent}", _TEMPLATES, _WHOLE)
UNKNOWN_TYPE = Damage("VHD003", "this VHD has the unknown type {type}", _TEMPLATES, _WHOLE)
NO_FOOTER = Damage("VHD004", "no VHD footer here", (XENSERVER, HYPERV))
NO_HEADER = Damage("VHD005", "no dynamic header (cxsparse) here")
BLOCK_SIZE = Damage("VHD006", "block size {size} is not a power of two from 512 bytes to 256 MiB")
FEW_ENTRIES = Damage("VHD007", "{count} table entries for a disk of {needed} blocks")
MANY_BLOCKS = Damage("VHD008", "{count} blocks are more than any importer takes", (EVERY_IMPORTER,))

CREATORS = {"xen": (b"tap\0", 0x00010003, b"\0\0\0\0"), "hyperv": (b"win ", 0x00060003, b"Wi2k")}


class Footer(NamedTuple):
    """The 512 bytes at the end of every VHD, copied to its head when it is dynamic."""

    cookie: bytes
    features: int
    version: int
    data_offset: int
    timestamp: int
    creator: bytes
    creator_version: int
    creator_os: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    sectors: int
    type: int
    checksum: int
    uuid: bytes
    saved: int
    hidden: int

    def pack(self) -> bytes:
        """Bytes of the footer, its checksum made anew."""
        blank = _FOOTER.pack(*self._replace(checksum=0))
        return _FOOTER.pack(*self._replace(checksum=checksum(blank)))


class Header(NamedTuple):
    """The dynamic header: where the block table lies and how large a block is."""

    cookie: bytes
    data_offset: int
    table_offset: int
    version: int
    entries: int
    block_size: int
    checksum: int
    parent_uuid: bytes
    parent_time: int
    reserved: int
    parent_name: bytes
    locators: bytes

    def pack(self) -> bytes:
        """Bytes of the header, its checksum made anew."""
        blank = _HEADER.pack(*self._replace(checksum=0))
        return _HEADER.pack(*self._replace(checksum=checksum(blank)))


def checksum(content: bytes) -> int:
    """One's complement of the sum of all bytes, 32 bits."""
    return ~sum(content) & 0xFFFFFFFF


def geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors a track of a disk of `size` bytes: the VHD specification's appendix."""
    sectors = min(-(-size // SECTOR), 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        track, heads = 255, 16
        return sectors // track // heads, heads, track
    track = 17
    tracks = sectors // track
    heads = max(4, -(-tracks // 1024))
    if tracks >= heads * 1024 or heads > 16:
        track, heads = 31, 16
        tracks = sectors // track
    if tracks >= heads * 1024:
        track, heads = 63, 16
        tracks = sectors // track
    return tracks // heads, heads, track


def cut(size: int) -> int:
    """Bytes at the end of a disk that a tool does not see which goes by the geometry."""
    return size - math.prod(geometry(size)) * SECTOR


def next_exact(size: int) -> int:
    """The next size in MiB, even, that the geometry tells exactly; 0 above the last one.

    They are the multiples of 126 MiB from 252 to 32,130 MiB; above, cylinders run out of their 16 bits and
    other sizes are exact by chance only.
    """
    for mib in range(-(-(size >> 20) // 2) * 2, _LAST_EXACT + 1, 2):
        if mib << 20 >= size and not cut(mib << 20):
            return mib
    return 0


def make_footer(size: int, creator: Literal["xen", "hyperv"], seed: str, fixed: bool = False) -> bytes:
    """The footer of a disk of `size` bytes."""
    name, version, system = CREATORS[creator]
    return Footer(
        cookie=b"conectix",
        features=2,
        version=0x00010000,
        data_offset=(1 << 64) - 1 if fixed else SECTOR,
        timestamp=STAMP,
        creator=name,
        creator_version=version,
        creator_os=system,
        original_size=size,
        current_size=size,
        cylinders=(chs := geometry(size))[0],
        heads=chs[1],
        sectors=chs[2],
        type=2 if fixed else 3,
        checksum=0,
        uuid=derive(seed, f"vhd {creator}{' fixed' if fixed else ''}").bytes,
        saved=0,
        hidden=0,
    ).pack()


def shown(creator: bytes) -> str:
    """A creator's name for people."""
    return creator.rstrip(b"\0 ").decode("latin-1") or "of no name"


@dataclass
class VhdDisk:
    """Reads a fixed or dynamic VHD of any maker, by its size field as XenServer and Hyper-V do."""

    reader: BoundedReader

    def __post_init__(self) -> None:
        self.footer, self.footer_at = read_footer(self.reader)
        self.size = self.footer.current_size
        self.header: Header | None = None
        self.bat: array[int] = array("I")
        if self.footer.type == 2:
            if self.size > self.footer_at:
                raise Damaged(SHORT_FIXED, at(self.footer_at + 48), size=self.size, data=self.footer_at)
        elif self.footer.type == 3:
            self.header = read_header(self.reader, self.footer.data_offset)
            self.bat = _read_bat(self.reader, self.header, self.footer)
            self.bitmap_size = -(-self.header.block_size // SECTOR // 8 // SECTOR) * SECTOR
        elif self.footer.type == 4:
            raise Damaged(NEEDS_PARENT, at(self.footer_at + 60), parent=self._parent())
        else:
            raise Damaged(UNKNOWN_TYPE, at(self.footer_at + 60), type=self.footer.type)

    def _parent(self) -> str:
        """The parent's name as the dynamic header has it, in words."""
        name = read_header(self.reader, self.footer.data_offset).parent_name.decode("utf-16-be", "replace")
        return f" {known}" if (known := name.split("\0")[0][:200]) else ""

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece; None when no block of it is allocated."""
        start, wanted = index * pieces.PIECE, pieces.length(index, self.size)
        if self.header is None:
            return None if self.reader.is_zero(start, wanted) else self.reader.read(start, wanted)
        block_size = self.header.block_size
        if block_size == pieces.PIECE:
            return self._part(index, 0, wanted)
        blocks = range(start // block_size, -(-(start + wanted) // block_size))
        if all(self.bat[block] == ABSENT for block in blocks):
            return None
        parts = []
        for block in blocks:
            low, high = max(start, block * block_size), min(start + wanted, (block + 1) * block_size)
            part = self._part(block, low - block * block_size, high - low)
            parts.append(bytes(high - low) if part is None else part)
        return b"".join(parts)

    def facts(self) -> dict[str, str]:
        """Kind, creator, id, time and geometry, as the footer tells them."""
        footer = self.footer
        version = f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}"
        facts = {
            "type": "fixed" if self.header is None else "dynamic",
            "creator": f"{shown(footer.creator)} {version}",
            "uuid": str(uuid.UUID(bytes=footer.uuid)),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(footer.timestamp + EPOCH_2000)),
            "geometry": f"{footer.cylinders}/{footer.heads}/{footer.sectors}",
        }
        if self.header is not None:
            used = len(self.bat) - self.bat.count(ABSENT)
            facts["blocks"] = f"{used} of {len(self.bat)}, {self.header.block_size} bytes each"
        return facts

    def _part(self, block: int, offset: int, length: int) -> bytes | None:
        sector = self.bat[block]
        if sector == ABSENT:
            return None
        bitmap = self.reader.read(sector * SECTOR, self.bitmap_size)
        data = self.reader.read(sector * SECTOR + self.bitmap_size + offset, length)
        first, last = offset // SECTOR, (offset + length - 1) // SECTOR
        if bitmap.count(0xFF, first // 8, last // 8 + 1) == last // 8 + 1 - first // 8:
            return data
        return b"".join(
            data[i * SECTOR : (i + 1) * SECTOR]
            if bitmap[(first + i) >> 3] & 0x80 >> ((first + i) & 7)
            else bytes(min(SECTOR, length - i * SECTOR))
            for i in range(last - first + 1)
        )


def read_footer(reader: BoundedReader) -> tuple[Footer, int]:
    """The footer at the end (511 bytes of some old tools, too), or near it, or the copy at the head."""
    for length in (512, 511):
        if reader.size >= 512:
            raw = reader.read(reader.size - length, length).ljust(512, b"\0")
            if raw.startswith(b"conectix"):
                return Footer(*_FOOTER.unpack(raw)), reader.size - length
    if place := buried_footer(reader):
        return Footer(*_FOOTER.unpack(reader.read(place, 512))), place
    raw = reader.read(0, 512)
    if raw.startswith(b"conectix"):
        return Footer(*_FOOTER.unpack(raw)), reader.size
    raise Damaged(NO_FOOTER, at(max(reader.size - 512, 0)))


def buried_footer(reader: BoundedReader) -> int:
    """Offset of a sound footer that something follows, as a copy in whole blocks leaves it; 0 for none."""
    tail = min(reader.size, _TAIL) // SECTOR * SECTOR
    start = reader.size // SECTOR * SECTOR - tail
    content = reader.read(start, tail)
    place = content.rfind(b"conectix")
    raw = content[place : place + 512]
    if place < 0 or start + place == 0 or place % SECTOR or len(raw) < 512:
        return 0
    return start + place if is_sound(raw) else 0


def is_sound(raw: bytes) -> bool:
    """Whether a footer's checksum is right."""
    return checksum(raw[:64] + bytes(4) + raw[68:]) == int.from_bytes(raw[64:68], "big")


def read_header(reader: BoundedReader, offset: int) -> Header:
    """The dynamic header; Damaged when no reader could go on from it."""
    header = Header(*_HEADER.unpack(reader.read(offset, 1024)))
    if header.cookie != b"cxsparse":
        raise Damaged(NO_HEADER, at(offset))
    size = header.block_size
    if size < SECTOR or size & (size - 1) or size > 256 << 20:
        raise Damaged(BLOCK_SIZE, at(offset + 32), size=size)
    return header


def _read_bat(reader: BoundedReader, header: Header, footer: Footer) -> array[int]:
    needed = -(-footer.current_size // header.block_size)
    if header.entries < needed:
        raise Damaged(FEW_ENTRIES, at(footer.data_offset + 28), count=header.entries, needed=needed)
    if needed > MOST_BLOCKS:
        raise Damaged(MANY_BLOCKS, at(footer.data_offset + 28), count=needed)
    return read_words("I", reader.read(header.table_offset, needed * 4), "big")
