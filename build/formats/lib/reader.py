"""Bounded reading: a window into a file that no lie in the file can make us leave or overspend."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from build.formats.lib.findings import Damage, Damaged, at
from build.formats.lib.platforms import EVERY_IMPORTER

LARGEST = 64 << 20
"""Bytes that one read may ask for: every table that a format allows us fits, every bigger one is a lie."""
SMALLEST = 512
"""What a read of fewer bytes costs of the budget: it is the number of reads that takes the time."""
_COPY = "copy the file again: it is cut off or damaged"
PAST_END = Damage("ANY010", "{size} bytes here reach past the end of the file ({end} bytes)", fix=_COPY)
LARGE_TABLE = Damage(
    "ANY011", "a table of {size} bytes is larger than any that importers take", (EVERY_IMPORTER,)
)
NO_BUDGET = Damage("ANY012", "the tables of this file lead to more reading than its size explains")
SHRUNK = Damage(
    "ANY013", "the file became shorter while it was read", (), "run it again when nothing writes to it"
)


@dataclass
class Budget:
    """Bytes of tables that may still be read; a loop in a table ends here instead of never."""

    left: int


@dataclass
class BoundedReader:
    """`size` bytes of an open file from `start` on. Reading is by position, so threads may share it."""

    fd: int
    start: int
    size: int
    budget: Budget | None = field(default=None)

    @classmethod
    def whole(cls, fd: int) -> BoundedReader:
        """The whole of an open file or block device."""
        return cls(fd, 0, os.lseek(fd, 0, os.SEEK_END))

    def window(self, start: int, size: int) -> BoundedReader:
        """A part of this reader with the same budget; Damaged when it does not lie inside."""
        if start < 0 or size < 0 or start + size > self.size:
            raise Damaged(PAST_END, at(start), size=size, end=self.size)
        return BoundedReader(self.fd, self.start + start, size, self.budget)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; Damaged when they are not all there."""
        if length > LARGEST:
            raise Damaged(LARGE_TABLE, at(offset), size=length)
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Damaged(PAST_END, at(offset), size=length, end=self.size)
        if self.budget is not None:
            self.budget.left -= max(length, SMALLEST)
            if self.budget.left < 0:
                raise Damaged(NO_BUDGET, at(offset))
        parts = []
        while length:
            part = os.pread(self.fd, length, self.start + offset)
            if not part:
                raise Damaged(SHRUNK, at(offset))
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def allocated(self) -> int:
        """Bytes that the file occupies on its file system."""
        return os.fstat(self.fd).st_blocks * 512

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether these bytes are a hole; False says nothing about their content."""
        return next_data(self.fd, self.start + offset) >= self.start + offset + length


def next_data(fd: int, offset: int) -> int:
    """Offset of the next byte that may be other than zero; a huge number when only a hole is left."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == 6:  # ENXIO: nothing but a hole up to the end
            return 1 << 63
        return offset  # a file system without holes
