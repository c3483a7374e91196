"""VHDX, dynamic, for Hyper-V.

Layout and fields follow Microsoft's [MS-VHDX]. Little-endian, GUIDs in mixed-endian form. We write blocks
of 2 MiB, an empty log and two identical region tables; everything but the payload fits in the first MiBs.
"""

from __future__ import annotations

import functools
import struct
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from build.crc32c import crc32c
from build.formats.lib import pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.format import Format, Kind, Machine, Match, Options, Target
from build.formats.lib.platforms import EVERY_IMPORTER, HYPERV, QEMU
from build.formats.lib.reader import BoundedReader
from build.formats.lib.words import pack_words, read_words
from build.formats.lib.writer import Units, derive, put

MIB = 1 << 20
KIB = 1 << 10
BLOCK = pieces.PIECE
LARGEST = 64 << 40
LARGEST_FILE = 65 << 40
"""Bytes of the largest disk and of any tables around it."""
_WINDOW = 1 << 16
"""Entries of the block table that are read at once."""
_KNOWN = 16
"""Bytes of the longest metadata item that we look at."""
HEADERS = (64 * KIB, 128 * KIB)
REGIONS = (192 * KIB, 256 * KIB)
_LOG, _METADATA, _BAT = MIB, 2 * MIB, 3 * MIB
ABSENT, FULL, PARTIAL = 0, 6, 7

_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGION = struct.Struct("<16sQII")
_ITEM = struct.Struct("<16sIIII")
BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
PAGE_83 = uuid.UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR = uuid.UUID("CDA348C7-445D-4471-9CC9-E9885251C556")

GROUP = Group("VHDX", "VHDX", "Microsoft, [MS-VHDX]")
_HYPERV, _BOTH = (HYPERV,), (HYPERV, QEMU)
_AGAIN, _COPY = "convert again", "copy the file again"
NO_IDENTIFIER = Damage("VHDX001", "no VHDX identifier here", _HYPERV)
LARGE_FILE = Damage("VHDX002", "{size} bytes are more than any VHDX has", _HYPERV)
LOG = Damage(
    "VHDX003",
    "the log has entries that were never replayed",
    (EVERY_IMPORTER,),
    "open the disk once in Hyper-V, which replays them, and export it again",
)
NO_REGION = Damage("VHDX004", "the region table names no {name}", _HYPERV)
SHORT_TABLE = Damage("VHDX005", "the block table has {size} bytes, the disk needs {needed}", _HYPERV)
NO_ITEM = Damage("VHDX006", "the metadata item {name} is missing", _HYPERV)
BLOCK_SIZE = Damage("VHDX007", "block size {size} is not a power of two from 1 to 256 MiB", _HYPERV)
NEEDS_PARENT = Damage("VHDX008", "this VHDX needs its parent disk", _HYPERV, "export it as one whole disk")
SECTOR_SIZE = Damage("VHDX009", "logical sectors of {size} bytes", _HYPERV)
BAD_SIZE = Damage("VHDX010", "virtual size {size} is not possible", _HYPERV)
PARTIAL_BLOCK = Damage("VHDX011", "block {block} lies partly in a parent disk", _HYPERV)
NO_SOUND_HEADER = Damage("VHDX012", "neither of the two headers is sound", _HYPERV)
NO_SOUND_REGIONS = Damage("VHDX013", "neither of the two region tables is sound", _HYPERV)
NO_METADATA = Damage("VHDX014", "no metadata table here", _HYPERV)
BAD_HEADER = Code("VHDX015", "error", "a header is damaged", _HYPERV, _COPY)
OTHER_VERSION = Code("VHDX016", "error", "version {version} instead of 1", _HYPERV, _AGAIN)
BAD_REGIONS = Code("VHDX017", "error", "a region table is damaged", _BOTH, _COPY)
RESERVED_STATE = Code("VHDX018", "error", "a block has the reserved state {state}", _HYPERV, _AGAIN)
PAST_END = Code("VHDX019", "error", "a block lies past the end of the file", _BOTH, _COPY, lossy=True)
OVER_TABLES = Code("VHDX020", "error", "a block lies over the file's own tables", _HYPERV, _AGAIN, lossy=True)
OVER_BLOCK = Code("VHDX021", "error", "a block clobbers another block", _HYPERV, _AGAIN, lossy=True)


class Header(NamedTuple):
    """One of the two headers; the one with the higher sequence number counts."""

    signature: bytes
    checksum: int
    sequence: int
    file_guid: bytes
    data_guid: bytes
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that cannot be a VHDX."""
    if size > LARGEST:
        raise Unsupported(
            f"a VHDX holds at most 64 TiB, the disk has {size / (1 << 40):.1f} TiB", "make SIZE smaller"
        )
    if size % 512 or not size:
        raise Unsupported(
            f"a VHDX must be whole sectors of 512 bytes, the disk has {size} bytes", "build the disk again"
        )


def _entries(blocks: int, ratio: int) -> int:
    """Table entries: a sector bitmap's after each `ratio` payload blocks."""
    return blocks + max(blocks - 1, 0) // ratio


def _ratio(block_size: int, sector: int = 512) -> int:
    return (1 << 23) * sector // block_size


class VhdxWriter:
    """Writes a dynamic VHDX: blocks in rising order, then table, metadata and headers."""

    codec = None

    def __init__(self, file: BinaryIO, size: int) -> None:
        check_size(size)
        self.file, self.size = file, size
        blocks = pieces.count(size)
        self.ratio = _ratio(BLOCK)
        self.bat = array("Q", bytes(8 * _entries(blocks, self.ratio)))
        self.bat_length = -(-len(self.bat) * 8 // MIB) * MIB
        self.position = _BAT + self.bat_length
        self.layout: list[tuple[int, int, int]] = []
        file.seek(self.position)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write a block that is not zero."""
        self.bat[index + index // self.ratio] = self.position | FULL
        self.layout.append((index, self.position, len(data)))
        self.file.write(data if len(data) == BLOCK else data.ljust(BLOCK, b"\0"))
        self.position += BLOCK

    def close(self, seed: str) -> None:
        """Write table, metadata, regions and headers."""
        self.file.truncate(self.position)
        put(self.file, _BAT, pack_words(self.bat, "little").ljust(self.bat_length, b"\0"))
        put(self.file, _METADATA, self._metadata(seed).ljust(MIB, b"\0"))
        region = _with_checksum(_regions(self.bat_length))
        for offset in REGIONS:
            put(self.file, offset, region)
        for sequence, offset in enumerate(HEADERS, 1):
            put(self.file, offset, self._header(seed, sequence))
        put(self.file, 0, b"vhdxfile" + "systemvm-builder".encode("utf-16-le"))

    def _header(self, seed: str, sequence: int) -> bytes:
        head = Header(
            b"head",
            0,
            sequence,
            derive(seed, "vhdx file").bytes_le,
            derive(seed, "vhdx data").bytes_le,
            bytes(16),
            0,
            1,
            MIB,
            _LOG,
        )
        return _with_checksum(_HEADER.pack(*head).ljust(4 * KIB, b"\0"))

    def _metadata(self, seed: str) -> bytes:
        items = (
            (FILE_PARAMETERS, struct.pack("<II", BLOCK, 0), 4),
            (DISK_SIZE, struct.pack("<Q", self.size), 6),
            (PAGE_83, derive(seed, "vhdx page 83").bytes_le, 6),
            (LOGICAL_SECTOR, struct.pack("<I", 512), 6),
            (PHYSICAL_SECTOR, struct.pack("<I", 4096), 6),
        )
        table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
        values, offset = b"", 64 * KIB
        for name, value, flags in items:
            table += _ITEM.pack(name.bytes_le, offset + len(values), len(value), flags, 0)
            values += value
        return table.ljust(64 * KIB, b"\0") + values


def _regions(bat_length: int) -> bytes:
    table = struct.pack("<4sIII", b"regi", 0, 2, 0)
    table += _REGION.pack(BAT.bytes_le, _BAT, bat_length, 1)
    table += _REGION.pack(METADATA.bytes_le, _METADATA, MIB, 1)
    return table.ljust(64 * KIB, b"\0")


def _with_checksum(block: bytes) -> bytes:
    """Fill the checksum at byte 4, computed over the block with that field zero."""
    return block[:4] + struct.pack("<I", crc32c(block)) + block[8:]


def _right(block: bytes) -> bool:
    return int.from_bytes(block[4:8], "little") == crc32c(block[:4] + bytes(4) + block[8:])


@dataclass
class VhdxDisk:
    """Reads a VHDX of any maker that has no parent and no log to replay."""

    reader: BoundedReader

    def __post_init__(self) -> None:
        if self.reader.read(0, 8) != b"vhdxfile":
            raise Damaged(NO_IDENTIFIER, at(0))
        if self.reader.size > LARGEST_FILE:
            raise Damaged(LARGE_FILE, at(LARGEST_FILE), size=self.reader.size)
        self.header, self.header_at = _newest_header(self.reader)
        if any(self.header.log_guid):
            raise Damaged(LOG, at(self.header_at + 48))
        self.regions = _read_regions(self.reader)
        for name, known in ((BAT, "block table"), (METADATA, "metadata")):
            if name not in self.regions:
                raise Damaged(NO_REGION, at(REGIONS[0]), name=known)
        self.items = _read_metadata(self.reader.window(*self.regions[METADATA]), self.regions[METADATA][0])
        self._read_parameters()
        blocks = -(-self.size // self.block_size)
        self.ratio = _ratio(self.block_size, self.sector)
        start, length = self.regions[BAT]
        needed = _entries(blocks, self.ratio) * 8
        if needed > length:
            raise Damaged(SHORT_TABLE, at(start), size=length, needed=needed)
        self.entries = needed // 8
        self.window = functools.lru_cache(maxsize=64)(self._read_window)

    def _read_parameters(self) -> None:
        start = self.regions[METADATA][0]

        def number(name: uuid.UUID, length: int) -> int:
            if name not in self.items or len(self.items[name]) < length:
                raise Damaged(NO_ITEM, at(start), name=str(name))
            return int.from_bytes(self.items[name][:length], "little")

        self.block_size = number(FILE_PARAMETERS, 4)
        if not MIB <= self.block_size <= 256 * MIB or self.block_size & (self.block_size - 1):
            raise Damaged(BLOCK_SIZE, at(start), size=self.block_size)
        if number(FILE_PARAMETERS, 8) >> 33 & 1:
            raise Damaged(NEEDS_PARENT, at(start))
        self.size = number(DISK_SIZE, 8)
        self.sector = number(LOGICAL_SECTOR, 4)
        if self.sector not in (512, 4096):
            raise Damaged(SECTOR_SIZE, at(start), size=self.sector)
        if not 0 < self.size <= LARGEST or self.size % self.sector:
            raise Damaged(BAD_SIZE, at(start), size=self.size)

    def _read_window(self, number: int) -> array[int]:
        """So many entries of the block table, which may have half a GiB in all; empty when all are zero."""
        start = number * _WINDOW
        raw = self.reader.read(self.regions[BAT][0] + 8 * start, 8 * min(_WINDOW, self.entries - start))
        return array("Q") if pieces.is_zero(raw) else read_words("Q", raw, "little")

    def entry(self, block: int) -> tuple[int, int]:
        """State and file offset of a payload block."""
        number, place = divmod(block + block // self.ratio, _WINDOW)
        window = self.window(number)
        value = window[place] if window else ABSENT
        return value & 7, value >> 20 << 20

    def stored(self) -> Iterator[tuple[int, int, int]]:
        """Number, state and file offset of every payload block that has an entry."""
        step = self.ratio + 1  # a sector bitmap's follows the entries of its blocks
        for number in range(-(-self.entries // _WINDOW)):
            for place, value in enumerate(self._read_window(number), number * _WINDOW):
                if value and place % step != self.ratio:
                    yield place - place // step, value & 7, value >> 20 << 20

    def facts(self) -> dict[str, str]:
        """Creator, id and block size."""
        creator = self.reader.read(8, 512).decode("utf-16-le", "replace").split("\0")[0]
        page_83 = self.items.get(PAGE_83, b"")
        return {
            "creator": creator if creator.isprintable() else "unknown",
            "uuid": str(uuid.UUID(bytes_le=page_83)) if len(page_83) == 16 else "none",
            "blocks": f"{self.block_size} bytes each",
            "sectors": f"{self.sector} bytes",
        }

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece; None when no block of it is allocated."""
        start, wanted = index * pieces.PIECE, pieces.length(index, self.size)
        blocks = range(start // self.block_size, -(-(start + wanted) // self.block_size))
        entries = [self.entry(block) for block in blocks]
        if not any(state in (FULL, PARTIAL) for state, _ in entries):
            return None
        parts = []
        for block, (state, offset) in zip(blocks, entries, strict=True):
            low = max(start, block * self.block_size)
            high = min(start + wanted, (block + 1) * self.block_size)
            if state == PARTIAL:
                where = at(self.regions[BAT][0])
                raise Damaged(PARTIAL_BLOCK, where, block=block)
            full = state == FULL
            parts.append(
                self.reader.read(offset + low - block * self.block_size, high - low)
                if full
                else bytes(high - low)
            )
        return b"".join(parts)


def _headers(reader: BoundedReader) -> list[tuple[int, Header, bool]]:
    """Both headers with their offsets and whether each is sound."""
    found = []
    for offset in HEADERS:
        raw = reader.read(offset, 4 * KIB)
        header = Header(*_HEADER.unpack_from(raw))
        found.append((offset, header, header.signature == b"head" and _right(raw)))
    return found


def _newest_header(reader: BoundedReader) -> tuple[Header, int]:
    sound = [(header.sequence, offset, header) for offset, header, right in _headers(reader) if right]
    if not sound:
        raise Damaged(NO_SOUND_HEADER, at(HEADERS[0]))
    _, offset, header = max(sound)
    return header, offset


def _read_regions(reader: BoundedReader) -> dict[uuid.UUID, tuple[int, int]]:
    for offset in REGIONS:
        raw = reader.read(offset, 64 * KIB)
        if not raw.startswith(b"regi") or not _right(raw):
            continue
        count = min(struct.unpack_from("<I", raw, 8)[0], 2047)
        rows = (_REGION.unpack_from(raw, 16 + 32 * row) for row in range(count))
        return {uuid.UUID(bytes_le=name): (start, length) for name, start, length, _ in rows}
    raise Damaged(NO_SOUND_REGIONS, at(REGIONS[0]))


def _read_metadata(region: BoundedReader, start: int) -> dict[uuid.UUID, bytes]:
    raw = region.read(0, 64 * KIB)
    if not raw.startswith(b"metadata"):
        raise Damaged(NO_METADATA, at(start))
    count = min(struct.unpack_from("<H", raw, 10)[0], 2047)
    items = {}
    for row in range(count):
        name, offset, length, _, _ = _ITEM.unpack_from(raw, 32 + 32 * row)
        items[uuid.UUID(bytes_le=name)] = region.read(offset, min(length, _KNOWN))
    return items


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check headers, regions, metadata and block table; libvhdi and QEMU overlook part of this."""
    for offset, header, right in _headers(reader):
        if not right:
            yield Finding(BAD_HEADER, at(offset))
        elif header.version != 1:
            yield Finding(OTHER_VERSION, at(offset + 66), version=header.version)
    tables = [reader.read(offset, 64 * KIB) for offset in REGIONS]
    for offset, raw in zip(REGIONS, tables, strict=True):
        if not raw.startswith(b"regi") or not _right(raw):
            yield Finding(BAD_REGIONS, at(offset))
    disk = VhdxDisk(reader)
    yield from _lint_bat(disk)


def _lint_bat(disk: VhdxDisk) -> Iterator[Finding]:
    start = disk.regions[BAT][0]
    heads = [(0, MIB), (disk.header.log_offset, disk.header.log_length), *disk.regions.values()]
    taken = bytearray(disk.reader.size // MIB + 1)
    for block, state, offset in disk.stored():
        if state < 4:
            continue
        where = at(start + 8 * (block + block // disk.ratio))
        if state in (4, 5):
            yield Finding(RESERVED_STATE, where, state=state)
        if state != FULL:
            continue
        if offset + disk.block_size > disk.reader.size:
            yield Finding(PAST_END, where)
            continue
        if any(offset < low + length and low < offset + disk.block_size for low, length in heads):
            yield Finding(OVER_TABLES, where)
        span = slice(offset // MIB, (offset + disk.block_size) // MIB)
        if any(taken[span]):
            yield Finding(OVER_BLOCK, where)
        taken[span] = b"\1" * (span.stop - span.start)


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.CERTAIN if head.startswith(b"vhdxfile") else Match.NO


def _write(target: Target, options: Options) -> VhdxWriter:
    return VhdxWriter(target.file, target.size)


KIND = Kind(
    name="vhdx",
    suffix="vhdx",
    version=1,
    driver="vhdx",
    recognize=_recognize,
    write=_write,
    read=VhdxDisk,
    lint=lint,
    check_size=check_size,
)
FORMATS = (
    Format(
        name="vhdx",
        help="VHDX for Hyper-V",
        kind=KIND,
        file="{imagename}.vhdx",
        machine=Machine("virtio-scsi", "e1000", ("uefi",)),  # generation 2: UEFI, SCSI; QEMU has no VMBus
    ),
)
