"""Lay a disk out before anything is written: what the tree needs, where each part lies, every id.

Usage: layout.py DISK.json ROOT KERNEL INITRAMFS STUB FOLDER

DISK.json says what is asked for (the step writes it), SEED and SOURCE_DATE_EPOCH come from the environment,
STUB is empty for a disk without UEFI. FOLDER gets `plan.json`, which every later tool reads, `tree.json` with
what was found in the tree, and `cmdline`, the full kernel command line. A disk that cannot be made is
refused: status 3 and one line on stdout, `WHAT<TAB>HINT`.

Every id is derived from name and seed (RFC 4122, version 5), so equal inputs give equal disks.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build.disk import tree
from build.disk.tree import BLOCK, Entry, Tree

MIB = 1 << 20
SECTOR = 512
INODE = 256
GROUP = 8 * BLOCK
"""Blocks in a group: one bitmap block has this many bits."""
NAMESPACE = uuid.UUID("1f2d3e0a-5c0b-5e8e-9a59-2c1c7c3f6d11")
TYPES = {
    "bios": "21686148-6449-6E6F-744E-656564454649",
    "esp": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "root-amd64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "root-i386": "44479540-F297-41B2-9AF7-D131D5F0458A",
}
"""Partition types: GRUB's BIOS boot partition, UEFI 2.10 table 5.7, and the discoverable partitions
specification's roots."""
INITRAMFS = (
    b"070701",
    b"\x1f\x8b",
    b"\xfd7zXZ\0",
    b"(\xb5/\xfd",
    b"\x02!L\x18",
    b"BZh",
    b"]\0\0",
    b"\x89LZO",
)
"""How an initramfs begins: a plain cpio archive, or one in a compression the kernel knows."""
BYTES_PER_INODE = 16384
FOLDER_ROOM = BLOCK - 12
"""Bytes of a directory's block before its checksum."""
SHORT_LINK = 60
"""Bytes: the target of a link lies in its inode if it has fewer."""
GROWTH = 1 << 40
"""Bytes to which the root file system must be able to grow while it is mounted."""
ESP_LEAST = 36
"""MiB: the smallest FAT32 has 65525 clusters of one sector, and two tables of 4 bytes for each."""


class LayoutError(Exception):
    """The disk cannot be made: one line of what, one of what to do."""


@dataclass(frozen=True)
class TreeUsage:
    """What a tree needs in an ext4 file system."""

    inodes: int = 0
    blocks: int = 0
    """Blocks of data, directories, long links, outer extents and outer attributes."""

    def __add__(self, other: TreeUsage) -> TreeUsage:
        return TreeUsage(self.inodes + other.inodes, self.blocks + other.blocks)


def ceil(value: int, unit: int) -> int:
    """How many whole units hold the value."""
    return -(-value // unit)


def count(found: Tree) -> TreeUsage:
    """Count what the file system will hold of a tree; hard links count once."""
    total = TreeUsage(1, attribute_blocks(found.top))
    seen: set[str] = set()
    for entries in found.folders.values():
        total += TreeUsage(0, directory_blocks([entry.name for entry in entries]))
        for entry in entries:
            if entry.inode not in seen:
                total += TreeUsage(1, content_blocks(entry) + attribute_blocks(entry))
            if entry.inode:
                seen.add(entry.inode)
    return total


def content_blocks(entry: Entry) -> int:
    """Blocks of a file's data or a link's target, with outer extent blocks."""
    if entry.kind == stat.S_IFLNK:
        return int(len(os.fsencode(entry.target)) >= SHORT_LINK)
    blocks = sum(end - start for start, end in entry.runs)
    return blocks + extent_blocks(blocks, len(entry.runs) + ceil(blocks, GROUP))


def extent_blocks(blocks: int, pieces: int) -> int:
    """Outer blocks of an extent tree: four extents lie in the inode, up to 340 in a block.

    Blocks that were split when they were full are only half full.
    """
    extents = min(blocks, pieces)
    leaves = ceil(extents, 170) if extents > 4 else 0
    return leaves + (ceil(leaves, 170) if leaves > 4 else 0)


def directory_blocks(names: Sequence[str]) -> int:
    """Blocks of a directory; no entry lies over a block's end, and the first block has two more."""
    free, blocks = FOLDER_ROOM - 24, 1
    for name in names:
        need = name_size(os.fsencode(name))
        if need > free:
            free, blocks = FOLDER_ROOM, blocks + 1
        free -= need
    return blocks + extent_blocks(blocks, blocks)


def name_size(name: bytes) -> int:
    """Bytes of a name in a directory: 8 and itself, padded to 4."""
    return 8 + ceil(len(name), 4) * 4


def attribute_blocks(entry: Entry) -> int:
    """One block if the extended attributes do not fit into the inode's last 96 bytes, else none."""
    need = sum(16 + ceil(len(name), 4) * 4 + ceil(size, 4) * 4 for name, size in entry.attributes.items())
    return int(need + 8 > INODE - 128 - 32 and bool(need))


def filesystem(size: int, usage: TreeUsage) -> dict[str, int]:
    """Geometry of an ext4 file system of `size` bytes for a tree, and how many blocks it leaves free.

    The arithmetic is mke2fs's: bitmaps and inode table in every group, superblock and descriptors
    (64 bytes each) with room to grow in group 0, 1 and the powers of 3, 5 and 7 (sparse_super).
    """
    blocks = size // BLOCK
    needed = usage.inodes + 16
    inodes = max(size // BYTES_PER_INODE, needed + max(needed // 4, 1024))
    journal = min(64, max(4, size // MIB // 64))
    growth = max(GROWTH // BLOCK, 2 * blocks)
    groups = ceil(blocks, GROUP)
    per_group = ceil(ceil(inodes, max(groups, 1)), 16) * 16
    backups = sum(1 for group in range(groups) if has_superblock(group))
    descriptors = ceil(ceil(growth, GROUP), BLOCK // 64)
    overhead = groups * (2 + per_group * INODE // BLOCK) + backups * (1 + descriptors)
    # Outside of the tree: lost+found, the resize inode's blocks, grub.cfg and its directory.
    own = 4 + 2 + 4 + journal * MIB // BLOCK
    free = blocks - overhead - own - usage.blocks
    if per_group > GROUP:
        free = -1
    return {"blocks": blocks, "inodes": inodes, "journal": journal, "growth": growth, "free": free}


def has_superblock(group: int) -> bool:
    """Whether a group holds a copy of superblock and descriptors."""
    if group < 2:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False


def partitions(asked: Mapping[str, Any], size: int, esp: int) -> list[dict[str, Any]]:
    """The partitions of a disk of `size` MiB, in order, in sectors; root comes last and can grow."""
    rows = []
    if "bios" in asked["firmware"]:
        rows.append(("bios", "BIOS", TYPES["bios"], 1))
    if "uefi" in asked["firmware"]:
        rows.append(("esp", "ESP", TYPES["esp"], esp))
    # The last MiB is the backup table's.
    rows.append(("root", "ROOT", TYPES[f"root-{asked['arch']}"], size - 2 - sum(row[3] for row in rows)))
    start, table = 1, []
    for number, (role, name, kind, length) in enumerate(rows, 1):
        place = {"start": start * MIB // SECTOR, "sectors": length * MIB // SECTOR}
        table.append({"number": number, "role": role, "name": name, "type": kind, **place})
        start += length
    return table


def fits(asked: Mapping[str, Any], size: int, esp: int, usage: TreeUsage) -> bool:
    """Whether a disk of `size` MiB holds the tree, the asked headroom, and a margin for fragments."""
    length = partitions(asked, size, esp)[-1]["sectors"] * SECTOR
    margin = 2 * MIB // BLOCK + usage.blocks // 256
    headroom: int = asked["headroom"] * MIB // BLOCK
    return length > 0 and filesystem(length, usage)["free"] >= margin + headroom


def smallest(asked: Mapping[str, Any], esp: int, usage: TreeUsage) -> int:
    """The smallest even number of MiB that holds the tree."""
    size = (usage.blocks * BLOCK // MIB + esp + int(asked["headroom"])) & ~1
    while not fits(asked, size, esp, usage):
        size += 2
    return size


def plan(
    asked: Mapping[str, Any], usage: TreeUsage, boot_bytes: int, seed: str, epoch: int
) -> dict[str, Any]:
    """Everything about a disk that is known before it is written; raises LayoutError when SIZE is too small.

    `boot_bytes` is what the unified kernel image will have, `epoch` the latest time on the disk.
    """
    # Room for two unified kernel images: an update is written beside the one that boots.
    esp = max(ESP_LEAST, 2 * ceil(boot_bytes, MIB) + 4) if "uefi" in asked["firmware"] else 0
    size, least = asked["size"], smallest(asked, esp, usage)
    if not fits(asked, size, esp, usage):
        raise LayoutError(f"SIZE={size} MiB is too small", f"set SIZE to at least {least}")

    def derive(what: str) -> str:
        return str(uuid.uuid5(NAMESPACE, f"{asked['imagename']}\n{seed}\n{what}"))

    table = partitions(asked, size, esp)
    for row in table:
        row["guid"] = derive(f"partition {row['role']}")
        if row["role"] == "esp":
            row["filesystem"] = {"type": "vfat", "label": "ESP", "serial": derive("esp").replace("-", "")[:8]}
        if row["role"] == "root":
            geometry = filesystem(row["sectors"] * SECTOR, usage)
            ids = {"uuid": derive("root"), "hash_seed": derive("hash seed")}
            row["filesystem"] = {"type": "ext4", "label": "ROOT", **ids, **geometry}
    root = table[-1]["filesystem"]["uuid"]
    return {
        "size": size * MIB,
        "epoch": epoch,
        "smallest_size": least,
        "sector_size": SECTOR,
        "guid": derive("disk"),
        "kernel_cmdline": " ".join(f"root=UUID={root} ro {asked['kernel_cmdline']}".split()),
        "partitions": table,
        "tree": {"inodes": usage.inodes, "blocks": usage.blocks},
    }


def check_initramfs(path: str) -> None:
    """Refuse what no kernel would take for an initramfs."""
    with open(path, "rb") as file:
        if not file.read(8).startswith(INITRAMFS):
            raise LayoutError(
                f"{os.path.basename(path)} is not an initramfs", "make it anew: update-initramfs -u"
            )


def main(asked_path: str, root: str, kernel: str, initramfs: str, stub: str, folder: str) -> None:
    """Read what is asked for, count the tree, and write the plan."""
    with open(asked_path, encoding="utf-8") as file:
        asked = json.load(file)
    check_initramfs(initramfs)
    parts = [kernel, initramfs, stub] if stub else []
    boot_bytes = sum(os.path.getsize(part) for part in parts) + 16384
    found = tree.scan(root)
    tree.write(found, os.path.join(folder, "tree.json"))
    planned = plan(asked, count(found), boot_bytes, os.environ["SEED"], int(os.environ["SOURCE_DATE_EPOCH"]))
    with open(os.path.join(folder, "plan.json"), "w", encoding="utf-8") as file:
        json.dump(planned, file, indent=2)
    with open(os.path.join(folder, "cmdline"), "w", encoding="utf-8") as file:
        file.write(planned["kernel_cmdline"])


def refuse(error: LayoutError) -> NoReturn:
    """Say what and what to do on one line, and end."""
    print("\t".join(error.args))
    sys.exit(3)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except LayoutError as refused:
        refuse(refused)
