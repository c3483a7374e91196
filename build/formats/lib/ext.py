"""Files in an ext2, ext3 or ext4 file system of a disk in any format; nothing in it is trusted.

Source: the kernel's Documentation/filesystems/ext4 (super block, group descriptors, inodes, extents, linear
directories; the inner nodes of a hashed directory look like empty entries of a linear one).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache

from build.formats.lib import partitions
from build.formats.lib.findings import Damage, Damaged, Group
from build.formats.lib.pieces import Disk

MAGIC = 0xEF53
LARGEST = 64 << 20
"""Bytes of a file that are read; the list of the packages in an appliance has about one MiB."""
_ROOT = 2
_DEEPEST = 5
_MOST_NODES = 1 << 14
"""Of one file's extent tree; a sound one of LARGEST has far fewer."""
_EXTENTS, _SIXTY_FOUR = 0x80000, 0x80
_KIND, _FOLDER, _FILE = 0xF000, 0x4000, 0x8000
_WHERE = "file system"

GROUP = Group("EXT", "An ext file system", "Linux, Documentation/filesystems/ext4")
NO_EXT = Damage("EXT001", "no ext file system")
BAD_SUPER = Damage("EXT002", "the super block makes no sense")
LARGE_INODE = Damage("EXT003", "inode {inode} says that it has {size} bytes")
OVERLAP = Damage("EXT004", "blocks of inode {inode} lie over each other")
BAD_EXTENTS = Damage("EXT005", "an extent tree makes no sense")
PAST_END = Damage("EXT006", "it reaches past the end of the disk (byte {offset:#x})")
BAD_FOLDER = Damage("EXT007", "a directory makes no sense")


class _Kept:
    """A disk that keeps the last pieces of another one: what is read of a file system is small and near."""

    def __init__(self, disk: Disk) -> None:
        self.size, self.facts = disk.size, disk.facts
        self.piece = lru_cache(maxsize=8)(disk.piece)


class FileSystem:
    """What lies from a byte of a disk on; raises Damaged when that is no ext file system."""

    def __init__(self, disk: Disk, start: int) -> None:
        self._disk, self._start = _Kept(disk), start
        head = self._bytes(1024, 1024)
        if len(head) < 1024 or struct.unpack_from("<H", head, 56)[0] != MAGIC:
            raise Damaged(NO_EXT, f"guest byte {start:#x}")
        shift, per_group, revision = (struct.unpack_from("<I", head, at)[0] for at in (24, 40, 76))
        wide = struct.unpack_from("<I", head, 96)[0] & _SIXTY_FOUR
        self._inode_size = struct.unpack_from("<H", head, 88)[0] if revision else 128
        self._descriptor = struct.unpack_from("<H", head, 254)[0] if wide else 32
        if shift > 6 or not per_group or self._inode_size < 128 or self._descriptor < 32:
            raise Damaged(BAD_SUPER, f"guest byte {start + 1024:#x}")
        self._block, self._per_group, self._wide = 1024 << shift, per_group, bool(wide)
        self._nodes = 0

    def read(self, path: str) -> bytes | None:
        """Content of a file, None where there is none; links are not followed. Raises Damaged."""
        number = _ROOT
        parts = path.strip("/").split("/")
        for depth, name in enumerate(parts):
            kind, content = self._content(number)
            if kind != _FOLDER:
                return None
            found = dict(_entries(content)).get(name.encode())
            if not found:
                return None
            number = found
            if depth == len(parts) - 1:
                kind, content = self._content(number)
                return content if kind == _FILE else None
        return None

    def _content(self, number: int) -> tuple[int, bytes]:
        """Type of an inode, and its bytes when it is a file or a folder."""
        group, index = divmod(number - 1, self._per_group)
        place = (2 if self._block == 1024 else 1) * self._block + group * self._descriptor
        descriptor = self._need(place, self._descriptor)
        table: int = struct.unpack_from("<I", descriptor, 8)[0]
        if self._wide and self._descriptor >= 64:
            table |= struct.unpack_from("<I", descriptor, 40)[0] << 32
        inode = self._need(table * self._block + index * self._inode_size, 128)
        mode, low = struct.unpack_from("<HxxI", inode)
        kind = mode & _KIND
        if kind not in (_FOLDER, _FILE):
            return kind, b""
        flags, high = struct.unpack_from("<I", inode, 32)[0], struct.unpack_from("<I", inode, 108)[0]
        size = low | high << 32
        if size > LARGEST:
            raise Damaged(LARGE_INODE, _WHERE, inode=number, size=size)
        count = left = -(-size // self._block)
        self._nodes = _MOST_NODES
        map_ = inode[40:100]
        found = self._extents(map_, 0) if flags & _EXTENTS else self._blocks(map_, count)
        out = bytearray(size)
        for logical, length, physical in found:
            if logical < count:
                length = min(length, count - logical)
                left -= length
                if left < 0:
                    raise Damaged(OVERLAP, _WHERE, inode=number)
                data = self._need(physical * self._block, length * self._block)
                out[logical * self._block : (logical + length) * self._block] = data
        return kind, bytes(out[:size])

    def _extents(self, node: bytes, depth: int) -> Iterator[tuple[int, int, int]]:
        """First logical block, count and first physical block of each run below a node."""
        magic, entries, _, level = struct.unpack_from("<4H", node)
        self._nodes -= 1
        if magic != 0xF30A or self._nodes < 0 or depth > _DEEPEST or 12 + 12 * entries > len(node):
            raise Damaged(BAD_EXTENTS, _WHERE)
        for at in range(12, 12 + 12 * entries, 12):
            if level:
                low, high = struct.unpack_from("<IH", node, at + 4)
                yield from self._extents(self._need((low | high << 32) * self._block, self._block), depth + 1)
                continue
            logical, length, high, low = struct.unpack_from("<IHHI", node, at)
            if length <= 0x8000:  # else allocated, but never written
                yield logical, length, low | high << 32

    def _blocks(self, map_: bytes, count: int) -> Iterator[tuple[int, int, int]]:
        """The same by the block map of ext2 and ext3."""
        logical = 0
        numbers = struct.unpack("<15I", map_)
        for number, depth in [
            *((each, 0) for each in numbers[:12]),
            *zip(numbers[12:], (1, 2, 3), strict=True),
        ]:
            if logical >= count:
                return
            for physical in self._mapped(number, depth, count - logical):
                if physical:
                    yield logical, 1, physical
                logical += 1

    def _mapped(self, number: int, depth: int, left: int) -> Iterator[int]:
        span = (self._block // 4) ** depth
        if depth == 0 or number == 0:
            yield from [number] if depth == 0 else [0] * min(span, left)
            return
        for below in struct.unpack(f"<{self._block // 4}I", self._need(number * self._block, self._block)):
            if left <= 0:
                return
            yield from self._mapped(below, depth - 1, left)
            left -= span // (self._block // 4)

    def _need(self, offset: int, length: int) -> bytes:
        data = self._bytes(offset, length)
        if len(data) < length:
            raise Damaged(PAST_END, _WHERE, offset=offset)
        return data

    def _bytes(self, offset: int, length: int) -> bytes:
        return partitions.read_guest(self._disk, self._start + offset, length)


def _entries(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Names and inodes in a directory."""
    place = 0
    while place + 8 <= len(content):
        inode, length, name = struct.unpack_from("<IHB", content, place)
        if length < 8:
            raise Damaged(BAD_FOLDER, _WHERE)
        if inode and name:
            yield content[place + 8 : place + 8 + name], inode
        place += length
