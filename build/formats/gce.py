"""Google Compute Engine: a GNU tar of the raw disk as `disk.raw`, to be packed by gzip.

As "Manually import boot disks" of Compute Engine has it: the name, the archive's old GNU form, and a disk of
whole GiB. A disk of another size is followed by zeros, as if it had been laid on a larger one: the firmware
reads the partition table in front, and a system that grows its root partition moves the one at the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from build.formats import raw
from build.formats.lib import platforms
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.format import Format, Kind, Machine, Match, Options, Target
from build.formats.lib.inner import Inner
from build.formats.lib.pieces import Disk
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import BLOCK, Archive, archive_size, is_tar, padded
from build.formats.lib.writer import Shifted, Units, put
from build.formats.raw import RawDisk, RawWriter

GIB = 1 << 30
NAME = "disk.raw"

GROUP = Group(
    "GCE", "Google Compute Engine's archive", "Compute Engine, Manually import boot disks: the image file"
)
_GOOGLE = (platforms.GCE,)
NO_DISK = Damage("GCE001", f"no {NAME} in the archive", _GOOGLE, f"put the disk in as {NAME}")
PAX = Code("GCE002", "error", "the archive is in pax format", _GOOGLE, "pack it again with --format=oldgnu")
OTHER_FILE = Code("GCE003", "error", f"{{name}} beside {NAME}", _GOOGLE, f"pack {NAME} alone")
ODD_SIZE = Code(
    "GCE004", "error", "the disk has {size} bytes, which is not whole GiB", _GOOGLE, "make it whole GiB"
)


def rounded(size: int) -> int:
    """The next whole GiB, in bytes."""
    return -(-size // GIB) * GIB


class GceWriter:
    """Writes the disk behind the header, zeros as holes."""

    codec = None

    def __init__(self, file: BinaryIO, size: int, epoch: int) -> None:
        self.file, self.size, self.epoch = file, rounded(size), epoch
        self.data = RawWriter(Shifted.over(file, BLOCK), self.size)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write what is not zero in a piece."""
        self.data.add(index, data, units)

    def close(self, seed: str) -> None:
        """Write the header and the archive's end."""
        head = tarfile.TarInfo(NAME)
        head.size, head.mtime = self.size, self.epoch
        put(self.file, 0, head.tobuf(tarfile.GNU_FORMAT))
        self.file.truncate(archive_size(BLOCK + padded(self.size)))


def inner(reader: BoundedReader) -> tuple[Inner, ...]:
    """The disk; raises Damaged when there is none."""
    archive = Archive(reader)
    member = archive.find(NAME)
    if member is None:
        raise Damaged(NO_DISK, "archive")
    return (archive.inner(member),)


def read(reader: BoundedReader) -> Disk:
    """What a guest sees; raises Damaged."""
    (disk,) = inner(reader)
    return disk.disk or RawDisk(disk.parts[0])


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check what Google's importer wants of the archive."""
    archive = Archive(reader)
    yield from archive.findings
    if archive.form == "pax":
        yield Finding(PAX, at(0))
    for member in archive.members:
        if member.name != NAME:
            yield Finding(OTHER_FILE, at(member.header_at), name=member.name)
    if (size := read(reader).size) % GIB:
        yield Finding(ODD_SIZE, NAME, size=size)


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.CERTAIN if is_tar(head) and head.startswith(NAME.encode() + b"\0") else Match.NO


def _write(target: Target, options: Options) -> GceWriter:
    return GceWriter(target.file, target.size, target.epoch)


KIND = Kind(
    name="gce",
    suffix="tar",
    version=1,
    driver="raw",
    recognize=_recognize,
    write=_write,
    read=read,
    lint=lint,
    check_size=raw.KIND.check_size,
    inner=inner,
)
FORMATS = (
    Format(
        name="gce",
        help="disk.raw in a .tar.gz for Google Compute Engine",
        kind=KIND,
        file="{imagename}-gce.tar.gz",
        machine=Machine("virtio-scsi", "virtio", ("bios", "uefi")),
        rounded=rounded,
    ),
)
