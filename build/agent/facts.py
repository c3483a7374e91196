"""Verb: what host this is. One call a host, read from files, without a child process."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from build.agent.events import Emit
from build.agent.process import PATH

TOOLS = (
    "apt-get",
    "debootstrap",
    "debugfs",
    "gpgv",
    "mcopy",
    "mke2fs",
    "mkfs.vfat",
    "mmdebstrap",
    "mount",
    "newgidmap",
    "newuidmap",
    "qemu-img",
    "qemu-system-i386",
    "qemu-system-x86_64",
    "setpriv",
    "sfdisk",
    "unshare",
    "xz",
)
CAP_SYS_ADMIN = 21
"""Bit of CAP_SYS_ADMIN in a capability set, from linux/capability.h."""
RANGE = 65536
"""Ids that a Debian tree needs: 0 to 65535, `nobody` being 65534."""


def run(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Answer the facts; `tools` maps a command to its path or None, sizes are bytes.

    `can_root`: uid 0 that may mount (a container's root often may not); `userns`: the kernel's switches allow
    an ordinary user a user namespace; `subids`: this user has a range of sub-ids and the tools to map it.
    """
    user = user_name()
    home = os.environ.get("HOME") or str(Path("~").expanduser())
    tools = {name: shutil.which(name, path=PATH) for name in TOOLS}
    return {
        "uid": os.getuid(),
        "user": user,
        "home": home,
        "data_dir": os.environ.get("XDG_DATA_HOME") or f"{home}/.local/share",
        "hostname": socket.gethostname(),
        "python": sys.executable,
        "python_version": ".".join(str(part) for part in sys.version_info[:3]),
        "cores": len(os.sched_getaffinity(0)),
        "memory_available": memory_available(),
        "debian": debian_version(),
        "arch": debian_arch(os.uname().machine),
        "kernel": os.uname().release,
        "tools": tools,
        "can_root": os.getuid() == 0 and bool(effective_capabilities() >> CAP_SYS_ADMIN & 1),
        "userns": user_namespaces_allowed(),
        "subids": bool(
            tools["newuidmap"]
            and tools["newgidmap"]
            and has_range(read("/etc/subuid"), user, os.getuid())
            and has_range(read("/etc/subgid"), user, os.getuid())
        ),
    }


def read(path: str) -> str:
    """Read a small file; what cannot be read counts as empty."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def user_name() -> str:
    """Name of the user, or its number where the user database does not know it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def field(text: str, name: str) -> str:
    """Value of the first `NAME: VALUE` line, or empty."""
    return next(
        (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(f"{name}:")), ""
    )


def memory_available() -> int:
    """Bytes that programs may still take: the kernel's estimate, or the cgroup's limit where that is less."""
    free = int(field(read("/proc/meminfo"), "MemAvailable").removesuffix(" kB") or 0) * 1024
    limit = read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        used = read("/sys/fs/cgroup/memory.current").strip()
        return max(0, min(free, int(limit) - int(used or 0)))
    return free


def debian_version() -> str:
    """Codename of the Debian release (`bookworm`), or empty elsewhere; read from os-release(5)."""
    rows = dict(line.split("=", 1) for line in read("/etc/os-release").splitlines() if "=" in line)
    values = {name: value.strip("\"'") for name, value in rows.items()}
    return values.get("VERSION_CODENAME", "") if values.get("ID") == "debian" else ""


def debian_arch(machine: str) -> str:
    """Debian's name of the machine that uname tells."""
    names = {"x86_64": "amd64", "aarch64": "arm64", "i686": "i386", "i586": "i386"}
    return names.get(machine, machine)


def effective_capabilities() -> int:
    """Capability bits of this process; 0 where the kernel does not tell."""
    return int(field(read("/proc/self/status"), "CapEff") or "0", 16)


def user_namespaces_allowed() -> bool:
    """Whether the kernel's switches let an ordinary user make a user namespace."""
    count = read("/proc/sys/user/max_user_namespaces").strip()
    switches = {
        "/proc/sys/kernel/unprivileged_userns_clone": "0",
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
    }
    return count not in ("", "0") and not any(read(path).strip() == off for path, off in switches.items())


def has_range(table: str, user: str, uid: int) -> bool:
    """Whether subuid(5) or subgid(5) text gives the user enough ids in one row."""
    for line in table.splitlines():
        owner, _, rest = line.partition(":")
        count = rest.partition(":")[2].strip()
        if owner in (user, str(uid)) and count.isdigit() and int(count) >= RANGE:
            return True
    return False
