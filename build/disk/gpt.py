"""Write the partition table of a planned disk: protective MBR, GPT, and its backup at the end.

Usage: gpt.py PLAN.json IMAGE

Layout of header and entries: UEFI specification 2.10, 5.2.3 (protective MBR), 5.3.2 (header) and
5.3.3 (entries); all numbers little-endian, sizes in sectors of 512 bytes.
"""

from __future__ import annotations

import json
import struct
import sys
import uuid
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

SECTOR = 512
ENTRIES = 128
ENTRY = 128
ARRAY = ENTRIES * ENTRY // SECTOR
"""Sectors of the entry array."""
BOOT_CODE = 440
"""Bytes at the start of the MBR that belong to the boot loader, not to the table."""


def protective(sectors: int) -> bytes:
    """Sector 0 from byte 440 on: one partition of type EE over the whole disk."""
    length = min(sectors - 1, 0xFFFFFFFF)
    entry = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, length)
    return bytes(6) + entry + bytes(48) + b"\x55\xaa"


def array(partitions: Sequence[Mapping[str, Any]]) -> bytes:
    """The entry array: type, id, first and last sector, no attributes, name in UTF-16."""
    packed = bytearray(ENTRIES * ENTRY)
    for row in partitions:
        last = row["start"] + row["sectors"] - 1
        ids = uuid.UUID(row["type"]).bytes_le + uuid.UUID(row["guid"]).bytes_le
        entry = ids + struct.pack("<QQQ72s", row["start"], last, 0, row["name"].encode("utf-16-le"))
        packed[(row["number"] - 1) * ENTRY : row["number"] * ENTRY] = entry
    return bytes(packed)


def header(guid: str, sectors: int, entries: bytes, *, backup: bool) -> bytes:
    """One header sector; the backup's mirror image points back at the first."""
    here, there = (sectors - 1, 1) if backup else (1, sectors - 1)
    table = sectors - 1 - ARRAY if backup else 2
    bounds = (here, there, 2 + ARRAY, sectors - 2 - ARRAY)

    def pack(checksum: int) -> bytes:
        start = struct.pack("<8sIIIIQQQQ", b"EFI PART", 0x00010000, 92, checksum, 0, *bounds)
        end = struct.pack("<QIII", table, ENTRIES, ENTRY, zlib.crc32(entries))
        return start + uuid.UUID(guid).bytes_le + end

    return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")


def tables(guid: str, sectors: int, partitions: Sequence[Mapping[str, Any]]) -> dict[int, bytes]:
    """What to write where: byte offsets and bytes. Raises ValueError when a partition lies wrong."""
    check(sectors, partitions)
    entries = array(partitions)
    return {
        BOOT_CODE: protective(sectors),
        SECTOR: header(guid, sectors, entries, backup=False) + entries,
        (sectors - 1 - ARRAY) * SECTOR: entries + header(guid, sectors, entries, backup=True),
    }


def check(sectors: int, partitions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse partitions that overlap, lie over a table, or cannot be told in an entry."""
    end = 2 + ARRAY
    for row in sorted(partitions, key=lambda row: int(row["start"])):
        if row["start"] < end or row["sectors"] < 1:
            raise ValueError(f"partition {row['number']} overlaps what lies before it")
        if not 1 <= row["number"] <= ENTRIES or len(row["name"]) > 36:
            raise ValueError(f"partition {row['number']} does not fit into the table")
        end = row["start"] + row["sectors"]
    if end > sectors - 1 - ARRAY:
        raise ValueError("the last partition lies over the backup table")


def main(plan_path: str, image: str) -> None:
    """Write the tables of a plan into an image that has its size already."""
    with open(plan_path, encoding="utf-8") as file:
        plan = json.load(file)
    with open(image, "r+b") as disk:
        for offset, data in tables(plan["guid"], plan["size"] // SECTOR, plan["partitions"]).items():
            disk.seek(offset)
            disk.write(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
