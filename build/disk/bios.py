"""Put GRUB's BIOS boot code on a planned disk, as grub-bios-setup would, without asking any device.

Usage: bios.py PLAN.json IMAGE BOOT.IMG CORE.IMG

Offsets: GRUB's include/grub/i386/pc/boot.h. boot.img tells at 5Ch which sector to load and at 66h
whether to mistrust the drive number a BIOS passes; the last entry of the block list in the first sector
of core.img (at 500) tells where its rest lies.
"""

from __future__ import annotations

import json
import struct
import sys

SECTOR = 512
BOOT_CODE = 440
KERNEL_SECTOR = 0x5C
DRIVE_CHECK = 0x66
BLOCK_LIST = 500
LOAD_SEGMENT = 0x820


def boot_code(boot: bytes, core_sector: int) -> bytes:
    """The boot loader's part of the MBR: boot.img taught where core.img lies."""
    if len(boot) != SECTOR or boot[-2:] != b"\x55\xaa":
        raise ValueError("boot.img is not a boot sector")
    if boot[DRIVE_CHECK] not in (0xEB, 0x90):
        raise ValueError("boot.img has no drive check where GRUB 2 has it")
    patched = bytearray(boot[:BOOT_CODE])
    struct.pack_into("<Q", patched, KERNEL_SECTOR, core_sector)
    # On a hard disk the check stays in: some BIOSes pass a wrong number.
    patched[DRIVE_CHECK : DRIVE_CHECK + 2] = b"\x90\x90"
    return bytes(patched)


def core_image(core: bytes, core_sector: int, room: int) -> bytes:
    """core.img taught where its own second sector lies; `room` in bytes."""
    if len(core) > room:
        raise ValueError(f"core.img has {len(core)} bytes, the BIOS boot partition holds {room}")
    _, length, segment = struct.unpack_from("<QHH", core, BLOCK_LIST)
    if segment != LOAD_SEGMENT or length != -(-len(core) // SECTOR) - 1:
        raise ValueError("core.img has no block list of its own length")
    patched = bytearray(core)
    struct.pack_into("<Q", patched, BLOCK_LIST, core_sector + 1)
    return bytes(patched)


def main(plan_path: str, image: str, boot_path: str, core_path: str) -> None:
    """Write both into the image."""
    with open(plan_path, encoding="utf-8") as file:
        place = next(row for row in json.load(file)["partitions"] if row["role"] == "bios")
    with open(boot_path, "rb") as boot, open(core_path, "rb") as core, open(image, "r+b") as disk:
        disk.write(boot_code(boot.read(), place["start"]))
        disk.seek(place["start"] * SECTOR)
        disk.write(core_image(core.read(), place["start"], place["sectors"] * SECTOR))


if __name__ == "__main__":
    main(*sys.argv[1:])
