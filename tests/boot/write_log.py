"""What a disk was told to keep, as QEMU's `blklogwrites` noted it, and what a power cut may leave of it.

Sources: QEMU, block/blklogwrites.c; Linux, Documentation/admin-guide/device-mapper/log-writes.rst and
drivers/md/dm-log-writes.c. The header counts the entries up to the last flush.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
MAGIC = 0x6A736677736872
FLUSH, DISCARD = 1, 4
PIECE = 4096
"""Bytes that a disk keeps or loses as one: a block of the file system."""

HEADER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Write:
    """Bytes for the disk, in the order in which it got them; they lie in the log."""

    offset: int
    length: int
    source: int


def epochs(log: Path) -> list[list[Write]]:
    """Writes from one flush to the next; what is left of one epoch means that all before it is there."""
    found: list[list[Write]] = [[]]
    with log.open("rb") as stream:
        magic, version, entries, size = HEADER.unpack(stream.read(HEADER.size))
        assert (magic, version, size) == (MAGIC, 1, SECTOR)
        place = SECTOR
        for _ in range(entries):
            stream.seek(place)
            sector, sectors, flags, _ = ENTRY.unpack(stream.read(ENTRY.size))
            place += SECTOR
            if flags & FLUSH and found[-1]:
                found.append([])
            if sectors and not flags & DISCARD:  # what a disk does with a hint to discard is its own affair
                found[-1].append(Write(sector * SECTOR, sectors * SECTOR, place))
                place += sectors * SECTOR
    assert not found[-1], "what follows the last flush is not counted"
    return found[:-1]


def cut(epoch: Sequence[Write], dice: random.Random) -> Iterator[Write]:
    """Those writes of an epoch that a disk with a volatile cache happened to keep: any pieces of a part.

    Often the part is all of it, and few pieces are lost: what is written last tells of what came before.
    """
    got = epoch[: dice.choice([dice.randint(0, len(epoch)), len(epoch), len(epoch)])]
    kept = dice.choice([0.1, 0.5, 0.9, 0.98, 1])
    for write in got:
        for begin in range(0, write.length, PIECE):
            if dice.random() < kept:
                length = min(PIECE, write.length - begin)
                yield Write(write.offset + begin, length, write.source + begin)


def replay(log: Path, writes: Iterator[Write], disk: Path, start: int = 0) -> None:
    """Write to a disk that begins at byte `start` of a file."""
    with log.open("rb") as source, disk.open("r+b") as target:
        for write in writes:
            source.seek(write.source)
            target.seek(start + write.offset)
            target.write(source.read(write.length))


def lay(source: Path, target: Path, start: int) -> None:
    """Copy a disk to byte `start` of a file that is made or grows, and leave holes where there is nothing."""
    with source.open("rb") as disk, target.open("r+b" if target.exists() else "xb") as file:
        file.truncate(start + source.stat().st_size)
        for place in range(start, start + source.stat().st_size, PIECE):
            piece = disk.read(PIECE)
            if any(piece):
                file.seek(place)
                file.write(piece)
