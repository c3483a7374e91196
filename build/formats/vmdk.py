"""VMDK, streamOptimized, version 3: what VMware's own exporter writes and what an OVA holds.

Layout and fields follow VMware's "Virtual Disk Format 5.0" and its open-vmdk tools: compressed grains of
64 KiB in rising order, a grain table after each 512 of them, the directory and a footer at the end.
Little-endian; addresses are sectors of 512 bytes.
"""

from __future__ import annotations

import functools
import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple

from build.formats.lib import pieces
from build.formats.lib.codec import Zlib
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.format import Format, Kind, Machine, Match, Options, Target, level
from build.formats.lib.platforms import AWS, ESXI, EVERY_IMPORTER, QEMU, VCENTER, Affected
from build.formats.lib.reader import BoundedReader
from build.formats.lib.words import pack_words, read_words
from build.formats.lib.writer import Units, derive, put

SECTOR = 512
GRAIN = pieces.UNIT
PER_TABLE = 512
OVERHEAD = 128
DESCRIPTOR_SECTORS = 20
AT_END = (1 << 64) - 1
EOS, TABLE, DIRECTORY, FOOTER = 0, 1, 2, 3
COMPRESSED, MARKERS, ZERO_GRAINS, NEWLINES = 1 << 16, 1 << 17, 1 << 2, 1
CODEC = Zlib()
Adapter = Literal["lsilogic", "buslogic", "pvscsi", "ide"]

_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH433x")
_MARKER = struct.Struct("<QII496x")
_GRAIN = struct.Struct("<QI")
_EXTENT = re.compile(
    r"^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+([0-9]{1,18})[ \t]+[A-Z]", re.MULTILINE | re.IGNORECASE
)
"""A line of the descriptor that names a part of the disk, and its length in sectors."""
_PER_GROUP = PER_TABLE * GRAIN // pieces.PIECE

GROUP = Group("VMDK", "VMDK", "VMware, Virtual Disk Format 5.0 and open-vmdk; QEMU, block/vmdk.c")
_ESXI, _IMPORTER, _ALSO_QEMU = (ESXI, VCENTER), (EVERY_IMPORTER,), (ESXI, VCENTER, QEMU)
_AGAIN = "convert again"
_CUT = "copy the file again: it may be cut off"
BAD_CAPACITY = Damage("VMDK001", "a capacity of {count} sectors is not possible", _ESXI)
GRAIN_SIZE = Damage("VMDK002", "grains of {size} bytes", _ESXI)
TABLE_SIZE = Damage("VMDK003", "{count} entries a grain table", _ESXI)
COMPRESSION = Damage("VMDK004", "compression algorithm {algorithm} is not deflate", _ESXI)
OTHER_GRAIN = Damage("VMDK005", "a grain says sector {said} instead of {expected}", _ESXI)
LONG_GRAIN = Damage("VMDK006", "a grain of {size} compressed bytes", _ESXI)
BROKEN_GRAIN = Damage("VMDK007", "a grain cannot be expanded: {reason}", _ALSO_QEMU)
SHORT_GRAIN = Damage("VMDK008", "a grain holds {size} bytes instead of {expected}", _ESXI)
NO_HEADER = Damage("VMDK009", "no VMDK header here", _ESXI, _CUT)
NO_FOOTER = Damage("VMDK010", "no VMDK footer here", _ESXI, _CUT)
DESCRIPTOR_ALONE = Damage(
    "VMDK011",
    "this is a descriptor alone, its extents are other files",
    _IMPORTER,
    "convert the extents' disk to streamOptimized",
)
COWD = Damage(
    "VMDK012",
    "this is an ESX 2 sparse extent (COWD)",
    _IMPORTER,
    "clone the disk to a whole one (vmkfstools -i)",
)
SPLIT = Damage(
    "VMDK013",
    "this is one piece of a split VMDK: its descriptor and the other pieces are other files",
    _IMPORTER,
    "convert the whole disk, by its descriptor: qemu-img convert -O raw NAME.vmdk NEW.raw",
)
NOT_STREAM = Code(
    "VMDK014",
    "error",
    "this sparse VMDK is not streamOptimized",
    (*_ESXI, AWS),
    "convert it: inv convert.vmdk --from FILE",
)
OLD_VERSION = Code(
    "VMDK015",
    "error",
    "header version {version} instead of 3",
    (Affected("esxi", since="6.5"),),
    "write version 3",
    repair="version",
)
LINE_ENDS = Code(
    "VMDK016", "error", "line ends in the header were changed by a text transfer", _ESXI, "copy it as binary"
)
UNCLEAN = Code(
    "VMDK017", "warning", "the disk was not closed cleanly", _ESXI, "open and close it once where it was made"
)
ODD_CAPACITY = Code("VMDK018", "info", "the capacity is not a multiple of the grain size")
OTHER_FOOTER = Code(
    "VMDK019", "error", "the footer differs from the header in more than the directory's place", _ESXI, _AGAIN
)
NO_DESCRIPTOR = Code("VMDK020", "error", "no embedded descriptor", _ESXI, _AGAIN)
NO_TITLE = Code("VMDK021", "error", "the descriptor does not begin with its title line", _ESXI, _AGAIN)
NO_CONTENT_ID = Code("VMDK022", "error", "the descriptor has no content id", _ESXI, "write a CID")
NO_TYPE = Code("VMDK023", "error", "the descriptor has no createType", _ESXI, "write streamOptimized")
OTHER_TYPE = Code("VMDK024", "error", "the createType is {said}", _ESXI, "write streamOptimized")
NEEDS_PARENT = Code(
    "VMDK025", "error", "the disk needs a parent disk", _ESXI, "export it as one whole disk", lossy=True
)
NO_EXTENT = Code(
    "VMDK026", "error", "the descriptor names no extent, the disk has {capacity} sectors", _ESXI, _AGAIN
)
OTHER_EXTENTS = Code(
    "VMDK027",
    "error",
    "the descriptor names extents of {count} sectors, the disk has {capacity} sectors",
    _ESXI,
    _AGAIN,
)
IDE = Code(
    "VMDK028",
    "warning",
    "the adapter is IDE",
    (Affected("vcenter", case="with a SCSI controller in the OVF"),),
    "write lsilogic",
)
NO_ADAPTER = Code("VMDK029", "warning", "no adapter is named", fix="write lsilogic")
OTHER_ADAPTER = Code(
    "VMDK030", "warning", "the adapter {said} is not one that VMware names", fix="write lsilogic"
)
NO_END = Code("VMDK031", "error", "the stream has no end mark", _ESXI, "append a sector of zeros")
FOREIGN_GRAIN = Damage("VMDK032", "a grain says sector {said}, which is none of this disk's", _ESXI)
ORDER = Code("VMDK033", "error", "grains are not in rising order", _ESXI, _AGAIN)
LOST_GRAIN = Code(
    "VMDK034", "error", "the grain table does not name a stored grain", _ALSO_QEMU, _AGAIN, lossy=True
)
UNKNOWN_MARKER = Damage("VMDK035", "a marker of the unknown type {type}", _ESXI)
BEHIND_END = Code("VMDK036", "error", "bytes follow the end mark", _ESXI, "cut the file there")
BEHIND_OLD_END = Code("VMDK037", "warning", "bytes follow the end mark", _ESXI, "cut the file there")
OTHER_COUNT = Code(
    "VMDK038",
    "error",
    "a grain table names {named} grains, the stream holds {stored}",
    _ALSO_QEMU,
    _AGAIN,
    lossy=True,
)


class Header(NamedTuple):
    """The sparse extent header, first sector of the file; a stream has it again at the end, as its footer."""

    magic: bytes
    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_size: int
    per_table: int
    redundant: int
    directory: int
    overhead: int
    unclean: int
    newlines: bytes
    compression: int


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that cannot be a VMDK."""
    if size % SECTOR or not size:
        raise Unsupported(
            f"a VMDK must be whole sectors of 512 bytes, the disk has {size} bytes", "build the disk again"
        )
    if size > 62 << 40:
        raise Unsupported("a VMDK holds at most 62 TiB", "make SIZE smaller")


class VmdkWriter:
    """Writes a streamOptimized VMDK from `base` on, front to back but for header and descriptor."""

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        name: str,
        adapter: Adapter = "lsilogic",
        codec: Zlib = CODEC,
        base: int = 0,
    ) -> None:
        check_size(size)
        self.file, self.size, self.name, self.adapter, self.codec, self.base = (
            file,
            size,
            name,
            adapter,
            codec,
            base,
        )
        self.directory = array("I", bytes(4 * -(-size // (GRAIN * PER_TABLE))))
        self.table = array("I", bytes(4 * PER_TABLE))
        self.group = 0
        self.position = OVERHEAD
        self.populated = 0
        """Guest bytes in stored grains: OVF's populatedSize."""
        put(file, base, bytes(OVERHEAD * SECTOR))

    @property
    def length(self) -> int:
        """Bytes written from `base` on."""
        return self.position * SECTOR

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the grains of a piece; zero grains are left out."""
        if index // _PER_GROUP != self.group:
            self._end_group()
            self.group = index // _PER_GROUP
        out = []
        first = index * (pieces.PIECE // GRAIN)
        for offset, packed in enumerate(units[self.codec]):
            if packed is None:
                continue
            grain = first + offset
            self.table[grain % PER_TABLE] = self.position
            length = _GRAIN.size + len(packed)
            padding = -length % SECTOR
            out += [_GRAIN.pack(grain * GRAIN // SECTOR, len(packed)), packed, bytes(padding)]
            self.position += (length + padding) // SECTOR
            self.populated += min(GRAIN, self.size - grain * GRAIN)
        self._write(b"".join(out))

    def close(self, seed: str) -> None:
        """End the stream: last table, directory, footer, end mark; then header and descriptor."""
        self._end_group()
        directory = pack_words(self.directory, "little")
        directory += bytes(-len(directory) % SECTOR)
        self._marker(len(directory) // SECTOR, DIRECTORY)
        header = self._header(self.position)
        self._write(directory)
        self.position += len(directory) // SECTOR
        self._marker(1, FOOTER)
        self._write(header + bytes(SECTOR))
        self.position += 2
        end = self.file.tell()
        descriptor = describe(self.size, self.name, self.adapter, derive(seed, "vmdk content").hex)
        put(self.file, self.base, self._header(AT_END) + descriptor.ljust(DESCRIPTOR_SECTORS * SECTOR, b"\0"))
        self.file.seek(end)

    def _end_group(self) -> None:
        if not any(self.table):
            return
        self._marker(PER_TABLE * 4 // SECTOR, TABLE)
        self.directory[self.group] = self.position
        self._write(pack_words(self.table, "little"))
        self.position += PER_TABLE * 4 // SECTOR
        self.table = array("I", bytes(4 * PER_TABLE))

    def _marker(self, sectors: int, kind: int) -> None:
        self._write(_MARKER.pack(sectors, 0, kind))
        self.position += 1

    def _write(self, content: bytes) -> None:
        if self.position > 0xFFFFFFFF:
            raise Unsupported(
                "the disk does not fit into one VMDK stream (2 TiB compressed)", "make SIZE smaller"
            )
        self.file.write(content)

    def _header(self, directory: int) -> bytes:
        return _HEADER.pack(
            b"KDMV",
            3,
            NEWLINES | COMPRESSED | MARKERS,
            self.size // SECTOR,
            GRAIN // SECTOR,
            1,
            DESCRIPTOR_SECTORS,
            PER_TABLE,
            0,
            directory,
            OVERHEAD,
            0,
            b"\n \r\n",
            1,
        )


def describe(size: int, name: str, adapter: Adapter, content_id: str) -> bytes:
    """The text descriptor; `content_id` is 32 hexadecimal digits whose last eight are the CID."""
    if content_id[-8:] in ("ffffffff", "fffffffe"):  # these two mean "no content id" to VMware
        content_id = content_id[:-8] + "fffffffd"
    heads, track = (16, 63) if adapter == "ide" else (255, 63)
    cylinders = min(65535, -(-size // (SECTOR * heads * track)))
    lines = (
        "# Disk DescriptorFile",
        "version=1",
        f"CID={content_id[-8:]}",
        "parentCID=ffffffff",
        'createType="streamOptimized"',
        "",
        "# Extent description",
        f'RW {size // SECTOR} SPARSE "{name}"',
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        f'ddb.adapterType = "{"lsilogic" if adapter == "pvscsi" else adapter}"',
        f'ddb.geometry.cylinders = "{cylinders}"',
        f'ddb.geometry.heads = "{heads}"',
        f'ddb.geometry.sectors = "{track}"',
        f'ddb.longContentID = "{content_id}"',
        'ddb.toolsInstallType = "4"',
        'ddb.toolsVersion = "2147483647"',
        'ddb.virtualHWVersion = "4"',
        "",
    )
    return "\n".join(lines).encode()


@dataclass
class VmdkDisk:
    """Reads a VMDK in one sparse file: streamOptimized of both layouts, and monolithicSparse."""

    reader: BoundedReader

    def __post_init__(self) -> None:
        _refuse_other_files(self.reader)
        self.head = read_header(self.reader, 0)
        self.header = self.head
        if self.head.directory == AT_END:
            self.header = read_header(self.reader, self.reader.size - 2 * SECTOR)
        header = self.header
        self.size = header.capacity * SECTOR
        if not 0 < self.size <= 62 << 40:
            raise Damaged(BAD_CAPACITY, at(12), count=header.capacity)
        self.grain = header.grain * SECTOR
        if not 4096 <= self.grain <= pieces.PIECE or self.grain & (self.grain - 1):
            raise Damaged(GRAIN_SIZE, at(20), size=self.grain)
        if not 1 <= header.per_table <= 4096:
            raise Damaged(TABLE_SIZE, at(44), count=header.per_table)
        self.compressed = bool(header.flags & COMPRESSED)
        if self.compressed and header.compression != 1:
            raise Damaged(COMPRESSION, at(77), algorithm=header.compression)
        tables = -(-self.size // (self.grain * header.per_table))
        self.directory = _words(self.reader, header.directory * SECTOR, tables)
        self.table = functools.lru_cache(maxsize=16)(self._read_table)

    def _read_table(self, group: int) -> array[int]:
        """A grain table; empty when the directory has none."""
        sector = self.directory[group]
        return _words(self.reader, sector * SECTOR, self.header.per_table) if sector else array("I")

    def grain_at(self, grain: int) -> int:
        """Sector of a grain; 0 when it is zero."""
        table = self.table(grain // self.header.per_table)
        sector = table[grain % self.header.per_table] if table else 0
        return 0 if sector == 1 and self.header.flags & ZERO_GRAINS else sector

    def read_grain(self, grain: int, sector: int) -> bytes | bytearray:
        """Guest-visible bytes of a stored grain; Damaged when it is broken or not this grain."""
        offset, wanted = sector * SECTOR, min(self.grain, self.size - grain * self.grain)
        if not self.compressed:
            return self.reader.read(offset, wanted)
        address, length = _GRAIN.unpack(self.reader.read(offset, _GRAIN.size))
        if self.header.flags & MARKERS and address != grain * self.header.grain:
            raise Damaged(OTHER_GRAIN, at(offset), said=address, expected=grain * self.header.grain)
        if not 0 < length <= 2 * self.grain + 4096:
            raise Damaged(LONG_GRAIN, at(offset + 8), size=length)
        try:
            data = CODEC.expand(self.reader.read(offset + _GRAIN.size, length), self.grain)
        except ValueError as error:
            raise Damaged(BROKEN_GRAIN, at(offset), reason=str(error)) from None
        if len(data) < wanted:
            raise Damaged(SHORT_GRAIN, at(offset), size=len(data), expected=wanted)
        return data if len(data) == wanted else data[:wanted]

    def facts(self) -> dict[str, str]:
        """Version, layout, and the descriptor's own words."""
        values = self.descriptor()
        return {
            "version": str(self.head.version),
            "type": values.get("createtype", "unknown"),
            "adapter": values.get("ddb.adaptertype", "unknown"),
            "content id": values.get("cid", "none"),
            "tables": "at the end" if self.head.directory == AT_END else "in front",
        }

    def descriptor(self) -> dict[str, str]:
        """Keys, in small letters, and values of the embedded descriptor."""
        head = self.head
        if not head.descriptor or head.descriptor_size > 2048:
            return {}
        raw = self.reader.read(head.descriptor * SECTOR, head.descriptor_size * SECTOR)
        lines = (line.partition("=") for line in raw.rstrip(b"\0").decode("latin-1").splitlines())
        return {key.strip().lower(): value.strip().strip('"').strip()[:200] for key, _, value in lines}

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece; None when no grain of it is stored."""
        start, wanted = index * pieces.PIECE, pieces.length(index, self.size)
        grains = range(start // self.grain, -(-(start + wanted) // self.grain))
        per_table = self.header.per_table
        if not any(self.directory[grains[0] // per_table : grains[-1] // per_table + 1]):
            return None
        sectors = [self.grain_at(grain) for grain in grains]
        if not any(sectors):
            return None
        return b"".join(
            self.read_grain(grain, sector)
            if sector
            else bytes(min(self.grain, self.size - grain * self.grain))
            for grain, sector in zip(grains, sectors, strict=True)
        )


def read_header(reader: BoundedReader, offset: int) -> Header:
    """A sparse extent header; Damaged when there is none."""
    header = Header(*_HEADER.unpack(reader.read(offset, SECTOR)))
    if header.magic != b"KDMV":
        raise Damaged(NO_FOOTER if offset else NO_HEADER, at(offset))
    return header


def _words(reader: BoundedReader, offset: int, count: int) -> array[int]:
    return read_words("I", reader.read(offset, count * 4), "little")


def _refuse_other_files(reader: BoundedReader) -> None:
    """Raise Damaged for a VMDK whose disk lies in other files, or in another form."""
    start = reader.read(0, min(reader.size, SECTOR))
    if start.lower().startswith(b"# disk descriptor"):
        raise Damaged(DESCRIPTOR_ALONE, at(0))
    if start.startswith(b"COWD"):
        raise Damaged(COWD, at(0))
    if start.startswith(b"KDMV") and len(start) == SECTOR:
        header = Header(*_HEADER.unpack(start))
        if not header.descriptor and not header.flags & COMPRESSED:
            raise Damaged(SPLIT, at(28))


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Walk the whole stream as ESXi does; QEMU's check and libvmdk read the tables only."""
    disk = VmdkDisk(reader)
    yield from _lint_header(disk)
    yield from _lint_descriptor(disk)
    if disk.compressed and disk.head.flags & MARKERS:
        yield from _walk(disk)


def _lint_header(disk: VmdkDisk) -> Iterator[Finding]:
    head, header = disk.head, disk.header
    if not disk.compressed or not head.flags & MARKERS:
        yield Finding(NOT_STREAM, at(8))
    elif head.version != 3:
        yield Finding(OLD_VERSION, at(4), version=head.version)
    if head.newlines != b"\n \r\n":
        yield Finding(LINE_ENDS, at(73))
    if head.unclean:
        yield Finding(UNCLEAN, at(72))
    if header.capacity % header.grain:
        yield Finding(ODD_CAPACITY, at(12))
    if head.directory == AT_END and header._replace(directory=AT_END) != head:
        yield Finding(OTHER_FOOTER, at(disk.reader.size - 1024))


def _lint_descriptor(disk: VmdkDisk) -> Iterator[Finding]:
    head = disk.head
    if not head.descriptor or head.descriptor_size > 2048:
        yield Finding(NO_DESCRIPTOR, at(28))
        return
    where = at(head.descriptor * SECTOR)
    raw = disk.reader.read(head.descriptor * SECTOR, head.descriptor_size * SECTOR)
    text, values = raw.rstrip(b"\0").decode("latin-1"), disk.descriptor()
    if not text.startswith("# Disk DescriptorFile"):
        yield Finding(NO_TITLE, where)
    if values.get("cid", "ffffffff").lower() in ("ffffffff", "fffffffe"):
        yield Finding(NO_CONTENT_ID, where)
    created = values.get("createtype", "")
    if disk.compressed and created.lower() != "streamoptimized":
        yield Finding(OTHER_TYPE, where, said=created) if created else Finding(NO_TYPE, where)
    if values.get("parentcid", "ffffffff").lower() != "ffffffff":
        yield Finding(NEEDS_PARENT, where)
    sizes = [int(size) for size in _EXTENT.findall(text)]
    if sum(sizes) != head.capacity:
        if sizes:
            yield Finding(OTHER_EXTENTS, where, count=sum(sizes), capacity=head.capacity)
        else:
            yield Finding(NO_EXTENT, where, capacity=head.capacity)
    adapter = values.get("ddb.adaptertype", "")
    if adapter.lower() == "ide":
        yield Finding(IDE, where)
    elif adapter.lower() not in ("lsilogic", "buslogic", "legacyesx"):
        yield Finding(OTHER_ADAPTER, where, said=adapter) if adapter else Finding(NO_ADAPTER, where)


def _walk(disk: VmdkDisk) -> Iterator[Finding]:
    """Follow the stream from grain to grain to its end mark, and compare the tables with what it holds."""
    reader, position = disk.reader, disk.head.overhead
    seen: dict[int, int] = {}
    last, ended = -1, False
    while not ended:
        offset = position * SECTOR
        if offset + SECTOR > reader.size:
            yield Finding(NO_END, at(reader.size))
            return
        count, length, kind = _MARKER.unpack(reader.read(offset, SECTOR))
        position += 1
        if length:
            address = count
            grain, rest = divmod(address, disk.header.grain)
            if rest or grain * disk.grain >= disk.size:
                raise Damaged(FOREIGN_GRAIN, at(offset), said=address)
            if grain <= last:
                yield Finding(ORDER, at(offset))
            last = max(last, grain)
            if disk.grain_at(grain) != offset // SECTOR:
                yield Finding(LOST_GRAIN, at(offset))
            disk.read_grain(grain, offset // SECTOR)
            position += -(-(_GRAIN.size + length) // SECTOR) - 1
            seen[grain // disk.header.per_table] = seen.get(grain // disk.header.per_table, 0) + 1
            continue
        if kind == EOS:
            ended = True
        elif kind == FOOTER and disk.head.directory == AT_END:
            position = reader.size // SECTOR - 1  # that is where readers look for it, whatever lies between
        elif kind in (TABLE, DIRECTORY, FOOTER):
            position += count
        else:
            raise Damaged(UNKNOWN_MARKER, at(offset), type=kind)
    if reader.size - position * SECTOR >= SECTOR:
        yield Finding(BEHIND_END if disk.head.directory == AT_END else BEHIND_OLD_END, at(position * SECTOR))
    yield from _lint_tables(disk, seen)


def _lint_tables(disk: VmdkDisk, seen: dict[int, int]) -> Iterator[Finding]:
    for group, sector in enumerate(disk.directory):
        if not sector:
            continue
        named = sum(
            1
            for entry in disk.table(group)
            if entry > 1 or (entry == 1 and not disk.header.flags & ZERO_GRAINS)
        )
        if named != seen.get(group, 0):
            yield Finding(OTHER_COUNT, at(sector * SECTOR), named=named, stored=seen.get(group, 0))


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    known = (b"KDMV", b"COWD", b"# Disk Descriptor", b"# disk descriptor")
    return Match.CERTAIN if head.startswith(known) else Match.NO


def adapter(settings: Options, compress: str) -> dict[str, Any]:
    """The disk controller that the descriptor names."""
    return {"adapter": settings["ovf"]["controller"]}


def codec(options: Options) -> Zlib:
    """The compressor with the level that the options ask for."""
    return Zlib(level(options, CODEC.level))


def _write(target: Target, options: Options) -> VmdkWriter:
    controller = options.get("adapter", "lsilogic")
    return VmdkWriter(target.file, target.size, target.name, controller, codec(options))


# VMware's own controller stands in for its LSI Logic, too: QEMU has none of that kind (53C1030), and of
# its serial one (mptsas1068) the kernel of bookworm sees the controller but no disk.
MACHINE = Machine("pvscsi", "vmxnet3")
EFI = Machine("ahci", "vmxnet3", ("uefi",))
"""OVMF has no driver for VMware's controllers."""
KIND = Kind(
    name="vmdk",
    suffix="vmdk",
    version=1,
    driver="vmdk",
    recognize=_recognize,
    write=_write,
    read=VmdkDisk,
    lint=lint,
    check_size=check_size,
    options=adapter,
)
FORMATS = (
    Format(
        name="vmdk",
        help="VMDK (streamOptimized) for VMware",
        kind=KIND,
        file="{imagename}.vmdk",
        machine=MACHINE,
        efi=EFI,
    ),
)
