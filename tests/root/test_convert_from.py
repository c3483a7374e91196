"""Conversion of files that others made: any format in, any format out, without our build."""

from __future__ import annotations

import bz2
import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from build.formats import FORMATS
from tests import cli
from tests.disks import MIB, one, usual

pytestmark = pytest.mark.root

OTHERS: dict[str, Sequence[str]] = {
    "a.qcow2": ("qcow2", "-c", "-o", "compression_type=zstd"),
    "b.qcow2": ("qcow2", "-o", "cluster_size=4k,compat=0.10"),
    "c.vhd": ("vpc", "-o", "subformat=dynamic,force_size=on"),
    "d.vhd": ("vpc", "-o", "subformat=fixed,force_size=on"),
    "e.vmdk": ("vmdk", "-o", "subformat=monolithicSparse"),
    "f.vmdk": ("vmdk", "-o", "subformat=streamOptimized"),
    "g.vhdx": ("vhdx", "-o", "block_size=1M"),
    "h.img": ("raw",),
}


def qemu(source: Path, target: Path, kind: str, *options: str) -> Path:
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", kind, *options, str(source), str(target)], check=True
    )
    return target


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of 48 MiB with a partition table."""
    return usual(tmp_path_factory.mktemp("disk") / "disk.raw", 48 * MIB)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_format_of_others_comes_out_as_the_same_disk(disk: Path, tmp_path: Path) -> None:
    """VHD, VHDX, VMDK and QCOW2 of QEMU's making, to a raw disk and back to a format."""
    for name, (kind, *options) in OTHERS.items():
        source = qemu(disk, tmp_path / name, kind, *options)
        cli.succeed("convert", "--from", str(source), "--formats", "raw,qcow2", "--to", str(tmp_path / "out"))
        made = tmp_path / "out" / f"{source.stem}.raw"
        assert digest(made) == digest(disk), name
        kept = made.with_suffix(".qcow2")
        subprocess.run(["qemu-img", "compare", "-q", "-F", "qcow2", "-f", "raw", disk, kept], check=True)


def test_every_format_of_ours_from_a_file_of_others(disk: Path, tmp_path: Path) -> None:
    """Whatever is asked for is the same file, byte for byte, as from the raw disk of the same name."""
    source = qemu(disk, tmp_path / "vm.qcow2", "qcow2", "-c")
    raw = tmp_path / "raw" / "vm.img"
    raw.parent.mkdir()
    raw.write_bytes(disk.read_bytes())
    everything = ",".join(name for name in FORMATS if name != "gce")  # which takes whole GiB
    found = []
    for start in (source, raw):
        out = start.parent / "out"
        cli.succeed("convert", "--from", str(start), "--formats", everything, "--to", str(out))
        found.append({path.name: digest(path) for path in out.glob("vm*") if path.suffix != ".json"})
    first, second = found
    assert first == second
    assert len(first) >= len(FORMATS) - 1
    told = json.loads((tmp_path / "out/vm.qcow2.json").read_text())
    assert told["artifact"]["guest_sha256"] == digest(disk)


def test_packed_files_and_where_things_go(disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "my vm (1).vmdk.bz2"
    source.write_bytes(bz2.compress(qemu(disk, tmp_path / "x.vmdk", "vmdk").read_bytes()))
    said = cli.succeed("convert.raw", "--from", str(source))
    assert f"in {tmp_path}" in said
    assert digest(tmp_path / "my-vm-1-.raw") == digest(disk)
    again = cli.succeed("convert.raw", "--from", str(source))
    assert "cached" in again


def test_an_ova_of_ours(disk: Path, tmp_path: Path) -> None:
    source = one(disk, tmp_path, "ova")
    cli.succeed("convert.raw", "--from", str(source), "--to", str(tmp_path / "out"))
    assert digest(tmp_path / "out/ova.raw") == digest(disk)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda raw: raw[: len(raw) // 2], "past the end", id="cut off"),
        pytest.param(
            lambda raw: raw[:20] + b"\0\0\0\77" + raw[24:], "cluster_bits 63", id="no such clusters"
        ),
        pytest.param(lambda raw: raw[:8] + b"\0\0\0\0\0\1\0\0" + raw[16:], "backing file", id="backing file"),
    ],
)
def test_what_would_lose_data_is_refused(spoil: object, says: str, disk: Path, tmp_path: Path) -> None:
    assert callable(spoil)
    source = qemu(disk, tmp_path / "bad.qcow2", "qcow2")
    source.write_bytes(spoil(source.read_bytes()))
    done = cli.inv("convert.vhd", "--from", str(source), "--to", str(tmp_path / "out"))
    assert done.returncode == 1
    assert says in done.stderr
    assert "hint:" in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_words_for_what_cannot_be(disk: Path, tmp_path: Path) -> None:
    for arguments, says in {
        ("convert.raw", "--from", str(tmp_path / "none")): "there is no file",
        ("convert.raw", "--from", str(tmp_path)): "is no file",
        ("convert.raw", "--from", str(disk), "--disk", "x"): "no number of a disk",
        ("convert.raw", "--disk", "2"): "--disk is for a file of --from",
        ("convert", "--from", str(disk), "--formats", "qcow3"): "did you mean 'qcow2'",
        ("convert.raw", "--from", str(disk)): "the file to convert itself",
        ("inspect", str(disk), "--for", "azzure"): "did you mean 'azure'",
    }.items():
        done = cli.inv(*arguments)
        assert done.returncode != 0
        assert says in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_what_one_place_refuses_decides(disk: Path, tmp_path: Path) -> None:
    """A fixed VHD of whole MiB goes to Azure, a dynamic one to Hyper-V alone, and neither to Google."""
    fixed = qemu(disk, tmp_path / "fixed.vhd", "vpc", "-o", "subformat=fixed,force_size=on")
    dynamic = one(disk, tmp_path, "hyperv-vhd")
    for path, places in {fixed: {"azure": 0, "gce": 1}, dynamic: {"hyperv": 0, "azure": 1, "gce": 1}}.items():
        for place, status in places.items():
            done = cli.inv("inspect", str(path), "--for", place)
            assert done.returncode == status, (path.name, place, done.stdout)
    done = cli.inv("inspect", str(dynamic), "--for", "hyperv,azure", "--json")
    assert "by Azure\n" in done.stderr
    wrong = [found["text"] for found in json.loads(done.stdout)["findings"] if found["severity"] == "error"]
    assert wrong == ["a dynamic VHD"]
