"""A new format is one file and one row in the docs, beside its own test: done to a copy of the tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cli
from tests.checkout import copy as copy
from tests.checkout import passes, replace
from tests.images import TINY, Built, link, sha256

pytestmark = pytest.mark.root

MODULE = '''"""A raw disk with a sector behind it that says so: as small as a format can be."""

from __future__ import annotations

from build.formats import raw
from build.formats.lib.errors import Unsupported
from build.formats.lib.format import Format, Kind, Machine, Match, Options, Target
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import put

TAIL = b"TAILED DISK".ljust(512, b"\\0")


class TailWriter(raw.RawWriter):
    """Writes the disk, then the sector."""

    def close(self, seed: str) -> None:
        """Finish the file."""
        super().close(seed)
        put(self.file, self.size, TAIL)


def disk(reader: BoundedReader) -> BoundedReader:
    """Return the disk alone."""
    return reader.window(0, reader.size - len(TAIL))


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    start = reader.size - len(TAIL)
    return Match.CERTAIN if start > 0 and reader.read(start, len(TAIL)) == TAIL else Match.NO


def _write(target: Target, options: Options) -> TailWriter:
    return TailWriter(target.file, target.size)


def _check_size(size: int) -> None:
    if size % (1 << 24):
        raise Unsupported("a tailed disk has whole 16 MiB", "set SIZE to 1024")


KIND = Kind(
    name="tail",
    suffix="tail",
    version=1,
    driver="raw",
    recognize=_recognize,
    write=_write,
    read=lambda reader: raw.RawDisk(disk(reader)),
    lint=lambda reader: raw.lint(disk(reader)),
    check_size=_check_size,
)
FORMATS = (
    Format(
        name="tail",
        help="a disk with a tail",
        kind=KIND,
        file="{imagename}.tail",
        machine=Machine("virtio", "virtio"),
    ),
)
'''
ROW = "| `convert.tail` | nobody | `IMAGENAME.tail` | the disk, and a sector behind it |\n"


@pytest.mark.slow(40, reason="tests in a copy of the checkout")
def test_a_format_is_a_file_and_a_row(copy: Path, tiny: Built, tmp_path: Path) -> None:
    (copy / "build/formats/tail.py").write_text(MODULE)
    replace(copy / "docs/formats.md", "| `convert.raw` |", f"{ROW}| `convert.raw` |")

    location = tmp_path / "location"
    link(tiny.location, location)
    flags = (*TINY, "--frozen", "--set", f"location={location}")
    assert "a disk with a tail" in cli.succeed("--list", checkout=copy)
    cli.succeed("convert.tail", *flags, checkout=copy)

    made = location / "tiny.tail"
    with made.open("rb") as file:
        file.seek(1 << 30)
        assert file.read() == b"TAILED DISK".ljust(512, b"\0")
    shown = cli.succeed("inspect", str(made), checkout=copy)
    assert f"{made}: tail\n" in shown
    assert f"{1 << 30} bytes" in shown
    back = ("convert", "--from", str(made), "--formats", "raw", "--to", str(tmp_path / "back"))
    cli.succeed(*back, checkout=copy)
    assert sha256(tmp_path / "back/tiny.raw") == sha256(tiny.image)
    odd = (*flags, "--set", "size=1030", "--formats", "tail")
    assert "whole 16 MiB" in cli.refuse("build", *odd, checkout=copy)

    passes(copy, "unit/test_imports.py", "unit/test_formats_names.py")
