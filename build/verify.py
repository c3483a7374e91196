"""What `inv verify` expects of an image, and how its answers look to people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from build.convert import FORMATS
from build.engine.options import Options
from build.engine.settings import Settings

Result = Mapping[str, Any]
Guest = Mapping[str, Any]
Check = Mapping[str, Any]

WIDTH = 88
"""Characters of a row for all guests' values; what is not as expected is told in full below the table."""


@dataclass(frozen=True)
class Machine:
    """What a hypervisor shows of a disk and a network card, as far as QEMU has it."""

    disk: str
    """A key of the agent's qemu.DISKS."""
    nic: str
    """A key of its qemu.NICS."""
    firmware: tuple[str, ...] = ("bios",)


MACHINES: Mapping[str, Machine] = {
    "vhd": Machine("ide", "rtl8139"),  # Xen's emulated devices, before its own drivers take over
    # VMware's own controller stands in for its LSI Logic, too: QEMU has none of that kind (53C1030), and of
    # its serial one (mptsas1068) the kernel of bookworm sees the controller but no disk.
    "ova": Machine("pvscsi", "vmxnet3"),
    "vmdk": Machine("pvscsi", "vmxnet3"),
    "qcow2": Machine("virtio", "virtio", ("bios", "uefi")),
    "raw": Machine("virtio-scsi", "virtio", ("bios", "uefi")),
    "hyperv-vhd": Machine("ide", "tulip"),  # generation 1 and its legacy network adapter
    "vhdx": Machine("virtio-scsi", "e1000", ("uefi",)),  # generation 2: UEFI and SCSI; QEMU has no VMBus
}
"""By format."""
VMWARE_UEFI = Machine("ahci", "vmxnet3", ("uefi",))
"""For an OVF with firmware efi: OVMF has no driver for VMware's controllers."""


def machine(name: str, options: Options) -> Machine:
    """The machine on which a format is tried."""
    efi = name in ("ova", "vmdk") and options.ovf.firmware == "efi"
    return VMWARE_UEFI if efi else MACHINES[name]


def guests(settings: Settings, files: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the agent's `verify` boots: for each converted file, by format, its hypervisor's machine."""
    asked = []
    for name, path in files.items():
        model = machine(name, settings.convert)
        for firmware in [
            one for one in settings.boots_under if one in model.firmware
        ] or settings.boots_under[:1]:
            asked.append(
                {
                    "name": name,
                    "image": path,
                    "format": FORMATS[name].kind,
                    "firmware": firmware,
                    "disk": model.disk,
                    "nic": model.nic,
                }
            )
    return asked


class Output(Protocol):
    """What the rows are shown on: the console."""

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows in columns."""

    def line(self, text: str) -> None:
        """Print a line."""


def expectations(settings: Settings, overlays: Sequence[Path] = ()) -> dict[str, Any]:
    """Say what the agent's `verify` shall find; the port of sshd only if an overlay sets it."""
    release = settings.cloudstack_release
    return {
        "release": f"Cloudstack Release {release}" if release else None,
        "ssh_port": ssh_port(overlays),
        "kernel_cmdline": settings.kernel_cmdline,
        "min_disk": settings.size,
    }


def ssh_port(overlays: Sequence[Path]) -> int | None:
    """Read the port from the last overlay that sets one in its sshd_config or below sshd_config.d."""
    for overlay in reversed(overlays):
        files = [*sorted(overlay.glob("etc/ssh/sshd_config.d/*.conf")), overlay / "etc/ssh/sshd_config"]
        for file in files:
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            if found := re.search(r"^\s*Port[\s=]+(\d+)\s*$", text, re.MULTILINE | re.IGNORECASE):
                return int(found[1])
    return None


def passed(result: Result) -> bool:
    """Say whether every check of every guest is as expected."""
    return all(guest["ok"] for guest in result["guests"])


def head(result: Result) -> list[str]:
    """Name the columns: state, check, and one for each guest."""
    return ["STATE", "CHECK", *(_label(guest, result).upper() for guest in result["guests"])]


def table(result: Result) -> list[list[str]]:
    """Lay out the checks, a row each; a check that a guest was not asked is a dash."""
    guests = result["guests"]
    names = list(dict.fromkeys(check["name"] for guest in guests for check in guest["checks"]))
    rows = []
    for name in names:
        found = [_find(guest, name) for guest in guests]
        state = "ok" if all(check["ok"] for check in found if check) else "FAIL"
        rows.append([state, name, *(_cell(check, max(16, WIDTH // len(found))) for check in found)])
    return rows


def faults(result: Result) -> list[str]:
    """Tell each check that is not as expected in full: guest, name, value, expectation."""
    lines = []
    for guest in result["guests"]:
        for check in guest["checks"]:
            if not check["ok"]:
                first, *rest = check["value"].splitlines() or [""]
                lines.append(
                    f"{_label(guest, result)}: {check['name']}: {first} (expected: {check['expected']})"
                )
                lines += [f"    {line}" for line in rest]
    return lines


def summary(result: Result) -> list[str]:
    """Say how long each guest took, by what it ran, and where its serial log lies."""
    return [
        f"{_label(guest, result)}: {guest['seconds']:.1f} s under {guest['accel'].upper()}, "
        f"serial log {guest['serial_log']}"
        for guest in result["guests"]
    ]


def show(console: Output, result: Result) -> None:
    """Print table, faults and logs."""
    console.table(head(result), table(result))
    for line in (*faults(result), *summary(result)):
        console.line(line)


def _label(guest: Guest, result: Result) -> str:
    """Name a guest by its firmware, and by what else tells it from the others."""
    others = result["guests"]
    parts = [guest[key] for key in ("name", "disk") if len({other[key] for other in others}) > 1]
    return " ".join([*parts, guest["firmware"]])


def _find(guest: Guest, name: str) -> Check | None:
    return next((check for check in guest["checks"] if check["name"] == name), None)


def _cell(check: Check | None, width: int) -> str:
    if check is None:
        return "-"
    text = (check["value"].splitlines() or [""])[0]
    return text if len(text) <= width else f"{text[: width - 3]}..."
