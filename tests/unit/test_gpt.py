"""The partition table, read back field by field as the UEFI specification lays it out."""

from __future__ import annotations

import struct
import uuid
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build.disk import gpt

DISK = "3F18C412-4B9B-5DC4-B0D7-5C713C3116A7"
KIND = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def row(number: int, start: int, sectors: int, name: str = "ROOT") -> dict[str, Any]:
    ids = {"type": KIND, "guid": str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))}
    return {"number": number, "start": start, "sectors": sectors, "name": name, **ids}


def written(sectors: int, *rows: dict[str, Any]) -> bytes:
    disk = bytearray(sectors * 512)
    for offset, data in gpt.tables(DISK, sectors, rows).items():
        assert not any(disk[offset : offset + len(data)])
        disk[offset : offset + len(data)] = data
    return bytes(disk)


def header(disk: bytes, sector: int) -> tuple[Any, ...]:
    fields = struct.unpack_from("<8sIIIIQQQQ16sQIII", disk, sector * 512)
    bare = bytearray(disk[sector * 512 : sector * 512 + 92])
    bare[16:20] = bytes(4)
    assert fields[:3] == (b"EFI PART", 0x10000, 92)
    assert fields[3] == zlib.crc32(bare)
    return fields


def test_both_headers_point_at_each_other_and_at_equal_entries() -> None:
    disk = written(8192, row(1, 2048, 2048), row(2, 4096, 2048, "É"))
    first, last = header(disk, 1), header(disk, 8191)
    assert first[5:7] == (1, 8191)
    assert last[5:7] == (8191, 1)
    assert first[7:9] == last[7:9] == (34, 8191 - 33)
    assert uuid.UUID(bytes_le=first[9]) == uuid.UUID(DISK)
    assert (first[10], last[10]) == (2, 8191 - 32)
    arrays = [disk[start * 512 : start * 512 + 128 * 128] for start in (first[10], last[10])]
    assert arrays[0] == arrays[1]
    assert first[13] == last[13] == zlib.crc32(arrays[0])
    entry = struct.unpack_from("<16s16sQQQ72s", arrays[0], 128)
    assert uuid.UUID(bytes_le=entry[0]) == uuid.UUID(KIND)
    assert entry[2:5] == (4096, 6143, 0)
    assert entry[5].decode("utf-16-le").rstrip("\0") == "É"
    assert not any(arrays[0][256:])


def test_the_protective_record_covers_the_disk_and_leaves_the_boot_code() -> None:
    disk = written(8192, row(1, 2048, 2048))
    assert not any(disk[:446])
    assert struct.unpack_from("<B3sB3sII", disk, 446)[2::2] == (0xEE, 1)
    assert struct.unpack_from("<I", disk, 458) == (8191,)
    assert disk[462:512] == bytes(48) + b"\x55\xaa"
    huge = gpt.tables(DISK, 1 << 33, [row(1, 2048, 2048)])
    assert struct.unpack_from("<I", huge[440], 18) == (0xFFFFFFFF,)


@pytest.mark.parametrize(
    "rows",
    [
        (row(1, 33, 100),),
        (row(1, 2048, 2048), row(2, 4095, 10)),
        (row(1, 2048, 0),),
        (row(1, 2048, 8192 - 2048 - 32),),
        (row(129, 2048, 10),),
        (row(0, 2048, 10),),
        (row(1, 2048, 10, "n" * 37),),
    ],
    ids=["over the table", "overlap", "empty", "over the backup", "number 129", "number 0", "long name"],
)
def test_a_table_that_would_lie_is_refused(rows: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(ValueError, match="partition"):
        gpt.tables(DISK, 8192, rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=128))
def test_any_row_of_partitions_comes_back(lengths: list[int]) -> None:
    start, rows = 34, []
    for number, length in enumerate(lengths, 1):
        rows.append(row(number, start, length))
        start += length
    entries = gpt.tables(DISK, start + 33, rows)[512][512:]
    back = [struct.unpack_from("<32xQQ", entries, 128 * index) for index in range(len(rows))]
    assert back == [(each["start"], each["start"] + each["sectors"] - 1) for each in rows]
