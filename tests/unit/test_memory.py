"""Memory that may still be taken: the machine's, or what a control group leaves, of either version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from build import wire
from build.agent import memory
from build.agent.debian import packages
from build.agent.events import Failure
from build.agent.guest import kvm
from build.agent.sandbox import BuildPaths
from build.agent.verbs import doctor, preflight

MIB = 1 << 20
UNLIMITED = str((1 << 63) - 4096)
"""What version 1 says where nothing is set."""
V2 = "30 23 0:26 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
V1 = "35 31 0:32 {root} {mount} rw,relatime - cgroup cgroup rw,memory"
OTHER = "36 31 0:33 / {mount}-devices rw,relatime - cgroup cgroup rw,devices"


def host(
    tmp_path: Path, cgroup: str, mounts: tuple[str, ...], files: Mapping[str, str], *, root: str = "/"
) -> Path:
    """A /proc of a machine with 8000 MiB available, and its control groups; sizes in `files` are bytes."""
    mount = tmp_path / "cgroup folder"
    shown = str(mount).replace(" ", "\\040")
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(f"{text}\n")
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    available = (
        f"MemTotal: 16384000 kB\nMemFree:  1024 kB\nMemAvailable:    {8000 * 1024} kB\nHugePages_Total: 0\n"
    )
    (proc / "meminfo").write_text(available)
    (proc / "self/cgroup").write_text(cgroup)
    lines = ["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts]
    (proc / "self/mountinfo").write_text(
        "".join(f"{line.format(root=root, mount=shown)}\n" for line in lines)
    )
    return proc


def of(tmp_path: Path, files: Mapping[str, str], cgroup: str = "0::/a/b\n", root: str = "/") -> int:
    """MiB available in a group of version 2."""
    return memory.available(host(tmp_path, cgroup, (V2,), files, root=root)) // MIB


def test_a_machine_without_control_groups_tells_its_own_estimate(tmp_path: Path) -> None:
    assert memory.available(host(tmp_path, "", (), {})) == 8000 * MIB


def test_where_the_kernel_tells_nothing_there_is_none(tmp_path: Path) -> None:
    assert memory.available(tmp_path / "nowhere") == 0


def test_this_machine_has_some() -> None:
    assert memory.available() > 0


@pytest.mark.parametrize(
    ("files", "mebibytes"),
    [
        pytest.param({"a/b/memory.max": "max"}, 8000, id="no limit"),
        pytest.param({"a/b/memory.max": str(1024 * MIB)}, 1024, id="nothing taken"),
        pytest.param(
            {"a/b/memory.max": str(1024 * MIB), "a/b/memory.current": str(300 * MIB)}, 724, id="some is taken"
        ),
        pytest.param({"a/b/memory.max": str(64 * MIB), "a/b/memory.current": str(65 * MIB)}, 0, id="full"),
        pytest.param(
            {"a/b/memory.max": "max", "a/b/memory.high": str(500 * MIB), "a/b/memory.current": str(MIB)},
            499,
            id="throttled before it is killed",
        ),
        pytest.param(
            {"a/b/memory.max": str(400 * MIB), "a/b/memory.high": str(500 * MIB)}, 400, id="the lower of both"
        ),
        pytest.param({"a/memory.max": str(200 * MIB), "a/b/memory.max": "max"}, 200, id="a group above"),
        pytest.param(
            {"memory.max": str(900 * MIB), "a/memory.max": "max", "a/b/memory.max": str(1000 * MIB)},
            900,
            id="a container's own root",
        ),
        pytest.param(
            {
                "a/memory.max": str(1000 * MIB),
                "a/memory.current": str(950 * MIB),
                "a/b/memory.max": str(800 * MIB),
                "a/b/memory.current": str(100 * MIB),
            },
            50,
            id="a sibling took it",
        ),
        pytest.param({"a/c/memory.max": str(MIB)}, 8000, id="another's limit"),
        pytest.param({"a/b/memory.max": str(9000 * MIB)}, 8000, id="more than there is"),
    ],
)
def test_the_least_of_machine_and_groups_counts(
    tmp_path: Path, files: dict[str, str], mebibytes: int
) -> None:
    assert of(tmp_path, files) == mebibytes


def test_page_cache_counts_as_available_and_a_tmpfs_does_not(tmp_path: Path) -> None:
    rows = {
        "anon": 100,
        "file": 800,
        "shmem": 300,
        "inactive_anon": 350,
        "active_anon": 50,
        "inactive_file": 400,
        "active_file": 100,
        "slab_reclaimable": 20,
        "slab_unreclaimable": 10,
    }
    stat = "".join(f"{name} {size * MIB}\n" for name, size in rows.items())
    files = {
        "a/b/memory.max": str(1024 * MIB),
        "a/b/memory.current": str(930 * MIB),
        "a/b/memory.stat": stat,
    }
    assert of(tmp_path, files) == 1024 - 930 + 400 + 100 + 20


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    files = {"memory.max": str(1024 * MIB), "memory.current": str(24 * MIB)}
    assert of(tmp_path, files, "0::/docker/0123\n", root="/docker/0123") == 1000


@pytest.mark.parametrize(("root", "path"), [("/", "/../elsewhere"), ("/docker/0123", "/elsewhere")])
def test_a_group_that_cannot_be_seen_leaves_what_can_be(tmp_path: Path, root: str, path: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/memory.max").write_text(str(MIB))
    assert of(tmp_path, {"memory.max": str(700 * MIB)}, f"0::{path}\n", root=root) == 700


def test_version_1_is_read_too_beside_an_empty_version_2(tmp_path: Path) -> None:
    cgroup = "9:name=systemd:/x\n5:devices:/x\n4:cpuset,memory:/a/b\n0::/\n"
    files = {
        "memory.limit_in_bytes": UNLIMITED,
        "memory.usage_in_bytes": str(5000 * MIB),
        "a/memory.limit_in_bytes": str(1024 * MIB),
        "a/memory.usage_in_bytes": str(1000 * MIB),
        "a/memory.stat": f"cache {900 * MIB}\ninactive_file 0\n"
        f"total_inactive_file {500 * MIB}\ntotal_active_file {100 * MIB}\ntotal_shmem {300 * MIB}\n",
        "a/b/memory.limit_in_bytes": UNLIMITED,
        "a/b/memory.usage_in_bytes": str(1000 * MIB),
    }
    nowhere = V2.replace("{mount}", f"{tmp_path}/unified")
    assert memory.available(host(tmp_path, cgroup, (OTHER, V1, nowhere), files)) == 624 * MIB


# --- what a build needs ----------------------------------------------------------------------------


def emit(kind: str, **fields: object) -> None:
    """Nobody listens."""


def asked(folder: Path) -> wire.Preflight:
    return wire.Preflight(str(folder), str(folder / "x.img"))


@pytest.mark.parametrize("size", [0, 200 * MIB, memory.NEEDED - 1])
def test_a_build_that_memory_cannot_suffice_for_is_refused_before_it_starts(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "missing", lambda *_: ())
    monkeypatch.setattr(memory, "available", lambda: size)
    with pytest.raises(
        Failure, match=rf"^{size // MIB} MiB of memory are free, a build needs about 512$"
    ) as no:
        preflight.run(asked(tmp_path), emit)
    assert "raise the limit" in no.value.hint


def test_a_build_with_just_enough_memory_may_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing", lambda *_: ())
    monkeypatch.setattr(memory, "available", lambda: memory.NEEDED)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    assert preflight.run(asked(tmp_path), emit) == wire.Space(1 << 40)


@pytest.mark.parametrize(
    ("size", "ok", "value"),
    [
        (memory.NEEDED - 1, False, "511 MiB free, a build needs about 512"),
        (memory.NEEDED, True, "512 MiB free, a build needs about 512"),
        (1 << 30, True, "1024 MiB free, a build needs about 512"),
    ],
)
def test_the_doctor_has_one_bound_of_memory_and_nothing_is_said_of_more(
    tmp_path: Path, size: int, ok: bool, value: str
) -> None:
    place = BuildPaths(tmp_path, tmp_path, "root", True)
    context = doctor.CheckContext({"memory_available": size}, place, tmp_path, {}, emit)
    (row,) = doctor.memory(context)
    assert (row.ok, row.needed, row.value) == (ok, True, value)
    assert row.fix == "free 1 MiB of memory, or raise this container's limit"


@pytest.mark.parametrize(
    ("why", "fix"),
    [
        ("qemu-system-x86_64 is missing", "apt-get install --no-install-recommends qemu-system-x86"),
        ("no /dev/kvm", "enable (nested) virtualization"),
        ("", ""),
    ],
)
def test_why_guests_are_emulated_is_told_with_what_helps(
    why: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kvm, "missing", lambda: why)
    monkeypatch.setattr(os, "access", lambda *_: True)
    place = BuildPaths(tmp_path, tmp_path, "root", True)
    context = doctor.CheckContext({"uid": 1000, "user": "me"}, place, tmp_path, {}, lambda kind, **_: None)
    (check,) = doctor.virtualization(context)
    assert (check.ok, check.value) == (not why, why or "runs guests")
    assert fix in check.fix
    assert not why or not fix.startswith("apt") or check.fix.startswith("sudo apt-get")


# --- who was killed for lack of it -----------------------------------------------------------------


def test_the_group_counts_its_kills_and_a_neighbours_do_not_count(tmp_path: Path) -> None:
    events = "low 0\nhigh 4\nmax 17\noom 3\noom_kill 2\n"
    proc = host(tmp_path, "0::/a/b\n", (V2,), {"a/b/memory.events": events, "memory.events": "oom_kill 9"})
    (proc / "vmstat").write_text("pgfault 7\noom_kill 11\n")
    assert memory.kills(proc) == 2


def test_the_group_above_counts_where_the_inner_one_does_not(tmp_path: Path) -> None:
    proc = host(tmp_path, "0::/a/b\n", (V2,), {"a/memory.events": "oom_kill 5"})
    assert memory.kills(proc) == 5


def test_version_1_counts_beside_an_empty_version_2(tmp_path: Path) -> None:
    files = {"a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3"}
    assert memory.kills(host(tmp_path, "4:memory:/a\n0::/\n", (V1,), files)) == 3


def test_a_machine_without_groups_counts_for_itself(tmp_path: Path) -> None:
    proc = host(tmp_path, "0::/\n", (V2,), {})
    assert memory.kills(proc) == 0
    (proc / "vmstat").write_text("pgfault 7\noom_kill 11\n")
    assert memory.kills(proc) == 11
