"""OVF descriptors: parsed as XML that may be hostile, and checked as vSphere and CloudStack read them.

Rules from the OVF specification (DMTF DSP0243) and from what those two importers take.
"""

from __future__ import annotations

import re
import xml.parsers.expat
from collections.abc import Callable, Iterator
from xml.etree import ElementTree

from build.formats.lib.findings import Damaged, Finding, at
from build.formats.lib.tar import VSPHERE, Archive, Member

MOST_ELEMENTS = 50_000
"""Elements and attributes of a descriptor that are kept in memory; real ones have some hundreds."""
CLOUDSTACK = "CloudStack"
OVF = "http://schemas.dmtf.org/ovf/envelope/1"
RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
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


def lint_descriptor(archive: Archive, member: Member, size_of: Callable[[Member], int]) -> Iterator[Finding]:
    """Check a descriptor against its archive; `size_of` gives the virtual size of a disk in it, in bytes."""
    if member.size > 4 << 20:
        raise Damaged(at(member.offset), "a descriptor of more than 4 MiB", VSPHERE)
    content = archive.window(member).read(0, member.size)
    root = parse_xml(content)
    if root.tag != f"{{{OVF}}}Envelope":
        raise Damaged("OVF", f"the root element is {root.tag[:100]}, not an OVF 1 Envelope", VSPHERE)
    yield from _lint_prefixes(content)
    yield from _lint_files(archive, root)
    yield from _lint_disks(archive, root, size_of)
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


def _lint_disks(
    archive: Archive, root: ElementTree.Element, size_of: Callable[[Member], int]
) -> Iterator[Finding]:
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
            actual = size_of(member)
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
