"""QCOW2 with compressed clusters, for KVM.

Layout and fields follow QEMU's docs/interop/qcow2.txt. Big-endian; clusters of 64 KiB. Compressed clusters
carry raw deflate with a window of 4 KiB, as QEMU itself writes and every reader takes it, or Zstandard
where it is asked for. The file is written front to back; only the header cluster comes last.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from build.formats.lib import codec, pieces
from build.formats.lib.codec import Deflate, Zstandard
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, Finding, at
from build.formats.lib.format import DEBIAN, Format, Kind, Machine, Match, Options, Target, Template, level
from build.formats.lib.reader import BoundedReader
from build.formats.lib.words import pack_words, read_words
from build.formats.lib.writer import Units, put

CLUSTER = pieces.UNIT
PER_L2 = CLUSTER // 8
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET = 0x00FFFFFFFFFFFE00
DEFLATE = Deflate(12)
KVM = "QEMU, KVM"
_DIRTY, _CORRUPT, _DATA_FILE, _ZSTD, _EXTENDED_L2 = 1, 2, 4, 8, 16
_MOST_L1 = 32 << 20
_MOST_CLUSTERS = 1 << 25
_MOST_REFCOUNTS = 8 << 20
_MOST_EXPANDED = 64 << 30
_EXPLAINED = 64
"""Times its own size that a file's compressed clusters may expand to: entries may name one time and again."""

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_MORE = struct.Struct(">QQQIIB7x")
_PIECES_PER_L2 = PER_L2 * CLUSTER // pieces.PIECE


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


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that cannot be a QCOW2."""
    if size % 512 or not size:
        raise Unsupported(
            f"a QCOW2 must be whole sectors of 512 bytes, the disk has {size} bytes", "build the disk again"
        )
    if size > _MOST_L1 // 8 * PER_L2 * CLUSTER:
        raise Unsupported(
            "the disk is larger than a QCOW2 with clusters of 64 KiB can be (2 PiB)", "make SIZE smaller"
        )


class Qcow2Writer:
    """Writes compressed clusters byte to byte, each L2 table after its clusters, the rest at the end."""

    def __init__(
        self, file: BinaryIO, size: int, version: int = 2, codec: Deflate | Zstandard | None = DEFLATE
    ) -> None:
        check_size(size)
        if version == 2 and isinstance(codec, Zstandard):
            raise Unsupported("QCOW2 version 2 knows no zstd", "set version 3, or compression deflate")
        self.file, self.size, self.version, self.codec = file, size, version, codec
        self.l1 = array("Q", bytes(8 * -(-size // (PER_L2 * CLUSTER))))
        self.l2 = array("Q", bytes(CLUSTER))
        self.group = 0
        self.position = CLUSTER
        self.refcounts = array("H", [1])
        file.seek(CLUSTER)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the clusters of a piece; zero clusters stay unallocated."""
        if index // _PIECES_PER_L2 != self.group:
            self._end_group()
            self.group = index // _PIECES_PER_L2
        first = index * (pieces.PIECE // CLUSTER)
        packed = units[self.codec] if self.codec else pieces.units(data)
        out = bytearray()
        start = self.position
        for offset, unit in enumerate(packed):
            if unit is None:
                continue
            place = offset * CLUSTER
            if self.codec and place + CLUSTER > len(data):  # an odd disk's last cluster is a whole one, too
                unit = self.codec.compress(data[place:].ljust(CLUSTER, b"\0"))
            entry = (first + offset) % PER_L2
            if self.codec and len(unit) < CLUSTER:
                self.l2[entry] = self._take_packed(len(unit))
                out += unit
            else:
                self._align()
                out += bytes(self.position - start - len(out))
                self.l2[entry] = self._take_cluster() | COPIED
                out += data[place : place + CLUSTER].ljust(CLUSTER, b"\0")
        self.file.write(out)

    def close(self, seed: str) -> None:
        """Write the tables behind the data, then the header."""
        self._end_group()
        l1_at = self._append(pack_words(self.l1, "big"))
        blocks, table_clusters = refcount_clusters(self.position // CLUSTER)
        block_at = self.position + table_clusters * CLUSTER
        self._grow(self.position // CLUSTER + table_clusters + blocks)
        table_at = self._append(
            pack_words(array("Q", range(block_at, block_at + blocks * CLUSTER, CLUSTER)), "big"), counted=True
        )
        self._append(pack_words(self.refcounts, "big"), counted=True)
        self.file.truncate(self.position)
        put(self.file, 0, self._header(l1_at, table_at, table_clusters).ljust(CLUSTER, b"\0"))

    def _take_packed(self, length: int) -> int:
        """Reserve bytes for a compressed cluster; answers its L2 entry."""
        start = self.position
        self.position += length
        last = (self.position - 1) // 512
        self._count(start // CLUSTER, last * 512 // CLUSTER)
        return COMPRESSED | (last - start // 512) << 54 | start

    def _take_cluster(self) -> int:
        start = self.position
        self.position += CLUSTER
        self._count(start // CLUSTER, start // CLUSTER)
        return start

    def _count(self, first: int, last: int) -> None:
        self._grow(last + 1, 0)
        for cluster in range(first, last + 1):
            self.refcounts[cluster] += 1

    def _grow(self, clusters: int, value: int = 1) -> None:
        while len(self.refcounts) < clusters:
            self.refcounts.append(value)

    def _align(self) -> None:
        self.position = -(-self.position // CLUSTER) * CLUSTER

    def _append(self, content: bytes, counted: bool = False) -> int:
        """Write a table at the next cluster boundary; answers its offset."""
        self._align()
        start = self.position
        self.file.seek(start)
        self.file.write(content.ljust(-(-len(content) // CLUSTER) * CLUSTER, b"\0"))
        self.position += -(-len(content) // CLUSTER) * CLUSTER
        if not counted:
            self._count(start // CLUSTER, self.position // CLUSTER - 1)
        return start

    def _end_group(self) -> None:
        if any(self.l2):
            self.l1[self.group] = self._append(pack_words(self.l2, "big")) | COPIED
            self.l2 = array("Q", bytes(CLUSTER))

    def _header(self, l1_at: int, table_at: int, table_clusters: int) -> bytes:
        head = pack_header(self.size, len(self.l1), l1_at, table_at, table_clusters, self.version)
        if self.version == 2:
            return head
        zstd = isinstance(self.codec, Zstandard)
        return head + _MORE.pack(_ZSTD if zstd else 0, 0, 0, 4, 112, int(zstd))


def refcount_clusters(used: int) -> tuple[int, int]:
    """Clusters of refcount blocks and of the table over them, for `used` others; they count themselves."""
    blocks = table = 0
    while True:
        needed = -(-(used + blocks + table) // (CLUSTER // 2))
        if (needed, -(-needed * 8 // CLUSTER)) == (blocks, table):
            return blocks, table
        blocks, table = needed, -(-needed * 8 // CLUSTER)


def pack_header(
    size: int, l1_entries: int, l1_at: int, table_at: int, table_clusters: int, version: int = 2
) -> bytes:
    """The 72 bytes that every version begins with: clusters of 64 KiB, no backing file, no snapshots."""
    return _HEADER.pack(
        b"QFI\xfb", version, 0, 0, 16, size, 0, l1_entries, l1_at, table_at, table_clusters, 0, 0
    )


def read_header(reader: BoundedReader) -> Header:
    """The header; Damaged when no reader could go on from it."""
    raw = reader.read(0, 72)
    fields = _HEADER.unpack(raw)
    if fields[0] != b"QFI\xfb":
        raise Damaged(at(0), "no QCOW2 header here", KVM)
    if fields[1] not in (2, 3):
        raise Damaged(at(4), f"QCOW version {fields[1]} is not 2 or 3", KVM)
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


@dataclass
class Qcow2Disk:
    """Reads a QCOW2 of any maker that has no backing file, external data or encryption."""

    reader: BoundedReader

    def __post_init__(self) -> None:
        header = self.header = read_header(self.reader)
        _refuse(header)
        self.size = header.size
        self.cluster = 1 << header.cluster_bits
        self.codec: Deflate | Zstandard = Zstandard() if header.compression == 1 else DEFLATE
        span = self.cluster // 8 * self.cluster
        needed = -(-self.size // span)
        if header.l1_size < needed:
            raise Damaged(at(36), f"{header.l1_size} L1 entries for a disk that needs {needed}", KVM)
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
                raise Damaged(at(offset), f"a compressed cluster cannot be expanded: {error}", KVM) from None
            if len(data) < self.cluster:
                raise Damaged(at(offset), f"a compressed cluster holds {len(data)} bytes", KVM)
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


def _refuse(header: Header) -> None:
    """Raise Damaged for what makes the file no disk of its own, or no disk at all."""
    if header.backing_offset:
        raise Damaged(
            at(8), "this QCOW2 needs its backing file", "every importer", "flatten it with a conversion"
        )
    if header.crypt:
        raise Damaged(at(32), "this QCOW2 is encrypted", "CloudStack", "export it unencrypted")
    if not 9 <= header.cluster_bits <= 21:
        raise Damaged(at(20), f"cluster_bits {header.cluster_bits} is not from 9 to 21", KVM)
    for bit, text in (
        (_DATA_FILE, "needs its external data file"),
        (_EXTENDED_L2, "uses extended L2 entries"),
    ):
        if header.incompatible & bit:
            raise Damaged(at(72), f"this QCOW2 {text}", "older QEMU, CloudStack", "convert it again")
    if header.incompatible >> 5:
        raise Damaged(at(72), f"unknown incompatible features {header.incompatible:#x}", KVM)
    if header.compression not in (0, 1):
        raise Damaged(at(104), f"compression type {header.compression} is not known", KVM)
    if not 0 < header.size <= 1 << 56:
        raise Damaged(at(24), f"a virtual size of {header.size} bytes is not possible", KVM)
    if header.l1_size * 8 > _MOST_L1:
        raise Damaged(at(36), "the L1 table is larger than QEMU takes (32 MiB)", KVM)
    if header.refcount_clusters << header.cluster_bits > _MOST_REFCOUNTS:
        raise Damaged(at(56), "the refcount table is larger than QEMU takes (8 MiB)", KVM)
    if header.refcount_order > 6:
        raise Damaged(at(96), f"refcount order {header.refcount_order} is more than 6", KVM)


def _longs(reader: BoundedReader, offset: int, count: int) -> array[int]:
    return read_words("Q", reader.read(offset, count * 8), "big")


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check header, tables, refcounts and every compressed cluster's window."""
    header = read_header(reader)
    yield from _lint_header(header)
    disk = Qcow2Disk(reader)
    found = _Recount(disk)
    yield from found.follow()
    yield from found.compare()


def _lint_header(header: Header) -> Iterator[Finding]:
    if header.compression == 1:
        yield Finding(
            "warning", at(104), "clusters are zstd", "QEMU before 5.1, CloudStack on EL7", "use deflate"
        )
    if header.version == 3:
        yield Finding(
            "info", at(4), "version 3 (compat 1.1)", "QEMU before 1.1 (EL6)", "use version 2 for such hosts"
        )
    if header.incompatible & _DIRTY:
        yield Finding("warning", at(72), "the refcounts are marked dirty", KVM, "run qemu-img check -r all")
    if header.incompatible & _CORRUPT:
        yield Finding("error", at(72), "the file is marked corrupt", KVM, "run qemu-img check -r all")
    if bool(header.incompatible & _ZSTD) != (header.compression == 1):
        yield Finding("error", at(72), "compression type and its feature bit disagree", KVM, "convert again")
    if header.snapshots:
        yield Finding(
            "warning",
            at(60),
            f"{header.snapshots} internal snapshots",
            "CloudStack",
            "convert the disk without them",
        )
    if header.size % 512:
        yield Finding("error", at(24), "the virtual size is not whole sectors", KVM, "convert again")


class _Recount:
    """Follows every table once and counts the references to each host cluster."""

    def __init__(self, disk: Qcow2Disk) -> None:
        self.disk, self.reader, self.cluster = disk, disk.reader, disk.cluster
        clusters = -(-self.reader.size // self.cluster)
        if clusters > _MOST_CLUSTERS:
            text = f"{clusters} host clusters are more than this check counts"
            raise Damaged(at(0), text, "nobody by itself", "look at it with qemu-img check")
        self.counted = array("H", bytes(2 * clusters))
        self.left = min(_MOST_EXPANDED, (1 << 30) + _EXPLAINED * self.reader.allocated())

    def follow(self) -> Iterator[Finding]:
        """Walk header, refcount structures, L1, L2 and data; an L2 table once, however often named."""
        header, disk = self.disk.header, self.disk
        yield from self._use(0, self.cluster, at(0))
        yield from self._use(header.l1_offset, header.l1_size * 8, at(40))
        yield from self._use(header.refcount_offset, header.refcount_clusters * self.cluster, at(48))
        yield from self._refcount_blocks()
        visited = set()
        for index, entry in enumerate(disk.l1):
            offset = entry & OFFSET
            where = at(header.l1_offset + index * 8)
            if not offset:
                continue
            if offset % self.cluster:
                yield Finding("error", where, "an L1 entry is not aligned to a cluster", KVM, "convert again")
                continue
            yield from self._use(offset, self.cluster, where)
            if offset in visited:
                yield Finding("error", where, "two L1 entries name one L2 table", KVM, "convert again")
                continue
            visited.add(offset)
            yield from self._l2(offset)

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
                yield Finding("error", where, "an L2 entry is not aligned to a cluster", KVM, "convert again")
            elif data:
                yield from self._use(data, self.cluster, where)

    def _compressed(self, entry: int, where: str) -> Iterator[Finding]:
        start, length = self.disk.packed(entry)
        if entry & COPIED:
            yield Finding(
                "error", where, "a compressed cluster is marked as owned alone", KVM, "convert again"
            )
        if start >= self.reader.size or start + length > -(-self.reader.size // 512) * 512:
            yield Finding(
                "error",
                where,
                "a compressed cluster lies past the end of the file",
                KVM,
                "copy the file again",
            )
            return
        yield from self._use(start & ~511, (start + length) - (start & ~511), where)
        if self.left <= 0:
            return
        self.left -= self.cluster
        if self.left <= 0:
            yield Finding("info", where, "clusters from here on were not expanded: there is too much in them")
            return
        raw = self.reader.read(start, min(length, self.reader.size - start))
        try:
            if len(self.disk.codec.expand(raw, self.cluster)) != self.cluster:
                yield Finding(
                    "error", at(start), "a compressed cluster is too short", KVM, "copy the file again"
                )
            elif self.disk.header.compression == 0 and not codec.keeps_window(raw, 12, self.cluster):
                yield Finding(
                    "warning",
                    at(start),
                    "a compressed cluster needs a window of more than 4 KiB",
                    "readers with hardware or streaming inflate",
                    "compress with a window of 4 KiB",
                )
        except ValueError:
            yield Finding(
                "error", at(start), "a compressed cluster cannot be expanded", KVM, "copy the file again"
            )

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
            yield Finding(
                "error", where, "a table names a cluster past the end of the file", KVM, "copy the file again"
            )
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
                    yield Finding("error", where, "a refcount is too low", KVM, "run qemu-img check -r all")
                else:
                    yield Finding(
                        "warning",
                        where,
                        "a refcount is too high: leaked space",
                        "",
                        "run qemu-img check -r leaks",
                    )


def _bits(raw: bytes, row: int, bits: int) -> int:
    if bits >= 8:
        return int.from_bytes(raw[row * bits // 8 : (row + 1) * bits // 8], "big")
    return raw[row * bits // 8] >> (row * bits % 8) & ((1 << bits) - 1)


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.CERTAIN if head.startswith(b"QFI\xfb") else Match.NO


def _options(settings: Options, compress: str) -> dict[str, Any]:
    given = dict(settings["qcow2"])
    _check(given["version"], given["compression"])
    if given["compression"] == "deflate" and compress:
        given["compression"] = "none"  # deflate inside would only hinder what is put around it
    return given


def _check(version: int, compression: str) -> None:
    if version == 2 and compression == "zstd":
        raise Unsupported("QCOW2 version 2 knows no zstd", "set version 3, or compression deflate")


def _write(target: Target, options: Options) -> Qcow2Writer:
    compression, version = options.get("compression", "deflate"), int(options.get("version", 2))
    codecs: dict[str, Deflate | Zstandard | None] = {
        "deflate": Deflate(12, level(options, DEFLATE.level)),
        "zstd": Zstandard(),
        "none": None,
    }
    if compression not in codecs:
        raise Unsupported(f"unknown QCOW2 compression {compression!r}", f"use one of {', '.join(codecs)}")
    if version not in (2, 3):
        raise Unsupported(
            f"QCOW2 version {version} is not 2 or 3", "set 2 for every KVM host, 3 for QEMU 1.1 and later"
        )
    _check(version, compression)
    return Qcow2Writer(target.file, target.size, version, codecs[compression])


KIND = Kind(
    name="qcow2",
    suffix="qcow2",
    version=1,
    driver="qcow2",
    recognize=_recognize,
    write=_write,
    read=Qcow2Disk,
    lint=lint,
    check_size=check_size,
    options=_options,
)
FORMATS = (
    Format(
        name="qcow2",
        help="QCOW2 for KVM",
        kind=KIND,
        file="{imagename}.qcow2",
        machine=Machine("virtio", "virtio", ("bios", "uefi")),
        cloudstack=Template("KVM", "QCOW2", "kvm.qcow2.bz2", DEBIAN, ("kvm", "lxc")),
    ),
)
