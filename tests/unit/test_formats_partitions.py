"""Partition tables: what a guest would not see, and no false alarm about what it would."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from build.formats.lib import partitions
from build.formats.lib.findings import Code, Finding, collect
from build.formats.lib.platforms import EVERY_HYPERVISOR
from build.formats.raw import RawDisk
from tests.disks import MIB, damaged, opened, partition, patch

SIZE = 16 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with a GPT and one partition."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    partition(path)
    return path


def found(path: Path, sector: int = 512) -> list[Finding]:
    with opened(path) as reader:
        raw = RawDisk(reader)
        raw.sector = sector  # type: ignore[attr-defined]
        return collect(partitions.lint(raw))


def codes(path: Path) -> list[Code]:
    return [finding.code for finding in found(path)]


def mbr(path: Path, *rows: tuple[int, int, int], at: int = 0) -> None:
    """Write a boot record with up to four entries: type, first sector, length."""
    table = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", start, count) for kind, start, count in rows)
    patch(path, at * 512 + 446, table.ljust(64, b"\0") + b"\x55\xaa")


def gpt(path: Path, sector: int) -> None:
    """A GPT that counts in sectors of another size, laid out by the specification."""
    count = path.stat().st_size // sector
    rows = struct.pack("<16s16sQQQ72s", b"\1" * 16, b"\2" * 16, 256, count - 40, 0, b"").ljust(16384, b"\0")
    for place, other, table in ((1, count - 1, 2), (count - 1, 1, count - 1 - 16384 // sector)):
        fields = (b"EFI PART", 0x10000, 92, 0, 0, place, other, 34, count - 40, b"\3" * 16, table, 128, 128)
        head = struct.pack("<8sIIIIQQQQ16sQIII", *fields, zlib.crc32(rows))
        patch(path, table * sector, rows)
        patch(path, place * sector, head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:])
    mbr(path, (0xEE, 1, 0xFFFFFFFF))


def test_a_good_table_has_nothing_to_say(disk: Path) -> None:
    assert found(disk) == []


@pytest.mark.parametrize("rows", [[(0xEE, 1, 0xFFFFFFFF)], [(0xEE, 1, 5), (0x83, 2048, 100)]])
def test_protective_and_hybrid_records_are_fine(rows: list[tuple[int, int, int]], disk: Path) -> None:
    mbr(disk, *rows)
    assert found(disk) == []


def test_a_cut_disk_is_one_finding(disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.truncate(SIZE // 2)
    (cut,) = found(disk)
    assert cut.code == partitions.CUT_OFF
    assert (cut.severity, cut.lossy, cut.affects) == ("error", True, (EVERY_HYPERVISOR,))


def test_a_larger_disk_is_no_fault(disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.truncate(2 * SIZE)
    (larger,) = found(disk)
    assert larger.severity == "info"
    assert (larger.code, larger.fields) == (partitions.LARGER, {"count": 32768})


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (512, b"X", partitions.NO_TABLE),
        (512 + 12, b"\xff\xff", partitions.HEADER_LENGTH),
        (512 + 16, b"\0\0\0\0", partitions.HEADER_CHECKSUM),
        (1024 + 8, b"X", partitions.ENTRIES_CHECKSUM),
        (SIZE - 512, b"X", partitions.NO_HEADER),
    ],
)
def test_damage_is_named(offset: int, value: bytes, says: Code, disk: Path) -> None:
    if offset == 512:
        mbr(disk, (0x83, 2048, 100))
    patch(disk, offset, value)
    assert codes(disk) == [] if offset == 512 else says in codes(disk)


@pytest.mark.parametrize(("sector", "shown"), [(4096, 512), (512, 4096)])
def test_a_table_in_sectors_of_the_other_size(sector: int, shown: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    gpt(path, sector)
    assert found(path, sector) == []
    (wrong,) = found(path, shown)
    assert (wrong.code, wrong.fields) == (
        partitions.OTHER_SECTORS,
        {"counted": sector, "sector": shown},
    )
    assert wrong.lossy


def test_partitions_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    mbr(path, (0x83, 2048, 1000), (0x83, 4096, 40_000))
    (past,) = found(path)
    assert past.code == partitions.PAST_END
    assert past.fields == {"number": 2, "end": 44095, "count": 32768}
    assert past.lossy


def test_logical_partitions_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    mbr(path, (0x83, 2048, 1000), (0x0F, 4096, 20_000))
    mbr(path, (0x83, 63, 500), (0x05, 2000, 2000), at=4096)
    mbr(path, (0x83, 63, 60_000), (0x05, 0, 0), at=4096 + 2000)
    (past,) = found(path)
    assert past.code == partitions.PAST_END
    assert past.fields == {"number": 6, "end": 66158, "count": 32768}
    mbr(path, (0x83, 63, 500), (0x05, 2000, 2000), at=4096 + 2000)  # a chain that leads back to itself
    assert codes(path) == []


def test_a_file_system_without_a_table_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "fat.img"
    path.write_bytes(bytes(SIZE))
    patch(path, 54, b"FAT16   ")
    patch(path, 446, b"\xeb" * 64 + b"\x55\xaa")
    assert [finding.severity for finding in found(path)] == ["info"]


def test_what_convert_refuses(disk: Path) -> None:
    with opened(disk) as reader:
        partitions.refuse(RawDisk(reader))
    with open(disk, "r+b") as file:
        file.truncate(SIZE // 2)
    with opened(disk) as reader, damaged(partitions.CUT_OFF):
        partitions.refuse(RawDisk(reader))
