"""Make a unified kernel image: a PE program for UEFI that carries kernel, initramfs and command line.

Usage: uki.py STUB OUT SECTION=FILE...

The sections go behind those of the stub (systemd-stub, part of the target suite), in the given order.
Format: Microsoft PE/COFF; section names: the unified kernel image specification of the UAPI group.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable

READ_ONLY_DATA = 0x40000040
ENTRY = 40
PAGE = 4096


def up(value: int, unit: int) -> int:
    """Round up to a whole number of units."""
    return -(-value // unit) * unit


def assemble(stub: bytes, sections: Iterable[tuple[str, bytes]]) -> bytes:
    """Append sections to a PE32+ program; raises ValueError when it is none or has no room for them."""
    if stub[:2] != b"MZ":
        raise ValueError("the stub is not a PE program")
    (pe,) = struct.unpack_from("<I", stub, 0x3C)
    number, optional_size = struct.unpack_from("<H12xH", stub, pe + 6)
    optional = pe + 24
    if stub[pe : pe + 4] != b"PE\0\0" or struct.unpack_from("<H", stub, optional) != (0x20B,):
        raise ValueError("the stub is not a PE program for 64 bits")
    alignment, file_alignment = struct.unpack_from("<II", stub, optional + 32)
    (headers,) = struct.unpack_from("<I", stub, optional + 60)
    first = optional + optional_size
    table = [struct.unpack_from("<8sIIII12xI", stub, first + ENTRY * index) for index in range(number)]
    # What lies behind the last section is the linker's symbol table: no use in a program.
    length = max(offset + size for _, _, _, size, offset, _ in table)
    end = max(address + max(virtual, size) for _, virtual, address, size, _, _ in table)
    out = bytearray(stub[:length].ljust(up(length, file_alignment), b"\0"))
    for name, data in sections:
        entry = first + ENTRY * number
        if entry + ENTRY > headers:
            raise ValueError("the stub's header has no room for another section")
        address = up(end, max(alignment, PAGE))
        raw = data.ljust(up(len(data), file_alignment), b"\0")
        fields = (name.encode().ljust(8, b"\0"), len(data), address, len(raw), len(out), READ_ONLY_DATA)
        struct.pack_into("<8sIIII12xI", out, entry, *fields)
        out += raw
        end = address + len(raw)
        number += 1
    struct.pack_into("<H", out, pe + 6, number)
    struct.pack_into("<II", out, pe + 12, 0, 0)
    (initialized,) = struct.unpack_from("<I", out, optional + 8)
    struct.pack_into("<I", out, optional + 8, initialized + len(out) - up(length, file_alignment))
    struct.pack_into("<I", out, optional + 56, up(end, max(alignment, PAGE)))
    # The checksum is looked at for drivers of Windows only; 0 means none.
    struct.pack_into("<I", out, optional + 64, 0)
    return bytes(out)


def main(stub: str, out: str, *sections: str) -> None:
    """Read the parts and write the image."""
    pairs = (section.split("=", 1) for section in sections)
    with open(stub, "rb") as file:
        image = assemble(file.read(), [(name, read(path)) for name, path in pairs])
    with open(out, "wb") as file:
        file.write(image)


def read(path: str) -> bytes:
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
