"""Make a control group for a container, and remove it when whoever asked for it is gone.

Usage: cgroup_keeper.py SOCKET MEMORY MODE

The kernel takes mounts, processes and network interfaces of a namespace with its last process; a control
group it leaves. So this program, which is not tied to the agent, holds the group's lock, waits for the end
of the agent's side of the socket, and then kills what is left in the group and removes it. Where it was
killed itself, the next one removes what nobody holds. SOCKET is a descriptor; MEMORY a limit in MiB; MODE
`root`, or `user` in a user namespace of whoever asks.

Sends one JSON object: `error` (text), or `limited` (whether the kernel holds the container to MEMORY) with
the descriptors of the groups' folders, that of cgroup2 first.

Sources: cgroups(7), cgroup_namespaces(7), the kernel's admin-guide/cgroup-v2 (cgroup.kill, the rule on inner
groups without processes) and admin-guide/cgroup-v1/memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from build.agent import enter, memory
from build.agent.memory import V1, V2, Kind

PREFIX = "systemvm-container-"
OURS = "/sys/fs/cgroup"
"""Where cgroup2 is mounted, in a mount namespace of our own, on a host that mounts none."""
PATIENCE = 60.0
"""Seconds for a killed container's processes to be gone."""


def parent(groups: Iterable[Path], mode: str) -> Path:
    """Return the group below which a container's is made, of those we are in, the innermost first.

    Root's is made at the top, since a group that has processes cannot hand controllers down, but for the
    top one; another user's in his own.
    """
    own, *others = groups
    return [own, *(each for each in others if each in own.parents)][-1] if mode == "root" else own


def mounted() -> dict[Kind, list[Path]]:
    """Return the groups that we are in; mounts cgroup2, for us alone, where nobody has.

    Raises OSError when this kernel has no cgroup2, or this user may not mount it.
    """
    if not (found := _groups()).get(V2):
        try:
            enter.call("unshare", enter.NEWNS)
            enter.mount("", "/", flags=enter.REC | enter.PRIVATE)
            enter.mount("cgroup2", OURS, "cgroup2")
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise OSError(error.errno, f"cgroup2 is not mounted, and cannot be: {why}") from None
        found = _groups()
    return found


def _groups() -> dict[Kind, list[Path]]:
    pairs = list(memory.groups())
    return {kind: [path for each, path in pairs if each is kind] for kind in (V2, V1)}


def make(folder: Path) -> tuple[Path, int]:
    """Make a group below `folder` and lock it; returns it and its descriptor."""
    path = folder / f"{PREFIX}{secrets.token_hex(4)}"
    path.mkdir()
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return path, handle


def limit(path: Path, kind: Kind, mebibytes: int) -> bool:
    """Hold a group to some memory; says whether the kernel does it."""
    if kind is V2:
        with contextlib.suppress(OSError):
            (path.parent / "cgroup.subtree_control").write_text("+memory")
    try:
        (path / kind.limits[0]).write_text(str(mebibytes << 20))
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


def keep(mebibytes: int, mode: str) -> tuple[list[tuple[Path, int]], bool]:
    """Make a container's groups, cgroup2's first; says, too, whether its memory is limited."""
    made: list[tuple[Path, int]] = []
    limited = False
    for kind, groups in mounted().items():
        try:
            folder = parent(groups if kind is V2 else groups[:1], mode)
            sweep(folder)
            path, handle = make(folder)
        except (OSError, ValueError):
            if kind is V2:
                raise
            continue  # no memory controller under v1, or none for this user
        limited = limit(path, kind, mebibytes) or limited
        made.append((path, handle))
    return made, limited


def main(descriptor: int, mebibytes: int, mode: str) -> int:
    """Keep the groups of one container."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as line:
        try:
            made, limited = keep(mebibytes, mode)
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
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
