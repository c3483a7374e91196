"""The raw disk itself: a sparse file whose bytes are the guest's, with a GPT or MBR in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from build.formats.lib import partitions, pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code, Finding, Group, at
from build.formats.lib.format import DEBIAN, Format, Kind, Machine, Match, Options, Target, Template
from build.formats.lib.platforms import EVERY_HYPERVISOR, Affected
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import Units

SECTOR = 512

GROUP = Group("RAW", "Raw disks", "what every hypervisor has in common")
EMPTY = Code("RAW001", "error", "the file is empty", (EVERY_HYPERVISOR,), "copy it again")
ODD_SECTORS = Code(
    "RAW002", "error", "{size} bytes are not whole sectors", (EVERY_HYPERVISOR,), "copy it again"
)
ODD_SIZE = Code(
    "RAW003",
    "info",
    "the size is not a multiple of 2 MiB",
    (Affected("xenserver", case="when converted to VHD"),),
    "make SIZE even",
)


class RawWriter:
    """Writes a sparse copy: units of zeros stay holes."""

    codec = None

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.layout: list[tuple[int, int, int]] = []

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write what is not zero in a piece."""
        self.layout.append((index, index * pieces.PIECE, len(data)))
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
    found = list(partitions.lint(RawDisk(reader))) if reader.size else []
    if not any(finding.lossy for finding in found):  # a disk that is cut off is so at any byte
        yield from _lint_size(reader)
    yield from found


def _lint_size(reader: BoundedReader) -> Iterator[Finding]:
    if not reader.size:
        yield Finding(EMPTY, at(0))
    elif reader.size % SECTOR:
        yield Finding(ODD_SECTORS, at(reader.size), size=reader.size)
    elif reader.size % pieces.PIECE:
        yield Finding(ODD_SIZE, at(reader.size))


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
