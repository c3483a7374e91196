"""A new format is one file and one row in the docs, beside its own test: done to a copy of the tree."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
from pathlib import Path

import pytest

from tests import cli
from tests.checkout import copy as copy
from tests.checkout import passes, replace
from tests.images import TINY, Built, link, sha256

pytestmark = pytest.mark.root

MODULE = '''"""What Google Cloud imports: image.raw, whole GiB, in a tar of GNU's old form inside gzip.

Source: Google Cloud, Compute Engine, "Manually import boot disks", on the image file.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from build.formats.lib import pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, Finding, at
from build.formats.lib.format import Format, Kind, Machine, Match, Options, Target
from build.formats.lib.inner import Inner
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import Units, put
from build.formats.raw import RawDisk

BLOCK = 512
RECORD = 20 * BLOCK
GIB = 1 << 30
MEMBER = "image.raw"
GOOGLE = "Google Cloud"


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that Google Cloud does not import."""
    if size % GIB or not size:
        raise Unsupported(f"{GOOGLE} takes whole GiB, the disk has {size} bytes", "set SIZE to 1024 or 2048")


class GcpWriter:
    """Writes the disk sparse behind the header of its only member."""

    codec = None

    def __init__(self, target: Target) -> None:
        check_size(target.size)
        self.file, self.size, self.epoch = target.file, target.size, target.epoch

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write what is not zero in a piece."""
        for number, unit in enumerate(pieces.units(data)):
            if unit is not None:
                put(self.file, BLOCK + index * pieces.PIECE + number * pieces.UNIT, unit)

    def close(self, seed: str) -> None:
        """Write the header, and zeros up to a whole record."""
        info = tarfile.TarInfo(MEMBER)
        info.size, info.mtime = self.size, self.epoch
        put(self.file, 0, info.tobuf(tarfile.GNU_FORMAT))
        self.file.truncate(-(-(BLOCK + self.size + 2 * BLOCK) // RECORD) * RECORD)


def disk(reader: BoundedReader) -> BoundedReader:
    """The disk inside; Damaged when there is none."""
    try:
        info = tarfile.TarInfo.frombuf(reader.read(0, BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise Damaged(at(0), f"no tar header: {error}", GOOGLE) from None
    if info.name != MEMBER:
        raise Damaged(at(0), f"the archive does not begin with {MEMBER}", GOOGLE)
    return reader.window(BLOCK, info.size)


def inner(reader: BoundedReader) -> tuple[Inner, ...]:
    """The disk, for whoever opens an archive."""
    return (Inner(MEMBER, (disk(reader),)),)


class GcpDisk(RawDisk):
    """Reads the disk inside."""

    def __init__(self, reader: BoundedReader) -> None:
        super().__init__(disk(reader))


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check that Google Cloud takes it."""
    if disk(reader).size % GIB:
        yield Finding("error", at(124), "the disk is no whole number of GiB", GOOGLE, "convert it again")
    if reader.read(257, 8) != b"ustar  \\0":
        yield Finding("error", at(257), "the tar is not of GNU's old form", GOOGLE, "tar --format=oldgnu")


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.CERTAIN if head.startswith(MEMBER.encode() + b"\\0") else Match.NO


def _write(target: Target, options: Options) -> GcpWriter:
    return GcpWriter(target)


KIND = Kind(
    name="gcp",
    suffix="tar",
    version=1,
    driver="raw",
    recognize=_recognize,
    write=_write,
    read=GcpDisk,
    lint=lint,
    check_size=check_size,
    inner=inner,
)
FORMATS = (
    Format(
        name="gcp",
        help="image.raw in a tar for Google Cloud",
        kind=KIND,
        file="{imagename}-gcp.tar.gz",
        machine=Machine("virtio-scsi", "virtio", ("bios", "uefi")),
    ),
)
'''
ROW = "| `convert.gcp` | Google Cloud | `IMAGENAME-gcp.tar.gz` | `image.raw` in a tar of GNU's old form |\n"


def test_a_format_is_a_file_and_a_row(copy: Path, tiny: Built, tmp_path: Path) -> None:
    (copy / "build/formats/gcp.py").write_text(MODULE)
    replace(copy / "docs/formats.md", "| `convert.raw` |", f"{ROW}| `convert.raw` |")

    location = tmp_path / "location"
    link(tiny.location, location)
    flags = (*TINY, "--frozen", "--set", f"location={location}")
    assert "image.raw in a tar for Google Cloud" in cli.succeed("--list", checkout=copy)
    cli.succeed("convert.gcp", *flags, checkout=copy)

    image, made = location / "tiny.img", location / "tiny-gcp.tar.gz"
    with gzip.open(made) as packed:
        assert packed.read(265)[257:] == b"ustar  \0"
    unpack = subprocess.run(["tar", "-xzOf", made, "image.raw"], capture_output=True, check=True)
    assert hashlib.sha256(unpack.stdout).hexdigest() == sha256(image)
    shown = cli.succeed("inspect", str(made), checkout=copy)
    assert f"{made}: gcp inside gz\n" in shown
    assert f"{1 << 30} bytes" in shown
    with gzip.open(made) as packed:
        (tmp_path / "cut.tar").write_bytes(packed.read(1 << 20))
    assert "reach past the end" in cli.inv("inspect", str(tmp_path / "cut.tar"), checkout=copy).stdout
    odd = (*flags, "--set", "size=1030", "--formats", "gcp")
    assert "takes whole GiB" in cli.refuse("build", *odd, checkout=copy)

    passes(copy, "unit/test_imports.py", "unit/test_formats_names.py", "unit/test_formats_convert.py")
