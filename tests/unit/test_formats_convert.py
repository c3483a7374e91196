"""The verb: names and sums, what is cached, and that nothing half-made or wrong ever gets a name."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent import sums
from build.agent.events import Failure
from build.agent.verbs import convert
from build.formats.lib import codec, outer, pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged
from build.formats.lib.pieces import Disk
from build.formats.lib.qcow2 import Qcow2Disk
from tests.disks import MIB, ask, spec, usual

SPECS = [spec("vhd"), spec("qcow2"), spec("vmdk", "gz")]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The usual disk."""
    return usual(tmp_path / "disk.img", 16 * MIB)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the artifacts go: not made yet."""
    return tmp_path / "out"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_it_answers_and_writes(disk: Path, out: Path) -> None:
    told = ask(disk, out, SPECS)
    content = disk.read_bytes()
    assert told["guest_sha256"] == hashlib.sha256(content).hexdigest()
    assert told["virtual_size"] == len(content)
    files = {row["file"]: row for row in told["files"]}
    assert set(files) == {"vhd.vhd", "qcow2.qcow2", "vmdk.vmdk.gz"}
    for name, row in files.items():
        raw = (out / name).read_bytes()
        assert row["size"] == len(raw)
        assert row["allocated"] == (out / name).stat().st_blocks * 512
        assert row["state"] == "built"
        for algorithm in ("md5", "sha256", "sha512"):
            assert row[algorithm] == hashlib.new(algorithm, raw).hexdigest()
        manifest = json.loads((out / f"{name}.json").read_text())
        assert manifest["artifact"] == row
        assert manifest["settings"]["identity"] == "test"
    assert "zlib-ng" in files["qcow2.qcow2"]["compressor"]
    for name, algorithm in sums.SUMS.items():
        lines = (out / name).read_text().splitlines()
        assert lines == [f"{files[each][algorithm]}  {each}" for each in sorted(files)]
    assert not [name for name in names(out) if name.startswith(".")]


def test_sums_of_other_files_stay_and_those_of_lost_files_go(disk: Path, out: Path) -> None:
    ask(disk, out, [spec("vhd"), spec("raw")])
    (out / "raw.raw").unlink()
    ask(disk, out, [spec("qcow2")])
    listed = [line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert listed == ["qcow2.qcow2", "vhd.vhd"]


def test_an_unchanged_disk_is_not_converted_again(disk: Path, out: Path) -> None:
    first = ask(disk, out, SPECS)["files"]
    second = ask(disk, out, SPECS)["files"]
    assert [row["state"] for row in second] == ["cached"] * 3
    assert [{**row, "state": "built"} for row in second] == first


@pytest.mark.parametrize("change", ["disk", "artifact", "options", "identity", "gone", "manifest"])
def test_any_change_converts_again(change: str, disk: Path, out: Path) -> None:
    ask(disk, out, [spec("qcow2")])
    row, more = spec("qcow2"), {}
    if change == "disk":
        with open(disk, "r+b") as file:
            file.write(b"changed")
    elif change == "artifact":
        os.utime(out / "qcow2.qcow2")
    elif change == "options":
        row["options"] = {"version": 3}
    elif change == "identity":
        more["identity"] = "other"
    elif change == "gone":
        (out / "qcow2.qcow2").unlink()
    else:
        (out / "qcow2.qcow2.json").write_text("{")
    assert ask(disk, out, [row], **more)["files"][0]["state"] == "built"


def test_a_missing_disk(tmp_path: Path, out: Path) -> None:
    with pytest.raises(Failure, match="no raw disk") as caught:
        ask(tmp_path / "none.img", out, SPECS)
    assert "inv build" in caught.value.hint
    assert not out.exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**spec("vhd"), "kind": "hdd"}, "unknown format 'hdd'"),
        ({**spec("vhd"), "file": "../vhd.vhd"}, "no name for an image"),
        ({**spec("vhd"), "file": ".hidden"}, "no name for an image"),
        ({**spec("vhd"), "compress": "bz2"}, "cannot be compressed"),
        ({**spec("vhd"), "file": "vhd.vhd.xz", "compress": "xz"}, "cannot be compressed"),
        ({**spec("raw"), "file": "vhd.vhd"}, "same file name"),
    ],
)
def test_requests_that_cannot_be(row: dict[str, Any], says: str, disk: Path, out: Path) -> None:
    with pytest.raises(Failure, match=says):
        ask(disk, out, [spec("vhd"), row])
    assert not out.exists()


def test_the_raw_disk_is_never_overwritten(disk: Path) -> None:
    with pytest.raises(Failure, match="the file to convert itself"):
        ask(disk, disk.parent, [{**spec("raw"), "file": disk.name}])


def test_a_disk_that_changes_while_it_is_read(disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out).mkdir()
    (out / "vhd.vhd").write_bytes(b"earlier")
    scan = pieces.scan

    def disturbed(source: Disk) -> Any:
        for number, run in enumerate(scan(source)):
            if number == 2:
                with open(disk, "r+b") as file:
                    file.seek(12 * MIB)
                    file.write(b"written meanwhile")
            yield run

    monkeypatch.setattr(pieces, "scan", disturbed)
    with pytest.raises(Failure, match="changed while it was read"):
        ask(disk, out, SPECS)
    assert names(out) == {"vhd.vhd"}
    assert (out / "vhd.vhd").read_bytes() == b"earlier"


def test_a_disk_that_becomes_shorter(disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = pieces.scan

    def cut(source: Disk) -> Any:
        for run in scan(source):
            os.truncate(disk, 3 * MIB)
            yield run

    monkeypatch.setattr(pieces, "scan", cut)
    with pytest.raises(Failure, match=r"shorter|past the end|changed while it was read"):
        ask(disk, out, SPECS)
    assert names(out) == set()


@pytest.mark.parametrize("name", ["vhd", "vhdx", "qcow2", "vmdk", "ova", "raw"])
def test_a_file_that_reads_back_wrong_gets_no_name(
    name: str, disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(disk, out, [spec(name)])
    earlier = (out / spec(name)["file"]).read_bytes()
    prove = convert._prove

    def spoilt(outputs: list[convert.Output], *rest: Any) -> None:
        inner = outputs[0].inner
        assert inner is not None
        inner.seek(0, os.SEEK_END)
        end = inner.tell()
        for offset in range(end * 3 // 10, end * 7 // 10, 4096):
            inner.seek(offset)
            inner.write(b"\xde\xad")
        inner.flush()
        prove(outputs, *rest)

    monkeypatch.setattr(convert, "_prove", spoilt)
    with pytest.raises(Failure, match=f"^{name}.*read back"):
        ask(disk, out, [spec(name)], force=True)
    assert (out / spec(name)["file"]).read_bytes() == earlier
    assert not [left for left in names(out) if left.startswith(".")]


def test_an_outer_file_that_reads_back_wrong_gets_no_name(
    disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer, "_pack", lambda kind, data, last: (b"BZh9 not it", 0, len(data)))
    with pytest.raises(Failure, match="differs from the raw disk"):
        ask(disk, out, [spec("vhd", "bz2")])
    assert names(out) == set()


@pytest.mark.parametrize("module", ["zlib_ng.zlib_ng", "deflate"])
def test_a_missing_compressor_names_the_fix(
    module: str, disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = (codec.zlib_ng, codec.libdeflate)
    monkeypatch.setitem(sys.modules, module, None)
    for loader in loaders:
        loader.cache_clear()
    with pytest.raises(Unsupported, match=f"compressor {module.partition('.')[0]} is missing") as caught:
        ask(disk, out, [spec("qcow2"), spec("vmdk")])
    for loader in loaders:
        loader.cache_clear()
    assert "./inv" in caught.value.hint


def test_parts_of_a_killed_run_are_taken_away(disk: Path, out: Path) -> None:
    out.mkdir()
    for left in (".vhd.vhd.part", ".vmdk.vmdk.gz.inner.part", ".qcow2.qcow2.json.part"):
        (out / left).write_bytes(b"left over")
    ask(disk, out, SPECS)
    assert not [name for name in names(out) if name.startswith(".")]


def test_progress_ends_at_the_whole_of_each_phase(disk: Path, out: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def emit(kind: str, **fields: Any) -> None:
        assert kind == "progress"
        told.setdefault(fields["label"], []).append((fields["done"], fields["total"]))

    request = wire.Convert(str(disk), str(out), (spec("vhd", "bz2"),), "x", 0)
    convert.run(request, emit)
    assert list(told) == ["convert", "verify", "compress bz2", "verify bz2"]
    for steps in told.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("image", "private", "mode"),
    [(0o644, False, 0o644), (0o600, False, 0o600), (0o640, False, 0o600), (0o644, True, 0o600)],
    ids=["for all", "of a private disk", "of a group's disk", "asked for"],
)
def test_files_are_private_from_their_first_byte_when_their_disk_is_or_it_is_asked_for(
    image: int, private: bool, mode: int, disk: Path, out: Path
) -> None:
    disk.chmod(image)
    seen: dict[str, set[int]] = {}

    def emit(kind: str, **fields: Any) -> None:
        for name, each in modes(out).items():
            seen.setdefault(name, set()).add(each)

    rows = (spec("ova"), *(spec("vhd", compress) for compress in outer.KINDS))
    told = convert.run(wire.Convert(str(disk), str(out), rows, "x", 0, private=private), emit)
    assert told.private == (mode == 0o600)
    ends = (".part", ".inner.part")
    parts = [".ova.ova.part", *(f".{row['file']}{end}" for row in rows[1:] for end in ends)]
    assert [seen[name] for name in parts] == [{mode}] * len(parts)
    made = [row["file"] for row in rows]
    assert {name: modes(out)[name] for name in made} == dict.fromkeys(made, mode)
    assert {modes(out)[name] for name in ("SHA256SUMS", "ova.ova.json")} == {0o644}


def test_a_disk_that_was_closed_closes_its_files(disk: Path, out: Path) -> None:
    """And the owner may open one of them, without it being made anew."""
    ask(disk, out, [spec("qcow2")])
    assert modes(out)["qcow2.qcow2"] == 0o644
    disk.chmod(0o600)
    assert ask(disk, out, [spec("qcow2")])["files"][0]["state"] == "built"
    assert modes(out)["qcow2.qcow2"] == 0o600
    (out / "qcow2.qcow2").chmod(0o640)
    assert ask(disk, out, [spec("qcow2")])["files"][0]["state"] == "cached"
    assert modes(out)["qcow2.qcow2"] == 0o640


def test_register_parameters_carry_the_checksum(disk: Path, out: Path) -> None:
    row = {**spec("qcow2"), "register": {"hypervisor": "KVM", "format": "QCOW2"}}
    told = ask(disk, out, [row])["files"][0]
    assert told["register"] == {
        "hypervisor": "KVM",
        "format": "QCOW2",
        "checksum": "{SHA-512}" + told["sha512"],
    }


def test_reading_beyond_the_end_is_damage_and_no_crash(disk: Path, out: Path) -> None:
    from tests.disks import opened

    ask(disk, out, [spec("qcow2")])
    with open(out / "qcow2.qcow2", "r+b") as file:
        file.truncate(200_000)
    with opened(out / "qcow2.qcow2") as reader, pytest.raises(Damaged):
        Qcow2Disk(reader)
