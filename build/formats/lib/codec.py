"""The pinned compressors, and the few ways in which image formats use them.

zlib-ng makes streams with a small window (QCOW2) and streams in pieces (gz, zip); libdeflate, which can do
neither but is smaller and half as fast again, makes those that may use all of deflate's window (VMDK). Both
are pinned in the lock, because compressed bytes depend on the library's version: the same file comes out
on every run, thread count and host. Neither is ever replaced behind the user's back. Zstandard, where it is
asked for by name, is the build host's libzstd: its bytes depend on that host's version.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from build.formats.lib.errors import Unsupported


class Codec(Protocol):
    """Compresses one unit and back; equal codecs make equal bytes, so formats may share what they made."""

    @property
    def maker(self) -> str:
        """Library and version, as manifests record it."""

    def compress(self, data: bytes) -> bytes:
        """Compress a unit; Unsupported when the compressor is missing."""

    def expand(self, data: bytes, size: int) -> bytes | bytearray:
        """Expand to at most `size` bytes; ValueError when the stream is broken, cut off or larger."""


@functools.cache
def zlib_ng() -> Any:
    """The module of zlib-ng, which has zlib's interface."""
    try:
        import zlib_ng.zlib_ng as module
    except ImportError as error:
        raise _missing("zlib_ng", error) from None
    return module


@functools.cache
def libdeflate() -> Any:
    """The module of libdeflate."""
    try:
        import deflate as module
    except ImportError as error:
        raise _missing("deflate", error) from None
    return module


def _missing(name: str, error: ImportError) -> Unsupported:
    return Unsupported(
        f"the compressor {name} is missing here ({error})",
        "run: ./inv config (the launcher installs what the lock names)",
    )


@dataclass(frozen=True)
class Deflate:
    """Raw deflate (RFC 1951) whose matches reach back 2**`window` bytes at most, made by zlib-ng."""

    window: int
    level: int = 5
    memory: int = 9

    @property
    def maker(self) -> str:
        """Library and version, as manifests record it."""
        return f"zlib-ng {zlib_ng().ZLIBNG_RUNTIME_VERSION}"

    def compress(self, data: bytes) -> bytes:
        """Compress a unit."""
        stream = zlib_ng().compressobj(self.level, 8, -self.window, self.memory)
        first: bytes = stream.compress(data)
        last: bytes = stream.flush()
        return first + last if first else last

    def expand(self, data: bytes, size: int) -> bytes | bytearray:
        """Expand a stream of any window, whatever follows it."""
        module = libdeflate()
        try:
            out: bytearray = module.deflate_decompress(data, size)
        except module.DeflateError as error:
            raise ValueError(str(error)) from None
        return out


@dataclass(frozen=True)
class Zlib:
    """Deflate with zlib's head and checksum (RFC 1950), made by libdeflate."""

    level: int = 3

    @property
    def maker(self) -> str:
        """Library and version, as manifests record it."""
        return f"deflate {libdeflate().__version__}"

    def compress(self, data: bytes) -> bytes:
        """Compress a unit."""
        return bytes(libdeflate().zlib_compress(data, self.level))

    def expand(self, data: bytes, size: int) -> bytes | bytearray:
        """Expand a stream and check its Adler-32."""
        module = libdeflate()
        try:
            out: bytearray = module.zlib_decompress(data, size)
        except module.DeflateError as error:
            raise ValueError(str(error)) from None
        return out


def keeps_window(data: bytes, window: int, size: int) -> bool:
    """Whether a raw deflate stream can be read with a window of 2**`window` bytes.

    zlib looks at its window only for bytes that left its output buffer: small portions make it look.
    """
    stream = zlib.decompressobj(-window)
    left, start, portion = size, 0, b""
    try:
        while not stream.eof and left >= 0:
            if not portion:  # what zlib does not take at once it copies: never the whole of the data
                portion = data[start : start + 512]
                start += len(portion)
            out = stream.decompress(portion, 512)
            if not out and not portion and not stream.eof:
                return False
            portion = stream.unconsumed_tail
            left -= len(out)
    except zlib.error:
        return False
    return left >= 0


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer: the same three fields."""

    _fields_ = (("data", ctypes.c_char_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t))


@functools.cache
def _zstd() -> Any:
    try:
        loaded = ctypes.CDLL("libzstd.so.1")
    except OSError:
        raise Unsupported("libzstd is missing on the build host", "install the package libzstd1") from None
    loaded.ZSTD_compressBound.restype = loaded.ZSTD_compress.restype = ctypes.c_size_t
    loaded.ZSTD_decompress.restype = ctypes.c_size_t
    loaded.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    loaded.ZSTD_compress.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_int,
    ]
    loaded.ZSTD_decompress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    loaded.ZSTD_findFrameCompressedSize.restype = ctypes.c_size_t
    loaded.ZSTD_findFrameCompressedSize.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    loaded.ZSTD_isError.argtypes = [ctypes.c_size_t]
    loaded.ZSTD_createDStream.restype = ctypes.c_void_p
    loaded.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    loaded.ZSTD_decompressStream.restype = ctypes.c_size_t
    loaded.ZSTD_decompressStream.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(_Buffer),
        ctypes.POINTER(_Buffer),
    ]
    loaded.ZSTD_versionString.restype = ctypes.c_char_p
    return loaded


@dataclass(frozen=True)
class Zstandard:
    """One Zstandard frame a unit, made by the build host's libzstd."""

    level: int = 3

    @property
    def maker(self) -> str:
        """Library and version, as manifests record it."""
        return f"libzstd {_zstd().ZSTD_versionString().decode()}"

    def compress(self, data: bytes) -> bytes:
        """Compress into one frame that tells its content's size."""
        lib = _zstd()
        out = ctypes.create_string_buffer(lib.ZSTD_compressBound(len(data)))
        size = lib.ZSTD_compress(out, len(out), data, len(data), self.level)
        if lib.ZSTD_isError(size):
            raise Unsupported("libzstd could not compress a unit", "choose another compression")
        return ctypes.string_at(out, size)

    def expand(self, data: bytes, size: int) -> bytes | bytearray:
        """Expand the first frame, whatever follows, to at most `size` bytes; ValueError when broken."""
        lib = _zstd()
        frame = lib.ZSTD_findFrameCompressedSize(data, len(data))
        if lib.ZSTD_isError(frame):
            raise ValueError("no zstd frame")
        out = ctypes.create_string_buffer(size or 1)
        made = lib.ZSTD_decompress(out, size, data, frame)
        if lib.ZSTD_isError(made):
            raise ValueError("the zstd frame is broken or too large")
        return ctypes.string_at(out, made)


def zstd_stream(portions: Iterable[bytes], step: int) -> Iterator[bytes]:
    """Expand a series of zstd frames, at most `step` bytes at a time; ValueError when broken or cut off."""
    lib = _zstd()
    stream = lib.ZSTD_createDStream()
    space = ctypes.create_string_buffer(step)
    left = 0
    try:
        for data in portions:
            source = _Buffer(data, len(data), 0)
            filled = 0
            while source.position < source.size or (left and filled == step):
                target = _Buffer(ctypes.cast(space, ctypes.c_char_p), step, 0)
                left = lib.ZSTD_decompressStream(stream, ctypes.byref(target), ctypes.byref(source))
                if lib.ZSTD_isError(left):
                    raise ValueError("the zstd stream is broken")
                filled = target.position
                yield ctypes.string_at(space, filled)
    finally:
        lib.ZSTD_freeDStream(stream)
    if left:
        raise ValueError("the zstd stream has no end")
