"""A tree is carried whole, whatever happens to it between two passes."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from build.agent import copy_tree

pytestmark = pytest.mark.unit


def told(tree: Path) -> dict[str, object]:
    """Everything about a tree that a step could see."""
    first: dict[int, str] = {}
    found: dict[str, object] = {}
    for path in sorted([tree, *tree.rglob("*")]):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes(), first.setdefault(status.st_ino, str(path.relative_to(tree)))
        attributes = {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        }
        mode = stat.S_IMODE(status.st_mode)
        owner = (status.st_uid, status.st_gid)
        found[str(path.relative_to(tree))] = (kind, mode, owner, status.st_mtime_ns, content, attributes)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of everything."""
    root = tmp_path / "tree"
    (root / "etc/deep/er").mkdir(parents=True)
    (root / "etc/plain").write_text("one\n")
    (root / "etc/deep/er/script").write_text("#!/bin/sh\n")
    (root / "etc/deep/er/script").chmod(0o4755)
    (root / "etc/deep").chmod(0o1770)
    (root / "etc/link").symlink_to("../nowhere")
    (root / "etc/folder").symlink_to("deep")
    (root / "etc/twin").hardlink_to(root / "etc/plain")
    (root / "etc/a name\n\udcff with bytes").write_bytes(bytes(range(256)))
    os.mkfifo(root / "etc/pipe", 0o600)
    os.setxattr(root / "etc/plain", "user.colour", b"red")
    os.setxattr(root / "etc/deep", "user.colour", b"blue")
    os.utime(root / "etc/deep/er/script", ns=(1, 1_000_000_001))
    os.utime(root / "etc", ns=(1, 2_000_000_002))
    return root


def carried(tree: Path) -> dict[str, object]:
    target = tree.with_name("target")
    target.mkdir(exist_ok=True)
    copy_tree.main(str(tree), str(target), str(tree.with_name("notes")))
    return told(target)


def test_one_pass_carries_everything(tree: Path) -> None:
    assert carried(tree) == told(tree)


def same_size_and_time(tree: Path) -> None:
    path = tree / "etc/deep/er/script"
    before = path.stat()
    path.write_text("#!/bin/ks\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def folder_for_file(tree: Path) -> None:
    (tree / "etc/plain").unlink()
    (tree / "etc/plain/below").mkdir(parents=True)


def file_for_folder(tree: Path) -> None:
    shutil.rmtree(tree / "etc/deep")
    (tree / "etc/deep").write_text("now a file")


def link_for_folder(tree: Path) -> None:
    shutil.rmtree(tree / "etc/deep")
    (tree / "etc/deep").symlink_to("plain")


def another_link(tree: Path) -> None:
    (tree / "etc/link").unlink()
    (tree / "etc/link").symlink_to("plain")


def attributes(tree: Path) -> None:
    os.removexattr(tree / "etc/plain", "user.colour")
    os.removexattr(tree / "etc/deep", "user.colour")
    os.setxattr(tree / "etc/deep/er", "user.shape", b"round")


CHANGES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda tree: None,
    "same size and time": same_size_and_time,
    "mode": lambda tree: (tree / "etc/plain").chmod(0o600),
    "mode of a folder": lambda tree: (tree / "etc/deep/er").chmod(0o700),
    "attributes": attributes,
    "a new name of an old file": lambda tree: (tree / "etc/third").hardlink_to(tree / "etc/plain"),
    "one name less": lambda tree: (tree / "etc/twin").unlink(),
    "twins part": lambda tree: shutil.move(
        shutil.copy2(tree / "etc/plain", tree / "etc/new"), tree / "etc/twin"
    ),
    "renamed": lambda tree: (tree / "etc/deep").rename(tree / "etc/shallow"),
    "removed": lambda tree: shutil.rmtree(tree / "etc/deep"),
    "folder for file": folder_for_file,
    "file for folder": file_for_folder,
    "link for folder": link_for_folder,
    "another link": another_link,
}


@pytest.mark.parametrize("settled", [False, True], ids=["just now", "long ago"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_later_pass_brings_what_changed(
    tree: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], settled: bool
) -> None:
    if settled:
        monkeypatch.setattr(copy_tree, "TICK", -(10**12))
    carried(tree)
    change(tree)
    assert carried(tree) == told(tree)


def test_a_later_pass_leaves_alone_what_is_there(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_tree, "TICK", -(10**12))
    carried(tree)
    before = (tree.with_name("target") / "etc/plain").stat().st_ino
    carried(tree)
    assert (tree.with_name("target") / "etc/plain").stat().st_ino == before
