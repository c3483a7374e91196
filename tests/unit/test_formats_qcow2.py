"""QCOW2: tables, refcounts and the 4 KiB window that every reader takes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from build.formats.lib import qcow2, reader
from build.formats.lib.codec import keeps_window
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code
from tests.disks import MIB, ask, errors, lint, make, one, patch, spec, usual


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A QCOW2 of the usual disk."""
    return one(usual(tmp_path / "disk.img"), tmp_path, "qcow2")


def compressed(raw: bytes) -> list[bytes]:
    """Deflate streams of all compressed clusters, found without any of our code."""
    l1_size, l1_at = struct.unpack_from(">IQ", raw, 36)
    streams = []
    for entry in struct.unpack_from(f">{l1_size}Q", raw, l1_at):
        offset = entry & 0x00FFFFFFFFFFFE00
        if offset:
            for cluster in struct.unpack_from(">8192Q", raw, offset):
                if cluster & 1 << 62:
                    start = cluster & ((1 << 54) - 1)
                    sectors = (cluster >> 54 & 0xFF) + 1
                    streams.append(raw[start : start + sectors * 512 - (start & 511)])
    return streams


def test_the_default_is_version_2_with_a_window_of_4_kib(file: Path) -> None:
    raw = file.read_bytes()
    assert raw[:8] == b"QFI\xfb\0\0\0\2"
    assert struct.unpack_from(">Q", raw, 24)[0] == 48 * MIB
    streams = compressed(raw)
    assert len(streams) > 40
    for stream in streams:
        expander, out = zlib.decompressobj(-12), b""
        while not expander.eof:
            out += expander.decompress(stream, 256)
            stream = expander.unconsumed_tail
        assert len(out) == 65536


def test_a_wider_window_is_told_apart() -> None:
    far = bytes(range(256)) * 8
    data = far + bytes(20_000) + far + b"end"
    wide = zlib.compressobj(9, zlib.DEFLATED, -15)
    narrow = zlib.compressobj(9, zlib.DEFLATED, -12)
    assert not keeps_window(wide.compress(data) + wide.flush(), 12, len(data))
    assert keeps_window(narrow.compress(data) + narrow.flush(), 12, len(data))
    assert not keeps_window(b"nonsense", 12, 65536)


def test_version_3_and_zstd(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    plain, zstd = one(disk, tmp_path, "qcow2-v3").read_bytes(), one(disk, tmp_path, "qcow2-zstd").read_bytes()
    assert struct.unpack_from(">QQQIIB", plain, 72) == (0, 0, 0, 4, 112, 0)
    assert struct.unpack_from(">QQQIIB", zstd, 72) == (8, 0, 0, 4, 112, 1)
    codes = [finding.code for finding in lint(tmp_path / "qcow2-zstd.qcow2", "qcow2")]
    assert qcow2.ZSTD_CLUSTERS in codes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"version": 2, "compression": "zstd"}, "version 2 knows no zstd"),
        ({"version": 4}, "version 4 is not 2 or 3"),
        ({"compression": "lzma"}, "unknown QCOW2 compression"),
        ({"level": 0}, "level 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], says: str, tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", MIB, [])
    with pytest.raises(Unsupported, match=says):
        ask(disk, tmp_path / "out", [{**spec("qcow2"), "options": options}])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("offset", "content", "says"),
    [
        (0, b"x", qcow2.NO_HEADER),
        (7, b"\5", qcow2.OTHER_VERSION),
        (8, struct.pack(">Q", 512), qcow2.NEEDS_BACKING),
        (20, struct.pack(">I", 40), qcow2.CLUSTER_BITS),
        (24, struct.pack(">Q", 1 << 60), qcow2.BAD_SIZE),
        (24, struct.pack(">Q", 1 << 40), qcow2.FEW_ENTRIES),
        (32, struct.pack(">I", 1), qcow2.ENCRYPTED),
        (40, struct.pack(">Q", 1 << 40), reader.PAST_END),
        (48, struct.pack(">Q", 1 << 62), qcow2.PAST_END),
        (60, struct.pack(">I", 3), None),
    ],
)
def test_the_linter_sees(offset: int, content: bytes, says: Code | None, file: Path) -> None:
    patch(file, offset, content)
    if says:
        assert says in errors(file, "qcow2"), errors(file, "qcow2")
    else:
        assert any(finding.code == qcow2.SNAPSHOTS for finding in lint(file, "qcow2"))


def tables(file: Path) -> tuple[int, int, int]:
    """Offsets of the L1 table, the first L2 table and the first refcount block."""
    raw = file.read_bytes()
    l1_at, refcounts = struct.unpack_from(">QQ", raw, 40)
    l2_at = struct.unpack_from(">Q", raw, l1_at)[0] & ~(1 << 63)
    return l1_at, l2_at, struct.unpack_from(">Q", raw, refcounts)[0]


def test_refcounts_too_low_and_too_high(file: Path) -> None:
    _, _, block = tables(file)
    patch(file, block + 2, b"\0\0")
    assert qcow2.LOW_REFCOUNT in errors(file, "qcow2")
    patch(file, block + 2, b"\0\x77")
    found = [finding for finding in lint(file, "qcow2") if finding.code == qcow2.HIGH_REFCOUNT]
    assert [finding.severity for finding in found] == ["warning"]
    assert found[0].where == f"byte {block + 2:#x}"


def test_two_l1_entries_on_one_table_are_followed_once(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", 1100 * MIB, [(0, MIB, "text"), (600 * MIB, MIB, "text")])
    file = one(disk, tmp_path, "qcow2")
    l1_at, l2_at, _ = tables(file)
    patch(file, l1_at + 8, struct.pack(">Q", l2_at | 1 << 63))
    assert qcow2.SHARED_L2 in errors(file, "qcow2")


def test_a_damaged_stream(file: Path) -> None:
    _, l2_at, _ = tables(file)
    raw = file.read_bytes()
    entry = next(e for e in struct.unpack_from(">8192Q", raw, l2_at) if e & 1 << 62)
    start = entry & ((1 << 54) - 1)
    patch(file, start, b"\xff\xff\xff")
    assert qcow2.BROKEN_PACKED in errors(file, "qcow2")
