"""Finish a bootstrapped tree: check that it holds the set, and take out what differs from build to build.

tidy.py SET INSTALLED ROOT    INSTALLED holds `NAME VERSION ARCH STATUS` lines of dpkg-query
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import debian, inside

EMPTIED = (
    "dev",
    "run",
    "tmp",
    "proc",
    "sys",
    "var/tmp",
    "var/log/apt",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log/sysstat",
)
"""Folders whose content is a trace of the build."""
REMOVED = (
    "debootstrap",
    "etc/.pwd.lock",
    "etc/apt/sources.list",
    "etc/group-",
    "etc/gshadow-",
    "etc/hostname",
    "etc/passwd-",
    "etc/resolv.conf",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/available",
    "var/lib/dpkg/available-old",
    "var/lib/dpkg/cmethopt",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/dpkg/triggers/Unincorp",
    "var/lib/systemd/catalog/database",
    "var/log/alternatives.log",
    "var/log/bootstrap.log",
    "var/log/dpkg.log",
    "var/log/fontconfig.log",
)
MANUAL = ("apt",)


def compare(wanted: dict[str, Any], installed: str) -> list[str]:
    """What differs between the set and what dpkg says is installed."""
    asked = {f"{p['name']} {p['version']} {p['arch']} installed" for p in wanted["packages"]}
    found = set(installed.splitlines())
    return [f"+ {line}" for line in sorted(found - asked)] + [f"- {line}" for line in sorted(asked - found)]


def extended_states(wanted: dict[str, Any], base: set[str]) -> str:
    """The record of apt of packages that were installed for others only (apt-mark(8))."""
    kept = {name.partition(":")[0] for name in wanted["asked"]} | base | set(MANUAL)
    native = wanted["archs"][0]
    automatic = sorted(
        (p["name"], native if p["arch"] == "all" else p["arch"])
        for p in wanted["packages"]
        if p["name"] not in kept
    )
    return "".join(
        f"Package: {name}\nArchitecture: {arch}\nAuto-Installed: 1\n\n" for name, arch in automatic
    )


def clean(root: Path) -> None:
    """Remove the traces of the build."""
    for name in REMOVED:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in EMPTIED:
        folder = root / name
        if folder.is_dir():
            for entry in list(folder.iterdir()):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for key in root.glob("etc/ssh/ssh_host_*"):
        key.unlink()
    for name in ("lib32", "lib64", "libx32"):
        # debootstrap links every directory that some system of this kind may have.
        if (root / name).is_symlink() and not any((root / "usr" / name).iterdir()):
            (root / name).unlink()
            (root / "usr" / name).rmdir()
    machine = root / "etc/machine-id"
    if machine.exists():
        machine.write_bytes(b"")


def freeze(root: Path, epoch: int) -> None:
    """Give every folder, and every file that is newer, the time of the epoch."""
    for path, status in walk(root):
        if stat.S_ISDIR(status.st_mode) or status.st_mtime > epoch:
            os.utime(path, (epoch, epoch), follow_symlinks=False)


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every path of a tree, folders after what they hold."""
    pending = [(str(root), False)]
    while pending:
        folder, listed = pending.pop()
        if listed:
            yield folder, os.lstat(folder)
            continue
        pending.append((folder, True))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, False))
                else:
                    yield entry.path, entry.stat(follow_symlinks=False)


def main() -> int:
    """Check, write, clean, freeze."""
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    installed = Path(sys.argv[2]).read_text(encoding="utf-8")
    inside.enter(sys.argv[3])
    root = Path("/")
    if differences := compare(wanted, installed):
        print("installed (+) and resolved (-) differ:", *differences, sep="\n")
        os.write(3, b"fail\tthe tree does not hold the resolved set\tread the log of this step\n")
        return 1
    (root / "var/lib/apt").mkdir(parents=True, exist_ok=True)
    base = debian.base_names(debian.paragraphs((root / "var/lib/dpkg/status").read_text(encoding="utf-8")))
    (root / "var/lib/apt/extended_states").write_text(extended_states(wanted, base), encoding="utf-8")
    clean(root)
    for folder in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    freeze(root, int(os.environ["SOURCE_DATE_EPOCH"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
