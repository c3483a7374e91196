"""Lay files over a tree: `apply_overlay.py ROOT SOURCES TABLE.json`; SOURCE_DATE_EPOCH is in the environment.

TABLE is a list of entries, laid in order. Each has `path` (relative to the tree) and one of

    {"path": P, "source": NAME, "mode": M}   a file, its content from SOURCES/NAME
    {"path": P, "link": TARGET}              a symbolic link
    {"path": P, "mode": M}                   a directory

All of it belongs to root:root and carries SOURCE_DATE_EPOCH. Missing folders above an entry are made with
mode 0755. A link or a file in the tree gives way; a directory never does.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import inside

Entry = dict[str, Any]


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


@contextmanager
def _unchanged(folder: str, epoch: int) -> Iterator[None]:
    """Keep a folder's time as it was before entries came and went in it, or at most the epoch."""
    before = os.stat(folder).st_mtime_ns
    yield
    os.utime(folder, ns=(min(before, epoch * 10**9),) * 2)


def _folders(path: str, epoch: int) -> None:
    above = os.path.dirname(path)
    if not above or os.path.isdir(above):
        return
    _folders(above, epoch)
    with _unchanged(os.path.dirname(above) or ".", epoch):
        os.mkdir(above, 0o755)
    os.utime(above, (epoch, epoch))


def _read(sources: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=sources), "rb") as source:
        return source.read()


def _replace(path: str, entry: Entry, sources: int, epoch: int) -> None:
    """Make a file or a link aside and rename it, so that no link of the tree is ever written through."""
    there = _lstat(path)
    if there and stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(f"{path!r} is a directory in the tree")
    aside = os.path.join(os.path.dirname(path), f".lay-{os.getpid()}")
    if "link" in entry:
        os.symlink(entry["link"], aside)
    else:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_read(sources, entry["source"]))
            os.fchmod(file.fileno(), entry["mode"])
    os.chown(aside, 0, 0, follow_symlinks=False)
    os.utime(aside, (epoch, epoch), follow_symlinks=False)
    os.rename(aside, path)


def _make(path: str, mode: int, epoch: int) -> None:
    if not os.path.isdir(path):
        os.mkdir(path)
    os.chown(path, 0, 0)
    os.chmod(path, mode)
    os.utime(path, (epoch, epoch))


def lay(entry: Entry, sources: int, epoch: int) -> None:
    """Lay one entry below the current directory; raises OSError."""
    path = entry["path"]
    _folders(path, epoch)
    with _unchanged(os.path.dirname(path) or ".", epoch):
        if "link" in entry or "source" in entry:
            _replace(path, entry, sources, epoch)
        else:
            _make(path, entry["mode"], epoch)


def main() -> int:
    """Lay the table; 0 done, 1 an entry cannot be laid (named on stderr)."""
    root, folder, table = sys.argv[1:4]
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    with open(table, encoding="ascii") as file:
        entries = json.load(file)
    sources = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.umask(0o022)
    inside.enter(root)
    for entry in entries:
        try:
            lay(entry, sources, epoch)
        except OSError as error:
            print(f"cannot lay {entry['path']!r}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
