"""Take bulk out of a tree and print what each rule saved: `minimize.py ROOT`.

Bulk is what no program of an appliance reads: documentation, translations, fonts, indices that are
fetched anew. Copyright files stay, and so do folders that maintainer scripts expect.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import inside


@dataclass(frozen=True)
class Rule:
    """Files below `folders` go, but for those whose path below the folder matches `keep`."""

    name: str
    folders: tuple[str, ...]
    keep: str = r"(?!)"
    prune: bool = True
    """Remove emptied folders as well; a kept one is part of some package's contract."""


RULES = (
    # A documentation folder that is a link to another package's leads to that one's copyright file.
    Rule("documentation", ("usr/share/doc",), keep=r"(.*/)?copyright(\.gz)?|[^/]+@"),
    Rule("package notes", ("usr/share/doc-base", "usr/share/lintian", "usr/share/linda", "usr/share/bug")),
    # update-alternatives of a JRE fails when the folder man1 is not there.
    Rule("manual pages", ("usr/share/man", "var/cache/man"), prune=False),
    Rule("info pages", ("usr/share/info",), prune=False),
    Rule("fonts", ("usr/share/fonts", "usr/share/X11/fonts")),
    Rule("translations", ("usr/share/locale",), keep=r"locale\.alias|en(_US)?([.@][^/]*)?/.*"),
    Rule("help", ("usr/share/help", "usr/share/gtk-doc", "usr/share/gnome/help")),
    # What locale-gen reads to make C, POSIX and en_US.UTF-8 anew.
    Rule(
        "locale sources",
        ("usr/share/i18n",),
        keep=r"SUPPORTED|charmaps/UTF-8\.gz|locales/(C|POSIX|en_(US|GB)|i18n[^/]*|iso14651[^/]*|translit_[^/]*)",
    ),
    Rule("apt lists", ("var/lib/apt/lists",), keep=r"lock|partial/", prune=False),
    Rule("apt caches", ("var/cache/apt",), keep=r"archives/lock", prune=False),
    Rule("debconf backups", ("var/cache/debconf",), keep=r".*\.dat", prune=False),
)


def _entries(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """All that is below a folder, deepest first; links are not followed."""
    for above, folders, names in os.walk(folder, topdown=False):
        for name in sorted([*folders, *names]):
            path = os.path.join(above, name)
            yield path, os.lstat(path)


def apply(rule: Rule, root: str) -> tuple[int, int]:
    """Apply one rule; returns how many files it took out and their bytes (a hard link saves none)."""
    keep = re.compile(rule.keep)
    files = bytes_saved = 0
    for folder in rule.folders:
        top = os.path.join(root, folder)
        if os.path.islink(top):
            continue
        for path, status in _entries(top):
            inside = os.path.relpath(path, top)
            if stat.S_ISDIR(status.st_mode):
                if rule.prune and not os.listdir(path):
                    os.rmdir(path)
                continue
            if keep.fullmatch(inside + ("@" if stat.S_ISLNK(status.st_mode) else "")) or keep.fullmatch(
                inside
            ):
                continue
            os.unlink(path)
            files += 1
            bytes_saved += status.st_size if status.st_nlink == 1 or stat.S_ISLNK(status.st_mode) else 0
    return files, bytes_saved


def main() -> int:
    """Apply every rule: a line each of its name, files and bytes, with tabs between."""
    inside.enter(sys.argv[1])
    for rule in RULES:
        print(rule.name, *apply(rule, "/"), sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main())
