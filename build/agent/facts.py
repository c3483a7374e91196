"""What host this is, read from files, without a child process."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path
from typing import Any

from build.agent import memory
from build.agent.files import read
from build.agent.process import PATH

RANGE = 65536
"""Ids that a Debian tree needs: 0 to 65535, `nobody` being 65534."""


def gather() -> dict[str, Any]:
    """Return the facts, sizes in bytes; `subids`: this user has a range of them, `uidmap`: and the tools."""
    user = user_name()
    home = os.environ.get("HOME") or str(Path("~").expanduser())
    return {
        "uid": os.getuid(),
        "user": user,
        "data_dir": os.environ.get("XDG_DATA_HOME") or f"{home}/.local/share",
        "cores": len(os.sched_getaffinity(0)),
        "memory_available": memory.available(),
        "debian": debian_version(),
        "arch": debian_arch(os.uname().machine),
        "kernel": os.uname().release,
        "subids": has_range(read("/etc/subuid"), user, os.getuid())
        and has_range(read("/etc/subgid"), user, os.getuid()),
        "uidmap": all(shutil.which(tool, path=PATH) for tool in ("newuidmap", "newgidmap")),
    }


def user_name() -> str:
    """Name of the user."""
    return name_of(os.getuid())


def name_of(uid: int) -> str:
    """Name of a user, or its number where the user database does not know it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def debian_version() -> str:
    """Codename of the Debian release (`bookworm`), or empty elsewhere; read from os-release(5)."""
    rows = dict(line.split("=", 1) for line in read("/etc/os-release").splitlines() if "=" in line)
    values = {name: value.strip("\"'") for name, value in rows.items()}
    return values.get("VERSION_CODENAME", "") if values.get("ID") == "debian" else ""


def debian_arch(machine: str) -> str:
    """Debian's name of the machine that uname tells."""
    names = {"x86_64": "amd64", "aarch64": "arm64", "i686": "i386", "i586": "i386"}
    return names.get(machine, machine)


def has_range(table: str, user: str, uid: int) -> bool:
    """Whether subuid(5) or subgid(5) text gives the user enough ids in one row."""
    for line in table.splitlines():
        owner, _, rest = line.partition(":")
        count = rest.partition(":")[2].strip()
        if owner in (user, str(uid)) and count.isdigit() and int(count) >= RANGE:
            return True
    return False
