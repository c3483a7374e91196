"""Disk images inside of another file: where they lie in it, and how they are packed there."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from build.formats.lib import pieces
from build.formats.lib.findings import Damage, Damaged
from build.formats.lib.pieces import Disk
from build.formats.lib.reader import BoundedReader

_STEP = 1 << 20
NOT_EXPANDED = Damage(
    "ANY014", "it cannot be expanded: {reason}", fix="copy the file again: it is cut off or damaged"
)


@dataclass(frozen=True)
class Inner:
    """A disk image in an archive: one window of it, or several in order, or compressed, or in pieces."""

    name: str
    parts: tuple[BoundedReader, ...]
    compression: str = ""
    """A key of `unwrap.KINDS` (gz); empty: none."""
    disk: Disk | None = None
    """A raw disk that does not lie there byte by byte; then there are no parts."""

    @property
    def whole(self) -> BoundedReader | None:
        """The image where it lies; None when it has to be put together first."""
        return self.parts[0] if len(self.parts) == 1 and not self.compression else None

    def head(self, length: int) -> bytes:
        """The first bytes of the image, fewer when it is shorter; Damaged when they cannot be expanded."""
        if self.compression not in ("", "gz"):
            return b""
        stream = zlib.decompressobj(31) if self.compression else None
        out = b""
        try:
            for data in self._portions():
                out += stream.decompress(data, length - len(out)) if stream else data
                if len(out) >= length or (stream and stream.eof):
                    break
        except zlib.error as error:
            raise Damaged(NOT_EXPANDED, self.name, reason=str(error)) from None
        return out[:length]

    def _portions(self) -> Iterator[bytes]:
        if self.disk and self.disk.size:
            yield self.disk.piece(0) or bytes(pieces.length(0, self.disk.size))
        for part in self.parts:
            for offset in range(0, part.size, _STEP):
                yield part.read(offset, min(_STEP, part.size - offset))
