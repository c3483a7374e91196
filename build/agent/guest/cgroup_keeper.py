"""Make a control group for a container, and remove it when whoever asked for it is gone.

Usage: cgroup_keeper.py SOCKET MEMORY

The kernel takes mounts, processes and network interfaces of a namespace with its last process; a control
group it leaves. So this program, which is not tied to the agent, holds the group's lock, waits for the end
of the agent's side of the socket, and then kills what is left in the group and removes it. Where it was
killed itself, the next one removes what nobody holds. SOCKET is a descriptor; MEMORY a limit in MiB.

Sends one JSON object: `error` (text), or `limited` (whether the kernel holds the container to MEMORY) with
the descriptors of the groups' folders, that of cgroup2 first.

Sources: cgroups(7), cgroup_namespaces(7), the kernel's admin-guide/cgroup-v2 (cgroup.kill, cgroup.events)
and admin-guide/cgroup-v1/memory, proc_pid_mountinfo(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "systemvm-container-"
NEWNS, PRIVATE = 0x00020000, 1 << 18 | 16384
OURS = "/sys/fs/cgroup"
"""Where cgroup2 is mounted, in a mount namespace of our own, on a host that mounts none."""
PATIENCE = 60.0
"""Seconds for a killed container's processes to be gone."""


@dataclass(frozen=True)
class Hierarchy:
    """A mounted hierarchy of control groups: where, and from which of its groups on."""

    mountpoint: str
    root: str
    version: int


def hierarchies(mountinfo: str) -> Iterator[Hierarchy]:
    """Read cgroup2 hierarchies and v1's of the memory controller out of a mountinfo file's text."""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        _, _, _, root, mountpoint, *_ = left.split()
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup2":
            yield Hierarchy(mountpoint, root, 2)
        elif kind == "cgroup" and "memory" in options.split(","):
            yield Hierarchy(mountpoint, root, 1)


def own(cgroups: str, version: int) -> str:
    """Return our group in a hierarchy, by the text of /proc/self/cgroup; `/` if it is not told."""
    for line in cgroups.splitlines():
        number, controllers, path = line.split(":", 2)
        if version == 2 and (number, controllers) == ("0", ""):
            return path
        if version == 1 and "memory" in controllers.split(","):
            return path
    return "/"


def parent(hierarchy: Hierarchy, cgroups: str, uid: int) -> Path:
    """Return the group below which a container's is made: root's at the top, another's in his own.

    A group that has processes cannot hand controllers down, but for the top one.
    """
    if hierarchy.version == 2 and uid == 0:
        return Path(hierarchy.mountpoint)
    return Path(hierarchy.mountpoint, os.path.relpath(own(cgroups, hierarchy.version), hierarchy.root))


def mounted() -> list[Hierarchy]:
    """Return the hierarchies of this host, the first of each version; mounts cgroup2 if only that is missing.

    Raises OSError when this kernel or this user has none.
    """
    found = {each.version: each for each in reversed(list(hierarchies(_read("/proc/self/mountinfo"))))}
    if 2 not in found:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEWNS) or libc.mount(None, b"/", None, ctypes.c_ulong(PRIVATE), None):
            raise OSError(ctypes.get_errno(), "unshare")
        if libc.mount(b"cgroup2", OURS.encode(), b"cgroup2", ctypes.c_ulong(0), None):
            raise OSError(ctypes.get_errno(), "mount")
        found[2] = Hierarchy(OURS, "/", 2)
    return [found[version] for version in (2, 1) if version in found]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def make(folder: Path) -> tuple[Path, int]:
    """Make a group below `folder` and lock it; returns it and its descriptor."""
    path = folder / f"{PREFIX}{secrets.token_hex(4)}"
    path.mkdir()
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return path, handle


def limit(path: Path, version: int, mebibytes: int) -> bool:
    """Hold a group to some memory; says whether the kernel does it."""
    if version == 2:
        with contextlib.suppress(OSError):
            (path.parent / "cgroup.subtree_control").write_text("+memory")
    try:
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        (path / name).write_text(str(mebibytes << 20))
    except OSError:
        return False
    return True


def sweep(folder: Path) -> None:
    """Remove containers' groups that no process holds: their keepers were killed."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(handle)


def remove(path: Path) -> None:
    """Remove a group and those below it; raises OSError while it has processes."""
    for folder, _, _ in os.walk(path, topdown=False):
        os.rmdir(folder)


def end(path: Path) -> None:
    """Kill what runs in a group, and remove it."""
    with contextlib.suppress(OSError):  # a kernel before 5.14; the namespaces' first processes are tied
        (path / "cgroup.kill").write_text("1")
    until = time.monotonic() + PATIENCE
    while path.exists() and time.monotonic() < until:
        try:
            remove(path)
        except OSError:
            time.sleep(0.02)


def groups(mebibytes: int) -> tuple[list[tuple[Path, int]], bool]:
    """Make a container's groups, cgroup2's first; says, too, whether its memory is limited."""
    made: list[tuple[Path, int]] = []
    limited = False
    cgroups, uid = _read("/proc/self/cgroup"), os.getuid()
    for hierarchy in mounted():
        folder = parent(hierarchy, cgroups, uid)
        try:
            sweep(folder)
            path, handle = make(folder)
        except OSError:
            if hierarchy.version == 2:
                raise
            continue  # a user's memory group under v1 is not his own
        limited = limit(path, hierarchy.version, mebibytes) or limited
        made.append((path, handle))
    return made, limited


def main(descriptor: int, mebibytes: int) -> int:
    """Keep the groups of one container."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as line:
        try:
            made, limited = groups(mebibytes)
        except OSError as error:
            line.send(json.dumps({"error": error.strerror, "errno": error.errno}).encode())
            return 1
        with contextlib.suppress(OSError):
            message = json.dumps({"limited": limited}).encode()
            socket.send_fds(line, [message], [handle for _, handle in made])
            line.recv(1)  # returns at the end of the other side
    for path, _ in made:
        end(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
