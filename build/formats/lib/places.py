"""Where images go: who takes which format, and what each place alone minds. `inspect --for PLACE` asks here.

A finding names whoever refuses the file in `refused_by`, parts set apart by commas. A part counts for a
place when it is one of its names, alone or with `and later`; `before X`, `with Y` and the like name old or
special ones, whom nobody means by the name of the place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from build.formats.lib.findings import Finding

EVERYBODY = ("every reader", "every importer", "every hypervisor", "UEFI", "BIOS")
"""Parts of `refused_by` that mean every place."""


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

    fault: Callable[[Seen], str]
    """What is wrong, in one line; empty when nothing is."""
    fix: str
    source: str
    """Where that place says so."""


@dataclass(frozen=True)
class Place:
    """A hypervisor, a cloud or a tool that images are imported to."""

    name: str
    """`xcp-ng` of `inspect --for xcp-ng`."""
    title: str
    names: tuple[str, ...]
    """How findings call it."""
    best: str
    """The format of ours that is made for it."""
    takes: tuple[str, ...]
    """Kinds of files that it imports."""
    source: str
    """Where it says which."""
    outer: tuple[str, ...] = ()
    """Compressions that it unpacks itself."""
    rules: tuple[Rule, ...] = ()


def _whole(unit: int, called: str) -> Callable[[Seen], str]:
    def fault(seen: Seen) -> str:
        odd = seen.virtual_size % unit
        return f"the virtual size of {seen.virtual_size} bytes is not whole {called}" if odd else ""

    return fault


def _at_most(size: int, called: str) -> Callable[[Seen], str]:
    def fault(seen: Seen) -> str:
        return f"the disk is larger than {called}" if seen.virtual_size > size else ""

    return fault


def _dynamic(seen: Seen) -> str:
    return "a dynamic VHD" if seen.kind == "vhd" and seen.facts.get("type") != "fixed" else ""


_XEN = ("vhd", "xva")
PLACES: Mapping[str, Place] = {
    place.name: place
    for place in (
        Place(
            "xcp-ng",
            "XCP-ng",
            ("XCP-ng", "Xen Orchestra", "XenServer"),
            "vhd",
            (*_XEN, "qcow2", "raw", "ova", "vmdk"),
            "xapi-project/xen-api, ocaml/xapi/import_raw_vdi.ml; Xen Orchestra's disk and VM import",
            ("gz", "zst"),
        ),
        Place(
            "xenserver",
            "XenServer",
            ("XenServer",),
            "vhd",
            (*_XEN, "ova"),
            "XenServer 8, Import and export VMs; blktap's vhd-util check",
            ("gz",),
        ),
        Place(
            "vsphere",
            "vSphere",
            ("vSphere", "ESXi", "vCenter", "VMware"),
            "ova",
            ("ova", "vmdk"),
            "vSphere, Deploying OVF and OVA Templates",
        ),
        Place(
            "hyperv",
            "Hyper-V",
            ("Hyper-V",),
            "vhdx",
            ("vhdx", "vhd"),
            "Microsoft Learn, New-VHD and Convert-VHD of Hyper-V",
        ),
        Place(
            "azure",
            "Azure",
            ("Azure", "Hyper-V"),
            "azure-vhd",
            ("vhd",),
            "Microsoft Learn, Prepare Linux for imaging in Azure",
            rules=(
                Rule(
                    _dynamic,
                    "make a fixed one: convert.azure-vhd",
                    "Prepare Linux for imaging",
                ),
                Rule(
                    _whole(1 << 20, "MiB"),
                    "make the disk whole MiB",
                    "Prepare Linux for imaging: aligned to 1 MB",
                ),
                Rule(
                    _at_most(4095 << 30, "4095 GiB"), "make SIZE smaller", "Managed disks: size of an OS disk"
                ),
            ),
        ),
        Place(
            "gce",
            "Google Compute Engine",
            ("Google Compute Engine",),
            "gce",
            ("gce",),
            "Compute Engine, Manually import boot disks",
            ("gz",),
            (
                Rule(
                    _whole(1 << 30, "GiB"),
                    "make the disk whole GiB",
                    "Manually import boot disks: size of the raw file",
                ),
            ),
        ),
        Place(
            "aws",
            "AWS VM Import",
            ("AWS",),
            "vmdk",
            ("ova", "vmdk", "vhd", "vhdx", "raw"),
            "VM Import/Export, Requirements: image formats",
        ),
        Place(
            "proxmox",
            "Proxmox VE",
            ("Proxmox", "QEMU", "KVM"),
            "qcow2",
            ("qcow2", "raw", "vmdk", "ova", "vdi", "vhdx", "vhd", "vma"),
            "Proxmox VE, qm disk import and import of OVF",
        ),
        Place(
            "kvm",
            "KVM",
            ("KVM", "QEMU"),
            "qcow2",
            ("qcow2", "raw", "vmdk", "vdi", "vhdx", "vhd", "qed", "parallels"),
            "QEMU, Disk image file formats",
        ),
        Place(
            "openstack",
            "OpenStack",
            ("OpenStack", "QEMU", "KVM"),
            "qcow2",
            ("qcow2", "raw", "vmdk", "vdi", "vhdx", "vhd", "ova", "iso"),
            "Glance, disk formats",
        ),
        Place(
            "virtualbox",
            "VirtualBox",
            ("VirtualBox",),
            "ova",
            ("ova", "vdi", "vmdk", "vhd", "parallels"),
            "VirtualBox manual, Disk Image Files",
        ),
        Place(
            "cloudstack",
            "CloudStack",
            ("CloudStack", "XenServer", "QEMU", "KVM", "vSphere", "ESXi", "vCenter"),
            "qcow2",
            ("qcow2", "vhd", "ova", "raw", "vmdk", "iso"),
            "CloudStack, registerTemplate; core/src/main/java/com/cloud/storage/template",
            ("bz2", "gz", "zip"),
        ),
    )
}
"""By name. Sources: the documentation of the place, or its importer's code."""


def minds(place: Place, refused_by: str) -> bool:
    """Whether a finding's `refused_by` names a place."""
    return any(_is_named(place, part.strip()) for part in refused_by.split(","))


def _is_named(place: Place, part: str) -> bool:
    if part in EVERYBODY:
        return True
    return any(
        part == name or (part.startswith(f"{name} ") and part.endswith("and later")) for name in place.names
    )


def refusals(place: Place, seen: Seen) -> Iterator[Finding]:
    """What this place alone has against a file."""
    name, make = place.names[0], f"make one for it: inv convert.{place.best} --from FILE"
    if seen.kind not in place.takes:
        yield Finding("error", "format", f"{place.title} does not import {seen.kind}", name, make)
        return
    if seen.outer and seen.outer not in place.outer:
        yield Finding(
            "error", "format", f"{place.title} does not unpack {seen.outer}", name, "unpack it first"
        )
    for rule in place.rules:
        if text := rule.fault(seen):
            yield Finding("error", "format", text, name, rule.fix)
