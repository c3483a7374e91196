"""QCOW2 for XCP-ng: uncompressed, every table in front of the data, so that it can be read as a stream.

XCP-ng's importer (mirage/ocaml-qcow, lib/qcow_stream.ml) cannot go back: it wants the header, the refcount
table from the second cluster on, its blocks, L1, the L2 tables in order and then the data, with no cluster
between them that nobody names, and it refuses compressed clusters. Xen Orchestra's reader
(@xen-orchestra/qcow2) takes no notice of the compressed bit and returns wrong bytes. How much data comes is
not known when the tables' room is kept free: so every L2 table is there, also an empty one, and refcount
blocks for a full disk, 1/6500 of the virtual size in all.
"""

from __future__ import annotations

from array import array
from typing import BinaryIO

from build.formats import qcow2
from build.formats.lib import pieces
from build.formats.lib.format import Format, Machine, Options, Target
from build.formats.lib.qcow2 import CLUSTER, COPIED, PER_L2
from build.formats.lib.words import pack_words
from build.formats.lib.writer import Units, put

PER_BLOCK = CLUSTER // 2
"""Refcounts of 16 bits in a cluster."""


class StreamedWriter:
    """Writes clusters in rising order behind room for the tables, each L2 table after its clusters."""

    codec = None

    def __init__(self, file: BinaryIO, size: int) -> None:
        qcow2.check_size(size)
        self.file, self.size = file, size
        clusters = -(-size // CLUSTER)
        self.groups = -(-clusters // PER_L2)
        self.l1_clusters = -(-self.groups * 8 // CLUSTER)
        self.blocks, self.table_clusters = qcow2.refcount_clusters(
            1 + self.l1_clusters + self.groups + clusters
        )
        self.l1_at = (1 + self.table_clusters + self.blocks) * CLUSTER
        self.l2_at = self.l1_at + self.l1_clusters * CLUSTER
        self.position = self.l2_at + self.groups * CLUSTER
        self.l2 = array("Q", bytes(CLUSTER))
        self.group = 0
        file.seek(self.position)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the clusters of a piece; zero clusters stay unallocated."""
        first = index * (pieces.PIECE // CLUSTER)
        if first // PER_L2 != self.group:
            self._end_group()
            self.group = first // PER_L2
        out = []
        for number, unit in enumerate(pieces.units(data), first):
            if unit is None:
                continue
            self.l2[number % PER_L2] = self.position | COPIED
            out.append(unit.ljust(CLUSTER, b"\0"))
            self.position += CLUSTER
        self.file.write(b"".join(out))

    def close(self, seed: str) -> None:
        """Write the tables, the header last."""
        self._end_group()
        self.file.truncate(self.position)
        used = self.position // CLUSTER
        table_at = CLUSTER
        blocks_at = table_at + self.table_clusters * CLUSTER
        put(self.file, table_at, _offsets(blocks_at, self.blocks))
        for block in range(-(-used // PER_BLOCK)):
            counts = array("H", [1]) * min(PER_BLOCK, used - block * PER_BLOCK)
            put(self.file, blocks_at + block * CLUSTER, pack_words(counts, "big"))
        put(self.file, self.l1_at, _offsets(self.l2_at | COPIED, self.groups))
        header = qcow2.pack_header(self.size, self.groups, self.l1_at, table_at, self.table_clusters)
        put(self.file, 0, header.ljust(CLUSTER, b"\0"))

    def _end_group(self) -> None:
        if any(self.l2):
            put(self.file, self.l2_at + self.group * CLUSTER, pack_words(self.l2, "big"))
            self.file.seek(self.position)
            self.l2 = array("Q", bytes(CLUSTER))


def _offsets(first: int, count: int) -> bytes:
    """Table entries for clusters in a row."""
    return pack_words(array("Q", range(first, first + count * CLUSTER, CLUSTER)), "big")


def _write(target: Target, options: Options) -> StreamedWriter:
    return StreamedWriter(target.file, target.size)


KIND = qcow2.KIND
FORMATS = (
    Format(
        name="xcp-qcow2",
        help="QCOW2 for XCP-ng, to be read as a stream",
        kind=KIND,
        file="{imagename}-xcp.qcow2",
        machine=Machine("ide", "rtl8139"),  # Xen's emulated devices, before its own drivers take over
        write=_write,
    ),
)
