"""What a machine says on its serial line when it will not come up."""

from __future__ import annotations

import re

DEATHS = {
    r"Kernel panic - not syncing": "the kernel panicked",
    r"Dropping to a shell!": "the initramfs does not find the root file system",
    r"You are in (emergency|rescue) mode|Cannot open access to console, the root account is locked": (
        "the system went into emergency mode"
    ),
    r"^error: .*(out of memory|you need to load the kernel first)": "GRUB cannot load the kernel",
    r"^!!!! X64 Exception Type": "the firmware crashed, as it does when what it loads is too big",
    r"^No bootable device|^BdsDxe: No bootable option": "the firmware finds nothing to boot",
}
"""Lines after which nothing will come any more."""

PROMPTS = {
    r"^\(initramfs\)$": "the initramfs does not find the root file system",
    r"^grub(?: rescue)?>$": "GRUB finds no configuration",
    r"^Shell>$": "the firmware finds nothing to boot",
}
"""The same, where the line does not end."""


def fatal(line: str, ended: bool) -> str:
    """Say what has happened if nothing will come any more after a serial line, else nothing."""
    signs = DEATHS if ended else PROMPTS
    return next((why for sign, why in signs.items() if re.search(sign, line)), "")
