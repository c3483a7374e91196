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

from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group
from build.formats.lib.hardware import attribute, is_open, kind_of, lint_system, local
from build.formats.lib.manifest import named
from build.formats.lib.platforms import CLOUDSTACK, VIRT_V2V, VSPHERE, Affected
from build.formats.lib.tar import Member

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

GROUP = Group(
    "OVF",
    "OVF descriptors and their virtual hardware",
    "DMTF DSP0243; VMware's descriptors in govmomi (ovf/fixtures) and open-vmdk (ova-compose); CloudStack, "
    "OVFHelper.java",
)
_VSPHERE = (VSPHERE,)
_BOTH = (VSPHERE, CLOUDSTACK)
_OLD_CLOUDSTACK = (Affected("cloudstack", before="4.15"),)
_LETTERS = "{name}: CloudStack looks for these letters"
DOCTYPE = Damage("OVF001", "the descriptor declares a document type", _VSPHERE, "remove the DOCTYPE")
NESTED = Damage("OVF002", "elements are nested more than 100 deep", _VSPHERE)
MANY_ELEMENTS = Damage("OVF003", "more than {most} elements and attributes", _VSPHERE)
NOT_XML = Damage("OVF004", "the descriptor is not XML: {reason}", _VSPHERE, "render the template again")
OTHER_ROOT = Damage(
    "OVF005", "the root element is {name}, not Envelope", _VSPHERE, "put in a descriptor of OVF 1"
)
VERSION_2 = Code(
    "OVF006",
    "error",
    "a descriptor of OVF 2.0: vSphere takes OVF 1 only",
    _VSPHERE,
    "export it as OVF 1.0 or 1.1: inv repair",
    repair="descriptor",
)
VERSION_09 = Code(
    "OVF007",
    "warning",
    "a descriptor of OVF 0.9, from before the standard",
    fix="export it again with a current tool: ovftool reads it and writes OVF 1",
)
OTHER_SPACE = Code(
    "OVF008", "error", "the namespace {space} is not that of an OVF 1 descriptor", _VSPHERE, f"write {OVF}"
)
NO_SPACE = Code(
    "OVF009", "error", "the descriptor has no namespace: it is not one of OVF 1", _VSPHERE, f"write {OVF}"
)
PREFIXES = Code(
    "OVF010",
    "warning",
    "elements carry the prefix ovf:",
    _OLD_CLOUDSTACK,
    "make the OVF namespace the default one, keep the prefix on attributes",
)
NO_OVF_PREFIX = Code(
    "OVF011",
    "warning",
    "ovf:{name} is never written with this very prefix",
    _OLD_CLOUDSTACK,
    f"write ovf:{_LETTERS}",
)
NO_RASD_PREFIX = Code(
    "OVF012", "warning", "rasd:{name} is never written with this very prefix", fix=f"write rasd:{_LETTERS}"
)
NO_FILE = Code("OVF013", "error", "no file is referenced", _VSPHERE, "reference the disk")
NO_HREF = Code("OVF014", "error", "ovf:href is missing", _VSPHERE, "name the file")
GONE = Code("OVF015", "error", "the referenced file is not in the archive", _BOTH, "add it", repair="refuse")
NO_CHUNK = Code(
    "OVF016",
    "error",
    "the referenced file is not in the archive, nor its first chunk",
    _BOTH,
    "add it",
    repair="refuse",
)
BAD_SIZE = Code(
    "OVF017",
    "warning",
    "ovf:size {said!r} is no number",
    (CLOUDSTACK,),
    "write {actual}",
    repair="descriptor",
)
OTHER_SIZE = Code(
    "OVF018",
    "error",
    "ovf:size {said!r} is not the file's {actual} bytes",
    _BOTH,
    "write the size in bytes",
    repair="descriptor",
)
CHUNKS = Code(
    "OVF019",
    "warning",
    "the file lies in {count} chunks, as the specification has it: vSphere takes it",
    (VIRT_V2V, CLOUDSTACK),
    "join them: inv repair",
    repair="join",
)
ONE_CHUNK = Code(
    "OVF020",
    "warning",
    "the file lies in {count} chunk, as the specification has it: vSphere takes it",
    (VIRT_V2V, CLOUDSTACK),
    "join them: inv repair",
    repair="join",
)
CHUNK_SIZE = Code(
    "OVF021",
    "error",
    "ovf:chunkSize {said!r} is not the size of the chunks",
    _VSPHERE,
    "write {size}",
    repair="join",
)
NO_DISK = Code("OVF022", "warning", "no disk is described", (CLOUDSTACK,), "describe the disk, if it has one")
NO_ID = Code("OVF023", "error", "ovf:diskId is missing", _VSPHERE, "give each disk an id of its own")
SAME_ID = Code("OVF024", "error", "ovf:diskId is used twice", _VSPHERE, "give each disk an id of its own")
NO_SUCH_FILE = Code(
    "OVF025",
    "error",
    "ovf:fileRef {ref!r} names no file",
    _VSPHERE,
    "name the file's ovf:id",
    repair="refuse",
)
NO_POPULATED = Code(
    "OVF026",
    "warning",
    "ovf:populatedSize is missing",
    (Affected("cloudstack", before="4.11.1"),),
    "write it in bytes",
)
NO_FORMAT = Code(
    "OVF027", "warning", "ovf:format is missing", _VSPHERE, f"write {STREAM}", repair="descriptor"
)
OTHER_VMDK = Code(
    "OVF028",
    "warning",
    "ovf:format says {said}, not streamOptimized",
    fix=f"write {STREAM}",
    repair="descriptor",
)
CD_DISK = Code(
    "OVF029",
    "warning",
    "a CD image is described as a Disk",
    _VSPHERE,
    "reference it as a file alone: inv repair",
    repair="descriptor",
)
OTHER_FORMAT = Code(
    "OVF030",
    "error",
    "ovf:format {said!r} is not VMDK",
    _VSPHERE,
    f"convert the disk, and write {STREAM}",
    repair="descriptor",
)
NO_UNITS = Code(
    "OVF031",
    "warning",
    "ovf:capacityAllocationUnits is missing",
    (CLOUDSTACK,),
    'write "byte"',
    repair="descriptor",
)
NO_CAPACITY = Code(
    "OVF032", "error", "ovf:capacity is missing", _VSPHERE, "write the disk's size", repair="descriptor"
)
BAD_CAPACITY = Code(
    "OVF033",
    "error",
    "the capacity {said!r} is no number of bytes",
    _VSPHERE,
    "write the disk's size in bytes",
    repair="descriptor",
)
BAD_CAPACITY_UNITS = Code(
    "OVF034",
    "error",
    "the capacity {said!r} in units of {units!r} is no number of bytes",
    _VSPHERE,
    "write the disk's size in bytes",
    repair="descriptor",
)
OTHER_CAPACITY = Code(
    "OVF035",
    "error",
    "the capacity is {said} bytes, the disk's {actual}",
    _VSPHERE,
    "write the disk's",
    repair="descriptor",
)
NO_SYSTEM = Code("OVF036", "error", "no virtual system", _BOTH, "describe one")
_WITHOUT_COLLECTIONS = (CLOUDSTACK, Affected("esxi", case="without vCenter"))
SEVERAL_SYSTEMS = Code(
    "OVF037",
    "warning",
    "a collection of {count} virtual systems",
    _WITHOUT_COLLECTIONS,
    "export each machine alone for them",
)
SYSTEM_IN_COLLECTION = Code(
    "OVF038",
    "warning",
    "a collection of {count} virtual system",
    _WITHOUT_COLLECTIONS,
    "export each machine alone for them",
)


def parse_xml(content: bytes) -> ElementTree.Element:
    """Parse a descriptor that may be hostile: no document type, so no entities of its own."""

    def refuse(*_: object) -> None:
        raise Damaged(DOCTYPE, "OVF")

    builder = ElementTree.TreeBuilder()
    depth = count = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1 + len(attributes)
        if depth > 100:
            raise Damaged(NESTED, "OVF")
        if count > MOST_ELEMENTS:
            raise Damaged(MANY_ELEMENTS, "OVF", most=MOST_ELEMENTS)
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
        raise Damaged(NOT_XML, "OVF", reason=str(error)) from None
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
        raise Damaged(OTHER_ROOT, "OVF", name=local(root.tag))
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
        return Finding(VERSION_2, "Envelope")
    if space.startswith("http://www.vmware.com/schema/ovf/1/"):
        return Finding(VERSION_09, "Envelope")
    return Finding(OTHER_SPACE, "Envelope", space=space) if space else Finding(NO_SPACE, "Envelope")


def _lint_prefixes(content: bytes, space: str) -> Iterator[Finding]:
    text = content.decode("utf-8", "replace")
    if re.search(r"<ovf:(References|File|Disk|DiskSection|VirtualSystem)\b", text):
        yield Finding(PREFIXES, "Envelope")
    for code, prefix, name in ((NO_OVF_PREFIX, "ovf", "href"), (NO_RASD_PREFIX, "rasd", "InstanceID")):
        if space == OVF and name in text and f"{prefix}:{name}" not in text:
            yield Finding(code, "Envelope", name=name)


def _lint_files(members: Mapping[str, Member], read: Descriptor) -> Iterator[Finding]:
    if not read.files and any(disk.ref for disk in read.disks):
        yield Finding(NO_FILE, "References")
    known: set[FileRef] = set()
    for file in read.files:
        if file in known:
            continue
        known.add(file)
        where = f"File {file.href[:100]!r}" if file.href else "File"
        if not file.href:
            yield Finding(NO_HREF, where)
            continue
        if is_open(file.href):
            continue
        parts = find_parts(members, file)
        if not parts:
            yield Finding(NO_CHUNK if file.chunk else GONE, where)
            continue
        if file.chunk:
            yield from _lint_chunks(where, file, parts)
        actual = sum(part.size for part in parts)
        size = file.size.strip()
        if size and not is_open(size) and not _NUMBER.fullmatch(size):
            yield Finding(BAD_SIZE, where, said=size, actual=actual)
        elif size and not is_open(size) and int(size) != actual:
            yield Finding(OTHER_SIZE, where, said=file.size, actual=actual)


def chunked(name: str, count: int) -> Finding:
    """What there is to say of a file in chunks."""
    return Finding(CHUNKS if count > 1 else ONE_CHUNK, f"File {name[:100]!r}", count=count)


def _lint_chunks(where: str, file: FileRef, parts: tuple[Member, ...]) -> Iterator[Finding]:
    yield chunked(unquote(file.href), len(parts))
    if not file.chunk.isdecimal() or any(part.size != int(file.chunk) for part in parts[:-1]):
        yield Finding(CHUNK_SIZE, where, said=file.chunk, size=parts[0].size)


def _lint_disks(read: Descriptor, size_of: Callable[[FileRef], int | None]) -> Iterator[Finding]:
    if not read.disks:
        yield Finding(NO_DISK, "DiskSection")
    ids: set[str] = set()
    for disk in read.disks:
        if not disk.id or disk.id in ids:
            yield Finding(SAME_ID if disk.id else NO_ID, disk.where)
        ids.add(disk.id)
        if disk.ref and disk.file is None:
            yield Finding(NO_SUCH_FILE, disk.where, ref=disk.ref)
        if disk.file:
            yield from _lint_format(disk)
            if not disk.populated:
                yield Finding(NO_POPULATED, disk.where)
        yield from _lint_capacity(disk, size_of)


def _lint_format(disk: DiskRef) -> Iterator[Finding]:
    said, _, kind = disk.format.rpartition("#")
    if not disk.format:
        yield Finding(NO_FORMAT, disk.where)
    elif kind.lower() == "streamoptimized" and "vmdk" in said.lower():
        return
    elif "vmdk" in said.lower():
        yield Finding(OTHER_VMDK, disk.where, said=kind)
    elif disk.format.lower().endswith(ISO):
        yield Finding(CD_DISK, disk.where)
    else:
        yield Finding(OTHER_FORMAT, disk.where, said=disk.format)


def _lint_capacity(disk: DiskRef, size_of: Callable[[FileRef], int | None]) -> Iterator[Finding]:
    if not disk.units:
        yield Finding(NO_UNITS, disk.where)
    if is_open(disk.capacity) or is_open(disk.units):
        return
    if not disk.capacity:
        yield Finding(NO_CAPACITY, disk.where)
        return
    said = capacity(disk.capacity, disk.units)
    if said is None:
        if disk.units:
            yield Finding(BAD_CAPACITY_UNITS, disk.where, said=disk.capacity, units=disk.units)
        else:
            yield Finding(BAD_CAPACITY, disk.where, said=disk.capacity)
        return
    actual = size_of(disk.file) if disk.file else None
    if actual is not None and said != actual and not _rounded(said, actual, disk):
        yield Finding(OTHER_CAPACITY, disk.where, said=said, actual=actual)


def _rounded(said: int, actual: int, disk: DiskRef) -> bool:
    """Whether a capacity in MiB or GiB is the disk's size, rounded up: the import makes no larger disk."""
    unit = capacity("1", disk.units) or 1
    return unit > 1 and said - unit < actual <= said


def _lint_systems(read: Descriptor) -> Iterator[Finding]:
    systems = read.systems
    several = any(kind_of(child) == "VirtualSystemCollection" for child in read.root)
    if not systems and not several:
        yield Finding(NO_SYSTEM, "Envelope")
    if len(systems) > 1 or any(kind_of(child) == "VirtualSystemCollection" for child in read.root):
        yield Finding(
            SEVERAL_SYSTEMS if len(systems) != 1 else SYSTEM_IN_COLLECTION,
            "VirtualSystemCollection",
            count=len(systems),
        )
    disks = frozenset(disk.id for disk in read.disks)
    for system in systems:
        yield from lint_system(system, disks)
