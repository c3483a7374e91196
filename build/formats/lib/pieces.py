"""The raw disk in pieces of 2 MiB: a VHD or VHDX block, 32 QCOW2 clusters, 32 VMDK grains."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

PIECE = 2 << 20
UNIT = 64 << 10
ZERO_PIECE = bytes(PIECE)
ZERO_UNIT = bytes(UNIT)


class Disk(Protocol):
    """What a guest would see of a file in some format."""

    size: int
    """Virtual size in bytes."""

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece (the last may be shorter); None when the file says they are zero.

        Raises Damaged. Threads may call it at the same time.
        """

    def facts(self) -> dict[str, str]:
        """What the file says about itself, for people."""


@dataclass(frozen=True)
class Run:
    """`count` pieces from `index` on that are zero, or one piece with its `data`."""

    index: int
    count: int
    data: bytes | None


def count(size: int) -> int:
    """Pieces of a disk of `size` bytes."""
    return -(-size // PIECE)


def length(index: int, size: int) -> int:
    """Bytes of one piece: 2 MiB, less for the last one of an odd disk."""
    return min(PIECE, size - index * PIECE)


def scan(disk: Disk) -> Iterator[Run]:
    """Read a disk once, front to back; zero pieces come in runs. Raises Damaged."""
    zeros = 0
    total = count(disk.size)
    for index in range(total):
        data = disk.piece(index)
        if data is None or is_zero(data):
            zeros += 1
            continue
        if zeros:
            yield Run(index - zeros, zeros, None)
        zeros = 0
        yield Run(index, 1, data)
    if zeros:
        yield Run(total - zeros, zeros, None)


def is_zero(data: bytes) -> bool:
    """Whether all bytes are zero, at the speed of a memory comparison."""
    return ZERO_PIECE.startswith(data) if len(data) <= PIECE else not any(data)


def units(data: bytes) -> list[bytes | None]:
    """Cut a piece into units of 64 KiB, the last may be shorter; zero units are None."""
    return [
        None if data.startswith(ZERO_UNIT, start) else data[start : start + UNIT]
        for start in range(0, len(data) - UNIT + 1, UNIT)
    ] + _odd_end(data)


def _odd_end(data: bytes) -> list[bytes | None]:
    end = data[len(data) - len(data) % UNIT :]
    return [None if is_zero(end) else end] if end else []


def sha256(disk: Disk) -> str:
    """SHA-256 of everything a guest would see."""
    digest = hashlib.sha256()
    for index in range(count(disk.size)):
        data = disk.piece(index)
        digest.update(ZERO_PIECE[: length(index, disk.size)] if data is None else data)
    return digest.hexdigest()
