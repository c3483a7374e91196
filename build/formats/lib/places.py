"""Where images go: who takes which format, and what each place alone minds. `inspect --for PLACE` asks here.

A finding counts for a place when it affects one of its platforms, always or from a release on. Old releases
and special cases (`before X`, `on EL7`) are not meant by the name of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from build.formats.lib.findings import Code, Finding, Group
from build.formats.lib.platforms import AZURE, EVERYBODY, GCE, Affected

GROUP = Group(
    "FOR", "What one place alone refuses (`--for`)", "build/formats/lib/places.py names that of each place"
)
_ITSELF = (Affected("{platform}"),)
NOT_IMPORTED = Code(
    "FOR001",
    "error",
    "{place} does not import {kind}",
    _ITSELF,
    "make one for it: inv convert.{best} --from FILE",
)
NOT_UNPACKED = Code("FOR002", "error", "{place} does not unpack {outer}", _ITSELF, "unpack it first")
DYNAMIC = Code(
    "FOR003",
    "error",
    "a dynamic VHD",
    (AZURE,),
    "make a fixed one: convert.azure-vhd",
    source="Microsoft Learn, Prepare Linux for imaging in Azure",
)
NOT_WHOLE_MIB = Code(
    "FOR004",
    "error",
    "the virtual size of {size} bytes is not whole MiB",
    (AZURE,),
    "make the disk whole MiB",
    source="Microsoft Learn, Prepare Linux for imaging in Azure: aligned to 1 MB",
)
LARGER_THAN_AZURES = Code(
    "FOR005",
    "error",
    "the disk of {size} bytes is larger than 4095 GiB",
    (AZURE,),
    "make SIZE smaller",
    source="Microsoft Learn, Managed disks: size of an OS disk",
)
NOT_WHOLE_GIB = Code(
    "FOR006",
    "error",
    "the virtual size of {size} bytes is not whole GiB",
    (GCE,),
    "make the disk whole GiB",
    source="Compute Engine, Manually import boot disks: size of the raw file",
)


@dataclass(frozen=True)
class Seen:
    """What is known of a file when a place judges it."""

    outer: str
    """Compression or archive around it; empty: none."""
    kind: str
    virtual_size: int
    """Bytes; 0 when it is not known."""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """Something that one place refuses and that is no fault elsewhere."""

    code: Code
    applies: Callable[[Seen], bool]


@dataclass(frozen=True)
class Place:
    """A hypervisor, a cloud or a tool that images are imported to."""

    name: str
    """`xcp-ng` of `inspect --for xcp-ng`."""
    title: str
    platforms: tuple[str, ...]
    """Those of `platforms.TITLES` that it is, or runs on; the first is its own."""
    best: str
    """The format of ours that is made for it."""
    takes: tuple[str, ...]
    """Kinds of files that it imports."""
    source: str
    """Where it says which."""
    outer: tuple[str, ...] = ()
    """Compressions that it unpacks itself."""
    rules: tuple[Rule, ...] = ()


def _dynamic(seen: Seen) -> bool:
    return seen.kind == "vhd" and seen.facts.get("type") != "fixed"


def _part_of(unit: int) -> Callable[[Seen], bool]:
    return lambda seen: bool(seen.virtual_size % unit)


_XEN = ("vhd", "xva")
PLACES: Mapping[str, Place] = {
    place.name: place
    for place in (
        Place(
            "xcp-ng",
            "XCP-ng",
            ("xcp-ng", "xen-orchestra", "xenserver"),
            "vhd",
            (*_XEN, "qcow2", "raw", "ova", "vmdk"),
            "xapi-project/xen-api, ocaml/xapi/import_raw_vdi.ml; Xen Orchestra's disk and VM import",
            ("gz", "zst"),
        ),
        Place(
            "xenserver",
            "XenServer",
            ("xenserver",),
            "vhd",
            (*_XEN, "ova"),
            "XenServer 8, Import and export VMs; blktap's vhd-util check",
            ("gz",),
        ),
        Place(
            "vsphere",
            "vSphere",
            ("vsphere", "esxi", "vcenter"),
            "ova",
            ("ova", "vmdk"),
            "vSphere, Deploying OVF and OVA Templates",
        ),
        Place(
            "hyperv",
            "Hyper-V",
            ("hyperv",),
            "vhdx",
            ("vhdx", "vhd"),
            "Microsoft Learn, New-VHD and Convert-VHD of Hyper-V",
        ),
        Place(
            "azure",
            "Azure",
            ("azure", "hyperv"),
            "azure-vhd",
            ("vhd",),
            "Microsoft Learn, Prepare Linux for imaging in Azure",
            rules=(
                Rule(DYNAMIC, _dynamic),
                Rule(NOT_WHOLE_MIB, _part_of(1 << 20)),
                Rule(LARGER_THAN_AZURES, lambda seen: seen.virtual_size > 4095 << 30),
            ),
        ),
        Place(
            "gce",
            "Google Compute Engine",
            ("gce",),
            "gce",
            ("gce",),
            "Compute Engine, Manually import boot disks",
            ("gz",),
            (Rule(NOT_WHOLE_GIB, _part_of(1 << 30)),),
        ),
        Place(
            "aws",
            "AWS VM Import",
            ("aws",),
            "vmdk",
            ("ova", "vmdk", "vhd", "vhdx", "raw"),
            "VM Import/Export, Requirements: image formats",
        ),
        Place(
            "proxmox",
            "Proxmox VE",
            ("proxmox", "qemu", "kvm"),
            "qcow2",
            ("qcow2", "raw", "vmdk", "ova", "vdi", "vhdx", "vhd", "vma"),
            "Proxmox VE, qm disk import and import of OVF",
        ),
        Place(
            "kvm",
            "KVM",
            ("kvm", "qemu"),
            "qcow2",
            ("qcow2", "raw", "vmdk", "vdi", "vhdx", "vhd", "qed", "parallels"),
            "QEMU, Disk image file formats",
        ),
        Place(
            "openstack",
            "OpenStack",
            ("openstack", "qemu", "kvm"),
            "qcow2",
            ("qcow2", "raw", "vmdk", "vdi", "vhdx", "vhd", "ova", "iso"),
            "Glance, disk formats",
        ),
        Place(
            "virtualbox",
            "VirtualBox",
            ("virtualbox",),
            "ova",
            ("ova", "vdi", "vmdk", "vhd", "parallels"),
            "VirtualBox manual, Disk Image Files",
        ),
        Place(
            "cloudstack",
            "CloudStack",
            ("cloudstack", "xenserver", "qemu", "kvm", "vsphere", "esxi", "vcenter"),
            "qcow2",
            ("qcow2", "vhd", "ova", "raw", "vmdk", "iso"),
            "CloudStack, registerTemplate; core/src/main/java/com/cloud/storage/template",
            ("bz2", "gz", "zip"),
        ),
    )
}
"""By name. Sources: the documentation of the place, or its importer's code."""


def is_affected(place: Place, affects: Iterable[Affected]) -> bool:
    """Whether whom a finding affects is a place's platform, or everybody."""
    known = EVERYBODY | {*place.platforms}
    return any(each.always and each.platform in known for each in affects)


def refusals(place: Place, seen: Seen) -> Iterator[Finding]:
    """What this place alone has against a file."""
    own = {"place": place.title, "platform": place.platforms[0]}
    if seen.kind not in place.takes:
        yield Finding(NOT_IMPORTED, "format", **own, kind=seen.kind, best=place.best)
        return
    if seen.outer and seen.outer not in place.outer:
        yield Finding(NOT_UNPACKED, "format", **own, outer=seen.outer)
    for rule in place.rules:
        if rule.applies(seen):
            yield Finding(rule.code, "format", size=seen.virtual_size)
