"""The unified kernel image, read back as PE."""

from __future__ import annotations

import struct

import pytest

from build.disk import uki

SECTIONS = [(".cmdline", b"root=x"), (".initrd", b"i" * 5000), (".linux", b"k" * 9000)]


def stub(magic: int = 0x20B, room: int = 0x400, alignment: int = 0x1000) -> bytes:
    """A PE program of one section, with symbols behind it as a linker leaves them."""
    head = bytearray(room)
    head[:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, 0x80)
    struct.pack_into("<4sHHIIIHH", head, 0x80, b"PE\0\0", 0x8664, 1, 0, 0x600, 7, 240, 0x22)
    struct.pack_into("<HxxIII", head, 0x98, magic, 0x200, 0x200, 0)
    struct.pack_into("<II", head, 0x98 + 32, alignment, 0x200)
    struct.pack_into("<III", head, 0x98 + 56, 0x2000, room, 0xABCD)
    struct.pack_into("<8sIIII12xI", head, 0x98 + 240, b".text", 0x123, 0x1000, 0x200, room, 0x60000020)
    return bytes(head) + b"\xc3" * 0x200 + b"symbols"


def sections(image: bytes) -> dict[str, tuple[int, bytes]]:
    (pe,) = struct.unpack_from("<I", image, 0x3C)
    number, optional = struct.unpack_from("<H12xH", image, pe + 6)
    found = {}
    for index in range(number):
        fields = struct.unpack_from("<8sIIII12xI", image, pe + 24 + optional + 40 * index)
        name, size, address, raw, offset, _ = fields
        assert offset % 0x200 == 0
        assert raw % 0x200 == 0
        assert offset + raw <= len(image)
        found[name.rstrip(b"\0").decode()] = (address, image[offset : offset + min(size, raw)])
    return found


@pytest.mark.parametrize("alignment", [0x200, 0x1000, 0x10000])
def test_sections_come_back_whole_in_order_and_apart(alignment: int) -> None:
    found = sections(uki.assemble(stub(alignment=alignment), SECTIONS))
    assert list(found) == [".text", ".cmdline", ".initrd", ".linux"]
    assert {name: data for name, (_, data) in found.items() if name != ".text"} == dict(SECTIONS)
    end = 0
    for name, (address, data) in found.items():
        assert address >= end
        assert name == ".text" or address % max(alignment, 0x1000) == 0
        end = address + len(data)


def test_the_header_tells_the_new_sizes_and_nothing_of_the_linker() -> None:
    image = uki.assemble(stub(), SECTIONS)
    assert b"symbols" not in image
    assert len(image) % 0x200 == 0
    assert struct.unpack_from("<II", image, 0x80 + 12) == (0, 0)
    size_of_image, _, checksum = struct.unpack_from("<III", image, 0x98 + 56)
    last = max(address + len(data) for address, data in sections(image).values())
    assert size_of_image >= last
    assert size_of_image % 0x1000 == 0
    assert checksum == 0


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"\x7fELF" + bytes(600), "not a PE program"),
        (stub(magic=0x10B), "for 64 bits"),
        (stub(room=0x200), "no room"),
    ],
    ids=["ELF", "32 bits", "full header"],
)
def test_what_cannot_be_a_stub_is_refused(program: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        uki.assemble(program, SECTIONS)
