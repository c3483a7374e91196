"""Where everything lies on a disk, and how big it must be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build.disk import layout, tree
from build.disk.layout import MIB, LayoutError, TreeUsage

ASKED = {
    "imagename": "vm",
    "arch": "amd64",
    "size": 2000,
    "firmware": ["bios", "uefi"],
    "headroom": 0,
    "kernel_cmdline": "quiet  console=ttyS0",
}
TREE = TreeUsage(25_000, 250_000)
BOOT = 17 * MIB
SEED = "00ff"


def plan(usage: TreeUsage = TREE, seed: str = SEED, **asked: Any) -> dict[str, Any]:
    return layout.plan({**ASKED, **asked}, usage, BOOT, seed, 1_700_000_000)


@pytest.mark.parametrize("size", [64, 700, 2000, 2001, 65536, 2088960])
@pytest.mark.parametrize("firmware", [["bios"], ["uefi"], ["bios", "uefi"]])
def test_partitions_lie_on_whole_mib_one_behind_the_other_and_root_is_last(
    size: int, firmware: list[str]
) -> None:
    rows = layout.partitions({**ASKED, "firmware": firmware}, size, 40)
    roles = {"bios": "bios", "uefi": "esp"}
    assert [row["role"] for row in rows] == [*(roles[kind] for kind in firmware), "root"]
    end = 2048
    for number, row in enumerate(rows, 1):
        assert row["number"] == number
        assert row["start"] == end
        assert row["start"] % 2048 == row["sectors"] % 2048 == 0
        end += row["sectors"]
    assert end == (size - 1) * 2048


@settings(deadline=None)
@given(st.integers(100, 300_000), st.integers(100, 2_000_000), st.integers(0, 3000))
def test_the_named_size_is_enough_and_the_next_smaller_is_not(inodes: int, blocks: int, room: int) -> None:
    usage = TreeUsage(inodes, blocks)
    with pytest.raises(LayoutError) as refused:
        plan(usage, size=2, headroom=room)
    named = int(refused.value.args[1].split()[-1])
    assert named % 2 == 0
    assert plan(usage, size=named, headroom=room)["smallest_size"] == named
    with pytest.raises(LayoutError, match=f"SIZE={named - 2} MiB is too small"):
        plan(usage, size=named - 2, headroom=room)


def test_the_named_size_counts_what_must_stay_free() -> None:
    assert plan(headroom=500)["smallest_size"] - plan()["smallest_size"] in range(500, 520)


def test_the_efi_system_partition_holds_two_kernels() -> None:
    esp = next(row for row in plan()["partitions"] if row["role"] == "esp")
    assert esp["sectors"] * 512 >= 2 * BOOT
    assert not [row for row in plan(firmware=["bios"])["partitions"] if row["role"] == "esp"]


def test_inodes_are_left_for_a_running_system() -> None:
    many = TreeUsage(400_000, 200_000)
    for usage in (TREE, many):
        geometry = plan(usage)["partitions"][-1]["filesystem"]
        assert geometry["inodes"] >= usage.inodes * 1.25
        assert geometry["growth"] * 4096 >= 1 << 40


def ids(planned: dict[str, Any]) -> set[str]:
    rows = planned["partitions"]
    own = {planned["guid"], *(row["guid"] for row in rows)}
    inner = [row.get("filesystem", {}) for row in rows]
    return own | {fs[key] for fs in inner for key in ("uuid", "hash_seed", "serial") if key in fs}


def test_every_id_follows_from_name_and_seed() -> None:
    assert plan() == plan()
    assert len(ids(plan())) == 7
    assert not ids(plan()) & ids(plan(seed="00fe"))
    assert not ids(plan()) & ids(plan(imagename="other"))
    assert ids(plan()) == ids(plan(size=3000))


def test_one_command_line_names_root_by_its_id() -> None:
    planned = plan()
    device = planned["partitions"][-1]["filesystem"]["uuid"]
    assert planned["kernel_cmdline"] == f"root=UUID={device} ro quiet console=ttyS0"


@pytest.mark.parametrize(
    ("group", "held"), [(0, 1), (1, 1), (2, 0), (3, 1), (5, 1), (6, 0), (9, 1), (15, 0), (49, 1), (81, 1)]
)
def test_copies_of_the_superblock(group: int, held: int) -> None:
    assert layout.has_superblock(group) is bool(held)


def test_a_tree_is_counted_as_ext4_stores_it(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 4097)
    os.link(tmp_path / "one", tmp_path / "two")
    (tmp_path / "empty").touch()
    (tmp_path / "short").symlink_to("x" * 59)
    (tmp_path / "long").symlink_to("x" * 60)
    (tmp_path / "folder").mkdir()
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"data")
    # root, one/two, empty, short, long, folder, sparse (a window of 16 blocks)
    assert layout.count(tree.scan(str(tmp_path))) == TreeUsage(7, 1 + 2 + 1 + 1 + 16)


def test_directories_are_counted_by_the_length_of_their_names() -> None:
    assert layout.directory_blocks([]) == 1
    assert layout.directory_blocks([f"{number:03}" for number in range(300)]) == 1
    # 255 bytes need 264; 15 fit into a block.
    assert layout.directory_blocks(["n" * 255] * 45) == 3
    assert layout.directory_blocks(["n" * 255] * 75) == 5 + 1


@pytest.mark.parametrize("start", [b"070701", b"\x1f\x8b\x08", b"(\xb5/\xfd", b"\xfd7zXZ\0", b"BZh9"])
def test_every_kind_of_initramfs_is_known(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "initrd").write_bytes(start + b"rest")
    layout.check_initramfs(str(tmp_path / "initrd"))


@pytest.mark.parametrize("content", [b"", bytes(4096), b"<html>", b"07"])
def test_what_is_no_initramfs_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "initrd").write_bytes(content)
    with pytest.raises(LayoutError, match="initrd is not an initramfs"):
        layout.check_initramfs(str(tmp_path / "initrd"))
