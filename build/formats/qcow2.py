"""QCOW2 with compressed clusters, for KVM.

Layout and fields follow QEMU's docs/interop/qcow2.txt. Big-endian; clusters of 64 KiB. Compressed clusters
carry raw deflate with a window of 4 KiB, as QEMU itself writes and every reader takes it, or Zstandard
where it is asked for. The file is written front to back; only the header cluster comes last.
"""

from __future__ import annotations

from array import array
from typing import Any, BinaryIO

from build.formats.lib import pieces
from build.formats.lib.codec import Deflate, Zstandard
from build.formats.lib.errors import Unsupported
from build.formats.lib.format import DEBIAN, Format, Kind, Machine, Match, Options, Target, Template, level
from build.formats.lib.qcow2 import (
    CLUSTER,
    COMPRESSED,
    COPIED,
    DEFLATE,
    HEADER,
    MORE,
    MOST_L1,
    PER_L2,
    ZSTD,
    Qcow2Disk,
    lint,
)
from build.formats.lib.reader import BoundedReader
from build.formats.lib.words import pack_words
from build.formats.lib.writer import Units, put

PIECES_PER_L2 = PER_L2 * CLUSTER // pieces.PIECE


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that cannot be a QCOW2."""
    if size % 512 or not size:
        raise Unsupported(
            f"a QCOW2 must be whole sectors of 512 bytes, the disk has {size} bytes", "build the disk again"
        )
    if size > MOST_L1 // 8 * PER_L2 * CLUSTER:
        raise Unsupported(
            "the disk is larger than a QCOW2 with clusters of 64 KiB can be (2 PiB)", "make SIZE smaller"
        )


class Qcow2Writer:
    """Writes compressed clusters byte to byte, each L2 table after its clusters, the rest at the end.

    `whole`: without a codec, pieces are written as they are, so that other files can share their bz2.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        version: int = 2,
        codec: Deflate | Zstandard | None = DEFLATE,
        whole: bool = False,
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
        self.whole = whole
        self.layout: list[tuple[int, int, int]] = []
        file.seek(CLUSTER)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the clusters of a piece; zero clusters stay unallocated."""
        if index // PIECES_PER_L2 != self.group:
            self._end_group()
            self.group = index // PIECES_PER_L2
        if self.whole:
            self._add_whole(index, data)
            return
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

    def _add_whole(self, index: int, data: bytes) -> None:
        """Write a piece as it is, its zero clusters, too."""
        self._align()
        self.layout.append((index, self.position, len(data)))
        clusters = -(-len(data) // CLUSTER)
        first = index * (pieces.PIECE // CLUSTER) % PER_L2
        self.file.seek(self.position)
        self.file.write(data.ljust(clusters * CLUSTER, b"\0"))
        for entry in range(first, first + clusters):
            self.l2[entry] = self._take_cluster() | COPIED

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
        return head + MORE.pack(ZSTD if zstd else 0, 0, 0, 4, 112, int(zstd))


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
    return HEADER.pack(
        b"QFI\xfb", version, 0, 0, 16, size, 0, l1_entries, l1_at, table_at, table_clusters, 0, 0
    )


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.CERTAIN if head.startswith(b"QFI\xfb") else Match.NO


def _options(settings: Options, compress: str) -> dict[str, Any]:
    given = dict(settings["qcow2"])
    _check(given["version"], given["compression"])
    if given["compression"] == "deflate" and compress:
        given["compression"] = "none"  # deflate inside would only hinder what is put around it
    if compress == "bz2" and given["compression"] == "none":
        given["whole"] = True
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
    whole = bool(options.get("whole")) and compression == "none"
    return Qcow2Writer(target.file, target.size, version, codecs[compression], whole)


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
