"""A tree as ext4 keeps it: inodes, folders, extents, and the blocks they take.

Sources: the kernel's Documentation/filesystems/ext4; for what checksums cover, e2fsprogs' lib/ext2fs/csum.c.
All numbers little-endian.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from build import crc32c
from build.disk import layout, tree
from build.disk.layout import FOLDER_ROOM, GROUP, INODE
from build.disk.tree import BLOCK, Entry, Tree

ROOT, LOST, FIRST = 2, 11, 12
"""Inodes of the root folder, of lost+found, and the first one that is free after mke2fs."""
NODE_ROOM = BLOCK - 4
"""Bytes before the checksum of a node of an extent tree."""
PER_NODE, PER_INODE = 340, 4
"""Extents in a node, and in an inode."""
EXTENTS_FLAG = 0x80000
MOST_LINKS = 65000
"""A folder with more is said to have one (dir_nlink)."""
TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""What a folder's entry says of an inode."""
_INODE = struct.Struct("<HHIiiiIHHIII60sIIII8HIIIiIII96x")
_EXTENT = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIHxx")
_ENTRY = struct.Struct("<IHBB")
_TAIL = struct.pack("<IHBB", 0, 12, 0, 0xDE)


class Run(NamedTuple):
    """Blocks in a row."""

    first: int
    length: int


class Extent(NamedTuple):
    """Blocks of a file in a row: where they lie in it, and on the disk."""

    logical: int
    first: int
    length: int


@dataclass(eq=False)
class Node:
    """One inode of the tree."""

    entry: Entry
    path: str
    """From the top."""
    number: int
    links: int = 1
    parent: int = 0
    """Of a folder: the inode of the one above it."""
    names: list[tuple[bytes, int, int]] = field(default_factory=list)
    """Of a folder: name, inode and type of each entry."""
    size: int = 0
    """Bytes of its content, as the inode tells."""
    extents: list[Extent] = field(default_factory=list)
    outer: int = 0
    """Blocks of its extent tree."""
    inner: bytes = b""
    """What its own 60 bytes hold."""


def collect(found: Tree) -> list[Node]:
    """Every inode of a tree, numbered folder by folder."""
    lost = (tree.LOST.encode(), LOST, TYPES[stat.S_IFDIR])
    top = Node(found.top, "", ROOT, links=3, parent=ROOT, names=[lost])
    nodes, folders, linked = [top], {"": top}, dict[str, Node]()
    for folder, entries in found.folders.items():
        above = folders[folder]
        for entry in entries:
            node = linked.get(entry.inode)
            if node:
                node.links += 1
            else:
                path = f"{folder}/{entry.name}" if folder else entry.name
                node = Node(entry, path, FIRST + len(nodes) - 1)
                nodes.append(node)
                if entry.kind == stat.S_IFDIR:
                    node.links, node.parent = 2, above.number
                    above.links += 1
                    folders[path] = node
                if entry.inode:
                    linked[entry.inode] = node
            above.names.append((os.fsencode(entry.name), node.number, TYPES[entry.kind]))
    return nodes


class Space:
    """The free blocks of a file system, given away from its start on."""

    def __init__(self, used: Iterable[int]) -> None:
        self.used = list(used)
        """What is in use by now, a bit for each block of a group."""
        self._runs = [
            Run(group * GROUP + found.start(), len(found[0]))
            for group, bits in enumerate(self.used)
            for found in re.finditer("0+", f"{bits:0{GROUP}b}"[::-1])
        ]
        self._runs.reverse()

    def take(self, blocks: int) -> list[Run]:
        """Take blocks, in as few runs as there are; none is longer than a group. Raises IndexError."""
        taken = []
        while blocks:
            first, length = self._runs.pop()
            if length > blocks:
                self._runs.append(Run(first + blocks, length - blocks))
                length = blocks
            group, bit = divmod(first, GROUP)
            self.used[group] |= ((1 << length) - 1) << bit
            taken.append(Run(first, length))
            blocks -= length
        return taken


def place(runs: Iterable[tuple[int, int]], space: Space) -> list[Extent]:
    """Give a file's runs of blocks (start and end) a place."""
    extents = []
    for logical, end in runs:
        for first, length in space.take(end - logical):
            extents.append(Extent(logical, first, length))
            logical += length
    return extents


def extent_tree(node: Node, space: Space, seed: int) -> Iterator[tuple[int, bytes]]:
    """Set what an inode's own bytes hold of its extents; yields number and content of each outer node."""
    rows = [
        (each.logical, _EXTENT.pack(each.logical, each.length, each.first >> 32, each.first & 0xFFFFFFFF))
        for each in node.extents
    ]
    depth = 0
    own = crc32c.register(struct.pack("<II", node.number, 0), seed) if len(rows) > PER_INODE else 0
    while len(rows) > PER_INODE:
        above = []
        for start in range(0, len(rows), PER_NODE):
            part = rows[start : start + PER_NODE]
            content = _node(part, PER_NODE, depth).ljust(NODE_ROOM, b"\0")
            ((number, _),) = space.take(1)
            node.outer += 1
            yield number, content + struct.pack("<I", crc32c.register(content, own))
            above.append((part[0][0], _INDEX.pack(part[0][0], number & 0xFFFFFFFF, number >> 32)))
        rows, depth = above, depth + 1
    node.inner = _node(rows, PER_INODE, depth)


def _node(rows: Sequence[tuple[int, bytes]], most: int, depth: int) -> bytes:
    head = struct.pack("<HHHHI", 0xF30A, len(rows), most, depth, 0)
    return head + b"".join(row for _, row in rows)


def folder_blocks(node: Node) -> bytes:
    """The blocks of a folder, without their checksums; no entry lies over a block's end."""
    blocks, rows, free = [], [(b".", node.number, 2), (b"..", node.parent, 2)], FOLDER_ROOM - 24
    for name in node.names:
        need = layout.name_size(name[0])
        if need > free:
            blocks.append(_folder_block(rows))
            rows, free = [], FOLDER_ROOM
        rows.append(name)
        free -= need
    return b"".join([*blocks, _folder_block(rows)])


def _folder_block(rows: Sequence[tuple[bytes, int, int]]) -> bytes:
    parts: list[bytes] = []
    left = FOLDER_ROOM
    for name, number, kind in rows:
        size = layout.name_size(name)
        last = len(parts) == len(rows) - 1
        parts.append((_ENTRY.pack(number, left if last else size, len(name), kind) + name).ljust(size, b"\0"))
        left -= size
    return b"".join(parts).ljust(FOLDER_ROOM, b"\0") + _TAIL.ljust(12, b"\0")


def inode(node: Node, epoch: int) -> bytes:
    """An inode without its checksum; no time is later than the epoch, and only the last change is earlier."""
    entry = node.entry
    blocks = (sum(each.length for each in node.extents) + node.outer) * (BLOCK // 512)
    changed = entry.changed if 0 <= entry.changed <= epoch else epoch
    (now, now_extra), (then, then_extra) = _time(epoch), _time(changed)
    has_extents = entry.kind in (stat.S_IFREG, stat.S_IFDIR) or node.extents
    links = node.links if entry.kind != stat.S_IFDIR or node.links < MOST_LINKS else 1
    return _INODE.pack(
        entry.mode, entry.uid & 0xFFFF, node.size & 0xFFFFFFFF, now, now, then, 0,
        entry.gid & 0xFFFF, links, blocks & 0xFFFFFFFF, EXTENTS_FLAG if has_extents else 0, 0,
        node.inner, 0, 0, node.size >> 32, 0,
        blocks >> 32, 0, entry.uid >> 16, entry.gid >> 16, 0, 0, 32, 0,
        now_extra, then_extra, now_extra, now, now_extra, 0, 0,
    )  # fmt: skip


def _time(seconds: int) -> tuple[int, int]:
    """Seconds since 1970 as 32 bits with a sign, and the two bits above these (the rest: nanoseconds)."""
    low = (seconds + (1 << 31)) % (1 << 32) - (1 << 31)
    return low, (seconds - low) >> 32


def device(number: int) -> bytes:
    """What the inode of a device node holds: the old form of its number where that is wide enough."""
    major, minor = os.major(number), os.minor(number)
    if major < 256 and minor < 256:
        return struct.pack("<I", major << 8 | minor)
    return struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


def with_checksums(inodes: bytes, first: int, seed: int) -> bytes:
    """The same inodes, numbered from `first` on, each with its checksum."""
    count = len(inodes) // INODE
    heads = b"".join(struct.pack("<II", number, 0) for number in range(first, first + count))
    own = crc32c.registers(heads, 8, 8, crc32c.start(seed, count))
    planes = crc32c.registers(inodes, INODE, INODE, own)
    summed = bytearray(inodes)
    for place_, plane in zip((0x7C, 0x7D, 0x82, 0x83), planes, strict=True):
        summed[place_::INODE] = plane
    return bytes(summed)


def summed_folders(blocks: bytes, numbers: Sequence[int], seed: int) -> bytes:
    """The same blocks of folders, each with its checksum; `numbers` tells whose each block is."""
    heads = b"".join(struct.pack("<II", number, 0) for number in numbers)
    own = crc32c.registers(heads, 8, 8, crc32c.start(seed, len(numbers)))
    planes = crc32c.registers(blocks, BLOCK, FOLDER_ROOM, own)
    summed = bytearray(blocks)
    for place_, plane in enumerate(planes, BLOCK - 4):
        summed[place_::BLOCK] = plane
    return bytes(summed)
