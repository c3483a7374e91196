"""An image file of any maker, opened: whatever is around it taken off, one of its disks chosen."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from build.agent.events import Emit, Failure
from build.agent.guest import media
from build.formats import KINDS, foreign, raw, recognize
from build.formats.lib import partitions, pieces, unwrap
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, Finding
from build.formats.lib.format import HEAD, Kind
from build.formats.lib.inner import Inner
from build.formats.lib.reader import BoundedReader, Budget
from build.formats.lib.tar import Archive, is_tar

SPACE = os.environ.get("TMPDIR", "/var/tmp")
"""Where a file is expanded: /tmp may be memory."""
MOST_LAYERS = 3
"""Compressions and archives around each other that are looked into."""
PLAIN = ("0", "\0", "7", "S")
"""Types of tar members that are files with content."""
RAW_NAMES = (".raw", ".img", ".dd")
"""Ends of names of raw disks, which may begin with anything."""
_SHORT = ("tgz", "tbz2", "txz", "tzst")
"""Ends of names that stand for a tar in a compression."""


@dataclass(frozen=True)
class Image:
    """A file that holds a disk."""

    outer: str
    """Compressions and archives around it from the outside in, set apart by `+`; empty: none."""
    kind: Kind
    reader: BoundedReader
    """Of the file in that kind."""
    name: str
    """Its name without what is around it."""
    holder: Image | None = None
    """The archive that it is a disk of, as an OVA."""
    number: int = 1
    """Which of that one's disks it is."""

    @property
    def described(self) -> str:
        """What the file is, in a few words."""
        around = [self.holder.kind.name if self.holder else "", *reversed(self.outer.split("+"))]
        return " inside ".join(filter(None, [self.kind.name, *around]))

    def losses(self) -> Iterator[Finding]:
        """What is wrong with its content, as its linter and that of the archive around it say."""
        if self.holder:
            found = _losses(self.holder)
            yield from (finding for finding in found if finding.disk in (None, self.number))
        yield from _losses(self)


def unreadable(name: str, damage: Damaged) -> Failure:
    """What ends a verb when a file called `name` cannot be read."""
    return Failure(f"{name}: {damage}", damage.finding.fix, code=damage.finding.code.id)


def _losses(file: Image) -> Iterator[Finding]:
    """What loses data, each one: nothing is counted instead, so that none can hide behind another."""
    try:
        yield from (finding for finding in file.kind.lint(bounded(file.reader)) if finding.lossy)
    except Damaged as damage:
        yield damage.finding


@dataclass(frozen=True)
class Opener:
    """Where and how far files may be expanded, and how long they stay open."""

    stack: ExitStack
    emit: Emit
    limit: int = media.LIMIT
    work: str = SPACE

    def space(self) -> BinaryIO:
        """A file without a name that lives as long as the image."""
        return self.stack.enter_context(tempfile.TemporaryFile(dir=self.work))

    def expand(self, compression: str, reader: BoundedReader) -> BoundedReader:
        """What is in a compression; raises Damaged and Unsupported."""
        if compression not in unwrap.KINDS:
            raise Unsupported(f"{compression} is not unpacked here", "unpack it yourself")
        space = self.space()
        media.expand(compression, reader, space, self.emit, self.limit)
        return BoundedReader.whole(space.fileno())

    def join(self, parts: Sequence[BoundedReader]) -> BoundedReader:
        """Parts of an image in one file; raises Damaged and Unsupported."""
        space = self.space()
        media.join(parts, space, self.emit, self.limit)
        return BoundedReader.whole(space.fileno())


def bounded(reader: BoundedReader) -> BoundedReader:
    """The same with as much reading as its tables may lead to."""
    return BoundedReader(reader.fd, reader.start, reader.size, Budget(8 * reader.allocated() + (1 << 30)))


@contextlib.contextmanager
def opened_file(path: Path) -> Iterator[int]:
    """A descriptor of an image file or block device; raises Failure for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Failure(f"there is no file {path}", "name an image file") from None
    try:
        if not path.is_file() and not path.is_block_device():
            raise Failure(f"{path} is no file", "name an image file")
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opener(emit: Emit, limit: int = 0, work: str | None = None) -> Iterator[Opener]:
    """Expand below `work` (default: SPACE), at most `limit` bytes each time (default: media.LIMIT)."""
    with ExitStack() as stack:
        yield Opener(stack, emit, limit or media.LIMIT, work or SPACE)


@contextlib.contextmanager
def opened(
    fd: int, name: str, emit: Emit, limit: int = 0, work: str | None = None, disk: int = 1
) -> Iterator[Image]:
    """The image in an open file called `name`, or one of the disks in it, counted from 1.

    Raises Damaged, Unsupported, and Failure when there is no such disk.
    """
    with opener(emit, limit, work) as how:
        image = unwrapped(BoundedReader.whole(fd), name, how)
        disks = image.kind.inner(image.reader)
        yield chosen(image, disks, disk, how) if disks or disk != 1 else image


def unwrapped(reader: BoundedReader, name: str, how: Opener) -> Image:
    """A file without the compressions and plain archives around it; raises Damaged and Unsupported."""
    layers: list[str] = []
    while layer := unwrap.recognize(reader) or ("tar" if _is_plain_tar(reader) else ""):
        if len(layers) == MOST_LAYERS:
            text = f"more than {MOST_LAYERS} compressions and archives around each other"
            raise Unsupported(f"{name}: {text}", "unpack it yourself")
        layers.append(layer)
        if layer != "tar":
            reader, name = how.expand(layer, reader), _without(name, layer)
            continue
        inside = _lone_image(reader, name)
        name = inside.name.rpartition("/")[2]
        if inside.disk:
            return Image("+".join(layers), _piecewise(inside.disk), reader, name)
        reader = _laid_out(inside, how)
    return Image("+".join(layers), recognize(reader), reader, name)


def chosen(image: Image, disks: Sequence[Inner], number: int, how: Opener) -> Image:
    """One of the disks in an archive, counted from 1, as an image of its own kind; raises as `opened`."""
    need_disk(image, disks, number)
    disk = disks[number - 1]
    if disk.disk:
        found = Image("", _piecewise(disk.disk), image.reader, disk.name)
    else:
        found = unwrapped(_laid_out(disk, how), disk.name.rpartition("/")[2], how)
    outer = "+".join(filter(None, (image.outer, found.outer)))
    return replace(found, outer=outer, holder=image, number=number)


def need_disk(image: Image, disks: Sequence[Inner], number: int) -> None:
    """Raise Failure when there is no such disk, counted from 1."""
    if not 1 <= number <= len(disks):
        names = "; ".join(f"{row}: {disk.name}" for row, disk in enumerate(disks, 1))
        hint = f"choose one of these: {names[:300]}" if names else "leave the number out: it holds one"
        raise Failure(f"{image.name} has no disk {number}", hint)


def _without(name: str, compression: str) -> str:
    base, _, end = name.rpartition(".")
    if end.lower() in _SHORT:
        return f"{base}.tar"
    return base if base and end.lower() == compression else name


def _laid_out(disk: Inner, how: Opener) -> BoundedReader:
    """A disk image byte by byte: where it lies, or put together and expanded."""
    reader = disk.parts[0] if len(disk.parts) == 1 else how.join(disk.parts)
    return how.expand(disk.compression, reader) if disk.compression else reader


def _piecewise(disk: pieces.Disk) -> Kind:
    """The kind of a raw disk that lies nowhere byte by byte: whatever the reader, it is this disk."""
    return replace(raw.KIND, read=lambda _: disk, lint=lambda _: partitions.lint(disk))


def _is_plain_tar(reader: BoundedReader) -> bool:
    """Whether a file is a tar that nobody knows as a kind of image, and that is no OVA without a disk."""
    head = reader.read(0, min(reader.size, HEAD))
    if not is_tar(head) or recognize(reader) is not KINDS["ova"]:
        return False
    try:
        return not Archive(reader).find(".ovf") and bool(_images(reader))
    except Damaged:
        return False


def _images(reader: BoundedReader) -> list[Inner]:
    archive = Archive(reader)
    files = (archive.inner(member) for member in archive.members if member.kind in PLAIN and member.size)
    return [file for file in files if _is_image(file)]


def _lone_image(reader: BoundedReader, name: str) -> Inner:
    """The disk image in a tar; raises Unsupported when there are several."""
    found = _images(reader)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)[:300]
        raise Unsupported(f"{name} holds {len(found)} disk images: {names}", "unpack the one that you mean")
    return found[0]


def _is_image(file: Inner) -> bool:
    """Whether a file in a tar is a disk image: by its content, or, when that may be anything, by its name."""
    window = file.whole
    kind = recognize(window) if window else raw.KIND
    if kind in foreign.KINDS:
        return False
    if window and (unwrap.recognize(window) or kind is not raw.KIND):
        return True
    return (
        file.name.lower().endswith(RAW_NAMES)
        or file.head(partitions.SECTOR)[510:] == partitions.BOOT_SIGNATURE
    )
