"""Pack files of a tree into a tar: `archive.py ROOT PATHS.json TARGET`.

SOURCE_DATE_EPOCH is in the environment. PATHS and TARGET are relative to the tree. GNU tar format,
root:root, no folders: unpacked at /, it must not touch the modes of folders that are there.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tarfile

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import inside


def main() -> int:
    """Pack; 0 done. An OSError ends it with a traceback in the log: the paths were laid a moment ago."""
    root, table, target = sys.argv[1:4]
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    with open(table, encoding="ascii") as file:
        paths = json.load(file)
    inside.enter(root)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tarfile.open(
        target, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for path in paths:
            # gettarinfo would ask libc for the owner's name, which asks what nsswitch.conf of the tree names.
            member, status = tarfile.TarInfo(path), os.lstat(path)
            member.mode, member.mtime = stat.S_IMODE(status.st_mode), epoch
            member.uname = member.gname = "root"
            if stat.S_ISLNK(status.st_mode):
                member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
                archive.addfile(member)
            else:
                member.size = status.st_size
                with open(path, "rb") as content:
                    archive.addfile(member, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
