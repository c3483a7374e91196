"""Raw disks for the tests of the image formats, and short ways to convert and to read them."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from _pytest.raises import RaisesExc

from build import wire
from build.agent.verbs import convert
from build.engine.options import Options
from build.formats import FORMATS, KINDS
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code, Damaged, Finding, collect
from build.formats.lib.format import Format
from build.formats.lib.pieces import Disk
from build.formats.lib.reader import BoundedReader
from build.verbs.convert import UNKNOWN, descriptor

MIB = 1 << 20
EPOCH = 1_700_000_000


def options(row: Format) -> dict[str, Any]:
    """What its writer must be told."""
    ovf = (
        {"ovf": descriptor(row.descriptor, "systemvm", UNKNOWN, Options(), row.name)}
        if row.descriptor
        else {}
    )
    return {**row.options, **ovf}


def takes(row: Format) -> bool:
    """Whether it takes small disks as they are; one that does not brings a round trip of its own."""
    try:
        (row.check_size or row.kind.check_size)(8 * MIB)
    except Unsupported:
        return False
    return row.rounded(8 * MIB) == 8 * MIB


ALL: Mapping[str, Mapping[str, Any]] = {
    **{name: {"kind": row.kind.name, "options": options(row)} for name, row in FORMATS.items() if takes(row)},
    "qcow2-v3": {"kind": "qcow2", "options": {"version": 3}},
    "qcow2-zstd": {"kind": "qcow2", "options": {"version": 3, "compression": "zstd"}},
    "qcow2-plain": {"kind": "qcow2", "options": {"compression": "none"}},
}
"""Every way a format can be asked for, by a name that is also its file's."""


def spec(name: str, compress: str = "") -> dict[str, Any]:
    """What the agent is asked for one file, called NAME.SUFFIX[.COMPRESS]."""
    row = ALL[name]
    file = f"{name}.{KINDS[row['kind']].suffix or name}" + (f".{compress}" if compress else "")
    return {"name": name, **row, "file": file, "compress": compress}


def ask(image: Path, outdir: Path, specs: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """Have the agent's verb convert; answers its result."""
    request = {
        "image": str(image),
        "outdir": str(outdir),
        "formats": [dict(row) for row in specs],
        "identity": "test",
        "epoch": EPOCH,
        "threads": 2,
        **more,
    }
    told: dict[str, Any] = wire.dump(
        convert.run(wire.load(wire.Convert, request), lambda kind, **fields: None)
    )
    return told


def one(image: Path, outdir: Path, name: str, **more: Any) -> Path:
    """Convert to one format; answers the file."""
    ask(image, outdir, [spec(name)], **more)
    return outdir / str(spec(name)["file"])


def chunk(kind: str, length: int, seed: int) -> bytes:
    """Content of one kind: text that compresses well, noise that does not, or zeros."""
    if kind == "noise":
        return random.Random(seed).randbytes(length)
    if kind == "zero":
        return bytes(length)
    line = b"%d: all work and no play makes a disk with text in it\n" % seed
    return (line * (length // len(line) + 1))[:length]


def make(path: Path, size: int, parts: Sequence[tuple[int, int, str]]) -> Path:
    """Write a sparse disk of `size` bytes with (offset, length, kind) parts."""
    with open(path, "wb") as file:
        file.truncate(size)
        for seed, (offset, length, kind) in enumerate(parts):
            file.seek(offset)
            file.write(chunk(kind, max(min(length, size - offset), 0), seed))
        file.truncate(size)
    return path


def usual(path: Path, size: int = 48 * MIB) -> Path:
    """A disk with text, noise, holes and a partition table with its backup in the last sector."""
    parts = [(MIB, 300_000, "text"), (5 * MIB + 123, 200_000, "noise"), (size // 2, 3 * MIB, "text")]
    make(path, size, [*parts, (size - 40 * 1024, 1024, "noise"), (9 * MIB, 4096, "zero")])
    partition(path)
    return path


def partition(path: Path) -> None:
    """Put a GPT with one partition on a disk."""
    with open(path, "r+b") as file:
        last = file.seek(0, os.SEEK_END) // 512 - 1
        entry = struct.pack("<16s16sQQQ72s", b"\1" * 16, b"\2" * 16, 2048, last - 34, 0, b"")
        table = entry.ljust(128 * 128, b"\0")

        def header(own: int, other: int, entries: int) -> bytes:
            fields = (
                b"EFI PART",
                0x10000,
                92,
                0,
                0,
                own,
                other,
                34,
                last - 34,
                b"\3" * 16,
                entries,
                128,
                128,
            )
            head = struct.pack("<8sIIIIQQQQ16sQIII", *fields, zlib.crc32(table))
            return head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]

        protective = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(last, 0xFFFFFFFF))
        for sector, content in (
            (0, bytes(446) + protective.ljust(64, b"\0") + b"\x55\xaa"),
            (1, header(1, last, 2)),
            (2, table),
            (last - 32, table),
            (last, header(last, 1, last - 32)),
        ):
            file.seek(sector * 512)
            file.write(content)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BoundedReader]:
    """The whole of a file as an reader."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield BoundedReader.whole(fd)
    finally:
        os.close(fd)


def content(disk: Disk) -> bytes:
    """Everything a guest would see of a small disk."""
    out = bytearray()
    for index in range(-(-disk.size // (2 * MIB))):
        data = disk.piece(index)
        out += bytes(min(2 * MIB, disk.size - index * 2 * MIB)) if data is None else data
    return bytes(out)


def read(path: Path, kind: str) -> bytes:
    """What our reader makes of a file."""
    with opened(path) as reader:
        return content(KINDS[kind].read(reader))


def lint(path: Path, kind: str) -> list[Finding]:
    """What our linter says of a file."""
    with opened(path) as reader:
        return collect(KINDS[kind].lint(reader))


def damaged(code: Code) -> RaisesExc[Damaged]:
    """Expect that the reading ends for this reason."""
    return pytest.raises(Damaged, check=lambda error: error.finding.code is code)


def errors(path: Path, kind: str) -> list[Code]:
    """Codes of the findings that make a file useless somewhere."""
    return [finding.code for finding in lint(path, kind) if finding.severity == "error"]


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes; a negative offset counts from the end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        file.write(content)
