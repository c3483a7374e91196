"""XVA: what XenServer and XCP-ng export, a tar of `ova.xml` and of each disk's chunks of 1 MiB. Only read.

Facts from xen-api, ocaml/xapi: importexport.ml and import.ml (ova.xml is an XML-RPC value with `version` and
`objects`; its disks are the VDIs of VBDs that are no CD, on a storage that is none of ISO files) and
stream_vdi.ml (`Ref:N/00000012` and, right behind it, its sum in `.checksum`, SHA-1, or `.xxhash`; chunks in
rising order, disks in the order of their names as text; the first and the last chunk are always there,
another that is missing is zero). A chunk of no bytes keeps a connection alive: the next one has its place.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from build.formats.lib import ovf, pieces
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.format import Kind, Match, unwritten
from build.formats.lib.inner import Inner
from build.formats.lib.platforms import XCP_NG, XENSERVER
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import BLOCK, Member, Walk, is_tar, no_end, padded

CHUNK = 1 << 20
DESCRIPTION = "ova.xml"
LARGEST_DESCRIPTION = 16 << 20
MOST_CHUNKS = 16 << 20
"""Of all disks, holes counted: 16 TiB, as much as one disk of XCP-ng may have. Their table takes 128 MiB."""

GROUP = Group(
    "XVA", "Exports of XenServer and XCP-ng", "xen-api, ocaml/xapi: importexport.ml, import.ml, stream_vdi.ml"
)
_XEN = (XENSERVER, XCP_NG)
_AGAIN = "export the VM again"
CUT_OFF = Damage("XVA001", "its last chunk is not in the archive: the export is cut off", _XEN, _AGAIN)
OTHER_SUM = Damage("XVA002", "chunk {number} of {named} is not what its SHA-1 says", _XEN, _AGAIN)
NOT_AN_EXPORT = Damage("XVA003", f"the export does not begin with {DESCRIPTION}", _XEN, _AGAIN)
LARGE_DISKS = Damage(
    "XVA004", "disks of {tib} TiB together, more than is read here", _XEN, "export fewer disks at a time"
)
SCATTERED = Damage("XVA005", "chunks of {reference} stand in more than one place", _XEN, _AGAIN)
NOT_RISING = Damage("XVA006", "chunk {digits} of {reference} is not in rising order", _XEN, _AGAIN)
BEYOND = Damage("XVA007", "a chunk beyond the {size} bytes of {named}", _XEN, _AGAIN)
OTHER_LENGTH = Damage("XVA008", "a chunk of {size} bytes instead of {least}", _XEN, _AGAIN)
NO_DISK = Damage("XVA009", "the VM has no disk", _XEN, "export one with a disk")
LARGE = Damage("XVA010", "it has more than 16 MiB", _XEN, _AGAIN)
UNREADABLE = Damage("XVA011", "it cannot be read: {reason}", _XEN, _AGAIN)
OLD_FORM = Damage(
    "XVA012", "this export is of the form before XenServer 4, which is not read here", _XEN, _AGAIN
)
BAD_SIZE = Damage("XVA013", "the virtual size of {reference} is no number", _XEN, _AGAIN)
NO_ROWS = Damage("XVA014", "it has no {name}", _XEN, _AGAIN)
OTHER_MEMBER = Code("XVA015", "error", "a member that is neither a chunk nor its sum", _XEN, _AGAIN)
LOST_SUM = Code("XVA016", "error", "a sum that does not stand behind its chunk", _XEN, _AGAIN)
NO_SUM = Code("XVA017", "error", "a chunk without its sum behind it", _XEN, _AGAIN)
ORDER = Code("XVA018", "error", "the disks do not come in the order of their names", _XEN, _AGAIN)
UNKNOWN_DISK = Code("XVA019", "error", f"chunks of a disk that {DESCRIPTION} does not describe", _XEN, _AGAIN)
_CHUNK = re.compile(r"(Ref:[0-9]{1,10})/([0-9]{1,10})(\.checksum|\.xxhash)?")
_SUMS = {".checksum": "SHA-1 (checked with the content)", ".xxhash": "xxHash (not checked here)"}


@dataclass
class XvaDisk:
    """One disk of an export; a chunk that comes with a SHA-1 is held to it when it is read."""

    reader: BoundedReader
    reference: str
    label: str
    size: int
    """Virtual size in bytes."""
    about: dict[str, str] = field(default_factory=dict)
    """Facts of the export."""
    chunks: array[int] = field(default_factory=lambda: array("Q"))
    """Where each chunk lies in the archive; 0 for one of zeros."""
    last: int = 0
    """Bytes that are stored of the last chunk; 0 while it is not there."""

    @property
    def name(self) -> str:
        """Its reference, and what it is called."""
        return f"{self.reference} ({self.label})" if self.label else self.reference

    @property
    def cut(self) -> Damaged | None:
        """What to say of a disk whose last chunk is not there."""
        if self.last or not self.size:
            return None
        return Damaged(CUT_OFF, self.name)

    def piece(self, index: int) -> bytes | None:
        """Bytes of a piece; None when no chunk of it was exported. Raises Damaged."""
        step = pieces.PIECE // CHUNK
        numbers = range(index * step, min((index + 1) * step, len(self.chunks)))
        if numbers.stop == len(self.chunks) and self.cut:
            raise self.cut
        if not any(self.chunks[number] for number in numbers):
            return None
        return b"".join(map(self._chunk, numbers))[: pieces.length(index, self.size)]

    def _chunk(self, number: int) -> bytes:
        place, length = self.chunks[number], self.last if number == len(self.chunks) - 1 else CHUNK
        if not place:
            return bytes(CHUNK)
        data = self.reader.read(place, length)
        behind = place + padded(length)
        if behind + 2 * BLOCK <= self.reader.size:
            sum_file = self.reader.read(behind, 2 * BLOCK)
            named = sum_file[:100].rstrip(b"\0").endswith(b".checksum")
            if named and hashlib.sha1(data).hexdigest().encode() != sum_file[BLOCK : BLOCK + 40]:
                raise Damaged(OTHER_SUM, at(place), number=number, named=self.name)
        return data

    def facts(self) -> dict[str, str]:
        """What the export says of itself."""
        return self.about


class Export:
    """An export: its disks in the order of their devices, and what an importer would not take."""

    def __init__(self, reader: BoundedReader) -> None:
        self.reader = reader
        self.findings: dict[str, Finding] = {}
        walk = Walk(reader)
        members = iter(walk)
        first = next(members, None)
        if first is None or _name(first) != DESCRIPTION:
            raise Damaged(NOT_AN_EXPORT, at(0))
        self.disks, self.known = _describe(reader, first)
        count = sum(-(-disk.size // CHUNK) for disk in self.disks)
        if count > MOST_CHUNKS:
            raise Damaged(LARGE_DISKS, DESCRIPTION, tib=count >> 20)
        for disk in self.disks:
            disk.chunks = array("Q", [0]) * -(-disk.size // CHUNK)
        self._place(members)
        if not walk.ended:
            self.findings["end"] = no_end(reader)
        for number, disk in enumerate(self.disks, 1):
            if disk.cut:
                self.findings[disk.name] = disk.cut.finding.but(disk=number)

    def _tell(self, code: Code, where: str) -> None:
        """Note what an importer refuses, where it is met first: there may be millions of a kind."""
        self.findings.setdefault(code.id, Finding(code, where))

    def _place(self, members: Iterator[Member]) -> None:
        """Find each chunk's place, and its sum behind it."""
        disks = {disk.reference: disk for disk in self.disks}
        current, number, slot, waiting = "", -1, 0, ""
        begun: set[str] = set()
        for member in members:
            where, match = at(member.header_at), _CHUNK.fullmatch(_name(member))
            if match is None:
                if _name(member) != "checksum.xml":
                    self._tell(OTHER_MEMBER, where)
                continue
            reference, digits, suffix = match.groups()
            if suffix:
                if waiting != f"{reference}/{digits}":
                    self._tell(LOST_SUM, where)
                elif self.disks:
                    self.disks[0].about.setdefault("sums", _SUMS[suffix])  # all disks share it
                waiting = ""
                continue
            if waiting:
                self._tell(NO_SUM, where)
            waiting = f"{reference}/{digits}"
            if reference != current:
                if reference < current:
                    self._tell(ORDER, where)
                if reference in begun:
                    raise Damaged(SCATTERED, where, reference=reference)
                begun |= {reference} & disks.keys()
                current, number, slot = reference, -1, 0
            if int(digits) <= number:
                raise Damaged(NOT_RISING, where, digits=digits, reference=reference)
            slot, number = slot + int(digits) - number - 1, int(digits)
            if disk_of := disks.get(reference):
                _take(disk_of, slot, member)
            elif reference not in self.known:
                self._tell(UNKNOWN_DISK, where)
            slot += bool(member.size)
        if waiting:
            self._tell(NO_SUM, at(self.reader.size))


def _take(disk: XvaDisk, slot: int, member: Member) -> None:
    """Note where a chunk lies; raises Damaged for one that is longer or shorter than it can be."""
    if not member.size:
        return
    where, total = at(member.header_at), len(disk.chunks)
    if slot >= total:
        raise Damaged(BEYOND, where, size=disk.size, named=disk.name)
    least = CHUNK if slot < total - 1 else disk.size - slot * CHUNK
    if not least <= member.size <= CHUNK:
        raise Damaged(OTHER_LENGTH, where, size=member.size, least=least)
    disk.chunks[slot] = member.offset
    if slot == total - 1:
        disk.last = member.size


def _name(member: Member) -> str:
    return member.name.removeprefix("./")


def _describe(reader: BoundedReader, member: Member) -> tuple[list[XvaDisk], set[str]]:
    """Disks in the order of their devices, still without chunks, and the references of all VDIs."""
    if member.size > LARGEST_DESCRIPTION:
        raise Damaged(LARGE, DESCRIPTION)
    try:
        root = ovf.parse_xml(reader.read(member.offset, member.size))
    except Damaged as damage:
        raise Damaged(UNREADABLE, DESCRIPTION, reason=damage.finding.text) from None
    if root.tag == "appliance":
        raise Damaged(OLD_FORM, DESCRIPTION)
    top = _plain(root)
    objects = [_Object(row) for row in _rows(top, "objects")]
    vdis = {row.reference: row for row in objects if row.kind == "VDI"}
    storage = {row.reference: row.text("content_type") for row in objects if row.kind == "SR"}
    about = _about(top, objects)
    disks: dict[str, tuple[int, XvaDisk]] = {}
    for drive in objects:
        vdi = vdis.get(drive.text("VDI")) if drive.kind == "VBD" and drive.text("type") != "CD" else None
        if vdi is None or storage.get(vdi.text("SR")) == "iso":
            continue
        size, device = vdi.text("virtual_size"), drive.text("userdevice")
        if not re.fullmatch(r"[0-9]{1,19}", size):
            raise Damaged(BAD_SIZE, DESCRIPTION, reference=vdi.reference)
        disk = XvaDisk(reader, vdi.reference[:60], vdi.text("name_label")[:60], int(size), about)
        order = int(device) if re.fullmatch(r"[0-9]{1,3}", device) else 1000
        disks.setdefault(vdi.reference, (order, disk))
    return [disk for _, disk in sorted(disks.values(), key=lambda row: row[0])], set(vdis)


def _about(top: Any, objects: list[_Object]) -> dict[str, str]:
    version = top.get("version") if isinstance(top, dict) else None
    words = [str(version.get(key, "")) for key in ("product_brand", "product_version")] if version else []
    machine = next((row for row in objects if row.kind == "VM" and row.text("is_a_snapshot") != "1"), None)
    facts = {
        "exported by": " ".join(filter(None, words)),
        "VM": machine.text("name_label") if machine else "",
    }
    return {name: text[:100] for name, text in facts.items() if text}


class _Object:
    """One record of XenServer's database, as XML-RPC says it."""

    def __init__(self, row: Any) -> None:
        record = row if isinstance(row, dict) else {}
        self.kind, self.reference = str(record.get("class", "")), str(record.get("id", ""))
        snapshot = record.get("snapshot")
        self.fields = snapshot if isinstance(snapshot, dict) else {}

    def text(self, name: str) -> str:
        """A plain field; empty when there is none."""
        value = self.fields.get(name, "")
        return value if isinstance(value, str) else ""


def _rows(top: Any, name: str) -> list[Any]:
    rows = top.get(name) if isinstance(top, dict) else None
    if not isinstance(rows, list):
        raise Damaged(NO_ROWS, DESCRIPTION, name=name)
    return rows


def _plain(value: ElementTree.Element) -> Any:
    """An XML-RPC value as text, list or dict; parse_xml bounds how deep they lie in each other."""
    if not len(value):
        return value.text or ""
    inner = value[0]
    if inner.tag == "struct":
        pairs = ((member.findtext("name", ""), member.find("value")) for member in inner.iterfind("member"))
        return {name: _plain(child) for name, child in pairs if child is not None}
    if inner.tag == "array":
        return [_plain(child) for child in inner.iterfind("data/value")]
    return inner.text or ""


def inner(reader: BoundedReader) -> tuple[Inner, ...]:
    """The disks of an export; raises Damaged."""
    return tuple(Inner(disk.name, (), disk=disk) for disk in Export(reader).disks)


def read(reader: BoundedReader) -> XvaDisk:
    """The first disk; raises Damaged."""
    disks = Export(reader).disks
    if not disks:
        raise Damaged(NO_DISK, DESCRIPTION)
    return disks[0]


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check what xapi's import checks, but for the sums: those are checked while a disk is read."""
    yield from Export(reader).findings.values()


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    first = head[:100].split(b"\0")[0].removeprefix(b"./")
    return Match.CERTAIN if first == DESCRIPTION.encode() and is_tar(head) else Match.NO


def _check_size(size: int) -> None:
    """Any: none is written."""


KIND = Kind(
    name="xva",
    suffix="xva",
    version=1,
    driver="",
    recognize=_recognize,
    write=unwritten,
    read=read,
    lint=lint,
    check_size=_check_size,
    inner=inner,
)
FORMATS = ()
