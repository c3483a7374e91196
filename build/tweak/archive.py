"""Pack files of a tree into a tar: `archive.py ROOT PATHS.json TARGET`.

SOURCE_DATE_EPOCH is in the environment. PATHS and TARGET are relative to the tree. GNU tar format,
root:root, no folders: unpacked at /, it must not touch the modes of folders that are there.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile


def main() -> int:
    """Pack; 0 done. An OSError ends it with a traceback in the log: the paths were laid a moment ago."""
    root, table, target = sys.argv[1:4]
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    with open(table, encoding="ascii") as file:
        paths = json.load(file)
    os.chroot(root)
    os.chdir("/")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with tarfile.open(
        target, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for path in paths:
            member = archive.gettarinfo(path, arcname=path)
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            member.mtime = epoch
            if member.isreg():
                with open(path, "rb") as content:
                    archive.addfile(member, content)
            else:
                archive.addfile(member)
    return 0


if __name__ == "__main__":
    sys.exit(main())
