"""Archives and compressions as GNU tar, xz, gzip, bzip2 and zstd make them, read by our own reader."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.verbs import inspect
from build.formats import gce
from build.formats.lib.findings import Damaged
from build.formats.lib.tar import BLOCK, PAX_SPARSE, Archive, is_tar, member_header
from tests.disks import EPOCH, MIB, chunk, content, opened, usual

pytestmark = pytest.mark.root


def tar(folder: Path, *words: str) -> Path:
    """Have GNU tar write `a.tar`."""
    subprocess.run(["tar", "-cf", "a.tar", *words], cwd=folder, check=True)
    return folder / "a.tar"


@pytest.mark.parametrize("name", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_every_form_that_gnu_tar_writes(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.ovf").write_bytes(b"<x/>")
    (tmp_path / "b.vmdk").write_bytes(chunk("noise", 70_000, 1))
    path = tar(tmp_path, f"--format={name}", "a.ovf", "b.vmdk")
    with opened(path) as reader:
        archive = Archive(reader)
        files = [(member.name, archive.window(member).read(0, member.size)) for member in archive.members]
        assert files == [(member, (tmp_path / member).read_bytes()) for member in ("a.ovf", "b.vmdk")]
        assert archive.form == name.removeprefix("old")
        assert archive.findings == []
        assert is_tar(reader.read(0, BLOCK))


def test_gnu_tar_reads_our_header_of_more_than_8_gib(tmp_path: Path) -> None:
    size = (8 << 30) + 1
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(member_header("disk.vmdk", size, EPOCH))
        file.truncate(BLOCK + (size // BLOCK + 1) * BLOCK + 1024)
    run = subprocess.run(["tar", "-tvf", tmp_path / "a.tar"], capture_output=True, text=True, check=True)
    assert str(size) in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize("name", ["oldgnu", "gnu"])
@pytest.mark.parametrize("extents", [0, 1, 3, 4, 5, 25, 60])
def test_files_that_gnu_tar_stores_without_their_holes(name: str, extents: int, tmp_path: Path) -> None:
    """What Google's manual asks for: tar --format=oldgnu -S."""
    with open(tmp_path / "disk.raw", "wb") as file:
        for row in range(extents):
            file.seek(row * 300_000 + 70_001)
            file.write(chunk("noise", 40_000, row))
        file.truncate(20 * MIB + 512)
    path = tar(tmp_path, f"--format={name}", "--sparse", "disk.raw")
    with opened(path) as reader:
        archive = Archive(reader)
        (member,) = archive.members
        assert member.kind == "S"
        assert archive.findings == []
        disk = archive.inner(member).disk
        assert disk is not None
        assert content(disk) == (tmp_path / "disk.raw").read_bytes()
        assert archive.inner(member).head(100) == bytes(100)


def test_sparse_files_in_pax_form_are_named(tmp_path: Path) -> None:
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(20 * MIB)
    with opened(tar(tmp_path, "--format=pax", "--sparse", "disk.raw")) as reader:
        with pytest.raises(Damaged) as error:
            Archive(reader)
        assert error.value.finding.code == PAX_SPARSE


def look(path: Path) -> dict[str, Any]:
    request = wire.Inspect(str(path), str(path.parent), content=True)
    told: dict[str, Any] = wire.dump(inspect.run(request, lambda kind, **fields: None))
    return told


@pytest.mark.parametrize(
    ("end", "outer", "command"),
    [
        ("xz", "xz", "xz -9 -T1"),
        ("xz", "xz", "xz -0 -T4 --block-size=1MiB"),
        ("xz", "xz", "xz -6 --check=sha256 --x86 --lzma2=preset=6"),
        ("gz", "gz", "gzip -9"),
        ("bz2", "bz2", "bzip2 -1"),
        ("zst", "zst", "zstd -q -3 --rm"),
        ("zst", "zst", "zstd -q --long=27 --rm"),
    ],
)
def test_compressions_as_their_own_tools_make_them(
    end: str, outer: str, command: str, tmp_path: Path
) -> None:
    disk = usual(tmp_path / "disk.raw", 8 * MIB)
    wanted = hashlib.sha256(disk.read_bytes()).hexdigest()
    subprocess.run([*command.split(), disk], check=True)
    told = look(tmp_path / f"disk.raw.{end}")
    assert (told["format"], told["outer"], told["guest_sha256"]) == ("raw", outer, wanted)


@pytest.mark.parametrize("pack", ["-z", "-J", "-j", "--zstd"])
def test_a_disk_as_google_asks_for_it(pack: str, tmp_path: Path) -> None:
    """Its manual: tar --format=oldgnu -Sczf; the holes are not in the archive."""
    disk = usual(tmp_path / "disk.raw", 64 * MIB)
    wanted = hashlib.sha256(disk.read_bytes()).hexdigest()
    line = ["tar", "--format=oldgnu", "-S", pack, "-cf", "image.tar.gz", "disk.raw"]
    subprocess.run(line, cwd=tmp_path, check=True)
    told = look(tmp_path / "image.tar.gz")
    assert (told["format"], told["virtual_size"], told["guest_sha256"]) == ("gce", 64 * MIB, wanted)
    codes = [finding["code"] for finding in told["findings"] if finding["severity"] == "error"]
    assert codes == [gce.ODD_SIZE.id]


def test_a_disk_and_a_text_in_a_tar(tmp_path: Path) -> None:
    disk = usual(tmp_path / "vm.img", 8 * MIB)
    wanted = hashlib.sha256(disk.read_bytes()).hexdigest()
    (tmp_path / "README").write_text("read me\n")
    for form in ("v7", "gnu", "ustar", "pax"):
        line = ["tar", f"--format={form}", "-cJf", "vm.tar.xz", "./README", "./vm.img"]
        subprocess.run(line, cwd=tmp_path, check=True)
        told = look(tmp_path / "vm.tar.xz")
        assert (told["format"], told["outer"], told["guest_sha256"]) == ("raw", "xz+tar", wanted)
