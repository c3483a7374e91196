"""The raw disk itself: a sparse file whose bytes are the guest's, with a GPT or MBR in it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from build.formats.lib import pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Finding, at
from build.formats.lib.format import DEBIAN, Format, Kind, Machine, Match, Options, Target, Template
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import Units

SECTOR = 512


class RawWriter:
    """Writes a sparse copy: units of zeros stay holes."""

    codec = None

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write what is not zero in a piece."""
        run: list[bytes] = []
        for number, unit in enumerate([*pieces.units(data), None]):
            if unit is not None:
                run.append(unit)
            elif run:
                self.file.seek(index * pieces.PIECE + (number - len(run)) * pieces.UNIT)
                self.file.write(b"".join(run))
                run = []

    def close(self, seed: str) -> None:
        """Give the file its size."""
        self.file.truncate(self.size)


@dataclass
class RawDisk:
    """Reads a raw disk."""

    reader: BoundedReader

    def __post_init__(self) -> None:
        self.size = self.reader.size

    def piece(self, index: int) -> bytes | None:
        """Bytes of a piece; None for a hole."""
        start, wanted = index * pieces.PIECE, pieces.length(index, self.size)
        return None if self.reader.is_zero(start, wanted) else self.reader.read(start, wanted)

    def facts(self) -> dict[str, str]:
        """Nothing: a raw disk says nothing about itself."""
        return {}


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check what the content tells: whole sectors, a partition table with its backup in the last one."""
    if reader.size % SECTOR or not reader.size:
        yield Finding(
            "error",
            at(reader.size),
            f"{reader.size} bytes are not whole sectors",
            "every hypervisor",
            "copy it again",
        )
    elif reader.size % pieces.PIECE:
        yield Finding(
            "info",
            at(reader.size),
            "the size is not a multiple of 2 MiB",
            "XenServer, when converted to VHD",
            "make SIZE even",
        )
    yield from lint_partitions(RawDisk(reader))


def lint_partitions(disk: pieces.Disk) -> Iterator[Finding]:
    """Check a GPT as the firmware sees it, in a disk of any format."""
    head = read_guest(disk, 0, 2 * SECTOR)
    if len(head) < 2 * SECTOR or head[510:512] != b"\x55\xaa":
        yield Finding("info", "guest byte 0x1fe", "no partition table", "BIOS", "")
        return
    if not head.startswith(b"EFI PART", SECTOR):
        return
    backup_sector = struct.unpack_from("<Q", head, SECTOR + 32)[0]
    last = disk.size // SECTOR - 1
    for sector, name in ((1, "partition table"), (last, "backup partition table")):
        raw = read_guest(disk, sector * SECTOR, SECTOR)
        where = f"guest byte {sector * SECTOR:#x}"
        length = struct.unpack_from("<I", raw, 12)[0] if raw.startswith(b"EFI PART") else 0
        if not 92 <= length <= SECTOR:
            yield Finding(
                "error",
                where,
                f"the {name} is missing",
                "UEFI",
                "make the disk's size right and build it again",
            )
        elif struct.unpack_from("<I", raw, 16)[0] != zlib.crc32(raw[:16] + bytes(4) + raw[20:length]):
            yield Finding("error", where, f"the {name}'s checksum is wrong", "UEFI", "build the disk again")
    if backup_sector != last:
        yield Finding(
            "error",
            f"guest byte {SECTOR + 32:#x}",
            f"the backup partition table should be in sector {backup_sector}, the last one is {last}",
            "UEFI",
            "the size was changed after partitioning: build the disk again",
        )


def read_guest(disk: pieces.Disk, offset: int, length: int) -> bytes:
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


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.FALLBACK


def _write(target: Target, options: Options) -> RawWriter:
    return RawWriter(target.file, target.size)


def _check_size(size: int) -> None:
    if not size:
        raise Unsupported("the raw disk is empty", "build it again: inv build")


KIND = Kind(
    name="raw",
    suffix="",
    version=1,
    driver="raw",
    recognize=_recognize,
    write=_write,
    read=RawDisk,
    lint=lint,
    check_size=_check_size,
)
FORMATS = (
    Format(
        name="raw",
        help="the raw disk, sparse",
        kind=KIND,
        file="{imagename}.raw",
        machine=Machine("virtio-scsi", "virtio", ("bios", "uefi")),
        cloudstack=Template("Ovm3", "RAW", "ovm.raw.bz2", DEBIAN, ("ovm3",)),
    ),
)
