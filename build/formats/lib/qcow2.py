"""The structures of a QCOW2, their reader and the recount of its clusters.

QEMU's docs/interop/qcow2.txt; big-endian.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from build.formats.lib import codec, pieces
from build.formats.lib.codec import Deflate, Zstandard
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.platforms import (
    CLOUDSTACK,
    EVERY_IMPORTER,
    INFLATERS,
    KVM,
    QEMU,
    XCP_NG,
    XEN_ORCHESTRA,
    Affected,
)
from build.formats.lib.reader import BoundedReader
from build.formats.lib.words import pack_words, read_words

CLUSTER = pieces.UNIT
PER_L2 = CLUSTER // 8
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET = 0x00FFFFFFFFFFFE00
DEFLATE = Deflate(12)
_DIRTY, _CORRUPT, _DATA_FILE, ZSTD, _EXTENDED_L2 = 1, 2, 4, 8, 16
MOST_L1 = 32 << 20
_MOST_CLUSTERS = 1 << 25
_MOST_REFCOUNTS = 8 << 20
_MOST_EXPANDED = 64 << 30
_EXPLAINED = 64
"""Times its own size that a file's compressed clusters may expand to: entries may name one time and again."""

HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_SNAPSHOT = struct.Struct(">QIHHIIQII")
"""L1 table, its entries, sizes of id and name, date, VM clock, VM state, extra data."""
_BITMAP = struct.Struct(">QIIBBHI")
"""Table, its entries, flags, type, granularity, sizes of name and extra data."""
_BITMAPS, _BITMAPS_RIGHT = 0x23852875, 1
"""Header extension, and the autoclear bit that says that it is right."""
_MOST_SNAPSHOTS = 65536
_LONGEST_NAME = 1023
MORE = struct.Struct(">QQQIIB7x")

GROUP = Group("QCOW", "QCOW2", "QEMU, docs/interop/qcow2.txt and block/qcow2.c")
_KVM = (QEMU, KVM)
_XCP = (XCP_NG, XEN_ORCHESTRA)
_IMPORTER = (EVERY_IMPORTER,)
_OLD_QEMU = (Affected("qemu", before="5.2"), CLOUDSTACK)
_CONVERT = "convert it: qemu-img convert -O qcow2 FILE NEW.qcow2"
_AGAIN, _COPY = "convert again", "copy the file again"
_CHECK = "run qemu-img check -r all"
_FOR_XCP = "make one for it: inv convert.xcp-qcow2 --from FILE"
NO_HEADER = Damage("QCOW001", "no QCOW2 header here", _KVM)
OTHER_VERSION = Damage("QCOW002", "QCOW version {version} is not 2 or 3", _KVM)
FEW_ENTRIES = Damage("QCOW003", "{count} L1 entries for a disk that needs {needed}", _KVM)
BROKEN_CLUSTER = Damage("QCOW004", "a compressed cluster cannot be expanded: {reason}", _KVM)
SHORT_CLUSTER = Damage("QCOW005", "a compressed cluster holds {count} bytes", _KVM)
NEEDS_BACKING = Damage(
    "QCOW006",
    "this QCOW2 needs its backing file{name}",
    _IMPORTER,
    "flatten it: qemu-img convert -O qcow2 FILE NEW.qcow2",
)
ENCRYPTED = Damage("QCOW007", "this QCOW2 is encrypted", _IMPORTER, "export it unencrypted")
CLUSTER_BITS = Damage("QCOW008", "cluster_bits {bits} is not from 9 to 21", _KVM)
NEEDS_DATA_FILE = Damage("QCOW009", "this QCOW2 needs its external data file", _OLD_QEMU, _CONVERT)
EXTENDED_ENTRIES = Damage(
    "QCOW010", "this QCOW2 uses extended L2 entries, which are not read here", _OLD_QEMU, _CONVERT
)
FEATURES = Damage("QCOW011", "unknown incompatible features {features:#x}", _KVM)
COMPRESSION = Damage("QCOW012", "compression type {type} is not known", _KVM)
BAD_SIZE = Damage("QCOW013", "a virtual size of {size} bytes is not possible", _KVM)
LARGE_L1 = Damage("QCOW014", "the L1 table is larger than QEMU takes (32 MiB)", _KVM)
LARGE_REFCOUNTS = Damage("QCOW015", "the refcount table is larger than QEMU takes (8 MiB)", _KVM)
REFCOUNT_ORDER = Damage("QCOW016", "refcount order {order} is more than 6", _KVM)
ZSTD_CLUSTERS = Code(
    "QCOW017",
    "warning",
    "clusters are zstd",
    (Affected("qemu", before="5.1"), Affected("cloudstack", case="on EL7")),
    "use deflate",
)
VERSION_3 = Code(
    "QCOW018",
    "info",
    "version 3 (compat 1.1)",
    (Affected("qemu", before="1.1", case="(EL6)"),),
    "use version 2 for such hosts",
)
DIRTY = Code("QCOW019", "warning", "the refcounts are marked dirty", _KVM, _CHECK)
CORRUPT = Code("QCOW020", "error", "the file is marked corrupt", _KVM, _CHECK)
FEATURE_BIT = Code("QCOW021", "error", "compression type and its feature bit disagree", _KVM, _AGAIN)
SNAPSHOTS = Code(
    "QCOW022", "warning", "{count} internal snapshots", (CLOUDSTACK,), "convert the disk without them"
)
ODD_SIZE = Code("QCOW023", "error", "the virtual size is not whole sectors", _KVM, _AGAIN)
COMPRESSED_FOR_XCP = Code(
    "QCOW024",
    "warning",
    "clusters are compressed",
    _XCP,
    _FOR_XCP,
    source="mirage/ocaml-qcow, lib/qcow_stream.ml; @xen-orchestra/qcow2",
)
NO_STREAM = Code(
    "QCOW025",
    "warning",
    "tables lie behind data, or gaps between: it cannot be read as a stream",
    _XCP,
    _FOR_XCP,
    source="mirage/ocaml-qcow, lib/qcow_stream.ml",
)
TOO_MANY = Damage(
    "QCOW026", "{count} host clusters are more than this check counts", (), "look at it with qemu-img check"
)
UNALIGNED_L1 = Code("QCOW027", "error", "an L1 entry is not aligned to a cluster", _KVM, _AGAIN, lossy=True)
SHARED_L2 = Code("QCOW028", "error", "two L1 entries name one L2 table", _KVM, _AGAIN)
UNALIGNED_L2 = Code("QCOW029", "error", "an L2 entry is not aligned to a cluster", _KVM, _AGAIN, lossy=True)
OWNED = Code("QCOW030", "error", "a compressed cluster is marked as owned alone", _KVM, _AGAIN)
CLUSTER_PAST_END = Code(
    "QCOW031", "error", "a compressed cluster lies past the end of the file", _KVM, _COPY, lossy=True
)
NOT_EXPANDED = Code("QCOW032", "info", "clusters from here on were not expanded: there is too much in them")
SHORT_PACKED = Code("QCOW033", "error", "a compressed cluster is too short", _KVM, _COPY)
WIDE_WINDOW = Code(
    "QCOW034",
    "warning",
    "a compressed cluster needs a window of more than 4 KiB",
    (INFLATERS,),
    "compress with a window of 4 KiB",
)
BROKEN_PACKED = Code("QCOW035", "error", "a compressed cluster cannot be expanded", _KVM, _COPY, lossy=True)
PAST_END = Code(
    "QCOW036", "error", "a table names a cluster past the end of the file", _KVM, _COPY, lossy=True
)
LOW_REFCOUNT = Code("QCOW037", "error", "a refcount is too low", _KVM, _CHECK)
HIGH_REFCOUNT = Code(
    "QCOW038", "warning", "a refcount is too high: leaked space", fix="run qemu-img check -r leaks"
)


class Header(NamedTuple):
    """The header's fields, those of version 3 with their defaults in a version 2 file."""

    magic: bytes
    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    crypt: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 72
    compression: int = 0


def read_header(reader: BoundedReader) -> Header:
    """The header; Damaged when no reader could go on from it."""
    raw = reader.read(0, 72)
    fields = HEADER.unpack(raw)
    if fields[0] != b"QFI\xfb":
        raise Damaged(NO_HEADER, at(0))
    if fields[1] not in (2, 3):
        raise Damaged(OTHER_VERSION, at(4), version=fields[1])
    header = Header(*fields)
    if header.version == 3:
        incompatible, compatible, autoclear, order, length = struct.unpack(">QQQII", reader.read(72, 32))
        header = header._replace(
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=order,
            header_length=length,
            compression=reader.read(104, 1)[0] if length > 104 else 0,
        )
    return header


def extensions(reader: BoundedReader, header: Header) -> Iterator[tuple[int, bytes]]:
    """Type and content of each header extension; raises Damaged."""
    place, end = header.header_length, min(1 << header.cluster_bits, reader.size)
    while place + 8 <= end:
        kind, length = struct.unpack(">II", reader.read(place, 8))
        if not kind or place + 8 + length > end:
            return
        yield kind, reader.read(place + 8, length)
        place += 8 + -(-length // 8) * 8


@dataclass
class Qcow2Disk:
    """Reads a QCOW2 of any maker that has no backing file, external data or encryption."""

    reader: BoundedReader

    def __post_init__(self) -> None:
        header = self.header = read_header(self.reader)
        _refuse(header, _backing(self.reader, header))
        self.size = header.size
        self.cluster = 1 << header.cluster_bits
        self.codec: Deflate | Zstandard = Zstandard() if header.compression == 1 else DEFLATE
        span = self.cluster // 8 * self.cluster
        needed = -(-self.size // span)
        if header.l1_size < needed:
            raise Damaged(FEW_ENTRIES, at(36), count=header.l1_size, needed=needed)
        self.l1 = _longs(self.reader, header.l1_offset, needed)
        self.table = functools.lru_cache(maxsize=16)(self._read_table)

    def _read_table(self, index: int) -> array[int]:
        """An L2 table; empty when the L1 table has none."""
        offset = self.l1[index] & OFFSET
        return _longs(self.reader, offset, self.cluster // 8) if offset else array("Q")

    def entry(self, number: int) -> int:
        """L2 entry of a guest cluster; 0 when it is unallocated."""
        table = self.table(number * 8 // self.cluster)
        return table[number % (self.cluster // 8)] if table else 0

    def packed(self, entry: int) -> tuple[int, int]:
        """Offset and sector-rounded length of a compressed cluster."""
        shift = 62 - (self.header.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry >> shift & ((1 << (self.header.cluster_bits - 8)) - 1)) + 1
        return offset, sectors * 512 - (offset & 511)

    def cluster_data(self, entry: int) -> bytes | bytearray | None:
        """Guest-visible bytes of a cluster; None when it reads as zero."""
        if entry & COMPRESSED:
            offset, length = self.packed(entry)
            length = min(length, self.reader.size - offset)
            raw = self.reader.read(offset, length)
            try:
                data = self.codec.expand(raw, self.cluster)
            except ValueError as error:
                raise Damaged(BROKEN_CLUSTER, at(offset), reason=str(error)) from None
            if len(data) < self.cluster:
                raise Damaged(SHORT_CLUSTER, at(offset), count=len(data))
            return data
        offset = entry & OFFSET
        if not offset or (self.header.version == 3 and entry & ZERO):
            return None
        return self.reader.read(offset, self.cluster)

    def facts(self) -> dict[str, str]:
        """Version, cluster size and compression."""
        return {
            "version": f"{self.header.version} (compat {'0.10' if self.header.version == 2 else '1.1'})",
            "clusters": f"{self.cluster} bytes",
            "compression": "zstd" if self.header.compression == 1 else "deflate",
        }

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece; None when no cluster of it is allocated."""
        start, wanted = index * pieces.PIECE, pieces.length(index, self.size)
        numbers = range(start // self.cluster, -(-(start + wanted) // self.cluster))
        per_table = self.cluster // 8
        if not any(self.l1[numbers[0] // per_table : numbers[-1] // per_table + 1]):
            return None
        clusters = [self.cluster_data(entry) if (entry := self.entry(number)) else None for number in numbers]
        if all(data is None for data in clusters):
            return None
        whole = b"".join(bytes(self.cluster) if data is None else data for data in clusters)
        return whole[:wanted]


def _backing(reader: BoundedReader, header: Header) -> str:
    """The backing file's name, in words; empty when there is none that can be read."""
    length = min(header.backing_size, _LONGEST_NAME)
    if not header.backing_offset or header.backing_offset + length > reader.size:
        return ""
    return " " + reader.read(header.backing_offset, length).decode("utf-8", "replace")


def _refuse(header: Header, backing: str) -> None:
    """Raise Damaged for what makes the file no disk of its own, or no disk at all."""
    if header.backing_offset:
        raise Damaged(NEEDS_BACKING, at(8), name=backing)
    if header.crypt:
        raise Damaged(ENCRYPTED, at(32))
    if not 9 <= header.cluster_bits <= 21:
        raise Damaged(CLUSTER_BITS, at(20), bits=header.cluster_bits)
    for bit, code in ((_DATA_FILE, NEEDS_DATA_FILE), (_EXTENDED_L2, EXTENDED_ENTRIES)):
        if header.incompatible & bit:
            raise Damaged(code, at(72))
    if header.incompatible >> 5:
        raise Damaged(FEATURES, at(72), features=header.incompatible)
    if header.compression not in (0, 1):
        raise Damaged(COMPRESSION, at(104), type=header.compression)
    if not 0 < header.size <= 1 << 56:
        raise Damaged(BAD_SIZE, at(24), size=header.size)
    if header.l1_size * 8 > MOST_L1:
        raise Damaged(LARGE_L1, at(36))
    if header.refcount_clusters << header.cluster_bits > _MOST_REFCOUNTS:
        raise Damaged(LARGE_REFCOUNTS, at(56))
    if header.refcount_order > 6:
        raise Damaged(REFCOUNT_ORDER, at(96), order=header.refcount_order)


def _longs(reader: BoundedReader, offset: int, count: int) -> array[int]:
    return read_words("Q", reader.read(offset, count * 8), "big")


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check header, tables, refcounts and every compressed cluster's window."""
    header = read_header(reader)
    yield from _lint_header(header)
    disk = Qcow2Disk(reader)
    yield from _lint_for_xen(disk)
    found = _Recount(disk)
    yield from found.follow()
    yield from found.compare()


def _lint_header(header: Header) -> Iterator[Finding]:
    if header.compression == 1:
        yield Finding(ZSTD_CLUSTERS, at(104))
    if header.version == 3:
        yield Finding(VERSION_3, at(4))
    if header.incompatible & _DIRTY:
        yield Finding(DIRTY, at(72))
    if header.incompatible & _CORRUPT:
        yield Finding(CORRUPT, at(72))
    if bool(header.incompatible & ZSTD) != (header.compression == 1):
        yield Finding(FEATURE_BIT, at(72))
    if header.snapshots:
        yield Finding(SNAPSHOTS, at(60), count=header.snapshots)
    if header.size % 512:
        yield Finding(ODD_SIZE, at(24))


def _lint_for_xen(disk: Qcow2Disk) -> Iterator[Finding]:
    """Check what XCP-ng's importer and Xen Orchestra's reader want.

    The one (mirage/ocaml-qcow, lib/qcow_stream.ml) reads once and cannot go back: header, refcount table,
    L1 table, L2 tables as L1 has them, then the clusters, without a gap. The other (@xen-orchestra/qcow2)
    takes no notice of the compressed bit.
    """
    header, cluster = disk.header, disk.cluster
    tables = [entry & OFFSET for entry in disk.l1 if entry & OFFSET]
    order = [cluster, header.l1_offset, *tables]
    behind = max([header.l1_offset + 8 * header.l1_size, *(offset + cluster for offset in tables)])
    count, low, high = 0, 1 << 62, 0
    for group in range(len(disk.l1)):
        for entry in disk.table(group):
            if entry & COMPRESSED:
                yield Finding(COMPRESSED_FOR_XCP, at(header.l1_offset))
                return
            if place := entry & OFFSET:
                count, low, high = count + 1, min(low, place), max(high, place)
    gapless = not count or (low == -(-behind // cluster) * cluster and high == low + (count - 1) * cluster)
    if header.refcount_offset != cluster or order != sorted(order) or not gapless:
        yield Finding(NO_STREAM, at(header.l1_offset))


class _Recount:
    """Follows every table once and counts the references to each host cluster."""

    def __init__(self, disk: Qcow2Disk) -> None:
        self.disk, self.reader, self.cluster = disk, disk.reader, disk.cluster
        clusters = -(-self.reader.size // self.cluster)
        if clusters > _MOST_CLUSTERS:
            raise Damaged(TOO_MANY, at(0), count=clusters)
        self.counted = array("H", bytes(2 * clusters))
        self.left = min(_MOST_EXPANDED, (1 << 30) + _EXPLAINED * self.reader.allocated())

    def follow(self) -> Iterator[Finding]:
        """Walk header, refcount structures, L1, L2 and data; an L2 table once, however often named."""
        header, disk = self.disk.header, self.disk
        yield from self._use(0, self.cluster, at(0))
        yield from self._use(header.l1_offset, header.l1_size * 8, at(40))
        yield from self._use(header.refcount_offset, header.refcount_clusters * self.cluster, at(48))
        yield from self._refcount_blocks()
        yield from self._snapshots()
        yield from self._bitmaps()
        yield from self._l1(disk.l1, header.l1_offset)

    def _l1(self, table: array[int], start: int) -> Iterator[Finding]:
        """Walk a tree of tables: the disk's own, or a snapshot's."""
        visited = set()
        for index, entry in enumerate(table):
            offset = entry & OFFSET
            where = at(start + index * 8)
            if not offset:
                continue
            if offset % self.cluster:
                yield Finding(UNALIGNED_L1, where)
                continue
            yield from self._use(offset, self.cluster, where)
            if offset in visited:
                yield Finding(SHARED_L2, where)
                continue
            visited.add(offset)
            yield from self._l2(offset)

    def _snapshots(self) -> Iterator[Finding]:
        """The table of internal snapshots, and what each of them holds."""
        header, place = self.disk.header, self.disk.header.snapshots_offset
        start = place
        for _ in range(min(header.snapshots, _MOST_SNAPSHOTS)):
            l1_at, l1_size, id_size, name_size, *_, extra = _SNAPSHOT.unpack(
                self.reader.read(place, _SNAPSHOT.size)
            )
            yield from self._use(l1_at, l1_size * 8, at(place))
            yield from self._l1(_longs(self.reader, l1_at, min(l1_size, MOST_L1 // 8)), l1_at)
            place += -(-(_SNAPSHOT.size + extra + id_size + name_size) // 8) * 8
        yield from self._use(start, place - start, at(60))

    def _bitmaps(self) -> Iterator[Finding]:
        """Persistent bitmaps: their directory, tables and clusters."""
        header = self.disk.header
        if not header.autoclear & _BITMAPS_RIGHT:
            return
        for kind, content in extensions(self.reader, header):
            if kind != _BITMAPS or len(content) < 24:
                continue
            count, _, size, start = struct.unpack_from(">IIQQ", content)
            yield from self._use(start, size, at(start))
            place = start
            for _ in range(min(count, _MOST_SNAPSHOTS)):
                row = _BITMAP.unpack(self.reader.read(place, _BITMAP.size))
                table_at, entries, name_size, extra = row[0], row[1], row[5], row[6]
                yield from self._use(table_at, entries * 8, at(place))
                for number, entry in enumerate(_longs(self.reader, table_at, entries)):
                    if data := entry & OFFSET:
                        yield from self._use(data, self.cluster, at(table_at + 8 * number))
                place += -(-(_BITMAP.size + name_size + extra) // 8) * 8

    def _l2(self, offset: int) -> Iterator[Finding]:
        for row, entry in enumerate(_longs(self.reader, offset, self.cluster // 8)):
            if not entry:
                continue
            where = at(offset + row * 8)
            if entry & COMPRESSED:
                yield from self._compressed(entry, where)
                continue
            data = entry & OFFSET
            if data % self.cluster:
                yield Finding(UNALIGNED_L2, where)
            elif data:
                yield from self._use(data, self.cluster, where)

    def _compressed(self, entry: int, where: str) -> Iterator[Finding]:
        start, length = self.disk.packed(entry)
        if entry & COPIED:
            yield Finding(OWNED, where)
        if start >= self.reader.size or start + length > -(-self.reader.size // 512) * 512:
            yield Finding(CLUSTER_PAST_END, where)
            return
        yield from self._use(start & ~511, (start + length) - (start & ~511), where)
        if self.left <= 0:
            return
        self.left -= self.cluster
        if self.left <= 0:
            yield Finding(NOT_EXPANDED, where)
            return
        raw = self.reader.read(start, min(length, self.reader.size - start))
        try:
            if len(self.disk.codec.expand(raw, self.cluster)) != self.cluster:
                yield Finding(SHORT_PACKED, at(start))
            elif self.disk.header.compression == 0 and not codec.keeps_window(raw, 12, self.cluster):
                yield Finding(WIDE_WINDOW, at(start))
        except ValueError:
            yield Finding(BROKEN_PACKED, at(start))

    def _refcount_blocks(self) -> Iterator[Finding]:
        header = self.disk.header
        length = header.refcount_clusters * self.cluster
        self.table = _longs(self.reader, header.refcount_offset, length // 8)
        for index, entry in enumerate(self.table):
            if entry:
                yield from self._use(entry, self.cluster, at(header.refcount_offset + index * 8))

    def _use(self, offset: int, length: int, where: str) -> Iterator[Finding]:
        """Count a reference to every host cluster of a range."""
        if not length:
            return
        first, last = offset // self.cluster, (offset + length - 1) // self.cluster
        if last >= len(self.counted):
            yield Finding(PAST_END, where)
            return
        for cluster in range(first, last + 1):
            self.counted[cluster] = min(self.counted[cluster] + 1, 0xFFFF)

    def compare(self) -> Iterator[Finding]:
        """Compare the counts with the file's refcounts: too low corrupts on write, too high wastes space."""
        bits = 1 << self.disk.header.refcount_order
        per_block = self.cluster * 8 // bits
        for index in range(-(-len(self.counted) // per_block)):
            offset = self.table[index] if index < len(self.table) else 0
            raw = self.reader.read(offset, self.cluster) if offset else bytes(self.cluster)
            low = index * per_block
            counts = self.counted[low : low + per_block]
            if bits == 16 and pack_words(counts, "big").ljust(self.cluster, b"\0") == raw:
                continue
            if not any(counts) and not any(raw):
                continue
            for row, counted in enumerate(counts):
                stored = _bits(raw, row, bits)
                if stored == counted:
                    continue
                where = at(offset + row * bits // 8) if offset else f"cluster {low + row}"
                if stored < counted:
                    yield Finding(LOW_REFCOUNT, where)
                else:
                    yield Finding(HIGH_REFCOUNT, where)


def _bits(raw: bytes, row: int, bits: int) -> int:
    if bits >= 8:
        return int.from_bytes(raw[row * bits // 8 : (row + 1) * bits // 8], "big")
    return raw[row * bits // 8] >> (row * bits % 8) & ((1 << bits) - 1)
