"""Who reads images, by key, and from which release to which: what findings and places go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

TITLES: Mapping[str, str] = {
    "reader": "every reader",
    "importer": "every importer",
    "hypervisor": "every hypervisor",
    "unpacker": "every unpacker",
    "inflater": "readers with hardware or streaming inflate",
    "uefi": "UEFI",
    "bios": "BIOS",
    "xenserver": "XenServer",
    "xcp-ng": "XCP-ng",
    "xen-orchestra": "Xen Orchestra",
    "vsphere": "vSphere",
    "esxi": "ESXi",
    "vcenter": "vCenter",
    "hyperv": "Hyper-V",
    "azure": "Azure",
    "gce": "Google Compute Engine",
    "aws": "AWS",
    "proxmox": "Proxmox",
    "qemu": "QEMU",
    "kvm": "KVM",
    "openstack": "OpenStack",
    "virtualbox": "VirtualBox",
    "cloudstack": "CloudStack",
    "vagrant": "Vagrant",
    "virt-v2v": "virt-v2v",
}
"""By key, as people say it."""
EVERYBODY = frozenset(("reader", "importer", "hypervisor", "uefi", "bios"))
"""Keys that stand for every place that images go to."""


@dataclass(frozen=True)
class Affected:
    """Who refuses a file or misreads it. A text may hold a field of the finding in braces."""

    platform: str
    """A key of TITLES."""
    since: str = ""
    """The first release that does; empty: from the first on."""
    before: str = ""
    """The first release that does no longer."""
    only: str = ""
    """The one release that is known to."""
    case: str = ""
    """In which case alone, for people."""

    @property
    def always(self) -> bool:
        """Whether a current release does, in any case: it is meant by the platform's name alone."""
        return not (self.before or self.only or self.case)

    @property
    def title(self) -> str:
        """For people: `vSphere 6.5 and later`."""
        since, before = self.since and f"{self.since} and later", self.before and f"before {self.before}"
        words = (TITLES.get(self.platform, self.platform), since, before, self.only, self.case)
        return " ".join(filter(None, words))

    def filled(self, fields: Mapping[str, str | int]) -> Affected:
        """The same with a finding's fields put in."""
        platform, before = (text.format(**fields) for text in (self.platform, self.before))
        return replace(self, platform=platform, before=before)


EVERY_READER, EVERY_IMPORTER, EVERY_HYPERVISOR = map(Affected, ("reader", "importer", "hypervisor"))
EVERY_UNPACKER, INFLATERS, UEFI = map(Affected, ("unpacker", "inflater", "uefi"))
XENSERVER, XCP_NG, XEN_ORCHESTRA = map(Affected, ("xenserver", "xcp-ng", "xen-orchestra"))
VSPHERE, ESXI, VCENTER = map(Affected, ("vsphere", "esxi", "vcenter"))
HYPERV, AZURE, GCE, AWS = map(Affected, ("hyperv", "azure", "gce", "aws"))
QEMU, KVM, VIRTUALBOX, CLOUDSTACK = map(Affected, ("qemu", "kvm", "virtualbox", "cloudstack"))
VAGRANT, VIRT_V2V = map(Affected, ("vagrant", "virt-v2v"))
