"""A tree as it is found: what the layout of a disk and its root file system follow from.

Names that are no UTF-8 stand as Python's surrogateescape has them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 4096
WINDOW = 16
"""Blocks: as many that hold nothing but zeros, at a multiple of this, become a hole."""
LOST = "lost+found"
Copy = tuple[int, int, str, int]
"""What belongs into a disk: byte of the disk, bytes, path from the tree's top, byte of the file."""
_PROBE = 64
"""Bytes that tell of most windows that they do not."""


class Entry(NamedTuple):
    """What lies at a name."""

    name: str
    mode: int
    uid: int
    gid: int
    size: int
    changed: int
    """Seconds since 1970."""
    device: int
    """Of a device node: its number, as stat(2) has it."""
    inode: str
    """Of what has more than one name: equal for all of them."""
    runs: list[tuple[int, int]]
    """Of a file: first block and end of each run of blocks that its data needs."""
    target: str
    """Of a link."""
    attributes: dict[str, int]
    """Name and size of each extended attribute."""

    @property
    def kind(self) -> int:
        """Its type, as the `stat` module names them."""
        return stat.S_IFMT(self.mode)


class Tree(NamedTuple):
    """The top folder, and what is in each folder, by its path from the top; outer folders come first."""

    top: Entry
    folders: dict[str, list[Entry]]


def scan(root: str) -> Tree:
    """Look at a whole tree; a `lost+found` at the top is left out: the file system brings its own."""
    folders: dict[str, list[Entry]] = {}
    left = [""]
    while left:
        folder = left.pop()
        where = f"{root}/{folder}" if folder else root
        with os.scandir(where) as found:
            entries = [
                entry(each.path, each.name, each.stat(follow_symlinks=False))
                for each in sorted(found, key=lambda each: os.fsencode(each.name))
                if folder or each.name != LOST
            ]
        folders[folder] = entries
        left += [
            f"{folder}/{each.name}" if folder else each.name
            for each in reversed(entries)
            if each.kind == stat.S_IFDIR
        ]
    return Tree(entry(root, "", os.lstat(root)), folders)


def entry(path: str, name: str, status: os.stat_result) -> Entry:
    """Look at what lies at a path."""
    kind = stat.S_IFMT(status.st_mode)
    many = status.st_nlink > 1 and kind != stat.S_IFDIR
    return Entry(
        name,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_size,
        int(status.st_mtime),
        status.st_rdev,
        f"{status.st_dev}:{status.st_ino}" if many else "",
        data_runs(path, status.st_size) if kind == stat.S_IFREG else [],
        os.readlink(path) if kind == stat.S_IFLNK else "",
        {
            name: len(os.getxattr(path, name, follow_symlinks=False))
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        },
    )


def data_runs(path: str, size: int) -> list[tuple[int, int]]:
    """First block and end of each run of blocks that a file's data needs.

    Whether there is a hole depends on the content alone, not on how the build host keeps it.
    """
    end = -(-size // BLOCK)
    if end < WINDOW:
        return [(0, end)] if end else []
    runs: list[tuple[int, int]] = []
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        for start, stop in _kept_windows(handle, size):
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, min(stop, end)))
    finally:
        os.close(handle)
    return runs


def _kept_windows(handle: int, size: int) -> Iterator[tuple[int, int]]:
    """Windows of a file that hold more than zeros; what the build host keeps as a hole is not looked at."""
    length = WINDOW * BLOCK
    zeros = bytes(length)
    position = 0
    while position < size:
        try:
            data = os.lseek(handle, position, os.SEEK_DATA)
        except OSError:  # all the rest is a hole
            return
        position = data // length * length
        end = min(os.lseek(handle, data, os.SEEK_HOLE), size)
        while position < end:
            if any(os.pread(handle, _PROBE, position)) or not zeros.startswith(
                os.pread(handle, length, position)
            ):
                yield position // BLOCK, (position + length) // BLOCK
            position += length


def write(tree: Tree, path: str) -> None:
    """Keep a tree for another program."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(tree))  # not dump, which is written in Python


def read(path: str) -> Tree:
    """A tree that another program kept."""
    with open(path, encoding="utf-8") as file:
        top, folders = json.load(file)
    return Tree(
        Entry._make(top), {path: [Entry._make(row) for row in rows] for path, rows in folders.items()}
    )
