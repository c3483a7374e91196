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
from build.formats.lib.findings import Code, Finding, at
from build.formats.lib.format import DEBIAN, OTHER, Format, Kind, Machine, Match, Options, Target, Template
from build.formats.lib.platforms import (
    AZURE,
    CLOUDSTACK,
    EVERY_READER,
    HYPERV,
    KVM,
    QEMU,
    XCP_NG,
    XENSERVER,
)
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


XEN = (XENSERVER, XCP_NG)
_READER = (EVERY_READER,)
_AGAIN = "convert again"
_COPY = "copy the file again"
_ZERO = "set them to zero"
CUT_OFF = Code(
    "VHD020",
    "error",
    "the file is cut off: the footer at the end is missing",
    (*XEN, HYPERV),
    _COPY,
    lossy=True,
)
BEHIND_FOOTER = Code(
    "VHD021",
    "error",
    "{count} bytes follow the footer",
    (*XEN, HYPERV, AZURE),
    "cut them off: truncate --size={end} FILE",
)
FOOTER_511 = Code("VHD022", "error", "the footer has 511 bytes instead of 512", XEN, "append one zero byte")
FOOTER_CHECKSUM = Code("VHD023", "error", "the footer's checksum is wrong", (*XEN, HYPERV), _COPY)
HEAD_COPY = Code(
    "VHD024",
    "error",
    "the copy of the footer at the head differs from the footer",
    (*XEN, CLOUDSTACK),
    _AGAIN,
)
FEATURES = Code("VHD025", "error", "features {features:#x} instead of 2", XEN, "set the reserved feature bit")
VERSION = Code("VHD026", "error", "format version {version:#x} instead of 1.0", _READER, _AGAIN)
FUTURE = Code(
    "VHD027", "error", "the creation time lies in the future", XEN, "stamp it with a time in the past"
)
NO_UUID = Code("VHD028", "error", "the UUID is zero", XEN, "give it a UUID")
FOOTER_RESERVED = Code("VHD029", "error", "reserved bytes of the footer are not zero", XEN, _ZERO)
SAVED_STATE = Code(
    "VHD030", "warning", "the disk is marked as part of a saved state", (HYPERV,), "set the byte to 0"
)
GEOMETRY = Code(
    "VHD031",
    "error",
    "geometry {stored} is larger than the disk's {known}",
    XEN,
    "write the geometry of the current size, rounded down",
)
BY_GEOMETRY = Code(
    "VHD032",
    "warning",
    "creator {creator}: QEMU takes the size from the geometry, {taken} bytes instead of {size}",
    (QEMU, KVM),
    "open it with force_size_calc=current_size, or write creator tap",
)
ORIGINAL_SIZE = Code(
    "VHD033",
    "warning",
    "original size {original} is not the current size {size}",
    (CLOUDSTACK,),
    "write the current size in both fields",
)
TOO_LARGE = Code("VHD034", "error", "larger than 2040 GiB", (*XEN, HYPERV), "use VHDX")
ODD_SIZE = Code(
    "VHD035", "warning", "size {size} is not a multiple of 2 MiB", XEN, "make the disk a multiple of 2 MiB"
)
NOT_WHOLE_MIB = Code("VHD036", "warning", "size {size} is not whole MiB", (AZURE,), "make the disk whole MiB")
HEADER_CHECKSUM = Code("VHD037", "error", "the dynamic header's checksum is wrong", XEN, _COPY)
HEADER_VERSION = Code("VHD038", "error", "header version {version:#x} instead of 1.0", XEN, _AGAIN)
DATA_OFFSET = Code("VHD039", "error", "the header's data offset is not all ones", XEN, "set it to all ones")
OTHER_BLOCKS = Code("VHD040", "error", "block size {size} instead of 2 MiB", XEN, _AGAIN)
TABLE_PLACE = Code("VHD041", "error", "the block table does not start on a sector", XEN, _AGAIN)
HEADER_RESERVED = Code("VHD042", "error", "parent fields or reserved bytes are not zero", XEN, _ZERO)
CREATOR_VERSION = Code(
    "VHD043", "error", "creator version tap {version} is not known", XEN, "write version 1.3"
)
OVER_HEAD = Code("VHD044", "error", "a block lies over the head of the file", _READER, _AGAIN, lossy=True)
OVER_FOOTER = Code(
    "VHD045", "error", "a block clobbers the footer or lies past it", _READER, _AGAIN, lossy=True
)
TOO_MANY = Code("VHD046", "error", "the table names more blocks than the file has room for", XEN, _AGAIN)
OVER_BLOCK = Code("VHD047", "error", "a block clobbers another block", _READER, _AGAIN, lossy=True)
UNALIGNED = Code(
    "VHD048", "info", "blocks are not aligned to 4 KiB", fix="convert again for faster disk access"
)
NO_BATMAP = Code(
    "VHD049", "error", "creator tap 1.3 without a batmap", XEN, "write a batmap after the block table"
)
BATMAP_VERSION = Code(
    "VHD050", "error", "batmap version {version:#x} instead of 1.2", XEN, "write version 1.2"
)
BATMAP_PLACE = Code("VHD051", "error", "the batmap's place or size is wrong", XEN, _AGAIN)
BATMAP_CHECKSUM = Code("VHD052", "error", "the batmap's checksum is wrong", XEN, _AGAIN)
BATMAP_FULL = Code("VHD053", "error", "the batmap shows an unallocated block as full", XEN, _AGAIN)


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
        yield Finding(CUT_OFF, at(end))
    elif end + 512 < reader.size:
        yield Finding(BEHIND_FOOTER, at(end + 512), count=reader.size - end - 512, end=end + 512)
    elif len(raw) == 511:
        yield Finding(FOOTER_511, at(end))
    if not is_sound(raw):
        yield Finding(FOOTER_CHECKSUM, at(end + 64))
    if footer.type != 2 and end < reader.size and reader.read(0, 512) != raw.ljust(512, b"\0"):
        yield Finding(HEAD_COPY, at(0))
    if not footer.features & 2 or footer.features & ~3:
        yield Finding(FEATURES, at(end + 8), features=footer.features)
    if footer.version != 0x00010000:
        yield Finding(VERSION, at(end + 12), version=footer.version)
    if footer.timestamp > time.time() - EPOCH_2000 + 1800:
        yield Finding(FUTURE, at(end + 24))
    if footer.uuid == bytes(16):
        yield Finding(NO_UUID, at(end + 68))
    if any(raw[86:]):
        yield Finding(FOOTER_RESERVED, at(end + 86))
    if footer.saved:
        yield Finding(SAVED_STATE, at(end + 84))
    yield from _lint_size(footer, end)


def _lint_size(footer: Footer, end: int) -> Iterator[Finding]:
    size = footer.current_size
    chs = geometry(size)
    stored = (footer.cylinders, footer.heads, footer.sectors)
    if _encode(chs) < _encode(stored):
        yield Finding(
            GEOMETRY, at(end + 56), stored="/".join(map(str, stored)), known="/".join(map(str, chs))
        )
    by_size = footer.creator in _BY_SIZE or stored == (65535, 16, 255)
    if not by_size and math.prod(stored) * SECTOR != size:
        yield Finding(
            BY_GEOMETRY,
            at(end + 28),
            creator=shown(footer.creator),
            taken=math.prod(stored) * SECTOR,
            size=size,
        )
    if footer.original_size != size:
        yield Finding(ORIGINAL_SIZE, at(end + 40), original=footer.original_size, size=size)
    if size > LARGEST:
        yield Finding(TOO_LARGE, at(end + 48))
    if size % BLOCK:
        yield Finding(ODD_SIZE, at(end + 48), size=size)
    if size % (1 << 20):
        yield Finding(NOT_WHOLE_MIB, at(end + 48), size=size)


def _encode(chs: tuple[int, int, int]) -> int:
    return chs[0] << 16 | chs[1] << 8 | chs[2]


def _lint_header(reader: BoundedReader, footer: Footer, header: Header) -> Iterator[Finding]:
    offset = footer.data_offset
    raw = reader.read(offset, 1024)
    if checksum(raw[:36] + bytes(4) + raw[40:]) != header.checksum:
        yield Finding(HEADER_CHECKSUM, at(offset + 36))
    if header.version != 0x00010000:
        yield Finding(HEADER_VERSION, at(offset + 24), version=header.version)
    if header.data_offset != (1 << 64) - 1:
        yield Finding(DATA_OFFSET, at(offset + 8))
    if header.block_size != BLOCK:
        yield Finding(OTHER_BLOCKS, at(offset + 32), size=header.block_size)
    if header.table_offset % SECTOR:
        yield Finding(TABLE_PLACE, at(offset + 16))
    if any(raw[40:]):
        yield Finding(HEADER_RESERVED, at(offset + 40))
    if footer.creator == b"tap\0" and not 0x00010001 <= footer.creator_version <= 0x00010003:
        major, minor = footer.creator_version >> 16, footer.creator_version & 0xFFFF
        yield Finding(CREATOR_VERSION, at(reader.size - 512 + 32), version=f"{major}.{minor}")


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
            yield Finding(OVER_HEAD, at(table + block * 4))
        elif start + span > end:
            if end == disk.reader.size:  # it is cut off, which was said
                continue
            yield Finding(OVER_FOOTER, at(table + block * 4))
        placed.append(sector << 32 | block)
        if len(placed) * span > end:
            yield Finding(TOO_MANY, at(table))
            return
    placed.sort()
    for low, high in itertools.pairwise(placed):
        if (high >> 32) * SECTOR < (low >> 32) * SECTOR + span:
            yield Finding(OVER_BLOCK, at(table + (high & ABSENT) * 4))
    if any(((entry >> 32) * SECTOR + disk.bitmap_size) % 4096 for entry in placed):
        yield Finding(UNALIGNED, at(table))


def _lint_batmap(disk: VhdDisk) -> Iterator[Finding]:
    assert disk.header is not None
    reader, table = disk.reader, disk.header.table_offset
    offset = table + -(-disk.header.entries * 4 // SECTOR) * SECTOR
    cookie, map_at, sectors, version, stored = _BATMAP.unpack(reader.read(offset, SECTOR))
    if cookie != b"tdbatmap":
        yield Finding(NO_BATMAP, at(offset))
        return
    if version != 0x00010002:
        yield Finding(BATMAP_VERSION, at(offset + 20), version=version)
    if not map_at or map_at % SECTOR or sectors * SECTOR * 8 < len(disk.bat):
        yield Finding(BATMAP_PLACE, at(offset + 8))
        return
    if sectors > -(-disk.header.entries // 4096):
        sectors = -(-disk.header.entries // 4096)
    bits = reader.read(map_at, sectors * SECTOR)
    if checksum(bits[: _summed(disk.size)]) != stored:
        yield Finding(BATMAP_CHECKSUM, at(offset + 24))
    for block, sector in enumerate(disk.bat):
        if sector == ABSENT and bits[block >> 3] & 0x80 >> (block & 7):
            yield Finding(BATMAP_FULL, at(map_at + (block >> 3)))


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
