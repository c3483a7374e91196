"""How much memory this process and its children may still take, as machine and control groups allow it.

Sources: proc(5) (meminfo, vmstat), cgroups(7), proc_pid_mountinfo(5); Linux, Documentation/admin-guide/
cgroup-v2.rst (memory.max, memory.high, memory.current, memory.stat, memory.events) and
cgroup-v1/memory.rst (memory.oom_control).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from build.agent.files import read

PROC = Path("/proc")
NEEDED = 512 << 20
"""Bytes of memory without which a build is killed while it solves the package set, its most hungry moment.

Measured in control groups, where this agent and its client take 50 MiB: with 512 MiB in all it is killed,
with 528 the set is solved; nothing after it needs as much.
"""


@dataclass(frozen=True)
class Kind:
    """How the two versions of control groups are mounted, and their files of bytes."""

    filesystem: str
    option: str
    """Option that tells the mount from others of this file system; empty: there is one only."""
    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]
    """Rows of memory.stat that the kernel gives back when memory is wanted."""
    events: str
    """File whose row `oom_kill` counts the processes that were killed for lack of memory."""


V1 = Kind(
    filesystem="cgroup",
    option="memory",
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    cache=("total_active_file", "total_inactive_file"),
    events="memory.oom_control",
)
V2 = Kind(
    filesystem="cgroup2",
    option="",
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    cache=("active_file", "inactive_file", "slab_reclaimable"),
    events="memory.events",
)


def available(proc: Path = PROC) -> int:
    """Bytes that programs may still take without swapping; 0 where the kernel tells nothing.

    The kernel's estimate (MemAvailable), or what a control group leaves where that is less: this process's
    own or any above it. As in the kernel's estimate, page cache counts as available.
    """
    machine = _rows(read(proc / "meminfo").replace(" kB", "").replace(":", "")).get("MemAvailable", 0) * 1024
    return min([machine, *(room for kind, group in groups(proc) if (room := left(group, kind)) is not None)])


def kills(proc: Path = PROC) -> int:
    """How many processes the kernel has killed for lack of memory so far, of this one's control group.

    The innermost group that counts them does; without one, the machine.
    """
    files = (*(group / kind.events for kind, group in groups(proc)), proc / "vmstat")
    return next((rows["oom_kill"] for file in files if "oom_kill" in (rows := _rows(read(file)))), 0)


def groups(proc: Path = PROC) -> Iterator[tuple[Kind, Path]]:
    """Folders of the memory control groups that this process is in, the innermost first."""
    mounts = read(proc / "self/mountinfo")
    for line in read(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            kind = V2
        elif "memory" in controllers.split(","):
            kind = V1
        else:
            continue
        for root, folder in _mounted(mounts, kind):
            inside = _below(root, path)
            while True:
                yield kind, folder / inside
                if inside == inside.parent:
                    break
                inside = inside.parent


def left(group: Path, kind: Kind) -> int | None:
    """Bytes that a control group lets its members still take; None where it sets no limit."""
    limits = [int(text) for name in kind.limits if (text := read(group / name).strip()).isdigit()]
    if not limits:
        return None
    stat = _rows(read(group / "memory.stat"))
    used = int(read(group / kind.usage).strip() or 0) - sum(stat.get(name, 0) for name in kind.cache)
    return max(0, min(limits) - max(0, used))


def _mounted(mounts: str, kind: Kind) -> Iterator[tuple[str, Path]]:
    """Where control groups of this kind are mounted: the group at the mount's root, and the folder."""
    for line in mounts.splitlines():
        head, _, tail = line.partition(" - ")
        fields, (filesystem, *_, options) = head.split(), tail.split() or [""]
        if filesystem == kind.filesystem and (not kind.option or kind.option in options.split(",")):
            yield _plain(fields[3]), Path(_plain(fields[4]))


def _below(root: str, path: str) -> PurePosixPath:
    """A group's path below the group that is mounted; a mount of another branch shows what it can."""
    group = PurePosixPath(path)
    seen = group.is_relative_to(root) and ".." not in group.parts
    return group.relative_to(root) if seen else PurePosixPath()


def _plain(name: str) -> str:
    """A path of mountinfo without its octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _rows(text: str) -> Mapping[str, int]:
    """Lines `NAME NUMBER`; others are left out."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
