"""Assemble the raw disk image from the finished tree: a file that is written, never mounted, without root.

All places on the disk are known before a byte of it is written. Partition table, EFI system partition, boot
code, and the inodes, folders and extents of the root file system are written by programs of our own, so that
no version, clock or time zone of a build host shows in the bytes. The tree's own e2fsprogs do the rest of it:
mke2fs makes the file system, empty, debugfs adds extended attributes, e2fsck looks at all of it. The content
of files comes last, in one pass that also takes the image's digest.

BIOS boots through GRUB; UEFI boots a unified kernel image, because GRUB for UEFI runs out of memory at
256 MiB. Both pass the same kernel command line.
"""

from __future__ import annotations

import json
import re

from build.engine import script
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings

LOADERS = {
    "amd64": {"loader": "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "triplet": "x86_64-linux-gnu"},
    "i386": {"loader": "lib/i386-linux-gnu/ld-linux.so.2", "triplet": "i386-linux-gnu"},
}
"""Dynamic loader and library folder of each arch, relative to the tree.

Not the loader's usual name: bookworm has an absolute link there, which leads to the build host's.
"""

GRUB = "usr/lib/grub/i386-pc"
STUB = "usr/lib/systemd/boot/efi/linuxx64.efi.stub"

GRUB_MODULES = (
    *("biosdisk", "part_gpt", "ext2", "normal", "linux", "boot", "serial", "terminal", "test", "echo"),
    *(
        "keystatus",
        "minicmd",
        "ls",
        "cat",
        "halt",
        "reboot",
        "search",
        "search_fs_uuid",
        "search_label",
        "gzio",
    ),
)
"""All that GRUB needs for its menu, its command line and Linux; nothing is loaded from the disk."""

MKE2FS_CONF = """\
[defaults]
    base_features = none
    default_mntopts = acl,user_xattr
    enable_periodic_fsck = 0
    blocksize = 4096
    inode_size = 256
    inode_ratio = 16384
[fs_types]
    ext4 = {
        features = none
    }
"""
"""Read in place of /etc/mke2fs.conf; features, sizes and the rest are given on the command line."""


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the raw image: SIZE MiB, GPT, a partition for each firmware, ext4 root last."""
    settings = loaded.settings
    bios, uefi = "bios" in settings.boots_under, "uefi" in settings.boots_under
    files = script.programs(__file__, "nosync.py")
    files["disk.json"] = File(json.dumps(facts(settings), indent=2).encode())
    files["mke2fs.conf"] = File(MKE2FS_CONF.encode())
    if bios:
        files["grub.cfg"] = File(grub_config(settings.kernel_cmdline).encode())
    text = script.of(
        __file__,
        stub=STUB if uefi else "",
        grub=GRUB if bios else "",
        # GRUB looks for its menu on the disk it was started from. The partitions: BIOS boot, ESP, root.
        prefix=f"(,gpt{1 + bios + uefi})/boot/grub",
        grub_modules=GRUB_MODULES,
    )
    return Step("disk", text, files)


def facts(settings: Settings) -> dict[str, object]:
    """What layout.py and ext4.py must know of the settings."""
    return {
        "imagename": settings.imagename,
        "arch": settings.arch,
        "size": settings.size,
        "firmware": list(settings.boots_under),
        "headroom": settings.space_headroom,
        "kernel_cmdline": settings.kernel_cmdline,
        **LOADERS[settings.arch],
    }


def serial_port(cmdline: str) -> tuple[int, int] | None:
    """Unit and speed of the last serial console of a kernel command line, if there is one."""
    consoles = re.findall(r"(?:^|\s)console=ttyS(\d+)(?:,(\d+))?", cmdline)
    return (int(consoles[-1][0]), int(consoles[-1][1] or 9600)) if consoles else None


def grub_config(cmdline: str) -> str:
    """GRUB's configuration: boot at once; Shift held, or Escape pressed before, opens the menu.

    `@ROOT@` stands for the argument that names the root file system, whose id depends on the tree.
    """
    port = serial_port(cmdline)
    plain = re.compile(r"[\w.,:=/@%+~^-]+")
    arguments = " ".join(word if plain.fullmatch(word) else f"'{word}'" for word in cmdline.split())
    # A machine without that port boots all the same.
    serial = (
        f"if serial --unit={port[0]} --speed={port[1]}; then\n"
        "    terminal_input --append serial\n"
        "    terminal_output --append serial\n"
        "fi\n"
        if port
        else ""
    )
    return (
        f"{serial}"
        "set default=0\n"
        "set timeout=0\n"
        "set timeout_style=hidden\n"
        "if keystatus --shift; then\n"
        "    set timeout=-1\n"
        "    set timeout_style=menu\n"
        "fi\n"
        'menuentry "Linux" {\n'
        f"    linux /vmlinuz @ROOT@ ro {arguments}\n"
        "    initrd /initrd.img\n"
        "}\n"
    )
