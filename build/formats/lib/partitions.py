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
from build.formats.lib.findings import Damaged, Finding
from build.formats.lib.pieces import Disk

SECTOR = 512
OTHER = 4096
"""Bytes of the other logical sector that there is."""
EVERYBODY = "every hypervisor"
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
        yield Finding(
            "error",
            f"guest byte {other:#x}",
            f"the partition table counts in sectors of {other} bytes, the disk shows {sector}: "
            "no partition would be seen",
            EVERYBODY,
            f"partition the disk for sectors of {sector} bytes",
            lossy=True,
        )
    elif head[510:512] != BOOT_SIGNATURE or any(head.startswith(name, at) for at, name in _FILE_SYSTEMS):
        yield Finding("info", "guest byte 0x1fe", "no partition table", "", "")
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
    if isinstance(primary, str):
        text = f"the partition table's {primary}"
        yield Finding("error", f"guest byte {sector:#x}", text, "UEFI", "build the disk again")
        return
    where = f"guest byte {sector + 32:#x}"
    if primary.backup > last:
        yield Finding(
            "error",
            where,
            f"the disk is cut off: the backup partition table should be in sector {primary.backup}, "
            f"the last one is {last}",
            EVERYBODY,
            "copy the disk again, or build it again in this size",
            lossy=True,
        )
        return
    yield from _lint_entries(disk, sector, primary, last)
    backup = _header(disk, sector, primary.backup)
    if isinstance(backup, str):
        text = f"the backup partition table's {backup}"
        yield Finding(
            "error", f"guest byte {primary.backup * sector:#x}", text, "UEFI", "build the disk again"
        )
    elif primary.backup < last:
        yield Finding(
            "info",
            where,
            f"the disk is {last - primary.backup} sectors larger than its partition table says",
            "",
            "move the backup table when the disk has its final size (sfdisk --relocate gpt-bak-std)",
        )


def _header(disk: Disk, sector: int, place: int) -> Gpt | str:
    """The header in a sector, or what is wrong with it."""
    raw = read_guest(disk, place * sector, sector)
    if len(raw) < _HEADER.size or not raw.startswith(_GPT):
        return "header is missing"
    header = Gpt(*_HEADER.unpack_from(raw))
    if not _HEADER.size <= header.length <= sector:
        return f"header says that it has {header.length} bytes"
    if header.checksum != zlib.crc32(raw[:16] + bytes(4) + raw[20 : header.length]):
        return "checksum is wrong"
    if header.own != place:
        return f"header says that it lies in sector {header.own}"
    return header


def _lint_entries(disk: Disk, sector: int, header: Gpt, last: int) -> Iterator[Finding]:
    where = f"guest byte {header.table * sector:#x}"
    length = header.entries * header.entry_size
    if header.entry_size < 128 or header.entry_size % 8 or length > _LARGEST_TABLE:
        text = f"{header.entries} partition entries of {header.entry_size} bytes"
        yield Finding("error", where, text, "UEFI", "build the disk again")
        return
    table = read_guest(disk, header.table * sector, length)
    if len(table) < length or zlib.crc32(table) != header.table_checksum:
        yield Finding(
            "error", where, "the partition entries' checksum is wrong", "UEFI", "build the disk again"
        )
        return
    for number in range(header.entries):
        entry = table[number * header.entry_size :][:128]
        start, end = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]) and start <= end and end > last:
            yield _past(where, number + 1, end + 1, last + 1)


def _past(where: str, number: int, end: int, total: int) -> Finding:
    return Finding(
        "error",
        where,
        f"partition {number} ends at sector {end - 1}, the disk has {total}",
        EVERYBODY,
        "copy the disk again: it is cut off, or was made smaller",
        lossy=True,
    )


def refuse(disk: Disk) -> None:
    """Raise Damaged for a partition table by which a guest would miss data."""
    for finding in lint(disk):
        if finding.lossy:
            raise Damaged(finding.where, finding.text, finding.refused_by, finding.fix)
