"""Send the bytes of one file: the data between its holes, compressed where that helps, in order.

What goes over the wire is a series of frames: HEAD (a big-endian number of bytes of the file's offset, of
the data's length in the file, of its length here; 0 is the end) and the data,
deflated if that is shorter. The receiver hashes what it gets, with the zeros between frames, so that
nothing needs to be hashed here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import struct
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from build import wire
from build.agent import files
from build.agent.events import Emit, Failure

HEAD = struct.Struct(">QII")
CHUNK = 1 << 20
LEVEL = 1
DENSE = 0.97
"""What does not shrink below this part of itself is sent as it is, as is what follows it for a while."""
_ZEROS = bytes(CHUNK)
REST = 15
"""Chunks that follow an incompressible one and are not tried."""


def run(request: wire.Send, emit: Emit) -> tuple[wire.Sent, ...]:
    """Look at each; raises Failure for a file that is not what its manifest says."""
    return tuple(map(_sent, map(Path, request.paths)))


def _sent(path: Path) -> wire.Sent:
    manifest = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    stamp = manifest.get("file") or manifest["stamp"]
    status = path.stat()
    if {"size": status.st_size, "mtime_ns": status.st_mtime_ns} != stamp:
        raise Failure(f"{path} was changed after it was made", "build it again")
    digest = (manifest.get("disk") or manifest["artifact"])["sha256"]
    private = files.is_private(status)
    return wire.Sent(str(path), status.st_size, status.st_mtime_ns, digest, manifest, private)


def stream(asked: queue.Queue[dict[str, Any] | None]) -> int:
    """Write the frames of one file, `path` from `offset` on, to stdout."""
    request = asked.get()
    assert request is not None
    out = sys.stdout.buffer
    with open(request["path"], "rb") as file, contextlib.suppress(BrokenPipeError):
        for head, data in frames(file.fileno(), request["offset"]):
            out.write(head)
            out.write(data)
        out.flush()
    sys.stdout = None  # nothing is left to flush into a pipe that may be closed
    return 0


def frames(fd: int, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """Give head and data of each frame; the last one's are of the file's end, without data."""
    size = os.fstat(fd).st_size
    threads = len(os.sched_getaffinity(0))
    packing: deque[Future[tuple[bytes, bytes]]] = deque()
    skip = 0
    with ThreadPoolExecutor(threads) as pool:
        for start, end in _extents(fd, offset, size):
            for place in range(start, end, CHUNK):
                packing.append(pool.submit(_pack, fd, place, min(CHUNK, end - place), skip == 0))
                skip = max(0, skip - 1)
                if len(packing) > 2 * threads:
                    head, data = packing.popleft().result()
                    if data:
                        yield head, data
                        _, plain, packed = HEAD.unpack(head)
                        skip = REST if plain == packed and skip == 0 else skip
        while packing:
            head, data = packing.popleft().result()
            if data:
                yield head, data
    yield HEAD.pack(size, 0, 0), b""


def _pack(fd: int, place: int, length: int, shrink: bool) -> tuple[bytes, bytes]:
    data = os.pread(fd, length, place)
    if data == _ZEROS[: len(data)]:
        return b"", b""
    packed = zlib.compress(data, LEVEL) if shrink else data
    if len(packed) > DENSE * len(data):
        packed = data
    return HEAD.pack(place, len(data), len(packed)), packed


def _extents(fd: int, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Give start and end of what is no hole (lseek(2), SEEK_DATA)."""
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, offset
