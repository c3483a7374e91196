"""Where the boot line comes from, per hypervisor, and what it looks like there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from systemvm.hypervisor import HYPERV, KVM, VIRTUALBOX, VMWARE, XEN_HVM, XEN_PV

FILE = "/var/cache/cloud/cmdline"
"""Where the boot line ends up on every hypervisor; on KVM the host's agent writes it there itself."""

TEST_HOOK = "/mnt/cmdline"
"""A file that replaces what the hypervisor says."""

POOL_KEY, POOL_VALUE = 512, 2048
"""Bytes of key and value in a record of Hyper-V's key-value pools (linux/hyperv.h, HV_KVP_EXCHANGE_MAX_*)."""


@dataclass(frozen=True)
class Source:
    """How to get the boot line: one of a file, a command's output, or waiting for FILE."""

    units: tuple[str, ...] = ()
    """Started first."""
    stopped: tuple[str, ...] = ()
    """Not needed: this hypervisor's own tools keep the time."""
    command: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """The first one with content counts."""
    seconds: float = 0
    """How long to ask again while there is nothing."""
    form: str = "plain"
    """plain, percent (`%` for a blank), pool (Hyper-V's records) or dmi (a line with `cmdline:`)"""


SOURCES = {
    KVM: Source(units=("qemu-guest-agent",), files=(FILE,), seconds=60),
    XEN_PV: Source(units=("xe-daemon",), stopped=("ntpsec",), files=("/proc/cmdline",), form="percent"),
    XEN_HVM: Source(
        units=("xe-daemon",),
        stopped=("ntpsec",),
        command=("xenstore-read", "vm-data/cloudstack/init"),
        seconds=10,
        form="percent",
    ),
    VMWARE: Source(
        units=("open-vm-tools",),
        stopped=("ntpsec",),
        command=("vmtoolsd", "--cmd", "machine.id.get"),
        seconds=10,
    ),
    HYPERV: Source(
        units=("hv-kvp-daemon", "hv-vss-daemon", "hv-fcopy-daemon"),
        # Daemons of different ages keep their pools in different places.
        files=("/var/lib/hyperv/.kvp_pool_0", "/var/opt/hyperv/.kvp_pool_0"),
        seconds=20,
        form="pool",
    ),
    VIRTUALBOX: Source(command=("dmidecode",), form="dmi"),
}


def decode(form: str, data: bytes) -> str:
    """The boot line in what a source gave; empty when there is none."""
    text = data.decode("utf-8", errors="replace")
    if form == "percent":
        return text.replace("%", " ").strip()
    if form == "pool":
        return " ".join(value for value in pool_values(data) if "=" in value)
    if form == "dmi":
        lines = (line.partition("cmdline:")[2] for line in text.splitlines() if "cmdline:" in line)
        return next(lines, "").strip()
    return text.strip()


def pool_values(data: bytes) -> Sequence[str]:
    """Values of a key-value pool, in order; a file without whole records is taken as text."""
    size = POOL_KEY + POOL_VALUE
    if not data or len(data) % size:
        return [data.replace(b"\0", b" ").decode("utf-8", errors="replace").strip()]
    values = (data[at + POOL_KEY : at + size] for at in range(0, len(data), size))
    return [value.split(b"\0")[0].decode("utf-8", errors="replace").strip() for value in values]
