"""Writers against readers: what goes into a file comes out of it, whatever the disk looks like."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from build.formats import KINDS
from build.formats.lib import pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.format import Target
from tests.disks import ALL, MIB, ask, errors, make, one, opened, read, spec, usual

EVERY = sorted(ALL)
ODD = ("qcow2", "qcow2-v3", "qcow2-zstd", "qcow2-plain", "vmdk", "ova", "vhdx", "raw")


@pytest.mark.parametrize("name", EVERY)
def test_content_comes_back(name: str, tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    file = one(disk, tmp_path / "out", name)
    assert read(file, ALL[name]["kind"]) == disk.read_bytes()
    assert errors(file, ALL[name]["kind"]) == []


parts = st.lists(
    st.tuples(
        st.integers(0, 9 * MIB),
        st.one_of(st.integers(0, 5000), st.integers(60_000, 70_000), st.just(2 * MIB)),
        st.sampled_from(("text", "noise", "zero")),
    ),
    max_size=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=parts, sectors=st.integers(1, 10 * MIB // 512))
def test_any_disk_comes_back(parts: list[tuple[int, int, str]], sectors: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = make(Path(folder, "disk.img"), sectors * 512, parts)
        result = ask(disk, Path(folder, "out"), [spec(name) for name in ODD])
        wanted = disk.read_bytes()
        assert result["guest_sha256"] == hashlib.sha256(wanted).hexdigest()
        for name in ODD:
            file = Path(folder, "out", spec(name)["file"])
            assert read(file, ALL[name]["kind"]) == wanted, name
            assert errors(file, ALL[name]["kind"]) == [], name


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=parts, blocks=st.integers(1, 6))
def test_any_disk_of_whole_blocks_comes_back_from_vhd(parts: list[tuple[int, int, str]], blocks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = make(Path(folder, "disk.img"), blocks * 2 * MIB, parts)
        ask(disk, Path(folder, "out"), [spec("vhd"), spec("hyperv-vhd")])
        for name in ("vhd", "hyperv-vhd"):
            file = Path(folder, "out", spec(name)["file"])
            assert read(file, "vhd") == disk.read_bytes()
            assert errors(file, "vhd") == []


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", ["zero", "noise"])
def test_empty_and_full_disks(name: str, kind: str, tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", 6 * MIB, [(0, 6 * MIB, kind)])
    file = one(disk, tmp_path / "out", name)
    assert read(file, ALL[name]["kind"]) == disk.read_bytes()
    assert errors(file, ALL[name]["kind"]) == []


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("size", [512, 65_536, 65_536 + 512, 2 * MIB - 512, 2 * MIB + 512, 33 * MIB + 1536])
def test_odd_sizes(name: str, size: int, tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", size, [(0, size, "text"), (size - 512, 512, "noise")])
    file = one(disk, tmp_path / "out", name)
    assert read(file, ALL[name]["kind"]) == disk.read_bytes()
    assert errors(file, ALL[name]["kind"]) == []


def test_a_raw_disk_may_have_any_size(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", 100_001, [(99_999, 2, "noise")])
    assert one(disk, tmp_path / "out", "raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("vhd", 3 * MIB, "multiple of 2 MiB"),
        ("vhd", 2 * MIB + 512, "multiple of 2 MiB"),
        ("hyperv-vhd", 3 * MIB, "multiple of 2 MiB"),
        ("vhd", (2040 << 30) + 2 * MIB, "at most 2040 GiB"),
        ("vhdx", 1000, "whole sectors"),
        ("qcow2", 1000, "whole sectors"),
        ("vmdk", 1000, "whole sectors"),
        ("ova", 1000, "whole sectors"),
        ("vhdx", (64 << 40) + 512, "at most 64 TiB"),
        ("raw", 0, "empty"),
    ],
)
def test_a_size_that_the_format_cannot_have_is_refused_before_anything_is_written(
    name: str, size: int, says: str
) -> None:
    with pytest.raises(Unsupported, match=says):
        KINDS[ALL[name]["kind"]].check_size(size)


def test_bytes_do_not_depend_on_threads_or_on_what_else_is_asked(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    specs = [spec(name) for name in EVERY]
    ask(disk, tmp_path / "one", specs, threads=1)
    ask(disk, tmp_path / "five", list(reversed(specs)), threads=5)
    for row in specs:
        ask(disk, tmp_path / "alone", [row])
        wanted = (tmp_path / "one" / row["file"]).read_bytes()
        assert (tmp_path / "five" / row["file"]).read_bytes() == wanted, row["file"]
        assert (tmp_path / "alone" / row["file"]).read_bytes() == wanted, row["file"]


def test_ids_follow_name_and_content(tmp_path: Path) -> None:
    first, second = usual(tmp_path / "a.img"), usual(tmp_path / "b.img")
    with open(second, "r+b") as file:
        file.seek(MIB)
        file.write(b"different")
    ids: list[str] = []
    for disk, identity in ((first, "test"), (second, "test"), (first, "other"), (first, "test")):
        path = one(disk, tmp_path / f"out{len(ids)}", "vhd", identity=identity)
        with opened(path) as reader:
            ids.append(KINDS["vhd"].read(reader).facts()["uuid"])
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("name", ["vhd", "vhdx", "qcow2", "vmdk"])
def test_two_tebibytes_of_mostly_nothing(name: str, tmp_path: Path) -> None:
    """Only the hash of a conversion takes time for holes; writers, readers and linters do not."""
    size = 2040 << 30
    places = (0, size // 3 // (2 * MIB), size // (2 * MIB) - 1)
    kind = KINDS[ALL[name]["kind"]]
    path = tmp_path / "large"
    data = b"content".ljust(2 * MIB, b".")
    with open(path, "w+b") as file:
        writer = kind.write(Target(file, size, "large", 0), {})
        units = pieces.units(data)
        packed = (
            {writer.codec: [writer.codec.compress(u) if u else None for u in units]} if writer.codec else {}
        )
        for index in places:
            writer.add(index, data, packed)
        writer.close("seed")
    assert path.stat().st_size < 64 * MIB
    assert errors(path, ALL[name]["kind"]) == []
    with opened(path) as reader:
        disk = kind.read(reader)
        assert disk.size == size
        assert [index for index in range(pieces.count(size)) if disk.piece(index) is not None] == list(places)
        assert all(disk.piece(index) == data for index in places)
