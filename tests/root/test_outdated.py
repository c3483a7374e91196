"""What an image of any format and maker says is installed in it: read by us, and by debugfs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.agent.verbs import outdated
from build.formats import raw
from build.formats.lib import ext
from build.formats.lib.findings import Damaged
from build.formats.lib.reader import BoundedReader
from tests import cli
from tests.mirror import Deb, Key, Mirror

pytestmark = pytest.mark.root
MIB = 1 << 20
STATUS = """\
Package: dpkg
Status: install ok installed
Architecture: amd64
Version: 1.21

Package: libtool
Status: install ok installed
Architecture: amd64
Version: 1
Conffiles:
 /etc/x 0123

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 0.1

Package: tool
Status: install ok installed
Architecture: amd64
Version: 1
"""


def run(*argv: str | Path, text: str = "") -> str:
    return subprocess.run(argv, input=text, check=True, capture_output=True, text=True).stdout


def system(folder: Path, status: str = STATUS, codename: str = "bookworm") -> Path:
    """A tree with what is looked at."""
    tree = folder / "tree"
    (tree / "var/lib/dpkg").mkdir(parents=True)
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "var/lib/dpkg/status").write_text(status)
    (tree / "usr/lib/os-release").write_text(f'ID=debian\nVERSION_CODENAME="{codename}"\n')
    return tree


def disk(folder: Path, tree: Path, table: str = "gpt", kind: str = "ext4", block: int = 4096) -> Path:
    """A raw disk with a small partition before the one that holds a tree."""
    image, part = folder / "disk.img", folder / "part.img"
    argv = ["mke2fs", "-q", "-F", "-t", kind, "-b", str(block), "-d", str(tree), str(part), "40M"]
    subprocess.run(argv, check=True)
    if not table:
        part.rename(image)
        return image
    image.write_bytes(b"")
    os.truncate(image, 48 * MIB)
    run("sfdisk", "-q", image, text=f"label: {table}\nstart=2048,size=2048\nstart=4096,size={40 * 2048}\n")
    run("dd", f"if={part}", f"of={image}", "bs=1M", "seek=2", "conv=notrunc,sparse", "status=none")
    return image


@pytest.mark.parametrize("table", ["gpt", "dos", ""])
def test_the_packages_of_a_system_are_found_behind_any_partition_table(tmp_path: Path, table: str) -> None:
    found = outdated.look(disk(tmp_path, system(tmp_path), table), 1, lambda kind, **fields: None)
    assert (found.suite, found.arch) == ("bookworm", "amd64")
    assert [(package.name, package.version) for package in found.packages] == [
        ("dpkg", "1.21"),
        ("libtool", "1"),
        ("tool", "1"),
    ]


@pytest.mark.parametrize(("kind", "block"), [("ext4", 4096), ("ext4", 1024), ("ext3", 4096), ("ext2", 1024)])
def test_files_are_what_debugfs_reads(tmp_path: Path, kind: str, block: int) -> None:
    tree = system(tmp_path)
    (tree / "many").mkdir()
    for number in range(800):
        (tree / f"many/{number:04} {'x' * (number % 200)}").write_text(str(number))
    (tree / "large").write_bytes(bytes(os.urandom(MIB)) * 9)
    (tree / "small").write_bytes(b"")
    with (tree / "holes").open("wb") as file:
        for place in range(0, 12 * MIB, 3 * MIB):
            file.seek(place)
            file.write(os.urandom(5000))
    (tree / "link").symlink_to("small")
    image = disk(tmp_path, tree, "", kind, block)
    with image.open("rb") as stream:
        files = ext.FileSystem(raw.KIND.read(BoundedReader.whole(stream.fileno())), 0)
        for name in (
            "large",
            "small",
            "holes",
            "var/lib/dpkg/status",
            "many/0000 ",
            f"many/0799 {'x' * 199}",
        ):
            argv = ["debugfs", "-R", f'cat "/{name}"', str(image)]
            theirs = subprocess.run(argv, check=True, capture_output=True).stdout
            assert files.read(name) == theirs == (tree / name).read_bytes(), name
        for name in ("nowhere", "small/below", "many", "link", ""):
            assert files.read(name) is None


def test_what_is_no_system_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    image = disk(tmp_path, empty)
    line = ("outdated", str(image), "--set", f"location={tmp_path}/location")
    assert "holds no Debian system" in cli.refuse(*line)
    image.write_bytes(bytes(4096))
    assert "holds no Debian system" in cli.refuse(*line)
    image.unlink()
    assert "there is no file" in cli.refuse(*line)


def test_a_damaged_file_system_ends_in_damaged(tmp_path: Path) -> None:
    image = disk(tmp_path, system(tmp_path), "")
    sound = bytearray(image.read_bytes())
    for place in [*range(1024, 2048, 8), *range(4096, 4096 + 64, 4)]:
        data = bytearray(sound)
        data[place : place + 8] = b"\xff" * 8
        image.write_bytes(data)
        with image.open("rb") as stream:
            disk_ = raw.KIND.read(BoundedReader.whole(stream.fileno()))
            try:
                files = ext.FileSystem(disk_, 0)
                files.read("var/lib/dpkg/status")
            except Damaged:
                continue


@pytest.fixture
def mirrored(tmp_path: Path, key: Key) -> Iterator[list[str]]:
    """Flags of a mirror whose security suite has a newer libtool."""
    archive = Mirror(tmp_path / "mirror", key)
    archive.suites["bookworm-security"].append(Deb("libtool", "1+deb12u1"))
    archive.suites["bookworm-security"].append(Deb("gone", "2"))
    archive.publish("bookworm-security")
    with archive.served() as url:
        settings = (f"location={tmp_path}/location", f"debian_mirror={url}/debian", f"keyring={key.ring}")
        yield [word for pair in settings for word in ("--set", pair)]


def test_an_image_of_any_format_is_behind(tmp_path: Path, mirrored: list[str]) -> None:
    image = disk(tmp_path, system(tmp_path))
    run("qemu-img", "convert", "-O", "qcow2", "-c", image, tmp_path / "disk.qcow2")
    run("qemu-img", "convert", "-O", "vpc", image, tmp_path / "disk.vhd")
    run("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", image, tmp_path / "disk.vmdk")
    run("bzip2", "--keep", tmp_path / "disk.qcow2")
    for name in ("disk.img", "disk.qcow2", "disk.vhd", "disk.vmdk", "disk.qcow2.bz2"):
        done = cli.inv("outdated", str(tmp_path / name), "--json", *mirrored)
        assert done.returncode == 10, done.stderr
        told = json.loads(done.stdout)
        assert [(row["package"], row["old"], row["new"]) for row in told["updates"]] == [
            ("libtool", "1", "1+deb12u1")
        ]
        assert (told["suite"], told["packages"]) == ("bookworm-security", 3)


def test_an_image_that_is_up_to_date_ends_with_nothing(tmp_path: Path, mirrored: list[str]) -> None:
    old_one = "Package: libtool\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1"
    status = STATUS.replace(old_one, f"{old_one}+deb12u1")
    image = disk(tmp_path, system(tmp_path, status))
    assert "none of 3 packages" in cli.succeed("outdated", str(image), *mirrored)
    old = tmp_path / "old"
    old.mkdir()
    other = disk(old, system(old, codename="trixie"))
    assert "trixie" in cli.refuse("outdated", str(other), *mirrored)
