"""Look into bz2, gz, xz, zip and zst: expand the image inside into a sparse file, within bounds."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

from build.formats.lib import pieces
from build.formats.lib.codec import zstd_stream
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damage, Damaged, Group, at
from build.formats.lib.platforms import CLOUDSTACK, EVERY_READER, EVERY_UNPACKER
from build.formats.lib.reader import BoundedReader

_STEP = 1 << 20
_FEED = 16 << 10
"""Bytes that a decompressor gets at a time. It copies what follows the end of a stream, and a file may be
nothing but ends of streams."""
_XZ_MEMORY = 128 << 20
"""Bytes that an xz may have us keep: twice those of `xz -9`; a header may ask for gigabytes."""
_UNPACK = "unpack it yourself where there is room, and inspect what is inside"

GROUP = Group(
    "PACK",
    "Compressions around an image",
    "RFC 1950 to 1952, APPNOTE.TXT of PKWARE, the formats' own pages (bzip2, xz, zstd)",
)
_UNPACKERS = (CLOUDSTACK, EVERY_UNPACKER)
_READER = (EVERY_READER,)
_CUT = "copy the file again: it is cut off or damaged"
BROKEN = Damage("PACK001", "it cannot be unpacked: {reason}", _UNPACKERS, _CUT)
NO_END = Damage("PACK002", "the {kind} stream has no end", _UNPACKERS, _CUT)
BROKEN_XZ = Damage("PACK003", "it cannot be unpacked: {reason}", _READER, _CUT)
XZ_NO_END = Damage("PACK004", "the xz stream has no end", _READER, _CUT)
ZIP_CRC = Damage("PACK005", "the CRC of the file in the zip is wrong", _UNPACKERS, _CUT)
ZIP_NO_DIRECTORY = Damage("PACK006", "the zip has no central directory", _UNPACKERS, _CUT)
ZIP_LARGE_DIRECTORY = Damage("PACK007", "the zip's directory is larger than 1 MiB", _UNPACKERS)
ZIP_EMPTY = Damage("PACK008", "the zip holds no file", _UNPACKERS)
ZIP_METHOD = Damage(
    "PACK009", "the zip is encrypted or uses a method other than deflate", _UNPACKERS, _UNPACK
)
ZIP_NO_HEADER = Damage("PACK010", "no file header here", _UNPACKERS, _CUT)


def recognize(reader: BoundedReader) -> str:
    """Name of the outer compression, empty for none."""
    head = reader.read(0, min(reader.size, 10))
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bz2"
    if head.startswith(b"\x1f\x8b\x08"):
        return "gz"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    return "zst" if head.startswith(b"\x28\xb5\x2f\xfd") else ""


def expand(
    kind: str, reader: BoundedReader, target: BinaryIO, limit: int, room: int, report: Callable[[int], None]
) -> int:
    """Expand into `target`, zeros as holes, and answer the size.

    Raises Damaged for a broken or cut-off file, and Unsupported when more than `limit` bytes come out, or
    more than `room` that are not zero: what comes after those is counted, for the error, and not written.
    """
    made = _MAKERS[kind](reader, report)
    return _store(made, target, limit, room, f"the {kind} expands to", f"what is in the {kind}")


def join(
    parts: Iterable[BoundedReader], target: BinaryIO, limit: int, room: int, report: Callable[[int], None]
) -> int:
    """Put an image that lies in parts into `target`, as `expand` does, with its errors."""
    portions = (data for part in parts for data in _portions(part, 0, part.size, report))
    return _store(portions, target, limit, room, "the parts make", "what is in the parts")


def _store(portions: Iterable[bytes], target: BinaryIO, limit: int, room: int, made: str, what: str) -> int:
    size = stored = 0
    for data in portions:
        if size + len(data) > limit:
            raise Unsupported(f"{made} more than {_mib(limit)}", _UNPACK)
        for start in range(0, len(data), pieces.UNIT):
            part = data[start : start + pieces.UNIT]
            if not pieces.is_zero(part):
                stored += len(part)
                if stored <= room:
                    target.seek(size + start)
                    target.write(part)
        size += len(data)
    if stored > room:
        raise Unsupported(f"{what} takes {_mib(stored)}, and there is room for {_mib(room)}", _UNPACK)
    target.truncate(size)
    target.flush()
    return size


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def _portions(reader: BoundedReader, offset: int, end: int, report: Callable[[int], None]) -> Iterator[bytes]:
    while offset < end:
        data = reader.read(offset, min(_STEP, end - offset))
        offset += len(data)
        report(len(data))
        yield from (data[start : start + _FEED] for start in range(0, len(data), _FEED))


def _bz2(reader: BoundedReader, report: Callable[[int], None]) -> Iterator[bytes]:
    stream, started = bz2.BZ2Decompressor(), False
    try:
        for data in _portions(reader, 0, reader.size, report):
            while data:
                if stream.eof:
                    stream, started = bz2.BZ2Decompressor(), False
                started = True
                yield from _drained(stream, data)
                data = stream.unused_data if stream.eof else b""
    except OSError as error:
        raise Damaged(BROKEN, "bz2 stream", reason=str(error)) from None
    if started and not stream.eof:
        raise Damaged(NO_END, at(reader.size), kind="bz2")


def _drained(stream: bz2.BZ2Decompressor | lzma.LZMADecompressor, data: bytes) -> Iterator[bytes]:
    """All that a decompressor makes of `data`, a portion at a time."""
    out = stream.decompress(data, _STEP)
    while out:
        yield out
        out = b"" if stream.eof or stream.needs_input else stream.decompress(b"", _STEP)


def _xz(reader: BoundedReader, report: Callable[[int], None]) -> Iterator[bytes]:
    stream = _xz_stream()
    try:
        for data in _portions(reader, 0, reader.size, report):
            while data:
                if stream.eof:
                    if not (data := data.lstrip(b"\0")):  # padding between streams
                        break
                    stream = _xz_stream()
                yield from _drained(stream, data)
                data = stream.unused_data if stream.eof else b""
    except lzma.LZMAError as error:
        if "limit" in str(error):
            text = f"the xz takes more than {_mib(_XZ_MEMORY)} of memory to expand"
            raise Unsupported(text, "pack it with xz -9 or less") from None
        raise Damaged(BROKEN_XZ, "xz stream", reason=str(error)) from None
    if not stream.eof:
        raise Damaged(XZ_NO_END, at(reader.size))


def _xz_stream() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def _inflate(
    reader: BoundedReader, offset: int, end: int, bits: int, report: Callable[[int], None], many: bool
) -> Iterator[bytes]:
    stream = zlib.decompressobj(bits)
    try:
        for data in _portions(reader, offset, end, report):
            while data:
                if stream.eof:
                    if not many or not data.startswith(b"\x1f"):  # a member, cut anywhere, and no padding
                        return
                    stream = zlib.decompressobj(bits)
                yield stream.decompress(data, _STEP)
                data = stream.unused_data if stream.eof else stream.unconsumed_tail
    except zlib.error as error:
        raise Damaged(BROKEN, "deflate stream", reason=str(error)) from None
    if not stream.eof:
        raise Damaged(NO_END, at(end), kind="deflate")


def _gz(reader: BoundedReader, report: Callable[[int], None]) -> Iterator[bytes]:
    return _inflate(reader, 0, reader.size, 31, report, many=True)


def _zst(reader: BoundedReader, report: Callable[[int], None]) -> Iterator[bytes]:
    try:
        yield from zstd_stream(_portions(reader, 0, reader.size, report), _STEP)
    except ValueError as error:
        raise Damaged(BROKEN, "zstd stream", reason=str(error)) from None


def _zip(reader: BoundedReader, report: Callable[[int], None]) -> Iterator[bytes]:
    method, start, length, crc = _largest_member(reader)
    total = 0
    made = (
        _portions(reader, start, start + length, report)
        if method == 0
        else _inflate(reader, start, start + length, -15, report, many=False)
    )
    for data in made:
        total = zlib.crc32(data, total)
        yield data
    if total != crc:
        raise Damaged(ZIP_CRC, at(start))


def _largest_member(reader: BoundedReader) -> tuple[int, int, int, int]:
    """Method, data offset, packed length and CRC of the largest file in a zip."""
    tail_at = max(reader.size - 65557 - 76, 0)
    tail = reader.read(tail_at, reader.size - tail_at)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise Damaged(ZIP_NO_DIRECTORY, at(reader.size))
    size, offset = struct.unpack_from("<II", tail, end + 12)
    if 0xFFFFFFFF in (size, offset) and end >= 20 and tail.startswith(b"PK\x06\x07", end - 20):
        (record,) = struct.unpack_from("<Q", tail, end - 12)
        size, offset = struct.unpack_from("<QQ", reader.read(record, 56), 40)
    if size > _STEP:
        raise Damaged(ZIP_LARGE_DIRECTORY, at(offset))
    members = list(_members(reader.read(offset, size)))
    if not members:
        raise Damaged(ZIP_EMPTY, at(offset))
    _, flags, method, crc, length, header_at = max(members)
    if flags & 1 or method not in (0, 8):
        raise Damaged(ZIP_METHOD, at(header_at))
    head = reader.read(header_at, 30)
    if not head.startswith(b"PK\x03\x04"):
        raise Damaged(ZIP_NO_HEADER, at(header_at))
    name, extra = struct.unpack_from("<HH", head, 26)
    return method, header_at + 30 + name + extra, length, crc


def _members(directory: bytes) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Size, flags, method, CRC, packed length and header offset of each file in a central directory."""
    at_entry = 0
    while directory.startswith(b"PK\x01\x02", at_entry) and at_entry + 46 <= len(directory):
        flags, method = struct.unpack_from("<HH", directory, at_entry + 8)
        crc, length, size, name, extra, comment = struct.unpack_from("<IIIHHH", directory, at_entry + 16)
        (offset,) = struct.unpack_from("<I", directory, at_entry + 42)
        fields = directory[at_entry + 46 + name : at_entry + 46 + name + extra]
        if fields.startswith(b"\x01\0"):
            wide = [
                value[0] for value in struct.iter_unpack("<Q", fields[4 : 4 + (len(fields) - 4) // 8 * 8])
            ]
            values = []
            for value in (size, length, offset):
                values.append(wide.pop(0) if value == 0xFFFFFFFF and wide else value)
            size, length, offset = values
        yield size, flags, method, crc, length, offset
        at_entry += 46 + name + extra + comment


_MAKERS: Mapping[str, Callable[[BoundedReader, Callable[[int], None]], Iterator[bytes]]] = {
    "bz2": _bz2,
    "gz": _gz,
    "xz": _xz,
    "zip": _zip,
    "zst": _zst,
}
KINDS = tuple(_MAKERS)
"""Compressions that are looked into; more than we write."""
