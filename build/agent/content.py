"""What a tree holds: told once when a layer is finished, and compared before it is used again.

    content.py look TREE...           print a line of JSON for each tree: entries, digest, bytes
    content.py keep TREE LIST MARK    bring TREE's file system to the disk and make the file MARK, then write
                                      LIST: every entry and the SHA-256 of what it holds
    content.py compare TREE LIST      print the paths that are not as LIST has them

A look goes by what stat(2) tells, all but the times of access and of change: it finds what a power cut or a
half removal leaves. What only reading would find, flipped bits, `compare` finds. Run as a program, because an
ordinary user's layers can be read in his user namespace alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

OVERLAY = ("trusted.overlay.", "user.overlay.")
"""Extended attributes with which overlayfs marks folders (Linux, Documentation/filesystems/overlayfs.rst)."""


def walk(tree: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
    """Every entry below a tree, folders before what they hold, in one order: name below it, path, status."""
    pending = [(b"", tree)]
    while pending:
        inside, path = pending.pop()
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name, status = inside + b"/" + entry.name, entry.stat(follow_symlinks=False)
            yield name, entry.path, status
            if stat.S_ISDIR(status.st_mode):
                pending.append((name, entry.path))


def _line(name: bytes, path: bytes, status: os.stat_result) -> bytes:
    folder = stat.S_ISDIR(status.st_mode)
    size = 0 if folder else status.st_size  # a folder's is the file system's own
    marks = b""
    if folder:
        for mark in sorted(os.listxattr(path)):
            if mark.startswith(OVERLAY):
                marks += mark.encode() + os.getxattr(path, mark)
    numbers = (status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, status.st_rdev)
    return b"%s\0%o %d %d %d %d %d %s\0" % (name, *numbers, marks)


def look(tree: str) -> dict[str, Any]:
    """Count a tree's entries, digest their names and statuses, and add up what they take on the disk."""
    digest = hashlib.sha256()
    count = size = 0
    several: set[tuple[int, int]] = set()
    for name, path, status in walk(os.fsencode(tree)):
        count += 1
        digest.update(_line(name, path, status))
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            inode = (status.st_dev, status.st_ino)
            if inode in several:
                continue
            several.add(inode)
        size += status.st_blocks * 512
    return {"entries": count, "digest": digest.hexdigest(), "bytes": size}


def _content(path: bytes, status: os.stat_result) -> str:
    """Digest of a file's bytes, a link's target and of every extended attribute."""
    digest = hashlib.sha256()
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    elif stat.S_ISLNK(status.st_mode):
        digest.update(os.readlink(path))
    with contextlib.suppress(OSError):  # a file system may have none
        for name in sorted(os.listxattr(path, follow_symlinks=False)):
            digest.update(name.encode() + os.getxattr(path, name, follow_symlinks=False))
    return digest.hexdigest()


def rows(tree: str) -> Iterator[str]:
    """A line for every entry: digest of its status, digest of its content, name as JSON."""
    for name, path, status in walk(os.fsencode(tree)):
        told = hashlib.sha256(_line(name, path, status)).hexdigest()[:16]
        yield f"{told} {_content(path, status)} {json.dumps(os.fsdecode(name))}\n"


def keep(tree: str, path: str, mark: str) -> None:
    """Bring a tree to the disk and say so, then list what it holds; a list is whole or not there."""
    subprocess.run(["sync", "--file-system", tree], check=True)
    os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    aside = f"{path}.part"
    with open(aside, "w", encoding="ascii") as file:
        file.writelines(rows(tree))
        file.flush()
        os.fsync(file.fileno())
    os.rename(aside, path)


def listed(path: str) -> dict[str, str]:
    """Rows of a list by the names in them."""
    with open(path, encoding="ascii") as file:
        return {_name(row): row for row in file}


def _name(row: str) -> str:
    name: str = json.loads(row.split(" ", 2)[2])
    return name


def compare(tree: str, path: str) -> Iterator[str]:
    """Names that are changed, gone, or not in the list."""
    wanted = listed(path)
    for row in rows(tree):
        name = _name(row)
        if wanted.pop(name, None) != row:
            yield name
    yield from wanted


def main(verb: str, *arguments: str) -> None:
    """Do what the command line says."""
    if verb == "look":
        for tree in arguments:
            try:
                print(json.dumps(look(tree)))
            except OSError as error:
                print(json.dumps({"error": f"{error.strerror}: {error.filename!r}"}))
    elif verb == "keep":
        keep(*arguments)
    else:
        for name in compare(*arguments):
            print(json.dumps(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
