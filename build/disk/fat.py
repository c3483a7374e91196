"""Write the EFI system partition of a planned disk: a FAT32 file system with given files.

Usage: fat.py PLAN.json IMAGE NAME=FILE...

NAME is a path of upper-case 8.3 names. Layout: Microsoft's FAT32 specification 1.03; all numbers
little-endian. Written here and not by mkfs.fat and mtools, so that no version of theirs, time zone or clock
of a build host can show in the bytes.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

SECTOR = 512
RESERVED = 32
BACKUP = 6
FATS = 2
ROOT_CLUSTER = 2
LAST = 0x0FFFFFFF
LEAST_CLUSTERS = 65525
"""Fewer clusters make it FAT16."""
DIRECTORY, ARCHIVE, VOLUME = 0x10, 0x20, 0x08


@dataclass
class Folder:
    """A directory while the file system is made: its entries by name, and its clusters."""

    entries: dict[str, Folder | bytes] = field(default_factory=dict)
    first: int = 0


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from a partition's length in sectors."""

    sectors: int
    per_cluster: int
    fat_sectors: int

    @property
    def data(self) -> int:
        """First sector of the clusters."""
        return RESERVED + FATS * self.fat_sectors

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return (self.sectors - self.data) // self.per_cluster


def geometry(sectors: int) -> Geometry:
    """The largest clusters, up to 4 KiB, that still make a FAT32; raises ValueError when none do."""
    for per_cluster in (8, 4, 2, 1):
        entries = (sectors - RESERVED) // per_cluster + 2
        # Whole 4 KiB, so that clusters lie well on disks with such sectors.
        shape = Geometry(sectors, per_cluster, -(-entries * 4 // (8 * SECTOR)) * 8)
        if shape.clusters >= LEAST_CLUSTERS:
            return shape
    raise ValueError(f"{sectors} sectors are too few for FAT32")


def tree(files: Mapping[str, bytes]) -> Folder:
    """Folders and files from paths; raises ValueError on a name that is not upper-case 8.3."""
    root = Folder()
    for path, content in files.items():
        *folders, name = path.split("/")
        here = root
        for part in (*folders, name):
            if not re.fullmatch(r"[A-Z0-9_~-]{1,8}(\.[A-Z0-9_~-]{1,3})?", part):
                raise ValueError(f"{part!r} is not an upper-case 8.3 name")
        for part in folders:
            inner = here.entries.setdefault(part, Folder())
            if not isinstance(inner, Folder):
                raise ValueError(f"{part!r} is a file and a folder")
            here = inner
        here.entries[name] = content
    return root


def stamp(epoch: int) -> tuple[int, int]:
    """A time as FAT has it, in UTC: date and time, 1980 to 2107, in steps of two seconds."""
    when = time.gmtime(min(max(epoch, 315532800), 4354819198))
    date = (when.tm_year - 1980) << 9 | when.tm_mon << 5 | when.tm_mday
    return date, when.tm_hour << 11 | when.tm_min << 5 | when.tm_sec // 2


def entry(name: str, attributes: int, first: int, size: int, epoch: int) -> bytes:
    """One directory entry of 32 bytes; `.` and `..` are told by name."""
    stem, _, suffix = (name, "", "") if name in (".", "..") else name.partition(".")
    date, clock = stamp(epoch)
    packed = struct.pack(
        "<11sBBBHHHHHHHI",
        f"{stem:8}{suffix:3}".encode(),
        attributes, 0, 0, clock, date, date, first >> 16, clock, date, first & 0xFFFF, size,
    )  # fmt: skip
    assert len(packed) == 32
    return packed


class Chains:
    """Clusters as they are given out, one file behind the other."""

    def __init__(self, shape: Geometry) -> None:
        self.shape = shape
        self.table = [0x0FFFFFF8, LAST]
        self.contents: list[tuple[int, bytes]] = []

    def take(self, length: int) -> int:
        """Reserve a chain for so many bytes and return its first cluster; 0 for an empty file."""
        number = -(-length // (self.shape.per_cluster * SECTOR))
        first = len(self.table)
        if first + number > self.shape.clusters + 2:
            raise ValueError("the files do not fit into the EFI system partition")
        self.table += [*range(first + 1, first + number), LAST] if number else []
        return first if number else 0

    def store(self, folder: Folder, parent: int, epoch: int, label: str = "") -> None:
        """Lay out a folder's content, then the folder itself, whose first cluster is known."""
        listing = b""
        if label:
            listing += entry(f"{label:8}", VOLUME, 0, 0, epoch)
        else:
            listing += entry(".", DIRECTORY, folder.first, 0, epoch) + entry(
                "..", DIRECTORY, parent, 0, epoch
            )
        for name, content in folder.entries.items():
            if isinstance(content, Folder):
                content.first = self.take(self.shape.per_cluster * SECTOR)
                listing += entry(name, DIRECTORY, content.first, 0, epoch)
                # The root is written as 0 in an entry that leads to it.
                self.store(content, 0 if label else folder.first, epoch)
            else:
                first = self.take(len(content))
                listing += entry(name, ARCHIVE, first, len(content), epoch)
                self.contents.append((first, content))
        if len(listing) > self.shape.per_cluster * SECTOR:
            raise ValueError("a folder of the EFI system partition has too many entries")
        self.contents.append((folder.first, listing))


def boot_sector(shape: Geometry, hidden: int, serial: int, label: str) -> bytes:
    """The first sector: sizes, serial number and label; its code only halts."""
    parameters = struct.pack(
        "<3s8sHBHBHHBHHHIIIHHIHH12xBBBI11s8s",
        b"\xeb\x58\x90", b"MSWIN4.1",
        SECTOR, shape.per_cluster, RESERVED, FATS, 0, 0, 0xF8, 0, 63, 255, hidden, shape.sectors,
        shape.fat_sectors, 0, 0, ROOT_CLUSTER, 1, BACKUP,
        0x80, 0, 0x29, serial, f"{label:11}".encode(), b"FAT32   ",
    )  # fmt: skip
    assert len(parameters) == 90
    halt = b"\xfa\xf4\xeb\xfd"
    return (parameters + halt).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def write(
    disk: BinaryIO, start: int, sectors: int, serial: int, label: str, epoch: int, files: Mapping[str, bytes]
) -> None:
    """Write a file system at sector `start`; the place must read as zeros before."""
    shape = geometry(sectors)
    root = tree(files)
    chains = Chains(shape)
    root.first = chains.take(shape.per_cluster * SECTOR)
    chains.store(root, 0, epoch, label)

    def put(sector: int, data: bytes) -> None:
        disk.seek((start + sector) * SECTOR)
        disk.write(data)

    used = len(chains.table)
    information = struct.pack(
        "<I480xIII12xI", 0x41615252, 0x61417272, shape.clusters + 2 - used, used, 0xAA550000
    )
    for sector in (0, BACKUP):
        put(sector, boot_sector(shape, start, serial, label) + information)
    table = struct.pack(f"<{used}I", *chains.table)
    for copy in range(FATS):
        put(RESERVED + copy * shape.fat_sectors, table)
    for first, content in chains.contents:
        if content:
            put(shape.data + (first - 2) * shape.per_cluster, content)


def main(plan_path: str, image: str, *files: str) -> None:
    """Read the plan and the files, and write the partition."""
    with open(plan_path, encoding="utf-8") as file:
        plan = json.load(file)
    place = next(row for row in plan["partitions"] if row["role"] == "esp")
    contents = {}
    for name, path in (pair.split("=", 1) for pair in files):
        with open(path, "rb") as file:
            contents[name] = file.read()
    ids = place["filesystem"]
    with open(image, "r+b") as disk:
        serial, label = int(ids["serial"], 16), ids["label"]
        write(disk, place["start"], place["sectors"], serial, label, plan["epoch"], contents)


if __name__ == "__main__":
    main(*sys.argv[1:])
