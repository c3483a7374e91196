"""An OVF descriptor changed into one that vSphere imports; all it does not mind stays as it is.

What VirtualBox writes: its ApplianceImplExport.cpp. What vSphere takes: `build/formats/lib/hardware.py`. The
text is edited as a document, so comments, prefixes, licenses and what other vendors added are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from build.formats.lib.findings import Damage, Damaged, Group
from build.formats.lib.hardware import NVME_SINCE, SATA_SINCE, SCSI, STORAGE, is_open, words
from build.formats.lib.ovf import ISO, OVF, OVF2, RASD, STREAM, capacity, parse_xml

_SUBTYPES = {
    "ahci": ("20", "vmware.sata.ahci"),
    "nvme": ("20", "vmware.nvme.controller"),
    "virtioscsi": ("6", "VirtualSCSI"),
    "virtio-scsi": ("6", "VirtualSCSI"),
}
"""ResourceType and subtype of VMware's for a storage controller of VirtualBox's."""
_Node = TypeVar("_Node")
_SETTINGS = re.compile(r"CIM_(Storage|EthernetPort|Resource)AllocationSettingData(\.xsd)?$")
_NAMES = ("diskId", "fileRef", "href", "id", "capacity", "format")
"""Attributes in OVF's own namespace."""
_SOUND = "35"

ACTIONS: Mapping[str, str] = {
    "ustar": "the archive is ustar",
    "order": "the descriptor is the first file",
    "end": "the archive has an end",
    "top": "all files lie at the top of the archive",
    "manifest": "a SHA256 manifest is added",
    "sha256": "the manifest has SHA256",
    "form": "the manifest is written as SHA256(name)= hex",
    "list all": "the manifest lists every file",
    "list what is there": "the manifest lists only what is there",
}
"""Keys of `Code.repair` for what a new archive with a new manifest fixes by itself, and how that is told."""
REFUSE = "refuse"
"""The key for what nobody can fix without guessing."""
OTHER_ACTIONS: Mapping[str, str] = {
    "descriptor": "the descriptor is edited",
    "join": "the chunks are joined",
    "gunzip": "the disk is unpacked",
    "version": "the header's version is 3",
    REFUSE: "refused: it would take a guess",
}
"""The other keys: what tells of itself when it is done, and REFUSE."""

GROUP = Group("FIX", "What `inv repair` finds on its way", "build/agent/verbs/repair.py")
NO_URI = Damage(
    "FIX001", "the descriptor names a namespace that is no URI", fix="correct its xmlns attributes"
)
SHARED_FILE = Damage("FIX002", "one file is referenced by several names", fix="reference it once")
SAME_NAMES = Damage("FIX003", "files of one name lie in several folders", fix="rename one of them")


@dataclass(frozen=True)
class Stored:
    """A file as it will lie in the new archive."""

    name: str
    size: int
    virtual_size: int = 0
    """Bytes of the disk in it; 0: it is no disk."""


@dataclass
class _Document:
    """A descriptor that is being edited, and what was changed in it."""

    root: minidom.Element
    changes: list[str] = field(default_factory=list)

    def named(self, *names: str) -> list[minidom.Element]:
        """Elements by local name, in order."""
        return [
            element
            for element in self.root.getElementsByTagName("*")
            if element.tagName.rpartition(":")[2] in names
        ]


def edit_descriptor(content: bytes, files: Mapping[str, Stored], hardware: int) -> tuple[bytes, list[str]]:
    """Change a descriptor; `files` by the href that it has now. Returns it with one line for each change.

    `hardware` is the version of VMware's family that a foreign one becomes. Without a change the very
    bytes come back. Raises Damaged when it is no XML or declares a document type.
    """
    parse_xml(content)
    try:
        parsed = minidom.parseString(content)
    except (ExpatError, ValueError):  # expat sets apart the parts of a name by a blank here
        raise Damaged(NO_URI, "OVF") from None
    document = _Document(_present(parsed.documentElement))
    _edit_version(document)
    _edit_files(document, files)
    _edit_disks(document, files)
    _edit_items(document)
    _edit_family(document, hardware)
    if not document.changes:
        return content, []
    return parsed.toxml(encoding="UTF-8").replace(b"?><", b"?>\n<", 1) + b"\n", document.changes


def _present(node: _Node | None) -> _Node:
    """A node that a document always has: minidom's types do not know."""
    assert node is not None
    return node


def _attribute(element: minidom.Element, name: str) -> tuple[str, str]:
    """An attribute's full name and value, by its local name; a new one gets the prefix of its neighbours."""
    prefix = "ovf"
    for key, value in element.attributes.items():
        before, _, known = key.rpartition(":")
        if known == name and not key.startswith("xmlns"):
            return key, value
        if known in _NAMES:
            prefix = before
    return f"{prefix}:{name}" if prefix else name, ""


def _set(element: minidom.Element, name: str, value: str) -> None:
    element.setAttribute(_attribute(element, name)[0], value)


def _drop(element: minidom.Element, name: str) -> bool:
    key, value = _attribute(element, name)
    if value:
        element.removeAttribute(key)
    return bool(value)


def _children(element: minidom.Element) -> list[minidom.Element]:
    return [node for node in element.childNodes if isinstance(node, minidom.Element)]


def _text(element: minidom.Element) -> str:
    return "".join(node.data for node in element.childNodes if isinstance(node, minidom.Text)).strip()


def _write(element: minidom.Element, text: str) -> None:
    while element.firstChild:
        element.removeChild(element.firstChild)
    element.appendChild(_present(element.ownerDocument).createTextNode(text))


def _remove(element: minidom.Element) -> None:
    """Take an element out with the blanks in front of it."""
    before = element.previousSibling
    parent = element.parentNode
    if not isinstance(parent, minidom.Element):
        return
    if isinstance(before, minidom.Text) and not before.data.strip():
        parent.removeChild(before)
    parent.removeChild(element)


def _rename(element: minidom.Element, name: str) -> None:
    element.tagName = element.nodeName = name


def _edit_version(document: _Document) -> None:
    """OVF 2.0 has devices of two more kinds in namespaces of their own; the rest is OVF 1's."""
    root = document.root
    if OVF2 not in [value for key, value in root.attributes.items() if key.startswith("xmlns")]:
        return
    prefixes = {}
    for key, value in list(root.attributes.items()):
        if key.startswith("xmlns") and value == OVF2:
            root.setAttribute(key, OVF)
        elif key.startswith("xmlns:") and _SETTINGS.search(value):
            prefixes[key.removeprefix("xmlns:")] = value
    if not any(value == RASD for value in prefixes.values()):
        root.setAttribute("xmlns:rasd", RASD)
        prefixes["rasd"] = RASD
    target = next(key for key, value in prefixes.items() if value == RASD)
    if _attribute(root, "version")[1]:
        _set(root, "version", "1.0")
    moved = document.named("StorageItem", "EthernetPortItem")
    for item in moved:
        prefix = item.tagName.rpartition(":")[0]
        _rename(item, f"{prefix}:Item" if prefix else "Item")
    for item in document.named("Item"):
        for child in _children(item):
            prefix, _, name = child.tagName.rpartition(":")
            if prefix in prefixes and prefix != target:
                _rename(child, f"{target}:{name}")
    document.changes.append(f"OVF 2.0 is OVF 1.0: {len(moved)} StorageItem and EthernetPortItem are Item")


def _edit_files(document: _Document, files: Mapping[str, Stored]) -> None:
    for element in document.named("File"):
        href = _attribute(element, "href")[1]
        stored = files.get(href)
        if stored is None:
            continue
        if stored.name != href:
            _set(element, "href", stored.name)
            document.changes.append(f"{href} is called {stored.name}")
        for name in ("compression", "chunkSize"):
            if _drop(element, name):
                document.changes.append(f"{stored.name}: ovf:{name} removed")
        size = _attribute(element, "size")[1]
        if size and not is_open(size) and size.strip() != str(stored.size):
            _set(element, "size", str(stored.size))
            document.changes.append(f"{stored.name}: ovf:size {size} is {stored.size}")


def _edit_disks(document: _Document, files: Mapping[str, Stored]) -> None:
    by_name = {stored.name: stored for stored in files.values()}
    by_id = {
        _attribute(file, "id")[1]: by_name.get(_attribute(file, "href")[1]) for file in document.named("File")
    }
    images: dict[str, str] = {}
    for disk in document.named("Disk"):
        called, ref = _attribute(disk, "diskId")[1], _attribute(disk, "fileRef")[1]
        stored = by_id.get(ref)
        said = _attribute(disk, "format")[1]
        if said.lower().endswith(ISO):
            images[called] = ref
            _remove(disk)
            document.changes.append(f"Disk {called} is a CD image: referenced as a file")
        elif stored and stored.virtual_size:
            _edit_disk(document, disk, called, stored)
    for resource in document.named("HostResource") if images else ():
        match = re.fullmatch(r"(?:ovf:/?)?/disk/(.+)", _text(resource))
        if match and match[1] in images:
            _write(resource, f"ovf:/file/{images[match[1]]}")


def _edit_disk(document: _Document, disk: minidom.Element, called: str, stored: Stored) -> None:
    said = _attribute(disk, "format")[1]
    if not said.lower().endswith("vmdk.html#streamoptimized"):
        _set(disk, "format", STREAM)
        document.changes.append(f"Disk {called}: ovf:format is streamOptimized")
    size, units = _attribute(disk, "capacity")[1], _attribute(disk, "capacityAllocationUnits")[1]
    if is_open(size) or is_open(units):
        return
    now = capacity(size, units)
    unit = capacity("1", units) or 1
    if now is None or not stored.virtual_size <= now < stored.virtual_size + unit:
        _set(disk, "capacity", str(stored.virtual_size))
        _set(disk, "capacityAllocationUnits", "byte")
        document.changes.append(f"Disk {called}: the capacity is {stored.virtual_size} bytes, as the disk's")
    elif not units:
        _set(disk, "capacityAllocationUnits", "byte")
        document.changes.append(f"Disk {called}: ovf:capacityAllocationUnits is byte")


def _edit_items(document: _Document) -> None:
    """Devices as vSphere knows them; what was done to several is told once."""
    done: Counter[str] = Counter()
    for item in document.named("Item"):
        values = {child.tagName.rpartition(":")[2]: child for child in _children(item)}
        if item.parentNode is None or "ResourceType" not in values:
            continue
        done.update(_edit_item(item, values))
    document.changes += [f"{text}{f' ({count} times)' if count > 1 else ''}" for text, count in done.items()]


def _edit_item(item: minidom.Element, values: Mapping[str, minidom.Element]) -> Iterator[str]:
    kind = _text(values["ResourceType"])
    subtype = values.get("ResourceSubType")
    subtypes = words(_text(subtype).lower()) if subtype else []
    optional = _attribute(item, "required")[1].lower() == "false"
    if kind == _SOUND and not optional and not any(part.startswith("vmware.") for part in subtypes):
        _remove(item)
        yield "sound card removed"
        return
    if subtype and subtypes and not any(map(is_open, subtypes)):
        yield from _edit_subtype(kind, values["ResourceType"], subtype, subtypes)
    if "ElementName" not in values and "Caption" in values:
        caption = values["Caption"]
        _rename(caption, caption.tagName.replace("Caption", "ElementName"))
        yield "Caption is ElementName"
    if _sort(item):
        yield "elements of an Item put in order"


def _edit_subtype(
    kind: str, resource: minidom.Element, subtype: minidom.Element, subtypes: list[str]
) -> Iterator[str]:
    written = _text(subtype)
    if kind == "5":
        _remove(subtype)
        yield f"IDE controller {written}: the subtype, which vSphere has none of, removed"
    elif kind == "6" and not set(subtypes) & set(SCSI):
        _write(subtype, _SUBTYPES.get(subtypes[0], ("6", "lsilogic"))[1])
        yield f"SCSI controller {written} is {_text(subtype)}"
    elif kind == "20" and not set(subtypes) & (set(STORAGE) - {"ahci"}):
        number, name = _SUBTYPES.get(subtypes[0], ("20", "vmware.sata.ahci"))
        _write(resource, number)
        _write(subtype, name)
        yield f"storage controller {written} is {name}"
    elif kind == "10" and any(part.startswith("virtio") for part in subtypes) and len(subtypes) == 1:
        _write(subtype, "VmxNet3")
        yield f"network card {written} is VmxNet3"


def _sort(item: minidom.Element) -> bool:
    """Put the elements of CIM in alphabetical order, in the places that such elements had."""
    own = [child for child in _children(item) if _is_setting(child)]
    wanted = sorted(own, key=lambda child: child.tagName.rpartition(":")[2])
    if own == wanted:
        return False
    marks = [_present(item.ownerDocument).createComment("") for _ in own]
    for child, mark in zip(own, marks, strict=True):
        item.replaceChild(mark, child)
    for child, mark in zip(wanted, marks, strict=True):
        item.replaceChild(child, mark)
    return True


def _is_setting(element: minidom.Element) -> bool:
    prefix = element.tagName.rpartition(":")[0]
    key = f"xmlns:{prefix}" if prefix else "xmlns"
    node: object = element
    while isinstance(node, minidom.Element):
        if node.hasAttribute(key):
            return bool(_SETTINGS.search(node.getAttribute(key)))
        node = node.parentNode
    return False


def _edit_family(document: _Document, hardware: int) -> None:
    """A family of VMware's, new enough for the storage controllers."""
    for section in document.named("VirtualHardwareSection"):
        subtypes = [
            part
            for child in section.getElementsByTagName("*")
            if child.tagName.rpartition(":")[2] == "ResourceSubType"
            for part in words(_text(child).lower())
        ]
        least = NVME_SINCE if "vmware.nvme.controller" in subtypes else 0
        least = max(least, SATA_SINCE if set(subtypes) & set(STORAGE) else 0)
        for element in section.getElementsByTagName("*"):
            if element.tagName.rpartition(":")[2] != "VirtualSystemType":
                continue
            written = _text(element)
            versions = [int(number) for number in re.findall(r"\bvmx-([0-9]{1,2})\b", written.lower())]
            if is_open(written) or (versions and max(versions) >= least):
                continue
            _write(element, f"vmx-{max(least, hardware):02d}")
            document.changes.append(f"hardware family {written} is {_text(element)}")
