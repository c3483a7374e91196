"""VDI 1.1, dynamic, for VirtualBox.

Layout and fields follow VirtualBox's VDICore.h (VDIHEADER1PLUS) and QEMU's block/vdi.c. Little-endian; blocks
of 1 MiB, named by their place among the stored ones. All but the blocks lies in front.
"""

from __future__ import annotations

import itertools
import struct
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from build.formats.lib import pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.format import Format, Kind, Machine, Match, Options, Target
from build.formats.lib.platforms import EVERY_IMPORTER, EVERY_READER, KVM, QEMU, VIRTUALBOX
from build.formats.lib.reader import BoundedReader
from build.formats.lib.words import pack_words, read_words
from build.formats.lib.writer import Units, derive, put

SECTOR = 512
BLOCK = 1 << 20
SIGNATURE = 0xBEDA107F
ABSENT, DISCARDED = 0xFFFFFFFF, 0xFFFFFFFE
"""Both read as zeros."""
LARGEST = 0x3FFFFFFF * BLOCK
"""Bytes of the largest disk that QEMU opens (VDI_BLOCKS_IN_IMAGE_MAX)."""
MAP = SECTOR
_TITLE = b"<<< Oracle VM VirtualBox Disk Image >>>\n"
_HEADER = struct.Struct("<64sIIIII256sII16sIQIIII16s16s16s16s16s40x")
_DYNAMIC, _STATIC, _DIFFERENCE = 1, 2, 4
_MOST_BLOCKS = 1 << 24
"""Of a file that we read: a table of 64 MiB."""

GROUP = Group("VDI", "VDI", "VirtualBox, VDICore.h; QEMU, block/vdi.c")
_VIRTUALBOX, _BOTH, _READER = (VIRTUALBOX,), (VIRTUALBOX, QEMU), (EVERY_READER,)
_AGAIN = "convert it again"
NO_HEADER = Damage("VDI001", "no VDI header here", _VIRTUALBOX)
OTHER_VERSION = Damage("VDI002", "version {version} is not 1.1", _VIRTUALBOX, "open it once in VirtualBox")
UNKNOWN_TYPE = Damage("VDI003", "a VDI of the unknown type {type}", _VIRTUALBOX)
NEEDS_PARENT = Damage(
    "VDI004", "this VDI needs its parent disk", (EVERY_IMPORTER,), "clone it to one whole disk"
)
BLOCK_SIZE = Damage("VDI005", "blocks of {size} bytes", _BOTH)
BAD_SIZE = Damage("VDI006", "a virtual size of {size} bytes is not possible", _VIRTUALBOX)
FEW_BLOCKS = Damage("VDI007", "{count} blocks for a disk that needs {needed}", _BOTH)
OTHER_BLOCKS = Code("VDI008", "error", "blocks of {size} bytes", (QEMU, KVM), _AGAIN)
NO_UUID = Code("VDI009", "error", "the UUID is zero", _VIRTUALBOX, "give it a UUID")
OTHER_SECTORS = Code("VDI010", "error", "sectors are not of 512 bytes", _BOTH, "convert it")
UNALIGNED = Code("VDI011", "error", "table or data do not start on a sector", (QEMU,), _AGAIN)
PAST_END = Code(
    "VDI012", "error", "a block lies past the end of the file", _READER, "copy the file again", lossy=True
)
SHARED_PLACE = Code("VDI013", "error", "two blocks share one place", _READER, "copy it again", lossy=True)
OTHER_COUNT = Code(
    "VDI014", "warning", "the header counts {counted} blocks, the table {stored}", _VIRTUALBOX, _AGAIN
)


class Header(NamedTuple):
    """The first sector."""

    title: bytes
    signature: int
    version: int
    length: int
    type: int
    flags: int
    comment: bytes
    map_at: int
    data_at: int
    geometry: bytes
    unused: int
    size: int
    block: int
    extra: int
    blocks: int
    allocated: int
    uuid: bytes
    modified: bytes
    link: bytes
    parent: bytes
    logical_geometry: bytes


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that cannot be a VDI."""
    if size % SECTOR or not size:
        raise Unsupported(
            f"a VDI must be whole sectors of 512 bytes, the disk has {size} bytes", "build the disk again"
        )
    if size > LARGEST:
        raise Unsupported("a VDI holds at most 1 PiB", "make SIZE smaller")


class VdiWriter:
    """Writes blocks in rising order behind room for the table, which comes last."""

    codec = None

    def __init__(self, file: BinaryIO, size: int) -> None:
        check_size(size)
        self.file, self.size = file, size
        self.map = array("I", [ABSENT]) * -(-size // BLOCK)
        self.data_at = -(-(MAP + 4 * len(self.map)) // BLOCK) * BLOCK
        self.stored = 0
        file.seek(self.data_at)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the blocks of a piece; zero blocks are left out."""
        first = index * (pieces.PIECE // BLOCK)
        for number, start in enumerate(range(0, len(data), BLOCK), first):
            block = data[start : start + BLOCK]
            if pieces.is_zero(block):
                continue
            self.map[number] = self.stored
            self.stored += 1
            self.file.write(block.ljust(BLOCK, b"\0"))

    def close(self, seed: str) -> None:
        """Write header and table."""
        self.file.truncate(self.data_at + self.stored * BLOCK)
        put(self.file, 0, self._header(seed))
        put(self.file, MAP, pack_words(self.map, "little"))

    def _header(self, seed: str) -> bytes:
        geometry = struct.pack("<IIII", 0, 0, 0, SECTOR)  # VirtualBox computes its own from zeros
        return _HEADER.pack(
            _TITLE,
            SIGNATURE,
            0x00010001,
            0x190,
            _DYNAMIC,
            0,
            b"",
            MAP,
            self.data_at,
            geometry,
            0,
            self.size,
            BLOCK,
            0,
            len(self.map),
            self.stored,
            derive(seed, "vdi image").bytes_le,
            derive(seed, "vdi modification").bytes_le,
            bytes(16),
            bytes(16),
            geometry,
        )


@dataclass
class VdiDisk:
    """Reads a dynamic or fixed VDI of any maker that has no parent."""

    reader: BoundedReader

    def __post_init__(self) -> None:
        header = self.header = Header(*_HEADER.unpack(self.reader.read(0, SECTOR)))
        if header.signature != SIGNATURE:
            raise Damaged(NO_HEADER, at(64))
        if header.version >> 16 != 1:
            version = f"{header.version >> 16}.{header.version & 0xFFFF}"
            raise Damaged(OTHER_VERSION, at(68), version=version)
        if not _DYNAMIC <= header.type <= _DIFFERENCE:
            raise Damaged(UNKNOWN_TYPE, at(76), type=header.type)
        if header.type > _STATIC or any(header.link) or any(header.parent):
            raise Damaged(NEEDS_PARENT, at(76))
        if header.block < SECTOR or header.block & (header.block - 1) or header.block > 256 << 20:
            raise Damaged(BLOCK_SIZE, at(376), size=header.block)
        self.size = header.size
        needed = -(-self.size // header.block)
        if not self.size or self.size % SECTOR or needed > _MOST_BLOCKS:
            raise Damaged(BAD_SIZE, at(368), size=self.size)
        if header.blocks < needed:
            raise Damaged(FEW_BLOCKS, at(384), count=header.blocks, needed=needed)
        self.map = read_words("I", self.reader.read(header.map_at, 4 * needed), "little")

    def place(self, block: int) -> int:
        """Offset of a stored block's data in the file; 0 when it reads as zeros."""
        stored = self.map[block]
        if stored >= DISCARDED:
            return 0
        return self.header.data_at + stored * (self.header.block + self.header.extra) + self.header.extra

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece; None when no block of it is stored."""
        start, wanted = index * pieces.PIECE, pieces.length(index, self.size)
        size = self.header.block
        parts = []
        for block in range(start // size, -(-(start + wanted) // size)):
            low, high = max(start, block * size), min(start + wanted, (block + 1) * size)
            place = self.place(block)
            parts.append(self.reader.read(place + low - block * size, high - low) if place else high - low)
        if all(isinstance(part, int) for part in parts):
            return None
        return b"".join(bytes(part) if isinstance(part, int) else part for part in parts)

    def facts(self) -> dict[str, str]:
        """Kind, id and blocks, as the header tells them."""
        header = self.header
        stored = len(self.map) - self.map.count(ABSENT) - self.map.count(DISCARDED)
        return {
            "type": "fixed" if header.type == _STATIC else "dynamic",
            "uuid": str(uuid.UUID(bytes_le=header.uuid)),
            "blocks": f"{stored} of {len(self.map)}, {header.block} bytes each",
        }


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check header and table as VirtualBox and QEMU do."""
    disk = VdiDisk(reader)
    yield from _lint_header(disk)
    yield from _lint_map(disk)


def _lint_header(disk: VdiDisk) -> Iterator[Finding]:
    header = disk.header
    if header.block != BLOCK:
        yield Finding(OTHER_BLOCKS, at(376), size=header.block)
    if not any(header.uuid):
        yield Finding(NO_UUID, at(392))
    if int.from_bytes(header.geometry[12:], "little") != SECTOR:
        yield Finding(OTHER_SECTORS, at(360))
    if header.map_at % SECTOR or header.data_at % SECTOR:
        yield Finding(UNALIGNED, at(340))


def _lint_map(disk: VdiDisk) -> Iterator[Finding]:
    header = disk.header
    span = header.block + header.extra
    stored = array("Q")
    for block, number in enumerate(disk.map):
        if number >= DISCARDED:
            continue
        if header.data_at + (number + 1) * span > disk.reader.size:
            yield Finding(PAST_END, at(header.map_at + 4 * block))
        stored.append(number << 32 | block)
    for low, high in itertools.pairwise(sorted(stored)):
        if low >> 32 == high >> 32:
            yield Finding(SHARED_PLACE, at(header.map_at + 4 * (high & 0xFFFFFFFF)))
    if header.allocated != len(stored):
        yield Finding(OTHER_COUNT, at(388), counted=header.allocated, stored=len(stored))


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.CERTAIN if head[64:68] == SIGNATURE.to_bytes(4, "little") else Match.NO


def _write(target: Target, options: Options) -> VdiWriter:
    return VdiWriter(target.file, target.size)


KIND = Kind(
    name="vdi",
    suffix="vdi",
    version=1,
    driver="vdi",
    recognize=_recognize,
    write=_write,
    read=VdiDisk,
    lint=lint,
    check_size=check_size,
)
FORMATS = (
    Format(
        name="vdi",
        help="VDI for VirtualBox",
        kind=KIND,
        file="{imagename}.vdi",
        machine=Machine("ahci", "e1000", ("bios", "uefi")),  # what VirtualBox gives a new Linux machine
    ),
)
