"""Which hypervisor this is, from facts that cost little to read."""

from __future__ import annotations

from dataclasses import dataclass

KVM, XEN_PV, XEN_HVM, VMWARE, HYPERV, VIRTUALBOX = (
    "kvm",
    "xen-pv",
    "xen-hvm",
    "vmware",
    "hyperv",
    "virtualbox",
)
UNKNOWN = "unknown"

AGENT_PORT = "org.qemu.guest_agent.0"
"""Name of the virtio channel through which a KVM host writes the boot line."""


@dataclass(frozen=True)
class Signs:
    """What this machine says about itself; every field may be empty."""

    xen_type: str = ""
    """/sys/hypervisor/type"""
    xen_guest_type: str = ""
    """/sys/hypervisor/guest_type: PV, HVM or PVH"""
    vendor: str = ""
    """/sys/class/dmi/id/sys_vendor"""
    product: str = ""
    """/sys/class/dmi/id/product_name"""
    virtual_ports: tuple[str, ...] = ()
    """Names of the virtio serial ports"""
    detected: str = ""
    """What systemd-detect-virt prints"""
    cpu: str = ""
    """Model name of the first processor"""


BY_DETECTION = {
    "kvm": KVM,
    "qemu": KVM,
    "vmware": VMWARE,
    "microsoft": HYPERV,
    "oracle": VIRTUALBOX,
    "xen": XEN_HVM,
}
BY_VENDOR = {
    "VMware, Inc.": VMWARE,
    "Microsoft Corporation": HYPERV,
    "innotek GmbH": VIRTUALBOX,
    "Oracle Corporation": VIRTUALBOX,
    "QEMU": KVM,
    "Xen": XEN_HVM,
    # What CloudStack's KVM agent writes into the DMI table.
    "Apache Software Foundation": KVM,
}


def detect(signs: Signs) -> str:
    """Name the hypervisor.

    Xen comes first: with its Viridian extensions it looks like Hyper-V to everything else.
    """
    if signs.xen_type == "xen":
        return XEN_PV if signs.xen_guest_type == "PV" else XEN_HVM
    if AGENT_PORT in signs.virtual_ports:
        return KVM
    if signs.vendor in BY_VENDOR:
        return BY_VENDOR[signs.vendor]
    if signs.detected in BY_DETECTION:
        return BY_DETECTION[signs.detected]
    return KVM if "QEMU" in signs.cpu or "KVM" in signs.product else UNKNOWN
