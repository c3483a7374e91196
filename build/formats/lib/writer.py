"""What every format's writer is to the conversion, and the ids it may use."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

from build.formats.lib.codec import Codec

Units = Mapping[Codec, Sequence[bytes | None]]
"""A piece's units of 64 KiB, compressed once for every codec in use; None for a unit of zeros."""

_NAMESPACE = uuid.UUID("6f0b5b1e-3c0a-5c77-9d0e-2f6f9f1c7a55")


class Writer(Protocol):
    """Writes one file, piece by piece in rising order, zero pieces left out."""

    @property
    def codec(self) -> Codec | None:
        """What the units must be compressed with; None when the writer takes the plain piece."""

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write a piece that is not zero."""

    def close(self, seed: str) -> None:
        """Write tables and heads; every id in them comes from `seed`."""


@runtime_checkable
class Laid(Protocol):
    """A writer that puts pieces into the file as they are."""

    layout: list[tuple[int, int, int]]
    """Number of each piece, its offset in the file and its bytes; by rising offset."""


def derive(seed: str, purpose: str) -> uuid.UUID:
    """Name a thing by what it is made of: the same image gives the same id on every host."""
    return uuid.uuid5(_NAMESPACE, f"{seed}\n{purpose}")


def put(file: BinaryIO, offset: int, content: bytes) -> None:
    """Write at an offset."""
    file.seek(offset)
    file.write(content)


class Shifted(io.RawIOBase):
    """A file from byte `base` of another one on: what a writer needs that knows of no archive around it."""

    def __init__(self, file: BinaryIO, base: int) -> None:
        self.file, self.base = file, base

    @classmethod
    def over(cls, file: BinaryIO, base: int) -> BinaryIO:
        """The same as what writers take."""
        return cast(BinaryIO, cls(file, base))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset from the base."""
        return self.file.seek(offset + (self.base if whence == os.SEEK_SET else 0), whence) - self.base

    def tell(self) -> int:
        """The offset from the base."""
        return self.file.tell() - self.base

    def write(self, content: Any) -> int:
        """Write at the place where the other file is."""
        return self.file.write(content)

    def truncate(self, size: int | None = None) -> int:
        """Give the file an end, from the base on."""
        return self.file.truncate(None if size is None else size + self.base)
