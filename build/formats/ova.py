"""OVA: a tar archive of an OVF descriptor, a manifest and one streamOptimized VMDK, in this order.

Rules from the OVF specification (DMTF DSP0243) and from what vSphere and CloudStack take: ustar without
extensions, owners and times fixed, the manifest as `SHA256(name)= hex`. The descriptor's text comes rendered
but for numbers that are known when the VMDK is written; it is padded with line ends, so that its place
can be kept free in front of the VMDK and nothing is copied.
"""

from __future__ import annotations

import hashlib
import re
import xml.parsers.expat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO
from xml.etree import ElementTree

from build.formats import vmdk
from build.formats.lib.codec import Zlib
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, Finding, at
from build.formats.lib.format import OTHER, Format, Kind, Match, Options, Target, Template, is_tar, octal
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import Units, put
from build.formats.vmdk import VmdkDisk, VmdkWriter

BLOCK = 512
RECORD = 10240
LARGEST_MEMBER = 8 << 30
MOST_ELEMENTS = 50_000
"""Elements and attributes of a descriptor that are kept in memory; real ones have some hundreds."""
PLACEHOLDERS = ("@capacity@", "@populated@", "@vmdk_size@")
DIGITS = 20
"""Digits of the largest number that may take a placeholder's place."""
VSPHERE = "vSphere"
CLOUDSTACK = "CloudStack"
OVF = "http://schemas.dmtf.org/ovf/envelope/1"
RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MANIFEST_LINE = re.compile(r"(SHA1|SHA256|SHA512)\(([^)]+)\)= ([0-9a-f]+)")
_NUMBER = re.compile(r"[0-9]{1,20}")
_HASHES = {"SHA1": hashlib.sha1, "SHA256": hashlib.sha256, "SHA512": hashlib.sha512}


def fill(text: str, values: Mapping[str, int]) -> str:
    """Put numbers in the place of a descriptor's placeholders; Unsupported when one is missing."""
    for name in PLACEHOLDERS:
        if name not in text:
            raise Unsupported(f"the OVF template never uses {name}", "put it back: readers need the number")
        text = text.replace(name, str(values[name]))
    return text


def member_header(name: str, size: int, epoch: int) -> bytes:
    """A ustar header: a plain file of nobody's, mode 0644."""
    if size >= LARGEST_MEMBER:
        raise Unsupported(
            f"{name} would have {size} bytes; a file in an OVA has less than 8 GiB", "make the disk smaller"
        )
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        b"%011o\0" % size,
        b"%011o\0" % epoch,
        b" " * 8,
        b"0".ljust(101, b"\0"),
        b"ustar\x0000",
    )
    head = b"".join(fields).ljust(BLOCK, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class OvaWriter:
    """Writes the VMDK behind room for descriptor and manifest, which come last."""

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        base: str,
        ovf: str,
        epoch: int,
        codec: Zlib = vmdk.CODEC,
        adapter: vmdk.Adapter = "lsilogic",
    ) -> None:
        if not _NAME.fullmatch(base):
            raise Unsupported(
                f"{base!r} cannot name the files of an OVA", "use letters, digits, dots and dashes"
            )
        self.file, self.size, self.ovf, self.epoch, self.codec = file, size, ovf, epoch, codec
        self.names = (f"{base}.ovf", f"{base}.mf", f"{base}-disk1.vmdk")
        widest = fill(ovf, dict.fromkeys(PLACEHOLDERS, 10**DIGITS))
        self.ovf_length = len(widest.encode())
        self.mf_length = len(self._manifest(bytes(32), bytes(32)))
        self.mf_at = BLOCK + _padded(self.ovf_length)
        self.vmdk_at = self.mf_at + BLOCK + _padded(self.mf_length) + BLOCK
        self.vmdk = VmdkWriter(file, size, self.names[2], adapter, codec, self.vmdk_at)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the grains of a piece."""
        self.vmdk.add(index, data, units)

    def close(self, seed: str) -> None:
        """End the VMDK, hash it, write descriptor, manifest and the archive's end."""
        self.vmdk.close(seed)
        length = self.vmdk.length
        values = {"@capacity@": self.size, "@populated@": self.vmdk.populated, "@vmdk_size@": length}
        ovf = fill(self.ovf, values).encode()
        ovf += b"\n" * (self.ovf_length - len(ovf))
        self.file.flush()
        disk = BoundedReader(self.file.fileno(), self.vmdk_at, length)
        manifest = self._manifest(hashlib.sha256(ovf).digest(), _sha256(disk))
        put(self.file, 0, self._member(0, ovf))
        put(self.file, self.mf_at, self._member(1, manifest))
        put(self.file, self.vmdk_at - BLOCK, member_header(self.names[2], length, self.epoch))
        end = self.vmdk_at + _padded(length)
        self.file.truncate(-(-(end + 2 * BLOCK) // RECORD) * RECORD)

    def _member(self, number: int, content: bytes) -> bytes:
        return member_header(self.names[number], len(content), self.epoch) + content.ljust(
            _padded(len(content)), b"\0"
        )

    def _manifest(self, ovf: bytes, disk: bytes) -> bytes:
        return f"SHA256({self.names[0]})= {ovf.hex()}\nSHA256({self.names[2]})= {disk.hex()}\n".encode()


def _sha256(reader: BoundedReader) -> bytes:
    return _digest(reader, "SHA256")


def _digest(reader: BoundedReader, algorithm: str) -> bytes:
    digest = _HASHES[algorithm]()
    for offset in range(0, reader.size, 1 << 20):
        digest.update(reader.read(offset, min(1 << 20, reader.size - offset)))
    return digest.digest()


@dataclass(frozen=True)
class Member:
    """A file in the archive and what its header says."""

    name: str
    header_at: int
    offset: int
    size: int
    kind: str
    owner: tuple[int, int]


@dataclass
class Archive:
    """The members of an OVA by position; nothing is ever unpacked."""

    reader: BoundedReader
    members: list[Member] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        offset = 0
        while offset + BLOCK <= self.reader.size:
            head = self.reader.read(offset, BLOCK)
            if not any(head):
                return
            member = self._member(head, offset)
            self.members.append(member)
            if len(self.members) > 1000:
                raise Damaged(at(offset), "more than 1000 files in an OVA", VSPHERE)
            offset = member.offset + _padded(member.size)
        self.findings.append(
            Finding(
                "error",
                at(self.reader.size),
                "the archive has no end",
                VSPHERE,
                "copy the file again: it is cut off",
            )
        )

    def _member(self, head: bytes, offset: int) -> Member:
        try:
            stored, size = octal(head[148:156]), octal(head[124:136])
            owner = (octal(head[108:116]), octal(head[116:124]))
        except ValueError:
            raise Damaged(at(offset), "a tar header holds numbers that are not octal", VSPHERE) from None
        if stored != sum(head[:148]) + 8 * 32 + sum(head[156:]):
            raise Damaged(at(offset + 148), "a tar header's checksum is wrong", VSPHERE)
        if offset + BLOCK + size > self.reader.size:
            raise Damaged(
                at(offset + 124), f"a file of {size} bytes reaches past the end of the archive", VSPHERE
            )
        prefix = head[345:500].split(b"\0")[0] if head.startswith(b"ustar\0", 257) else b""
        name = b"/".join(filter(None, (prefix, head[:100].split(b"\0")[0]))).decode("utf-8", "replace")
        return Member(name, offset, offset + BLOCK, size, head[156:157].decode("latin-1"), owner)

    def find(self, suffix: str) -> Member | None:
        """First member whose name ends so."""
        return next((member for member in self.members if member.name.lower().endswith(suffix)), None)

    def window(self, member: Member) -> BoundedReader:
        """The bytes of a member."""
        return self.reader.window(member.offset, member.size)


class OvaDisk:
    """Reads the disk of an OVA."""

    def __init__(self, reader: BoundedReader) -> None:
        self.archive = Archive(reader)
        member = self.archive.find(".vmdk")
        if member is None:
            raise Damaged("archive", "no file ending in .vmdk", VSPHERE, "put the disk in as VMDK")
        self.disk = VmdkDisk(self.archive.window(member))
        self.size = self.disk.size

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece."""
        return self.disk.piece(index)

    def facts(self) -> dict[str, str]:
        """The archive's files, and what the disk says."""
        files = ", ".join(f"{member.name[:60]} ({member.size} bytes)" for member in self.archive.members[:10])
        return {"files": files, **self.disk.facts()}


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check archive, manifest, descriptor and disk, as vSphere's and CloudStack's importers do."""
    archive = Archive(reader)
    yield from archive.findings
    yield from _lint_archive(archive)
    descriptor = archive.find(".ovf")
    if descriptor is None:
        raise Damaged("archive", "no OVF descriptor in the archive", f"{VSPHERE}, {CLOUDSTACK}")
    yield from _lint_manifest(archive)
    disk = archive.find(".vmdk")
    yield from _lint_descriptor(archive, descriptor)
    if disk:
        for finding in vmdk.lint(archive.window(disk)):
            yield Finding(
                finding.severity,
                f"{disk.name}: {finding.where}",
                finding.text,
                finding.refused_by,
                finding.fix,
            )


def _lint_archive(archive: Archive) -> Iterator[Finding]:
    names = set()
    for member in archive.members:
        where = at(member.header_at)
        if member.kind not in "0\0":
            yield Finding(
                "error",
                where,
                f"a tar member of type {member.kind!r} that is no plain file",
                VSPHERE,
                "write a plain ustar archive",
            )
        if "/" in member.name or "\\" in member.name or member.name in ("", ".", ".."):
            yield Finding(
                "error",
                where,
                f"the name {member.name[:100]!r} leads out of the folder",
                VSPHERE,
                "use plain file names",
            )
        elif not _NAME.fullmatch(member.name):
            yield Finding(
                "warning",
                where,
                f"the name {member.name[:100]!r} has unusual characters",
                VSPHERE,
                "use letters and digits",
            )
        if member.name in names:
            yield Finding(
                "error", where, f"{member.name[:100]} is twice in the archive", VSPHERE, "keep one of them"
            )
        names.add(member.name)
        if archive.reader.read(member.header_at + 257, 6) != b"ustar\0":
            yield Finding(
                "warning", where, "a tar header that is not ustar", VSPHERE, "write the archive as ustar"
            )
        if any(member.owner):
            yield Finding(
                "info", where, f"{member.name[:100]} belongs to {member.owner}", "", "write owner and group 0"
            )
    if archive.members and not archive.members[0].name.endswith(".ovf"):
        yield Finding(
            "error", at(0), "the first file is not the OVF descriptor", VSPHERE, "put the .ovf first"
        )


def _lint_manifest(archive: Archive) -> Iterator[Finding]:
    member = archive.find(".mf")
    if member is None:
        yield Finding(
            "warning", "archive", "no manifest (.mf)", f"{VSPHERE} content library", "add a SHA256 manifest"
        )
        return
    if member.size > 1 << 20:
        yield Finding(
            "error", at(member.offset), "a manifest of more than 1 MiB", VSPHERE, "write one line a file"
        )
        return
    listed = set()
    by_name = {other.name: other for other in archive.members}
    for number, line in enumerate(
        archive.window(member).read(0, member.size).decode("utf-8", "replace").splitlines(), 1
    ):
        where = f"{member.name} line {number}"
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            yield Finding(
                "error",
                where,
                f"not of the form SHA256(name)= hex: {line[:80]!r}",
                VSPHERE,
                "write it in that form",
            )
            continue
        algorithm, name, stored = match.groups()
        if name in listed:
            yield Finding("error", where, f"{name} is listed twice", VSPHERE, "list it once")
            continue
        listed.add(name)
        if algorithm == "SHA1":
            yield Finding("warning", where, "the manifest uses SHA1", "vSphere 7 and later", "use SHA256")
        if name not in by_name:
            yield Finding("error", where, f"{name} is not in the archive", VSPHERE, "list only what is there")
        elif _digest(archive.window(by_name[name]), algorithm).hex() != stored:
            yield Finding(
                "error", where, f"the digest of {name} is wrong", VSPHERE, "write the manifest again"
            )
    for name in sorted(set(by_name) - listed - {member.name}):
        if not name.endswith(".cert"):
            yield Finding("warning", member.name, f"{name[:100]} is not listed", VSPHERE, "list every file")


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


def _lint_descriptor(archive: Archive, member: Member) -> Iterator[Finding]:
    if member.size > 4 << 20:
        raise Damaged(at(member.offset), "a descriptor of more than 4 MiB", VSPHERE)
    content = archive.window(member).read(0, member.size)
    root = parse_xml(content)
    if root.tag != f"{{{OVF}}}Envelope":
        raise Damaged("OVF", f"the root element is {root.tag[:100]}, not an OVF 1 Envelope", VSPHERE)
    yield from _lint_prefixes(content)
    yield from _lint_files(archive, root)
    yield from _lint_disks(archive, root)
    yield from _lint_system(root)


def _lint_prefixes(content: bytes) -> Iterator[Finding]:
    text = content.decode("utf-8", "replace")
    if re.search(r"<ovf:(References|File|Disk|DiskSection|VirtualSystem)\b", text):
        yield Finding(
            "warning",
            "Envelope",
            "elements carry the prefix ovf:",
            f"{CLOUDSTACK} before 4.15",
            "make the OVF namespace the default one, keep the prefix on attributes",
        )
    for name in ("ovf:href", "rasd:InstanceID"):
        if name not in text:
            yield Finding(
                "error",
                "Envelope",
                f"{name} is never written with this very prefix",
                CLOUDSTACK,
                f"write {name}",
            )


def _attribute(element: ElementTree.Element, name: str) -> str:
    return element.get(f"{{{OVF}}}{name}", "")


def _lint_files(archive: Archive, root: ElementTree.Element) -> Iterator[Finding]:
    files = root.findall(f"{{{OVF}}}References/{{{OVF}}}File")
    if not files:
        yield Finding("error", "References", "no file is referenced", VSPHERE, "reference the disk")
    sizes = {member.name: member.size for member in archive.members}
    for file in files:
        name, size = _attribute(file, "href"), _attribute(file, "size")
        where = f"File {name[:100]!r}"
        if name not in sizes:
            yield Finding(
                "error",
                where,
                "the referenced file is not in the archive",
                f"{VSPHERE}, {CLOUDSTACK}",
                "add it",
            )
        elif size != str(sizes[name]):
            yield Finding(
                "error",
                where,
                f"ovf:size {size[:30]!r} is not the file's {sizes[name]} bytes",
                f"{VSPHERE}, {CLOUDSTACK}",
                "write the size in bytes",
            )


def _lint_disks(archive: Archive, root: ElementTree.Element) -> Iterator[Finding]:
    disks = root.findall(f"{{{OVF}}}DiskSection/{{{OVF}}}Disk")
    ids = {_attribute(file, "id") for file in root.findall(f"{{{OVF}}}References/{{{OVF}}}File")}
    member = archive.find(".vmdk")
    if not disks:
        yield Finding(
            "error", "DiskSection", "no disk is described", f"{VSPHERE}, {CLOUDSTACK}", "describe the disk"
        )
    for disk in disks:
        where = f"Disk {_attribute(disk, 'diskId')[:60]!r}"
        if _attribute(disk, "fileRef") not in ids:
            yield Finding("error", where, "ovf:fileRef names no file", VSPHERE, "name the file's ovf:id")
        if not _NUMBER.fullmatch(_attribute(disk, "populatedSize")):
            yield Finding(
                "error",
                where,
                "ovf:populatedSize is missing",
                f"{CLOUDSTACK} before 4.11.1",
                "write it in bytes",
            )
        if _attribute(disk, "format") != STREAM:
            yield Finding("error", where, "ovf:format is not streamOptimized", VSPHERE, f"write {STREAM}")
        capacity = _bytes(_attribute(disk, "capacity"), _attribute(disk, "capacityAllocationUnits"))
        if not _attribute(disk, "capacityAllocationUnits"):
            yield Finding(
                "warning", where, "ovf:capacityAllocationUnits is missing", CLOUDSTACK, 'write "byte"'
            )
        if member and len(disks) == 1:
            actual = VmdkDisk(archive.window(member)).size
            if capacity != actual:
                yield Finding(
                    "error",
                    where,
                    f"the capacity is {capacity} bytes, the disk's {actual}",
                    VSPHERE,
                    "write the disk's",
                )


def _bytes(capacity: str, units: str) -> int | None:
    match = re.fullmatch(r"\s*byte(?:\s*\*\s*2\s*\^\s*([0-9]{1,2}))?\s*", units or "byte")
    if match is None or not _NUMBER.fullmatch(capacity):
        return None
    return int(capacity) << int(match[1] or 0)


def _lint_system(root: ElementTree.Element) -> Iterator[Finding]:
    systems = root.findall(f".//{{{OVF}}}VirtualSystem")
    if len(systems) != 1:
        yield Finding(
            "error",
            "VirtualSystem",
            f"{len(systems)} virtual systems instead of one",
            CLOUDSTACK,
            "describe one",
        )
        return
    hardware = systems[0].find(f"{{{OVF}}}VirtualHardwareSection")
    if hardware is None:
        yield Finding("error", "VirtualSystem", "no VirtualHardwareSection", VSPHERE, "describe the hardware")
        return
    kind = hardware.findtext(f"{{{OVF}}}System/{{{VSSD}}}VirtualSystemType", "")
    match = re.fullmatch(r"vmx-([0-9]{2})", kind.split(" ")[0])
    if match is None:
        yield Finding(
            "error", "VirtualSystemType", f"{kind[:40]!r} is no hardware version", VSPHERE, "write vmx-13"
        )
    elif int(match[1]) > 13:
        yield Finding(
            "warning",
            "VirtualSystemType",
            f"hardware version {match[1]}",
            "ESXi 6.5",
            "write vmx-13 for such hosts",
        )
    yield from _lint_items(hardware)


def _lint_items(hardware: ElementTree.Element) -> Iterator[Finding]:
    items = hardware.findall(f"{{{OVF}}}Item")
    ids, controllers, parents = set(), {}, []
    for item in items:
        values = {child.tag.rpartition("}")[2]: (child.text or "").strip() for child in item}
        number, kind = values.get("InstanceID", ""), values.get("ResourceType", "")
        where = f"Item {number[:20]!r}"
        if not number or number in ids:
            yield Finding("error", where, "InstanceID is missing or used twice", VSPHERE, "number the items")
        ids.add(number)
        tags = [child.tag.rpartition("}")[2] for child in item]
        if tags != sorted(tags):
            yield Finding(
                "error", where, "elements of an Item are not in alphabetical order", VSPHERE, "sort them"
            )
        if kind == "6":
            controllers[number] = values.get("ResourceSubType", "")
            if controllers[number].lower() not in ("lsilogic", "buslogic", "lsilogicsas", "virtualscsi"):
                yield Finding(
                    "error",
                    where,
                    f"the SCSI controller {controllers[number][:40]!r} is unknown",
                    VSPHERE,
                    "write lsilogic",
                )
        elif kind == "5" and values.get("ResourceSubType", "") not in ("", "PIIX4"):
            yield Finding("error", where, "the IDE controller's subtype is unknown", VSPHERE, "leave it out")
        elif kind == "10":
            yield Finding(
                "warning", where, "a network card", f"{CLOUDSTACK} on distributed switches", "leave it out"
            )
        elif kind == "17":
            parents.append((where, values.get("Parent", ""), values.get("HostResource", "")))
    for where, parent, resource in parents:
        if parent not in ids:
            yield Finding(
                "error",
                where,
                "the disk's Parent is no item",
                f"{VSPHERE}, {CLOUDSTACK}",
                "name the controller",
            )
        if not resource.startswith(("ovf:/disk/", "/disk/")):
            yield Finding(
                "error", where, f"HostResource {resource[:60]!r} names no disk", VSPHERE, "write ovf:/disk/ID"
            )


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.LIKELY if is_tar(head) else Match.NO


def _write(target: Target, options: Options) -> OvaWriter:
    return OvaWriter(
        target.file,
        target.size,
        target.name.removesuffix(".ova"),
        options["ovf"],
        target.epoch,
        vmdk.codec(options),
        options.get("adapter", "lsilogic"),
    )


def _disk(reader: BoundedReader) -> BoundedReader:
    member = Archive(reader).find(".vmdk")
    if member is None:
        raise Damaged("archive", "the OVA holds no VMDK", VSPHERE)
    return reader.window(member.offset, member.size)


KIND = Kind(
    name="ova",
    suffix="ova",
    version=1,
    driver="vmdk",
    recognize=_recognize,
    write=_write,
    read=OvaDisk,
    lint=lint,
    check_size=vmdk.check_size,
    options=vmdk.adapter,
    disk=_disk,
)
FORMATS = (
    Format(
        name="ova",
        help="OVA for VMware",
        kind=KIND,
        file="{imagename}.ova",
        machine=vmdk.MACHINE,
        efi=vmdk.EFI,
        descriptor="systemvm.ovf.j2",
        cloudstack=Template("VMware", "OVA", "vmware.ova", OTHER, ("vmware",)),
    ),
)
