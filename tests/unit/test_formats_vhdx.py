"""VHDX: its two headers, region tables, metadata and block table, and what breaks them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from build.crc32c import crc32c
from build.formats import vhdx
from build.formats.lib.findings import Code
from tests.disks import MIB, errors, one, patch, read, usual


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A VHDX of the usual disk."""
    return one(usual(tmp_path / "disk.img"), tmp_path, "vhdx")


def test_crc32c_of_the_standards_test_string() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_layout(file: Path) -> None:
    raw = file.read_bytes()
    assert raw.startswith(b"vhdxfile")
    for offset, sequence in ((0x10000, 1), (0x20000, 2)):
        head = raw[offset : offset + 4096]
        assert head[:4] == b"head"
        assert struct.unpack("<I", head[4:8])[0] == crc32c(head[:4] + bytes(4) + head[8:])
        assert struct.unpack("<Q", head[8:16])[0] == sequence
        assert head[48:64] == bytes(16), "no log to replay"
        assert struct.unpack("<HHIQ", head[64:80]) == (0, 1, MIB, MIB)
    assert raw[0x30000:0x40000] == raw[0x40000:0x50000]
    assert not any(raw[MIB : 2 * MIB])
    assert len(raw) % MIB == 0


def test_a_sector_bitmap_entry_follows_every_2048_blocks() -> None:
    from build.formats.vhdx import _entries, _ratio

    assert _ratio(2 * MIB) == 2048
    assert [_entries(blocks, 2048) for blocks in (1, 2048, 2049, 4096, 4097)] == [1, 2048, 2050, 4097, 4099]


@pytest.mark.parametrize(
    ("offset", "content", "says"),
    [
        (0, b"x", vhdx.NO_IDENTIFIER),
        (0x10010, b"x", vhdx.BAD_HEADER),
        (0x30010, b"x", vhdx.BAD_REGIONS),
        (0x200000, b"x", vhdx.NO_METADATA),
        (0x300000, struct.pack("<Q", (9 << 40) | 6), vhdx.PAST_END),
        (0x300000, struct.pack("<Q", 6), vhdx.OVER_TABLES),
        (0x300000 + 8, struct.pack("<Q", (4 << 20) | 6), vhdx.OVER_BLOCK),
        (0x300000, struct.pack("<Q", (4 << 20) | 5), vhdx.RESERVED_STATE),
    ],
)
def test_the_linter_sees(offset: int, content: bytes, says: Code, file: Path) -> None:
    patch(file, offset, content)
    assert says in errors(file, "vhdx"), errors(file, "vhdx")


def header(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        raw = bytearray(path.read_bytes()[0x20000:0x21000])
        change(raw)
        raw[4:8] = bytes(4)
        raw[4:8] = struct.pack("<I", crc32c(bytes(raw)))
        patch(path, 0x20000, bytes(raw))

    return apply


def test_an_unreplayed_log_is_an_error(file: Path) -> None:
    def set_log(raw: bytearray) -> None:
        raw[48:64] = b"\7" * 16

    header(set_log)(file)
    assert vhdx.LOG in errors(file, "vhdx")


def test_one_damaged_header_is_read_around(file: Path, tmp_path: Path) -> None:
    patch(file, 0x20010, b"x")
    assert read(file, "vhdx") == (tmp_path / "disk.img").read_bytes()
