"""Inspect: any file, however hostile, gives findings; never a traceback, a hang or huge memory."""

from __future__ import annotations

import hashlib
import random
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from build import wire
from build.agent.events import Failure
from build.agent.verbs import inspect
from build.formats.lib.errors import Unsupported
from build.formats.lib.names import OTHER_SUFFIX
from build.formats.lib.partitions import CUT_OFF
from build.formats.lib.qcow2 import SHARED_L2
from tests.disks import ALL, MIB, ask, make, patch, spec, usual

MEMORY = 200 * MIB


def look(path: Path, **more: Any) -> dict[str, Any]:
    """Inspect, and hold it to its bounds."""
    request = wire.Inspect(str(path), str(path.parent), **more)
    told: dict[str, Any] = wire.dump(inspect.run(request, lambda kind, **fields: None))
    return told


def codes(told: dict[str, Any], severity: str = "error") -> list[str]:
    return [finding["code"] for finding in told["findings"] if finding["severity"] == severity]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every format and every outer compression of one small disk."""
    folder = tmp_path_factory.mktemp("files")
    disk = usual(folder / "disk.img", 8 * MIB)
    rows = [spec(name) for name in ALL] + [spec("vhd", outer) for outer in ("bz2", "gz", "zip", "zst")]
    ask(disk, folder, rows)
    return {row["file"]: folder / row["file"] for row in rows} | {"disk.img": disk}


def test_every_file_of_ours_is_known_and_clean(files: dict[str, Path]) -> None:
    content = files["disk.img"].read_bytes()
    for name, path in files.items():
        told = look(path, content=True)
        assert codes(told) == [], name
        assert told["guest_sha256"] == hashlib.sha256(content).hexdigest(), name
        assert told["virtual_size"] == len(content)
        assert told["format"] == ("raw" if name == "disk.img" else ALL[name.split(".")[0]]["kind"])
        assert told["outer"] == [*name.split("."), "", ""][2]


def test_what_a_file_says_about_itself(files: dict[str, Path]) -> None:
    assert look(files["vhd.vhd"])["facts"]["creator"] == "tap 1.3"
    assert look(files["vhd.vhd"])["facts"]["created"] == "2010-01-01T00:00:00Z"
    assert look(files["vhdx.vhdx"])["facts"]["creator"] == "systemvm-builder"
    assert look(files["qcow2.qcow2"])["facts"]["version"] == "2 (compat 0.10)"
    assert look(files["vmdk.vmdk"])["facts"]["adapter"] == "lsilogic"
    assert "ova.ovf" in look(files["ova.ova"])["facts"]["files"]


def test_a_name_that_cloudstack_would_refuse(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(files["qcow2.qcow2"].read_bytes())
    assert OTHER_SUFFIX.id in codes(look(tmp_path / "disk.img"), "warning")


def test_a_disk_that_lost_its_end(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img", 8 * MIB)
    with open(disk, "r+b") as file:
        file.truncate(8 * MIB - 512 * 64)
    assert CUT_OFF.id in codes(look(disk))


@pytest.mark.parametrize(
    "content", [b"", b"x", b"QFI\xfb", b"KDMV", b"conectix", b"vhdxfile", b"BZh91AY&SY", b"PK\3\4"]
)
def test_tiny_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(content)
    assert codes(look(path))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no file"):
        look(tmp_path / "none")
    with pytest.raises(Failure, match="is no file"):
        look(tmp_path)
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Failure, match="is no file"):
        look(tmp_path / "pipe")


NAMES = [spec(name)["file"] for name in ALL]
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(INTERESTING), st.sampled_from("<> "), st.integers(1, 8)),
        min_size=1,
        max_size=6,
    ),
    near_a_table=st.booleans(),
)
def test_broken_files_give_findings(
    name: str, changes: list[tuple[float, int, str, int]], near_a_table: bool, files: dict[str, Path]
) -> None:
    raw = bytearray(files[name].read_bytes())
    for place, value, order, width in changes:
        span = min(len(raw), 8192) if near_a_table else len(raw)
        offset = int(place * (span - 8))
        packed = struct.pack(f"{'>' if order == '>' else '<'}Q", value)
        raw[offset : offset + width] = packed[-width:] if order == ">" else packed[:width]
    _bounded(bytes(raw))


@pytest.mark.soak(90)
def test_many_broken_files_give_findings(seed: int, files: dict[str, Path]) -> None:
    """Fields overwritten, blocks moved, ends cut: 600 files drawn from the seed."""
    dice = random.Random(seed)
    for _ in range(600):
        raw = bytearray(files[dice.choice(NAMES)].read_bytes())
        for _ in range(dice.randint(1, 8)):
            span = min(len(raw), dice.choice((512, 8192, 1 << 20, len(raw))))
            offset, width = dice.randrange(span), dice.choice((1, 2, 4, 8, 64, 512))
            source = dice.randrange(len(raw))
            raw[offset : offset + width] = dice.choice(
                (
                    dice.randbytes(width),
                    dice.choice(INTERESTING).to_bytes(8, dice.choice(("big", "little")))[-width:],
                    bytes(raw[source : source + width]),
                )
            )
        _bounded(bytes(raw[: len(raw) if dice.random() < 0.7 else dice.randrange(len(raw))]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), keep=st.floats(0, 1))
def test_cut_off_files_give_findings(name: str, keep: float, files: dict[str, Path]) -> None:
    raw = files[name].read_bytes()
    _bounded(raw[: int(len(raw) * keep)])


@settings(max_examples=100, deadline=None)
@given(
    magic=st.sampled_from(
        (b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"KDMV", b"vhdxfile", b"conectix", b"BZh91AY&SY", b"")
    ),
    seed=st.integers(0, 1 << 32),
    size=st.integers(0, 300_000),
)
def test_noise_behind_a_magic_number(magic: bytes, seed: int, size: int) -> None:
    _bounded(magic + random.Random(seed).randbytes(size))


def _bounded(raw: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hostile")
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            told = look(path, content=True, limit=64 * MIB)
            assert tracemalloc.get_traced_memory()[1] < MEMORY
        finally:
            tracemalloc.stop()
        return told


def test_headers_fuzzed_one_field_at_a_time(files: dict[str, Path], tmp_path: Path) -> None:
    """Every 4 bytes of every head, set to all ones, to zero and to a large number."""
    heads = {"qcow2.qcow2": 112, "vmdk.vmdk": 80, "vhdx.vhdx": 8, "vhd.vhd": 1600, "ova.ova": 512}
    for name, length in heads.items():
        raw = files[name].read_bytes()
        path = tmp_path / name
        path.write_bytes(raw)
        for offset in range(0, length, 16):
            for value in (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"):
                patch(path, offset, value)
                look(path)
                patch(path, offset, raw[offset : offset + 4])


def test_a_table_that_leads_in_circles(tmp_path: Path) -> None:
    """Thousands of L1 entries on one L2 table whose entries name itself."""
    path = tmp_path / "loop.qcow2"
    entries = 4000
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, entries << 29, 0, entries, 65536, 1 << 18, 1, 0, 0
    )
    with open(path, "wb") as file:
        file.write(head)
        file.seek(65536)
        file.write(struct.pack(">Q", 1 << 17 | 1 << 63) * entries)
        file.seek(1 << 17)
        file.write(struct.pack(">Q", 1 << 17 | 1 << 63) * 8192)
        file.truncate(1 << 19)
    told = look(path)
    assert SHARED_L2.id in codes(told)
    assert len(told["findings"]) < 200


def test_sizes_that_lie(tmp_path: Path) -> None:
    """A sparse file of 8 TiB whose tables claim to be as large as it is."""
    path = tmp_path / "lie.vhdx"
    path.write_bytes(b"vhdxfile")
    import os

    os.truncate(path, 8 << 40)
    assert codes(look(path))
    make(tmp_path / "lie.qcow2", 1 << 40, [])
    patch(
        tmp_path / "lie.qcow2",
        0,
        struct.pack(">4sIQIIQIIQQII", b"QFI\xfb", 2, 0, 0, 9, 1 << 40, 0, 1 << 25, 512, 512, 1 << 20, 0),
    )
    assert codes(look(tmp_path / "lie.qcow2"))


def test_a_bomb_inside_bz2_stops_at_the_limit(tmp_path: Path) -> None:
    import bz2

    path = tmp_path / "bomb.raw.bz2"
    path.write_bytes(bz2.compress(bytes(100 * MIB)))
    with pytest.raises(Unsupported, match="expands to more than"):
        look(path, limit=16 * MIB)
    assert [left.name for left in tmp_path.iterdir()] == ["bomb.raw.bz2"]
