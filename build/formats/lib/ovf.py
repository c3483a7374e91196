"""OVF descriptors: parsed as XML that may be hostile, and checked as vSphere and CloudStack read them.

Rules from the OVF specification (DMTF DSP0243) and from what those two importers take.
"""

from __future__ import annotations

import re
import xml.parsers.expat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import unquote
from xml.etree import ElementTree

from build.formats.lib.findings import Damaged, Finding
from build.formats.lib.hardware import CLOUDSTACK, attribute, is_open, kind_of, lint_system, local
from build.formats.lib.manifest import named
from build.formats.lib.tar import VSPHERE, Member

MOST_ELEMENTS = 50_000
"""Elements and attributes of a descriptor that are kept in memory; real ones have some hundreds."""
LARGEST = 4 << 20
"""Bytes of a descriptor."""
OVF = "http://schemas.dmtf.org/ovf/envelope/1"
OVF2 = "http://schemas.dmtf.org/ovf/envelope/2"
RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
CHUNK = ".{:09d}"
"""End of the name of a chunk, counted from 0 (DSP0243)."""
ISO = "ecma-119.htm"
"""How the format of a CD image ends, as VirtualBox writes it (ApplianceImplExport.cpp)."""
_UNITS = {
    "byte": 1,
    "bytes": 1,
    "kb": 1 << 10,
    "kilobytes": 1 << 10,
    "mb": 1 << 20,
    "megabytes": 1 << 20,
    "gb": 1 << 30,
    "gigabytes": 1 << 30,
    "tb": 1 << 40,
    "terabytes": 1 << 40,
}
"""Units of OVF 0.9 and of old writers, as CloudStack's OVFHelper.java still reads them."""
_NUMBER = re.compile(r"[0-9]{1,20}")


def parse_xml(content: bytes) -> ElementTree.Element:
    """Parse a descriptor that may be hostile: no document type, so no entities of its own."""

    def refuse(*_: object) -> None:
        raise Damaged("OVF", "the descriptor declares a document type", VSPHERE, "remove the DOCTYPE")

    builder = ElementTree.TreeBuilder()
    depth = count = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1 + len(attributes)
        if depth > 100:
            raise Damaged("OVF", "elements are nested more than 100 deep", VSPHERE)
        if count > MOST_ELEMENTS:
            raise Damaged("OVF", f"more than {MOST_ELEMENTS} elements and attributes", VSPHERE)
        builder.start(_expand(name), {_expand(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_expand(name))

    parser = xml.parsers.expat.ParserCreate(namespace_separator="}")
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    except (xml.parsers.expat.ExpatError, ValueError, LookupError) as error:
        raise Damaged(
            "OVF", f"the descriptor is not XML: {error}", VSPHERE, "render the template again"
        ) from None
    return builder.close()


def _expand(name: str) -> str:
    return "{" + name if "}" in name else name


@dataclass(frozen=True)
class FileRef:
    """A file of the package: `File` of References."""

    href: str
    id: str
    size: str
    """As written; empty: not given, which is allowed."""
    compression: str
    """`gzip`, `identity` or empty."""
    chunk: str
    """Bytes of each chunk as written, the last one shorter; empty: one file."""


@dataclass(frozen=True)
class DiskRef:
    """A disk: `Disk` of DiskSection."""

    id: str
    file: FileRef | None
    ref: str
    """ovf:fileRef as written; empty: a disk that the import makes, empty."""
    capacity: str
    units: str
    format: str
    populated: str

    @property
    def where(self) -> str:
        """How findings call it."""
        return f"Disk {self.id[:60]!r}" if self.id else "Disk"


@dataclass(frozen=True)
class Descriptor:
    """What a descriptor says of files and disks; elements are found by local name, so of any OVF."""

    root: ElementTree.Element
    files: tuple[FileRef, ...]
    disks: tuple[DiskRef, ...]

    @property
    def systems(self) -> list[ElementTree.Element]:
        """The virtual machines."""
        return [element for element in self.root.iter() if kind_of(element) == "VirtualSystem"]

    @property
    def stored(self) -> Iterator[tuple[str, FileRef]]:
        """Files with a disk in them, each once, in the order of the disks, with that disk's name."""
        seen: set[str] = set()
        for disk in self.disks:
            if disk.file and disk.file.href not in seen and not is_open(disk.file.href):
                seen.add(disk.file.href)
                if not disk.format.lower().endswith(ISO):
                    yield disk.id, disk.file


def read_descriptor(content: bytes) -> Descriptor:
    """Parse a descriptor; Damaged when it is none."""
    root = parse_xml(content)
    if local(root.tag) != "Envelope":
        raise Damaged(
            "OVF",
            f"the root element is {local(root.tag)[:60]}, not Envelope",
            VSPHERE,
            "put in a descriptor of OVF 1",
        )
    files = tuple(
        FileRef(*(attribute(element, name) for name in ("href", "id", "size", "compression", "chunkSize")))
        for section in root
        if local(section.tag) == "References"
        for element in section
        if local(element.tag) == "File"
    )
    by_id = {file.id: file for file in reversed(files) if file.id}
    names = ("diskId", "fileRef", "capacity", "capacityAllocationUnits", "format", "populatedSize")
    disks = []
    for section in root:
        for element in section:
            if local(element.tag) == "Disk" and kind_of(section) == "DiskSection":
                id_, ref, *rest = (attribute(element, name).strip() for name in names)
                disks.append(DiskRef(id_, by_id.get(ref), ref, *rest))
    return Descriptor(root, files, tuple(disks))


def find_parts(members: Mapping[str, Member], file: FileRef) -> tuple[Member, ...]:
    """The members that hold a file: one, or its chunks in order up to the first that is missing."""
    parts: list[Member] = []
    while file.chunk and (part := named(members, f"{file.href}{CHUNK.format(len(parts))}")) is not None:
        parts.append(part)
    if not parts and (member := named(members, file.href)):
        parts.append(member)
    return tuple(parts)


def capacity(text: str, units: str) -> int | None:
    """Bytes of a capacity in its units; None when it is no number of bytes."""
    unit = _UNITS.get(units.strip().lower() or "byte")
    if unit is None:
        match = re.fullmatch(r"bytes?\s*\*\s*(2|10|1024|1000)\s*\^\s*([0-9]{1,2})", units.strip().lower())
        unit = int(match[1]) ** int(match[2]) if match else None
    if unit is None or not _NUMBER.fullmatch(text):
        return None
    return int(text) * unit


def lint_descriptor(
    content: bytes,
    members: Mapping[str, Member],
    size_of: Callable[[FileRef], int | None],
) -> Iterator[Finding]:
    """Check a descriptor against the files of its archive; `size_of` gives a disk's virtual size in bytes.

    Raises Damaged when it is no descriptor.
    """
    read = read_descriptor(content)
    space = read.root.tag.rpartition("}")[0].lstrip("{")
    if space != OVF:
        yield _version(space)
    yield from _lint_prefixes(content, space)
    yield from _lint_files(members, read)
    yield from _lint_disks(read, size_of)
    yield from _lint_systems(read)


def _version(space: str) -> Finding:
    if space == OVF2:
        return Finding(
            "error",
            "Envelope",
            "a descriptor of OVF 2.0: vSphere takes OVF 1 only",
            VSPHERE,
            "export it as OVF 1.0 or 1.1: inv repair",
        )
    if space.startswith("http://www.vmware.com/schema/ovf/1/"):
        return Finding(
            "warning",
            "Envelope",
            "a descriptor of OVF 0.9, from before the standard",
            "",
            "export it again with a current tool: ovftool reads it and writes OVF 1",
        )
    known = f"the namespace {space[:80]}" if space else "no namespace"
    return Finding(
        "error", "Envelope", f"{known} is not that of an OVF 1 descriptor", VSPHERE, f"write {OVF}"
    )


def _lint_prefixes(content: bytes, space: str) -> Iterator[Finding]:
    text = content.decode("utf-8", "replace")
    if re.search(r"<ovf:(References|File|Disk|DiskSection|VirtualSystem)\b", text):
        yield Finding(
            "warning",
            "Envelope",
            "elements carry the prefix ovf:",
            f"{CLOUDSTACK} before 4.15",
            "make the OVF namespace the default one, keep the prefix on attributes",
        )
    for prefix, name in (("ovf", "href"), ("rasd", "InstanceID")):
        if space == OVF and name in text and f"{prefix}:{name}" not in text:
            yield Finding(
                "warning",
                "Envelope",
                f"{prefix}:{name} is never written with this very prefix",
                f"{CLOUDSTACK} before 4.15" if prefix == "ovf" else "",
                f"write {prefix}:{name}: CloudStack looks for these letters",
            )


def _lint_files(members: Mapping[str, Member], read: Descriptor) -> Iterator[Finding]:
    if not read.files and any(disk.ref for disk in read.disks):
        yield Finding("error", "References", "no file is referenced", VSPHERE, "reference the disk")
    known: set[FileRef] = set()
    for file in read.files:
        if file in known:
            continue
        known.add(file)
        where = f"File {file.href[:100]!r}" if file.href else "File"
        if not file.href:
            yield Finding("error", where, "ovf:href is missing", VSPHERE, "name the file")
            continue
        if is_open(file.href):
            continue
        parts = find_parts(members, file)
        if not parts:
            yield Finding(
                "error",
                where,
                f"the referenced file is not in the archive{', nor its first chunk' if file.chunk else ''}",
                f"{VSPHERE}, {CLOUDSTACK}",
                "add it",
            )
            continue
        if file.chunk:
            yield from _lint_chunks(where, file, parts)
        actual = sum(part.size for part in parts)
        size = file.size.strip()
        if size and not is_open(size) and not _NUMBER.fullmatch(size):
            text = f"ovf:size {size[:30]!r} is no number"
            yield Finding("warning", where, text, CLOUDSTACK, f"write {actual}")
        elif size and not is_open(size) and int(size) != actual:
            yield Finding(
                "error",
                where,
                f"ovf:size {file.size[:30]!r} is not the file's {actual} bytes",
                f"{VSPHERE}, {CLOUDSTACK}",
                "write the size in bytes",
            )


def chunked(name: str, count: int) -> Finding:
    """What there is to say of a file in chunks."""
    return Finding(
        "warning",
        f"File {name[:100]!r}",
        f"the file lies in {count} chunk{'s' * (count > 1)}, as the specification has it: vSphere takes it",
        "virt-v2v, CloudStack",
        "join them: inv repair",
    )


def _lint_chunks(where: str, file: FileRef, parts: tuple[Member, ...]) -> Iterator[Finding]:
    yield chunked(unquote(file.href), len(parts))
    if not file.chunk.isdecimal() or any(part.size != int(file.chunk) for part in parts[:-1]):
        text = f"ovf:chunkSize {file.chunk[:30]!r} is not the size of the chunks"
        yield Finding("error", where, text, VSPHERE, f"write {parts[0].size}")


def _lint_disks(read: Descriptor, size_of: Callable[[FileRef], int | None]) -> Iterator[Finding]:
    if not read.disks:
        yield Finding(
            "warning", "DiskSection", "no disk is described", CLOUDSTACK, "describe the disk, if it has one"
        )
    ids: set[str] = set()
    for disk in read.disks:
        if not disk.id or disk.id in ids:
            text = "ovf:diskId is used twice" if disk.id else "ovf:diskId is missing"
            yield Finding("error", disk.where, text, VSPHERE, "give each disk an id of its own")
        ids.add(disk.id)
        if disk.ref and disk.file is None:
            yield Finding(
                "error",
                disk.where,
                f"ovf:fileRef {disk.ref[:60]!r} names no file",
                VSPHERE,
                "name the file's ovf:id",
            )
        if disk.file:
            yield from _lint_format(disk)
            if not disk.populated:
                yield Finding(
                    "warning",
                    disk.where,
                    "ovf:populatedSize is missing",
                    f"{CLOUDSTACK} before 4.11.1",
                    "write it in bytes",
                )
        yield from _lint_capacity(disk, size_of)


def _lint_format(disk: DiskRef) -> Iterator[Finding]:
    said, _, kind = disk.format.rpartition("#")
    if not disk.format:
        yield Finding("warning", disk.where, "ovf:format is missing", VSPHERE, f"write {STREAM}")
    elif kind.lower() == "streamoptimized" and "vmdk" in said.lower():
        return
    elif "vmdk" in said.lower():
        text = f"ovf:format says {kind[:40]}, not streamOptimized"
        yield Finding("warning", disk.where, text, "", f"write {STREAM}")
    elif disk.format.lower().endswith(ISO):
        text = "a CD image is described as a Disk"
        yield Finding("warning", disk.where, text, VSPHERE, "reference it as a file alone: inv repair")
    else:
        text = f"ovf:format {disk.format[:80]!r} is not VMDK"
        yield Finding("error", disk.where, text, VSPHERE, f"convert the disk, and write {STREAM}")


def _lint_capacity(disk: DiskRef, size_of: Callable[[FileRef], int | None]) -> Iterator[Finding]:
    if not disk.units:
        yield Finding(
            "warning", disk.where, "ovf:capacityAllocationUnits is missing", CLOUDSTACK, 'write "byte"'
        )
    if is_open(disk.capacity) or is_open(disk.units):
        return
    if not disk.capacity:
        yield Finding("error", disk.where, "ovf:capacity is missing", VSPHERE, "write the disk's size")
        return
    said = capacity(disk.capacity, disk.units)
    if said is None:
        unit = f" in units of {disk.units[:30]!r}" if disk.units else ""
        text = f"the capacity {disk.capacity[:30]!r}{unit} is no number of bytes"
        yield Finding("error", disk.where, text, VSPHERE, "write the disk's size in bytes")
        return
    actual = size_of(disk.file) if disk.file else None
    if actual is not None and said != actual and not _rounded(said, actual, disk):
        yield Finding(
            "error",
            disk.where,
            f"the capacity is {said} bytes, the disk's {actual}",
            VSPHERE,
            "write the disk's",
        )


def _rounded(said: int, actual: int, disk: DiskRef) -> bool:
    """Whether a capacity in MiB or GiB is the disk's size, rounded up: the import makes no larger disk."""
    unit = capacity("1", disk.units) or 1
    return unit > 1 and said - unit < actual <= said


def _lint_systems(read: Descriptor) -> Iterator[Finding]:
    systems = read.systems
    several = any(kind_of(child) == "VirtualSystemCollection" for child in read.root)
    if not systems and not several:
        yield Finding("error", "Envelope", "no virtual system", f"{VSPHERE}, {CLOUDSTACK}", "describe one")
    if len(systems) > 1 or any(kind_of(child) == "VirtualSystemCollection" for child in read.root):
        yield Finding(
            "warning",
            "VirtualSystemCollection",
            f"a collection of {len(systems)} virtual system{'s' if len(systems) != 1 else ''}",
            f"{CLOUDSTACK}, ESXi without vCenter",
            "export each machine alone for them",
        )
    disks = frozenset(disk.id for disk in read.disks)
    for system in systems:
        yield from lint_system(system, disks)
