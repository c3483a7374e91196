"""Copy a tree from memory to the disk, in passes: the last one brings what changed since the one before.

Usage: copy_tree.py SOURCE TARGET NOTES

A first pass may run while programs still change the tree; one that runs when nothing does makes TARGET equal
to SOURCE: names, links, contents, owners, modes, times, extended attributes. NOTES, a file, tells the next
pass which inodes were copied, and at which change time (stat(2), st_ctime).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

TICK = 100_000_000
"""Nanoseconds by which a change must be older than our look at it: more than the kernel's coarsest clock."""

LABEL = "security.selinux"
"""Put on by the build host's kernel, not by the tree."""

Stamp = list[int]
"""Inode and change time."""


@dataclass
class Pass:
    """One walk over the tree."""

    source: str
    target: str
    before: dict[str, Stamp]
    carried: dict[str, Stamp] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)
    """Where in the target the first name of an inode with several lies."""

    def run(self) -> None:
        """Carry everything below the source; folders get their own attributes after their content."""
        self.folder("")

    def folder(self, inside: str) -> None:
        """Carry what a folder holds, remove what it does not hold any more."""
        path = self.source + inside
        wanted = set()
        for name in sorted(os.listdir(path)):
            wanted.add(name)
            with contextlib.suppress(FileNotFoundError):  # it went away meanwhile: a later pass will know
                self.entry(f"{inside}/{name}")
        for name in set(os.listdir(self.target + inside)) - wanted:
            _remove(f"{self.target}{inside}/{name}")
        _dress(path, self.target + inside, os.lstat(path))

    def entry(self, inside: str) -> None:
        """Carry one name."""
        path, target = self.source + inside, self.target + inside
        status = os.lstat(path)
        stamp = [status.st_ino, status.st_ctime_ns]
        if stat.S_ISDIR(status.st_mode):
            if not _is_folder(target):
                _remove(target)
                os.mkdir(target, 0o700)
            self.folder(inside)
            return
        several = status.st_nlink > 1
        if self.before.get(inside) != stamp:
            _remove(target)
            if several and status.st_ino in self.links:
                os.link(self.links[status.st_ino], target, follow_symlinks=False)
            else:
                _copy(path, target, status)
        if several:
            self.links.setdefault(status.st_ino, target)
        if status.st_ctime_ns + TICK < time.time_ns():
            self.carried[inside] = stamp


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _remove(path: str) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _copy(path: str, target: str, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        shutil.copyfile(path, target)
    elif stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(path), target)
    else:
        os.mknod(target, status.st_mode, status.st_rdev)
    _dress(path, target, status)


def _dress(path: str, target: str, status: os.stat_result) -> None:
    """Give owner, mode, extended attributes, times; in this order: each may undo an earlier one."""
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))
    wanted = dict(_attributes(path))
    for name in set(os.listxattr(target, follow_symlinks=False)) - {*wanted, LABEL}:
        os.removexattr(target, name, follow_symlinks=False)
    for name, value in wanted.items():
        os.setxattr(target, name, value, follow_symlinks=False)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _attributes(path: str) -> Iterator[tuple[str, bytes]]:
    for name in os.listxattr(path, follow_symlinks=False):
        yield name, os.getxattr(path, name, follow_symlinks=False)


def main(source: str, target: str, notes: str) -> None:
    """Make one pass."""
    before = {}
    if os.path.exists(notes):
        with open(notes, encoding="utf-8", errors="surrogateescape") as file:
            before = json.load(file)
    walk = Pass(source, target, before)
    walk.run()
    with open(notes, "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(walk.carried, file, ensure_ascii=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
