"""Partition tables as firmware and kernels see them, in a disk of any format.

GPT follows the UEFI specification (5, "GUID Partition Table Disk Layout"); MBR and the chain of logical
partitions what Linux reads (block/partitions/msdos.c). Both count in the disk's logical sectors.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from build.formats.lib import pieces
from build.formats.lib.findings import Code, Damaged, Finding, Group
from build.formats.lib.pieces import Disk
from build.formats.lib.platforms import EVERY_HYPERVISOR, UEFI

SECTOR = 512
OTHER = 4096
"""Bytes of the other logical sector that there is."""
BOOT_SIGNATURE = b"\x55\xaa"
"""At byte 510 of a disk that a BIOS boots, and of every boot record."""
_GPT = b"EFI PART"
_PROTECTIVE, _EXTENDED = 0xEE, (0x05, 0x0F, 0x85)
_MOST_LOGICAL = 128
_LARGEST_TABLE = 1 << 20
"""Bytes of partition entries that are read; 128 entries take 16 KiB."""
_FILE_SYSTEMS = ((3, b"NTFS    "), (3, b"EXFAT   "), (54, b"FAT"), (82, b"FAT32"))
"""Boot sectors that end as an MBR does; where its entries would be they hold code."""
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")

GROUP = Group(
    "PART", "Partition tables", "UEFI 5, GUID Partition Table Disk Layout; Linux, block/partitions/msdos.c"
)
_EVERYBODY = (EVERY_HYPERVISOR,)
_UEFI = (UEFI,)
_BUILD = "build the disk again"
NO_TABLE = Code("PART001", "info", "no partition table")
OTHER_SECTORS = Code(
    "PART002",
    "error",
    "the partition table counts in sectors of {counted} bytes, the disk shows {sector}: "
    "no partition would be seen",
    _EVERYBODY,
    "partition the disk for sectors of {sector} bytes",
    lossy=True,
)
CUT_OFF = Code(
    "PART003",
    "error",
    "the disk is cut off: the backup partition table should be in sector {backup}, the last one is {last}",
    _EVERYBODY,
    "copy the disk again, or build it again in this size",
    lossy=True,
)
LARGER = Code(
    "PART004",
    "info",
    "the disk is {count} sectors larger than its partition table says",
    fix="move the backup table when the disk has its final size (sfdisk --relocate gpt-bak-std)",
)
PAST_END = Code(
    "PART005",
    "error",
    "partition {number} ends at sector {end}, the disk has {count}",
    _EVERYBODY,
    "copy the disk again: it is cut off, or was made smaller",
    lossy=True,
)
NO_HEADER = Code("PART006", "error", "the {table}'s header is missing", _UEFI, _BUILD)
HEADER_LENGTH = Code("PART007", "error", "the {table}'s header says that it has {size} bytes", _UEFI, _BUILD)
HEADER_CHECKSUM = Code("PART008", "error", "the {table}'s checksum is wrong", _UEFI, _BUILD)
HEADER_PLACE = Code(
    "PART009", "error", "the {table}'s header says that it lies in sector {sector}", _UEFI, _BUILD
)
BAD_ENTRIES = Code("PART010", "error", "{count} partition entries of {size} bytes", _UEFI, _BUILD)
ENTRIES_CHECKSUM = Code("PART011", "error", "the partition entries' checksum is wrong", _UEFI, _BUILD)


class Gpt(NamedTuple):
    """A GPT header."""

    magic: bytes
    revision: int
    length: int
    checksum: int
    reserved: int
    own: int
    backup: int
    first: int
    last: int
    guid: bytes
    table: int
    entries: int
    entry_size: int
    table_checksum: int


def read_guest(disk: Disk, offset: int, length: int) -> bytes:
    """Guest-visible bytes at an offset, fewer at the disk's end."""
    out = b""
    while length > 0 and offset < disk.size:
        index, skip = divmod(offset, pieces.PIECE)
        data = disk.piece(index)
        if data is None:
            data = bytes(pieces.length(index, disk.size))
        part = data[skip : skip + length]
        out, offset, length = out + part, offset + len(part), length - len(part)
    return out


def starts(disk: Disk) -> list[int]:
    """First byte of each partition; of the disk, where it has no table. Raises Damaged."""
    sector: int = getattr(disk, "sector", SECTOR)
    if isinstance(header := _header(disk, sector, 1), Gpt) and 128 <= header.entry_size <= OTHER:
        length = min(header.entries * header.entry_size, _LARGEST_TABLE)
        table = read_guest(disk, header.table * sector, length)
        places = range(0, len(table) - header.entry_size + 1, header.entry_size)
        found = [struct.unpack_from("<Q", table, at + 32)[0] for at in places if any(table[at : at + 16])]
    else:
        found = [start for _, start, _ in _mbr(disk, sector)]
    return [start * sector for start in found] or [0]


def lint(disk: Disk) -> Iterator[Finding]:
    """Check the partition table; raises Damaged where the disk cannot be read."""
    sector: int = getattr(disk, "sector", SECTOR)  # only VHDX says that it has others
    head = read_guest(disk, 0, 2 * OTHER)
    if head.startswith(_GPT, sector):
        yield from _lint_gpt(disk, sector)
    elif head.startswith(_GPT, other := OTHER if sector == SECTOR else SECTOR):
        yield Finding(OTHER_SECTORS, f"guest byte {other:#x}", counted=other, sector=sector)
    elif head[510:512] != BOOT_SIGNATURE or any(head.startswith(name, at) for at, name in _FILE_SYSTEMS):
        yield Finding(NO_TABLE, "guest byte 0x1fe")
    else:
        yield from _lint_mbr(disk, sector)


def _lint_mbr(disk: Disk, sector: int) -> Iterator[Finding]:
    total = disk.size // sector
    for number, start, count in _mbr(disk, sector):
        if start + count > total:
            yield _past(
                f"guest byte {SECTOR - 66 + 16 * (min(number, 4) - 1):#x}", number, start + count, total
            )


def _mbr(disk: Disk, sector: int) -> Iterator[tuple[int, int, int]]:
    """Number, first sector and length in sectors of every partition, logical ones from 5 on."""
    for number, (kind, start, count) in enumerate(_rows(read_guest(disk, 0, SECTOR)), 1):
        if kind == _PROTECTIVE or not count:
            continue
        yield number, start, count
        if kind in _EXTENDED:
            yield from _logical(disk, sector, start)


def _logical(disk: Disk, sector: int, extended: int) -> Iterator[tuple[int, int, int]]:
    place, visited = extended, {0}
    for number in range(5, 5 + _MOST_LOGICAL):
        record = read_guest(disk, place * sector, SECTOR)
        if place in visited or record[510:512] != BOOT_SIGNATURE:
            return
        visited.add(place)
        (kind, start, count), (_, following, more) = list(_rows(record))[:2]
        if kind and count:
            yield number, place + start, count
        if not more:
            return
        place = extended + following


def _rows(record: bytes) -> Iterator[tuple[int, int, int]]:
    """Type, first sector and length of the four entries of a boot record."""
    for offset in range(446, 510, 16):
        kind, start, count = record[offset + 4], *struct.unpack_from("<II", record, offset + 8)
        yield (kind, start, count) if kind else (0, 0, 0)


def _lint_gpt(disk: Disk, sector: int) -> Iterator[Finding]:
    last = disk.size // sector - 1
    primary = _header(disk, sector, 1)
    if isinstance(primary, Finding):
        yield primary
        return
    where = f"guest byte {sector + 32:#x}"
    if primary.backup > last:
        yield Finding(CUT_OFF, where, backup=primary.backup, last=last)
        return
    yield from _lint_entries(disk, sector, primary, last)
    backup = _header(disk, sector, primary.backup, "backup partition table")
    if isinstance(backup, Finding):
        yield backup
    elif primary.backup < last:
        yield Finding(LARGER, where, count=last - primary.backup)


def _header(disk: Disk, sector: int, place: int, table: str = "partition table") -> Gpt | Finding:
    """The header in a sector, or what is wrong with it; `table` is how people call it."""
    where = f"guest byte {place * sector:#x}"
    raw = read_guest(disk, place * sector, sector)
    if len(raw) < _HEADER.size or not raw.startswith(_GPT):
        return Finding(NO_HEADER, where, table=table)
    header = Gpt(*_HEADER.unpack_from(raw))
    if not _HEADER.size <= header.length <= sector:
        return Finding(HEADER_LENGTH, where, table=table, size=header.length)
    if header.checksum != zlib.crc32(raw[:16] + bytes(4) + raw[20 : header.length]):
        return Finding(HEADER_CHECKSUM, where, table=table)
    if header.own != place:
        return Finding(HEADER_PLACE, where, table=table, sector=header.own)
    return header


def _lint_entries(disk: Disk, sector: int, header: Gpt, last: int) -> Iterator[Finding]:
    where = f"guest byte {header.table * sector:#x}"
    length = header.entries * header.entry_size
    if header.entry_size < 128 or header.entry_size % 8 or length > _LARGEST_TABLE:
        yield Finding(BAD_ENTRIES, where, count=header.entries, size=header.entry_size)
        return
    table = read_guest(disk, header.table * sector, length)
    if len(table) < length or zlib.crc32(table) != header.table_checksum:
        yield Finding(ENTRIES_CHECKSUM, where)
        return
    for number in range(header.entries):
        entry = table[number * header.entry_size :][:128]
        start, end = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]) and start <= end and end > last:
            yield _past(where, number + 1, end + 1, last + 1)


def _past(where: str, number: int, end: int, total: int) -> Finding:
    return Finding(PAST_END, where, number=number, end=end - 1, count=total)


def refuse(disk: Disk) -> None:
    """Raise Damaged for a partition table by which a guest would miss data."""
    for finding in lint(disk):
        if finding.lossy:
            raise Damaged.by(finding)
