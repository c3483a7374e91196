"""Outer compression on all cores: bz2, gz, zip and zst, cut into chunks that are compressed side by side.

Every result is a standard file. bz2 is a series of streams, which `bzip2`, Python and commons-compress in
its concatenated mode read as one; a reader that stops after the first stream sees the file up to the first
piece of the disk, where every format here has its header. gz and zip are one deflate stream. Zero chunks are
compressed once, and so are the pieces of a disk that several files of a conversion hold: their streams are
the same bytes wherever a piece lies.
"""

from __future__ import annotations

import bz2
import struct
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from build.formats.lib import codec, pieces
from build.formats.lib.codec import Deflate, Zstandard
from build.formats.lib.errors import Unsupported
from build.formats.lib.reader import BoundedReader

KINDS = ("bz2", "gz", "zip", "zst")
CHUNK = {"bz2": 699_981, "gz": 1 << 20, "zip": 1 << 20, "zst": 4 << 20}
_THIRD = -(-pieces.PIECE // 3)
"""Bytes of a part of a piece: as much as a block of bz2 takes of it."""
_LEVEL = 6
_BZ2_BLOCK = 7
"""Blocks of 700 kB: a tenth faster than 900 kB and 2 % larger. A chunk fills one but for its reserve."""
Report = Callable[[int], None]


class Chunk(NamedTuple):
    """A part of the file that is compressed by itself."""

    offset: int
    length: int
    key: tuple[int, int] | None = None
    """Piece of the disk and part of it, of a chunk that other files may have, too."""


Layout = Sequence[tuple[int, int, int]]
"""Number of a piece, where in the file it lies, its bytes; by rising offset."""


def cut(kind: str, size: int, layout: Layout = ()) -> Iterator[Chunk]:
    """Cut a file of `size` bytes into chunks: for bz2 at the pieces of the disk in it."""
    step, position = CHUNK[kind], 0
    for number, offset, length in layout if kind == "bz2" else ():
        yield from _plain(position, offset, step)
        for part, start in enumerate(range(0, length, _THIRD)):
            yield Chunk(offset + start, min(_THIRD, length - start), (number, part))
        position = offset + length
    yield from _plain(position, size, step)


def _plain(start: int, end: int, step: int) -> Iterator[Chunk]:
    for offset in range(start, end, step):
        yield Chunk(offset, min(step, end - offset))


@dataclass(frozen=True)
class Origin:
    """A chunk that another file of this conversion has, compressed and as it was."""

    source: BoundedReader
    chunk: Chunk
    made: BoundedReader
    offset: int
    length: int

    def packed(self) -> bytes:
        """Its stream."""
        return self.made.read(self.offset, self.length)

    def content(self) -> bytes:
        """What was compressed."""
        return self.source.read(self.chunk.offset, self.chunk.length)


@dataclass
class Packed:
    """A compressed file: where each chunk of the source went."""

    chunks: list[Chunk]
    places: array[int]
    """Offset of every compressed chunk, and of the end of the last."""
    origins: dict[int, Origin]
    """Of the chunks that were not compressed here, by their number."""


def compress(
    kind: str,
    source: BoundedReader,
    target: BinaryIO,
    name: str,
    epoch: int,
    pool: Executor,
    ahead: int,
    report: Report,
    layout: Layout = (),
    known: Mapping[tuple[int, int], Origin] | None = None,
) -> Packed:
    """Compress `source` into `target`, whose name inside a zip is `name`; `report` gets each chunk's bytes.

    `layout` tells where in the source pieces of the disk lie, `known` what is compressed already of them.
    Bytes depend on the content, the layout, the name and the epoch only, not on threads or what is known.
    """
    if kind not in KINDS:
        raise Unsupported(f"unknown outer compression {kind!r}", f"use one of {', '.join(KINDS)}")
    chunks = list(cut(kind, source.size, layout))
    origins = {
        number: known[chunk.key]
        for number, chunk in enumerate(chunks)
        if known and chunk.key and chunk.key in known and known[chunk.key].chunk.length == chunk.length
    }
    result = Packed(chunks, array("Q", [_head_length(kind, source.size, name)]), origins)
    packed = _in_order(kind, source, pool, ahead, report, result)
    if kind == "gz":
        _write_gz(packed, source.size, target, epoch)
    elif kind == "zip":
        _write_zip(packed, source.size, target, name, epoch)
    else:
        for chunk, _ in packed:
            target.write(chunk)
    return result


def maker(kind: str) -> str:
    """Library and version that make this compression, as manifests record them."""
    if kind == "bz2":
        return "bzip2 1.0"  # its output has not changed since 1996
    return Zstandard().maker if kind == "zst" else Deflate(15).maker


def unpack(kind: str, packed: bytes, wanted: int) -> bytes | bytearray:
    """Expand one chunk of `compress`; ValueError when it is broken."""
    try:
        if kind == "bz2":
            return bz2.decompress(packed)
        if kind == "zst":
            return Zstandard().expand(packed, wanted)
        out: bytes = codec.zlib_ng().decompressobj(-15).decompress(packed, wanted)
        return out
    except (OSError, codec.zlib_ng().error) as error:
        raise ValueError(str(error)) from None


def _head_length(kind: str, size: int, name: str) -> int:
    return {"gz": 10, "zip": 30 + len(name.encode()) + (20 if _is_big(size) else 0)}.get(kind, 0)


def _is_big(size: int) -> bool:
    """Whether a zip needs 64-bit sizes; with room for content that grows when it is compressed."""
    return size >= 0xFFFFFFFF - (16 << 20)


def _in_order(
    kind: str, source: BoundedReader, pool: Executor, ahead: int, report: Report, result: Packed
) -> Iterator[tuple[bytes, int]]:
    """Compressed chunks with the CRC-32 of all content up to the end of each."""
    pending: deque[Future[tuple[bytes, int, int]]] = deque()
    zeros: dict[int, tuple[bytes, int, int]] = {}

    def work(number: int, chunk: Chunk) -> tuple[bytes, int, int]:
        if origin := result.origins.get(number):
            return origin.packed(), 0, chunk.length
        last = chunk.offset + chunk.length == source.size
        hole = source.is_zero(chunk.offset, chunk.length)
        data = bytes(chunk.length) if hole else source.read(chunk.offset, chunk.length)
        if last or not (hole or pieces.is_zero(data)):
            return _pack(kind, data, last)
        if chunk.length not in zeros:
            zeros[chunk.length] = _pack(kind, data, last)
        return zeros[chunk.length]

    total = 0
    left = iter(enumerate(result.chunks))
    while True:
        while len(pending) < ahead and (row := next(left, None)) is not None:
            pending.append(pool.submit(work, *row))
        if not pending:
            return
        packed, crc, wanted = pending.popleft().result()
        total = codec.zlib_ng().crc32_combine(total, crc, wanted) if kind in ("gz", "zip") else 0
        result.places.append(result.places[-1] + len(packed))
        report(wanted)
        yield packed, total


def _pack(kind: str, data: bytes, last: bool) -> tuple[bytes, int, int]:
    if kind == "bz2":
        return bz2.compress(data, _BZ2_BLOCK), 0, len(data)
    if kind == "zst":
        return Zstandard(_LEVEL).compress(data), 0, len(data)
    module = codec.zlib_ng()
    stream = module.compressobj(_LEVEL, 8, -15, 8)
    out = stream.compress(data) + stream.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
    return out, module.crc32(data), len(data)


def _write_gz(packed: Iterator[tuple[bytes, int]], size: int, target: BinaryIO, epoch: int) -> None:
    crc = 0
    target.write(struct.pack("<BBBBIBB", 0x1F, 0x8B, 8, 0, epoch & 0xFFFFFFFF, 0, 255))
    for chunk, total in packed:
        target.write(chunk)
        crc = total
    if not size:
        target.write(b"\x03\0")
    target.write(struct.pack("<II", crc, size & 0xFFFFFFFF))


def _write_zip(
    packed: Iterator[tuple[bytes, int]], size: int, target: BinaryIO, name: str, epoch: int
) -> None:
    """One member, zip64 where needed; its header is written twice because sizes are known last."""
    encoded, stamp = name.encode(), _dos_time(epoch)
    big = _is_big(size)
    needs = 45 if big else 20

    def fields(crc: int, length: int) -> tuple[bytes, bytes]:
        extra = struct.pack("<HHQQ", 1, 16, size, length) if big else b""
        sizes = (0xFFFFFFFF, 0xFFFFFFFF) if big else (length, size)
        return struct.pack("<HHHIIIIHH", needs, 0x800, 8, stamp, crc, *sizes, len(encoded), len(extra)), extra

    def local(crc: int, length: int) -> bytes:
        head, extra = fields(crc, length)
        return b"PK\x03\x04" + head + encoded + extra

    head = local(0, 0)
    target.write(head)
    crc = length = 0
    for chunk, total in packed:
        target.write(chunk)
        length += len(chunk)
        crc = total
    start = len(head) + length
    common, extra = fields(crc, length)
    entry = (
        b"PK\x01\x02"
        + struct.pack("<H", 0x031E)
        + common
        + struct.pack("<HHHII", 0, 0, 0, 0o644 << 16 | 0x8000 << 16, 0)
    )
    entry += encoded + extra
    target.write(entry)
    if big:
        end = start + len(entry)
        target.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 0x031E, 45, 0, 0, 1, 1, len(entry), start))
        target.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
    where = 0xFFFFFFFF if big else start
    target.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), where, 0))
    target.seek(0)
    target.write(local(crc, length))


def _dos_time(epoch: int) -> int:
    moment = time.gmtime(max(epoch, 315532800))  # zip knows no time before 1980
    date = (moment.tm_year - 1980) << 9 | moment.tm_mon << 5 | moment.tm_mday
    return date << 16 | moment.tm_hour << 11 | moment.tm_min << 5 | moment.tm_sec // 2
