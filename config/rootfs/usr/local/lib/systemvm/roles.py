"""What each type of system VM is, as a table; another type is another row."""

from __future__ import annotations

from dataclasses import dataclass

from systemvm.boot_line import Params
from systemvm.hypervisor import HYPERV, VMWARE


@dataclass(frozen=True)
class Role:
    """One type of system VM."""

    name: str
    control: int = 0
    """Number of the NIC on which the management server logs in."""
    control_vmware: int | None = None
    """The same on VMware and Hyper-V, whose control network is the management network."""
    guest: int | None = None
    """Number of the NIC in the guests' network, if it has one at boot."""
    rules: str = ""
    """Packet filter: /etc/iptables/iptables-NAME; none for types that bring their own."""
    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    forwarding: bool = False
    modules: tuple[str, ...] = ()
    merged: bool = False
    """Whether CloudStack's data documents are merged at boot (update_config)."""
    agent: bool = False
    """Whether a Java agent reads the boot line from agent.properties."""
    ssh_port: int = 3922
    hourly_logs: bool = False
    cloud_init: bool = False
    """Whether cloud-init takes over: it finds a user's own settings, and the management server's key goes."""


CLOUD_INIT = (
    "cloud-init-local",
    "cloud-init",
    "cloud-init-main",
    "cloud-init-network",
    "cloud-config",
    "cloud-final",
)
"""Units of cloud-init's stages; which of them exist depends on its age."""
OFF_A_ROUTER = ("cloud", "nfs-common", "portmap")

ROLES = {
    role.name: role
    for role in (
        Role(
            "router",
            control=1,
            guest=0,
            rules="router",
            on=("haproxy", "apache2"),
            off=OFF_A_ROUTER,
            forwarding=True,
            modules=("nf_nat_pptp",),
            merged=True,
            hourly_logs=True,
        ),
        Role(
            "vpcrouter",
            control=0,
            rules="vpcrouter",
            on=("haproxy", "apache2"),
            off=OFF_A_ROUTER,
            forwarding=True,
            modules=("nf_nat_pptp",),
            merged=True,
            hourly_logs=True,
        ),
        Role(
            "dhcpsrvr",
            control=1,
            guest=0,
            rules="router",
            on=("dnsmasq", "apache2"),
            off=("cloud", "nfs-common", "conntrackd", "keepalived", "haproxy", "portmap", "radvd"),
            merged=True,
            hourly_logs=True,
        ),
        Role(
            "elbvm",
            control=1,
            guest=0,
            rules="elbvm",
            on=("haproxy",),
            off=("cloud", "dnsmasq", "keepalived", "conntrackd"),
        ),
        Role(
            "ilbvm",
            control=1,
            guest=0,
            rules="ilbvm",
            on=("haproxy",),
            off=("cloud", "dnsmasq", "keepalived", "conntrackd"),
        ),
        Role(
            "consoleproxy",
            control=0,
            control_vmware=1,
            rules="consoleproxy",
            on=("cloud",),
            off=("haproxy", "dnsmasq", "apache2", "nfs-common", "portmap"),
            agent=True,
        ),
        Role(
            "secstorage",
            control=0,
            control_vmware=1,
            rules="secstorage",
            on=("cloud", "apache2", "nfs-common", "portmap"),
            off=("conntrackd", "keepalived", "haproxy", "dnsmasq"),
            agent=True,
        ),
        Role("sharedfsvm", guest=0, on=CLOUD_INIT, off=("cloud",), ssh_port=22, cloud_init=True),
        Role("cksnode", guest=0, on=CLOUD_INIT, off=("cloud",), ssh_port=22, cloud_init=True),
    )
}

DEFAULT = Role("default")
"""A system VM whose type is missing or unknown: sshd, nothing else."""


def role(params: Params) -> Role:
    """The role that a boot line asks for."""
    name = params.text("type")
    if name in ROLES:
        return ROLES[name]
    params.complain("type", f"unknown type, known: {', '.join(ROLES)}")
    return DEFAULT


def control_nic(role: Role, params: Params, hypervisor: str) -> int:
    """Number of the NIC on which sshd listens."""
    if role.name in ("dhcpsrvr", "elbvm") and params.flag("sshonguest"):
        return 0
    if hypervisor in (VMWARE, HYPERV) and role.control_vmware is not None:
        return role.control_vmware
    return role.control


def services(role: Role, params: Params) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Services to start and to stop, under the names CloudStack uses."""
    on, off = role.on, role.off
    if role.name in ("router", "vpcrouter"):
        pair, single = ("keepalived", "conntrackd"), ("dnsmasq",)
        on, off = (
            (*on, *(pair if params.redundant else single)),
            (*off, *(single if params.redundant else pair)),
        )
    return on, off
