"""GRUB's boot code, patched where GRUB's own installer patches it."""

from __future__ import annotations

import struct

import pytest

from build.disk import bios


def boot() -> bytearray:
    code = bytearray(range(256)) * 2
    code[0x66:0x68] = b"\xeb\x05"
    code[510:] = b"\x55\xaa"
    return code


def core(size: int = 1300) -> bytearray:
    image = bytearray(b"\x5a" * size)
    struct.pack_into("<QHH", image, 500, 1, -(-size // 512) - 1, 0x820)
    return image


def test_boot_code_loads_the_core_image_and_keeps_the_drive_check() -> None:
    code = bios.boot_code(bytes(boot()), 2048)
    assert len(code) == 440
    assert struct.unpack_from("<Q", code, 0x5C) == (2048,)
    assert code[0x66:0x68] == b"\x90\x90"
    kept = [index for index in range(440) if not 0x5C <= index < 0x68]
    assert all(code[index] == boot()[index] for index in kept)


def test_the_core_image_finds_its_own_rest() -> None:
    patched = bios.core_image(bytes(core()), 2048, 1 << 20)
    assert struct.unpack_from("<QHH", patched, 500) == (2049, 2, 0x820)
    assert patched[512:] == core()[512:]


def broken(image: bytearray, place: int, data: bytes) -> bytes:
    image[place : place + len(data)] = data
    return bytes(image)


@pytest.mark.parametrize(
    "code",
    [bytes(512), bytes(boot())[:511], broken(boot(), 510, b"\0"), broken(boot(), 0x66, b"\0")],
    ids=["zeros", "short", "no signature", "other boot code"],
)
def test_foreign_boot_code_is_refused(code: bytes) -> None:
    with pytest.raises(ValueError, match=r"boot\.img"):
        bios.boot_code(code, 2048)


@pytest.mark.parametrize(
    ("image", "room"),
    [
        (bytes(core()), 1299),
        (broken(core(), 508, b"\1"), 1 << 20),
        (broken(core(), 510, b"\0"), 1 << 20),
        (bytes(1300), 1 << 20),
    ],
    ids=["no room", "wrong length", "wrong segment", "zeros"],
)
def test_a_foreign_core_image_is_refused(image: bytes, room: int) -> None:
    with pytest.raises(ValueError, match=r"core\.img"):
        bios.core_image(image, 2048, room)
