"""VHD, dynamic: for XenServer/XCP-ng (creator `tap`, with a batmap) and for Hyper-V (creator `win `).

Layout and fields follow Microsoft's "Virtual Hard Disk Image Format Specification" 1.0; the batmap, the
geometry rule and what is mandatory with which creator follow libvhd of XenServer's blktap, whose checker
is the strictest reader there is. All integers are big-endian; a block is 2 MiB.
"""

from __future__ import annotations

import itertools
import math
import struct
import time
from array import array
from collections.abc import Iterator
from typing import BinaryIO, Literal

from build.formats.lib import pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Finding, at
from build.formats.lib.format import DEBIAN, OTHER, Format, Kind, Machine, Match, Options, Target, Template
from build.formats.lib.reader import BoundedReader
from build.formats.lib.vhd import (
    ABSENT,
    BLOCK,
    EPOCH_2000,
    SECTOR,
    TABLE,
    Footer,
    Header,
    VhdDisk,
    buried_footer,
    checksum,
    cut,
    geometry,
    is_sound,
    make_footer,
    next_exact,
    read_footer,
    read_header,
    shown,
)
from build.formats.lib.words import pack_words
from build.formats.lib.writer import Units, put

LARGEST = 2040 << 30
"""Bytes of the largest VHD that XenServer and Hyper-V take."""
_BY_SIZE = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0")
"""Creators for which QEMU takes the size field; for any other it computes the size from the geometry."""
_BATMAP = struct.Struct(">8sQIII484x")


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that cannot be a VHD."""
    if size > LARGEST:
        raise Unsupported(
            f"a VHD holds at most 2040 GiB, the disk has {size / (1 << 30):.1f} GiB",
            "make SIZE smaller or take vhdx",
        )
    if size % BLOCK or not size:
        raise Unsupported(
            f"a VHD must be a multiple of 2 MiB, the disk has {size} bytes",
            "make SIZE even (MiB) and build again; padding would displace the backup partition table",
        )


class VhdWriter:
    """Writes a dynamic VHD: blocks in rising order, their data on 4 KiB boundaries, tables and heads last."""

    codec = None

    def __init__(self, file: BinaryIO, size: int, creator: Literal["xen", "hyperv"] = "xen") -> None:
        check_size(size)
        self.file, self.size, self.creator = file, size, creator
        self.bat = array("I", [ABSENT]) * pieces.count(size)
        table = -(-len(self.bat) * 4 // SECTOR) * SECTOR
        self.batmap = TABLE + table
        map_size = SECTOR + -(-len(self.bat) // (SECTOR * 8)) * SECTOR
        metadata = self.batmap + (map_size if creator == "xen" else 0)
        # A block is its bitmap (one sector) and its data; a gap before the bitmap aligns the data.
        self.data = -(-(metadata + SECTOR) // 4096) * 4096
        self.lead = bytes(4096 - SECTOR) + b"\xff" * SECTOR
        put(file, 0, bytes(self.data - SECTOR) + b"\xff" * SECTOR)
        self.first = True
        self.layout: list[tuple[int, int, int]] = []

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write a block that is not zero."""
        self.bat[index] = self.data // SECTOR - 1
        self.layout.append((index, self.data, len(data)))
        if not self.first:
            self.file.write(self.lead)
        self.file.write(data)
        self.first = False
        self.data += BLOCK + 4096

    def close(self, seed: str) -> None:
        """Write table, batmap, header and both footers."""
        end = self.data - 4096 if not self.first else self.data - SECTOR
        footer = make_footer(self.size, self.creator, seed)
        put(self.file, end, footer)
        self.file.truncate(end + SECTOR)
        header = Header(
            b"cxsparse",
            (1 << 64) - 1,
            TABLE,
            0x00010000,
            len(self.bat),
            BLOCK,
            0,
            bytes(16),
            0,
            0,
            bytes(512),
            bytes(192),
        )
        put(self.file, 0, footer + header.pack() + pack_words(self.bat, "big"))
        if self.creator == "xen":
            put(self.file, self.batmap, self._batmap())

    def _batmap(self) -> bytes:
        bits = bytearray(-(-len(self.bat) // (SECTOR * 8)) * SECTOR)
        for block, sector in enumerate(self.bat):
            if sector != ABSENT:
                bits[block >> 3] |= 0x80 >> (block & 7)
        head = _BATMAP.pack(
            b"tdbatmap",
            self.batmap + SECTOR,
            len(bits) // SECTOR,
            0x00010002,
            checksum(bytes(bits[: _summed(self.size)])),
        )
        return head + bytes(bits)


def _summed(size: int) -> int:
    """Bytes of the batmap that its checksum covers: libvhd derives them from the size, rounded down."""
    return max(1, -(-(size >> 24) // SECTOR)) * SECTOR


XEN = "XenServer, XCP-ng"


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check every rule that XenServer's own checker, Hyper-V or QEMU has for a VHD."""
    footer, end = read_footer(reader)
    yield from _lint_footer(reader, footer, end)
    if footer.type == 2:
        VhdDisk(reader)
        return
    header = read_header(reader, footer.data_offset)
    yield from _lint_header(reader, footer, header)
    disk = VhdDisk(reader)
    yield from _lint_bat(disk, end)
    if footer.creator == b"tap\0" and footer.creator_version >= 0x00010002:
        yield from _lint_batmap(disk)


def _lint_footer(reader: BoundedReader, footer: Footer, end: int) -> Iterator[Finding]:
    raw = reader.read(end if end < reader.size else 0, min(512, reader.size - end) or 512)
    if end == reader.size:
        text = "the file is cut off: the footer at the end is missing"
        yield Finding("error", at(end), text, f"{XEN}, Hyper-V", "copy the file again", lossy=True)
    elif end + 512 < reader.size:
        text = f"{reader.size - end - 512} bytes follow the footer"
        fix = f"cut them off: truncate --size={end + 512} FILE"
        yield Finding("error", at(end + 512), text, f"{XEN}, Hyper-V, Azure", fix)
    elif len(raw) == 511:
        yield Finding(
            "error", at(end), "the footer has 511 bytes instead of 512", XEN, "append one zero byte"
        )
    if not is_sound(raw):
        yield Finding(
            "error", at(end + 64), "the footer's checksum is wrong", f"{XEN}, Hyper-V", "copy the file again"
        )
    if footer.type != 2 and end < reader.size and reader.read(0, 512) != raw.ljust(512, b"\0"):
        yield Finding(
            "error",
            at(0),
            "the copy of the footer at the head differs from the footer",
            f"{XEN}, CloudStack",
            "convert again",
        )
    if not footer.features & 2 or footer.features & ~3:
        yield Finding(
            "error",
            at(end + 8),
            f"features {footer.features:#x} instead of 2",
            XEN,
            "set the reserved feature bit",
        )
    if footer.version != 0x00010000:
        yield Finding(
            "error",
            at(end + 12),
            f"format version {footer.version:#x} instead of 1.0",
            "every reader",
            "convert again",
        )
    if footer.timestamp > time.time() - EPOCH_2000 + 1800:
        yield Finding(
            "error",
            at(end + 24),
            "the creation time lies in the future",
            XEN,
            "stamp it with a time in the past",
        )
    if footer.uuid == bytes(16):
        yield Finding("error", at(end + 68), "the UUID is zero", XEN, "give it a UUID")
    if any(raw[86:]):
        yield Finding(
            "error", at(end + 86), "reserved bytes of the footer are not zero", XEN, "set them to zero"
        )
    if footer.saved:
        yield Finding(
            "warning",
            at(end + 84),
            "the disk is marked as part of a saved state",
            "Hyper-V",
            "set the byte to 0",
        )
    yield from _lint_size(footer, end)


def _lint_size(footer: Footer, end: int) -> Iterator[Finding]:
    size = footer.current_size
    chs = geometry(size)
    stored = (footer.cylinders, footer.heads, footer.sectors)
    if _encode(chs) < _encode(stored):
        yield Finding(
            "error",
            at(end + 56),
            f"geometry {'/'.join(map(str, stored))} is larger than the disk's {'/'.join(map(str, chs))}",
            XEN,
            "write the geometry of the current size, rounded down",
        )
    by_size = footer.creator in _BY_SIZE or stored == (65535, 16, 255)
    if not by_size and math.prod(stored) * SECTOR != size:
        yield Finding(
            "warning",
            at(end + 28),
            f"creator {shown(footer.creator)}: QEMU takes the size from the geometry, "
            f"{math.prod(stored) * SECTOR} bytes instead of {size}",
            "QEMU, KVM",
            "open it with force_size_calc=current_size, or write creator tap",
        )
    if footer.original_size != size:
        yield Finding(
            "warning",
            at(end + 40),
            f"original size {footer.original_size} is not the current size {size}",
            "CloudStack",
            "write the current size in both fields",
        )
    if size > LARGEST:
        yield Finding("error", at(end + 48), "larger than 2040 GiB", f"{XEN}, Hyper-V", "use VHDX")
    if size % BLOCK:
        yield Finding(
            "warning",
            at(end + 48),
            f"size {size} is not a multiple of 2 MiB",
            XEN,
            "make the disk a multiple of 2 MiB",
        )
    if size % (1 << 20):
        yield Finding(
            "warning", at(end + 48), f"size {size} is not whole MiB", "Azure", "make the disk whole MiB"
        )


def _encode(chs: tuple[int, int, int]) -> int:
    return chs[0] << 16 | chs[1] << 8 | chs[2]


def _lint_header(reader: BoundedReader, footer: Footer, header: Header) -> Iterator[Finding]:
    offset = footer.data_offset
    raw = reader.read(offset, 1024)
    if checksum(raw[:36] + bytes(4) + raw[40:]) != header.checksum:
        yield Finding(
            "error", at(offset + 36), "the dynamic header's checksum is wrong", XEN, "copy the file again"
        )
    if header.version != 0x00010000:
        yield Finding(
            "error",
            at(offset + 24),
            f"header version {header.version:#x} instead of 1.0",
            XEN,
            "convert again",
        )
    if header.data_offset != (1 << 64) - 1:
        yield Finding(
            "error", at(offset + 8), "the header's data offset is not all ones", XEN, "set it to all ones"
        )
    if header.block_size != BLOCK:
        yield Finding(
            "error", at(offset + 32), f"block size {header.block_size} instead of 2 MiB", XEN, "convert again"
        )
    if header.table_offset % SECTOR:
        yield Finding(
            "error", at(offset + 16), "the block table does not start on a sector", XEN, "convert again"
        )
    if any(raw[40:]):
        yield Finding(
            "error", at(offset + 40), "parent fields or reserved bytes are not zero", XEN, "set them to zero"
        )
    if footer.creator == b"tap\0" and not 0x00010001 <= footer.creator_version <= 0x00010003:
        major, minor = footer.creator_version >> 16, footer.creator_version & 0xFFFF
        yield Finding(
            "error",
            at(reader.size - 512 + 32),
            f"creator version tap {major}.{minor} is not known",
            XEN,
            "write version 1.3",
        )


def _lint_bat(disk: VhdDisk, end: int) -> Iterator[Finding]:
    assert disk.header is not None
    header = disk.header
    table = header.table_offset
    head = table + len(disk.bat) * 4
    span = disk.bitmap_size + header.block_size
    placed: list[int] = []  # sector and block in one integer: a table of a million blocks stays small
    for block, sector in enumerate(disk.bat):
        if sector == ABSENT:
            continue
        start = sector * SECTOR
        if start < head:
            text = "a block lies over the head of the file"
            yield Finding("error", at(table + block * 4), text, "every reader", "convert again", lossy=True)
        elif start + span > end:
            if end == disk.reader.size:  # it is cut off, which was said
                continue
            text = "a block clobbers the footer or lies past it"
            yield Finding("error", at(table + block * 4), text, "every reader", "convert again", lossy=True)
        placed.append(sector << 32 | block)
        if len(placed) * span > end:
            yield Finding(
                "error",
                at(table),
                "the table names more blocks than the file has room for",
                XEN,
                "convert again",
            )
            return
    placed.sort()
    for low, high in itertools.pairwise(placed):
        if (high >> 32) * SECTOR < (low >> 32) * SECTOR + span:
            where = at(table + (high & ABSENT) * 4)
            yield Finding(
                "error", where, "a block clobbers another block", "every reader", "convert again", True
            )
    if any(((entry >> 32) * SECTOR + disk.bitmap_size) % 4096 for entry in placed):
        yield Finding(
            "info", at(table), "blocks are not aligned to 4 KiB", "", "convert again for faster disk access"
        )


def _lint_batmap(disk: VhdDisk) -> Iterator[Finding]:
    assert disk.header is not None
    reader, table = disk.reader, disk.header.table_offset
    offset = table + -(-disk.header.entries * 4 // SECTOR) * SECTOR
    cookie, map_at, sectors, version, stored = _BATMAP.unpack(reader.read(offset, SECTOR))
    if cookie != b"tdbatmap":
        yield Finding(
            "error",
            at(offset),
            "creator tap 1.3 without a batmap",
            XEN,
            "write a batmap after the block table",
        )
        return
    if version != 0x00010002:
        yield Finding(
            "error", at(offset + 20), f"batmap version {version:#x} instead of 1.2", XEN, "write version 1.2"
        )
    if not map_at or map_at % SECTOR or sectors * SECTOR * 8 < len(disk.bat):
        yield Finding("error", at(offset + 8), "the batmap's place or size is wrong", XEN, "convert again")
        return
    if sectors > -(-disk.header.entries // 4096):
        sectors = -(-disk.header.entries // 4096)
    bits = reader.read(map_at, sectors * SECTOR)
    if checksum(bits[: _summed(disk.size)]) != stored:
        yield Finding("error", at(offset + 24), "the batmap's checksum is wrong", XEN, "convert again")
    for block, sector in enumerate(disk.bat):
        if sector == ABSENT and bits[block >> 3] & 0x80 >> (block & 7):
            yield Finding(
                "error",
                at(map_at + (block >> 3)),
                "the batmap shows an unallocated block as full",
                XEN,
                "convert again",
            )


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    if head.startswith(b"conectix"):
        return Match.CERTAIN
    # A fixed VHD has its footer alone, at the end; one of 511 bytes was written by Virtual PC before 2004.
    end = reader.read(reader.size - SECTOR, SECTOR) if reader.size >= SECTOR else b""
    if b"conectix" in (end[:8], end[1:9]):
        return Match.LIKELY
    # Something may follow it; but a VHD also lies so at the end of an archive.
    return Match.FALLBACK if buried_footer(reader) else Match.NO


def _write(target: Target, options: Options) -> VhdWriter:
    return VhdWriter(target.file, target.size, options.get("creator", "xen"))


def note(size: int) -> str:
    """Whether tools that go by the geometry would cut the disk's end."""
    if not (missing := cut(size)):
        return ""
    larger = next_exact(size)
    exact = f"; {larger} MiB would be exact" if larger else ""
    return f"tools that round to a VHD's geometry would cut {missing >> 10} KiB off its end{exact}"


KIND = Kind(
    name="vhd",
    suffix="vhd",
    version=1,
    driver="vpc",
    recognize=_recognize,
    write=_write,
    read=VhdDisk,
    lint=lint,
    check_size=check_size,
)
FORMATS = (
    Format(
        name="vhd",
        help="VHD for XenServer and XCP-ng",
        kind=KIND,
        file="{imagename}.vhd",
        machine=Machine("ide", "rtl8139"),  # Xen's emulated devices, before its own drivers take over
        options={"creator": "xen"},
        note=note,
        cloudstack=Template("XenServer", "VHD", "xen.vhd.bz2", OTHER, ("xenserver",)),
    ),
    Format(
        name="hyperv-vhd",
        help="VHD for Hyper-V",
        kind=KIND,
        file="{imagename}-hyperv.vhd",
        machine=Machine("ide", "tulip"),  # generation 1 and its legacy network adapter
        options={"creator": "hyperv"},
        note=note,
        cloudstack=Template("Hyperv", "VHD", "hyperv.vhd.zip", DEBIAN, ("hyperv",)),
    ),
)
