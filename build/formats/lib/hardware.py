"""The virtual hardware of an OVF descriptor, checked as vSphere and CloudStack read it.

Rules from the OVF specification (DMTF DSP0243, "Virtual hardware description"), VMware's own descriptors
(govmomi, ovf/fixtures; its ovf/configspec.go has the subtypes), open-vmdk's ova-compose, and what people
were told by ESXi and vCenter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from build.formats.lib.findings import Code, Finding
from build.formats.lib.platforms import CLOUDSTACK, VSPHERE, Affected

SCSI = ("lsilogic", "buslogic", "lsilogicsas", "virtualscsi")
"""Subtypes of SCSI controllers that vSphere knows, in small letters."""
STORAGE = (
    "ahci",
    "vmware.sata.ahci",
    "vmware.nvme.controller",
    "vmware.nvdimm.controller",
    "vmware.nvdimm.device",
)
"""Subtypes of other storage (ResourceType 20) that vSphere knows."""
RELEASES = {14: "6.7", 15: "6.7", 16: "7.0", 17: "7.0", 18: "7.0", 19: "7.0", 20: "8.0", 21: "8.0", 22: "9.0"}
"""First ESXi of a hardware version (Broadcom knowledge base, article 315655)."""
SATA_SINCE, NVME_SINCE = 10, 13
"""Hardware versions (ESXi 5.5, ESXi 6.5)."""
ITEMS = ("Item", "StorageItem", "EthernetPortItem")
"""Elements of a hardware section that describe a device; the last two are OVF 2.0's."""
_FAMILY = re.compile(r"vmx-([0-9]{1,2})")

_VSPHERE = (VSPHERE,)
_BOTH = (VSPHERE, CLOUDSTACK)
NO_SECTION = Code("OVF050", "error", "no VirtualHardwareSection", _VSPHERE, "describe the hardware")
NO_FAMILY = Code("OVF051", "warning", "no hardware family is named", fix="write vmx-13")
OTHER_FAMILY = Code(
    "OVF052",
    "error",
    "{named} is no hardware version of VMware",
    _VSPHERE,
    "write vmx-13: inv repair",
    repair="descriptor",
)
NEW_FAMILY = Code(
    "OVF053",
    "warning",
    "hardware version {version}",
    (Affected("esxi", before="{release}"),),
    "write vmx-13 for such hosts",
    source="Broadcom knowledge base, article 315655",
)
NO_ID = Code("OVF054", "error", "InstanceID is missing", _VSPHERE, "number the items")
SAME_ID = Code("OVF055", "error", "InstanceID is used twice", _VSPHERE, "number the items")
SAME_ID_IN = Code(
    "OVF056",
    "error",
    "InstanceID is used twice with the configuration {options}",
    _VSPHERE,
    "number the items",
)
ORDER = Code(
    "OVF057",
    "warning",
    "elements of an Item are not in alphabetical order, which the specification asks for",
    fix="sort them",
    repair="descriptor",
)
SCSI_UNKNOWN = Code(
    "OVF058",
    "error",
    "the SCSI controller {named} is unknown",
    _VSPHERE,
    "write lsilogic",
    repair="descriptor",
)
IDE_UNKNOWN = Code(
    "OVF059", "warning", "the IDE controller {named} is unknown", fix="leave it out", repair="descriptor"
)
STORAGE_UNKNOWN = Code(
    "OVF060",
    "error",
    "the storage controller {named} is unknown",
    _VSPHERE,
    "write vmware.sata.ahci",
    repair="descriptor",
)
_OTHER_CONTROLLER = "write vmx-{since}, or another controller"
STORAGE_SINCE = Code(
    "OVF061",
    "warning",
    "the storage controller {named} needs hardware version {since}, not {version}",
    _VSPHERE,
    _OTHER_CONTROLLER,
    repair="descriptor",
)
TYPE_20_SINCE = Code(
    "OVF062",
    "warning",
    "the storage controller of type 20 needs hardware version {since}, not {version}",
    _VSPHERE,
    _OTHER_CONTROLLER,
)
SOUND = Code("OVF063", "error", "a sound card", _VSPHERE, "remove the item: inv repair", repair="descriptor")
NETWORK = Code(
    "OVF064",
    "warning",
    "a network card",
    (Affected("cloudstack", case="on distributed switches"),),
    "leave it out",
)
NO_PARENT = Code("OVF065", "error", "the disk's Parent is no item", _BOTH, "name the controller")
NO_RESOURCE = Code("OVF066", "error", "HostResource {said!r} names no disk", _VSPHERE, "write ovf:/disk/ID")
NO_SUCH_DISK = Code(
    "OVF067",
    "error",
    "HostResource names the Disk {named!r}, which is not described",
    _BOTH,
    "name the diskId of a Disk",
)


@dataclass(frozen=True)
class Item:
    """A device."""

    element: ElementTree.Element
    values: dict[str, str]
    """Texts of its elements by local name; InstanceId, as the first OVF had it, under InstanceID."""

    @property
    def id(self) -> str:
        """Number by which other devices name it."""
        return self.values.get("InstanceID", "")

    @property
    def kind(self) -> str:
        """ResourceType, a number of CIM's."""
        return self.values.get("ResourceType", "")

    @property
    def subtypes(self) -> list[str]:
        """Small letters; several are alternatives."""
        return words(self.values.get("ResourceSubType", "").lower())

    @property
    def optional(self) -> bool:
        """Whether a reader may leave it out."""
        return attribute(self.element, "required").lower() == "false"


def local(tag: str) -> str:
    """Name of an element or attribute without its namespace."""
    return tag.rpartition("}")[2]


def attribute(element: ElementTree.Element, name: str) -> str:
    """An attribute by local name, with whatever prefix; empty when it is missing."""
    return next((value for key, value in element.attrib.items() if local(key) == name), "")


def kind_of(element: ElementTree.Element) -> str:
    """Name of an element; of a Section or Content of OVF 0.9, the kind that its xsi:type names."""
    name = local(element.tag)
    if name in ("Section", "Content"):
        return attribute(element, "type").rpartition(":")[2].removesuffix("_Type") or name
    return name


def words(text: str) -> list[str]:
    """Alternatives, set apart by blanks or commas."""
    return [part for part in re.split(r"[\s,]+", text) if part]


def is_open(text: str) -> bool:
    """Whether a value is only known when a property is filled in at the import: `${name}`."""
    return "${" in text


def read_item(element: ElementTree.Element) -> Item:
    """A device from its element."""
    values = {local(child.tag): (child.text or "").strip() for child in element}
    if "InstanceId" in values:
        values.setdefault("InstanceID", values["InstanceId"])
    return Item(element, values)


def items(section: ElementTree.Element) -> list[Item]:
    """Devices of a hardware section."""
    return [read_item(child) for child in section if local(child.tag) in ITEMS]


def families(section: ElementTree.Element) -> list[str]:
    """Hardware families that a section may be made on, over all its System elements."""
    return [
        family
        for system in section
        if local(system.tag) == "System"
        for child in system
        if local(child.tag) == "VirtualSystemType"
        for family in words(child.text or "")
    ]


def lint_system(system: ElementTree.Element, disks: frozenset[str]) -> Iterator[Finding]:
    """Check a virtual system; `disks` are the ids of the Disks that its devices may name."""
    sections = [child for child in system if kind_of(child) == "VirtualHardwareSection"]
    if not sections:
        yield Finding(NO_SECTION, "VirtualSystem")
        return
    best = max(sections, key=lambda section: bool(_versions(families(section))))
    yield from _lint_family(families(best))
    yield from _lint_items(best, disks)


def _versions(found: list[str]) -> list[int]:
    return sorted(int(match[1]) for family in found if (match := _FAMILY.fullmatch(family.lower())))


def _lint_family(found: list[str]) -> Iterator[Finding]:
    where, versions = "VirtualSystemType", _versions(found)
    if not found:
        yield Finding(NO_FAMILY, where)
    elif not versions and not any(map(is_open, found)):
        named = ", ".join(found)[:60]
        yield Finding(OTHER_FAMILY, where, named=named)
    elif versions and versions[0] > NVME_SINCE:
        release = RELEASES.get(versions[0], "9.0")
        yield Finding(NEW_FAMILY, where, version=versions[0], release=release)


def _lint_items(section: ElementTree.Element, disks: frozenset[str]) -> Iterator[Finding]:
    found = items(section)
    versions = _versions(families(section))
    ids: set[tuple[str, str, str]] = set()
    for item in found:
        where = f"Item {(item.id or item.values.get('ElementName', ''))[:40]}"
        yield from _lint_id(item, where, ids)
        yield from _lint_order(item, where)
        if not item.optional:
            yield from _lint_kind(item, where, versions[-1] if versions else NVME_SINCE)
    known = {item.id for item in found}
    for item in found:
        if item.kind == "17":
            yield from _lint_drive(item, f"Item {item.id[:40]}", known, disks)


def _lint_id(item: Item, where: str, ids: set[tuple[str, str, str]]) -> Iterator[Finding]:
    """One InstanceID may stand once for each set of deployment options and each bound of a range."""
    if not item.id:
        yield Finding(NO_ID, where)
        return
    bound = attribute(item.element, "bound") or "normal"
    options = " ".join(sorted(words(attribute(item.element, "configuration"))))
    if (item.id, options, bound) in ids:
        yield Finding(SAME_ID_IN, where, options=options) if options else Finding(SAME_ID, where)
    ids.add((item.id, options, bound))


def _lint_order(item: Item, where: str) -> Iterator[Finding]:
    """Only the elements of CIM have an order; what vendors add stands where it likes."""
    tags = [local(child.tag) for child in item.element if "SettingData" in child.tag]
    if tags != sorted(tags):
        yield Finding(ORDER, where)


def _lint_kind(item: Item, where: str, version: int) -> Iterator[Finding]:
    named = ", ".join(item.subtypes)[:60]
    if not item.subtypes or any(map(is_open, item.subtypes)):
        named = ""
    if item.kind == "6" and named and not set(item.subtypes) & set(SCSI):
        yield Finding(SCSI_UNKNOWN, where, named=named)
    elif item.kind == "5" and named and "piix4" not in item.subtypes:
        yield Finding(IDE_UNKNOWN, where, named=named)
    elif item.kind == "20" and named and not set(item.subtypes) & set(STORAGE):
        yield Finding(STORAGE_UNKNOWN, where, named=named)
    elif item.kind == "20" and version < _since(item.subtypes):
        since = _since(item.subtypes)
        if named:
            yield Finding(STORAGE_SINCE, where, named=named, since=since, version=version)
        else:
            yield Finding(TYPE_20_SINCE, where, since=since, version=version)
    elif item.kind == "35" and not any(part.startswith("vmware.") for part in item.subtypes):
        yield Finding(SOUND, where)
    elif item.kind == "10":
        yield Finding(NETWORK, where)


def _since(subtypes: list[str]) -> int:
    return NVME_SINCE if "vmware.nvme.controller" in subtypes else SATA_SINCE


def _lint_drive(item: Item, where: str, known: set[str], disks: frozenset[str]) -> Iterator[Finding]:
    parent, resource = item.values.get("Parent", ""), item.values.get("HostResource", "")
    if parent and parent not in known and not is_open(parent):
        yield Finding(NO_PARENT, where)
    if not resource or is_open(resource):
        return
    match = re.fullmatch(r"(?:ovf:/?)?/(disk|file)/(.+)", resource)
    if match is None:
        yield Finding(NO_RESOURCE, where, said=resource)
    elif match[1] == "disk" and match[2] not in disks:
        yield Finding(NO_SUCH_DISK, where, named=match[2])
