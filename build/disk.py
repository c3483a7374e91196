"""Disk: assemble the raw image from the finished tree, as files; no device, no mount, no root needed.

Partition table, FAT and boot code are written by tools of our own, a few hundred lines in all, so that no
version, clock or time zone of a build host shows in the bytes; ext4, which is not small, by the tree's
own e2fsprogs. BIOS boots through GRUB; UEFI boots a unified kernel image, because GRUB for UEFI runs out of
memory at 256 MiB. Both pass the same kernel command line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings
from build.engine.shell import quote, words

TOOLS = ("layout.py", "ext4.py", "uki.py", "fat.py", "bios.py", "gpt.py", "digest.py", "nosync.py")

LOADERS = {
    "amd64": {"loader": "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "triplet": "x86_64-linux-gnu"},
    "i386": {"loader": "lib/i386-linux-gnu/ld-linux.so.2", "triplet": "i386-linux-gnu"},
}
"""Dynamic loader and library folder of each arch, relative to the tree.

Not the loader's usual name: bookworm has an absolute link there, which leads to the build host's.
"""

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
    folder = Path(__file__).parent / "tools"
    files = {name: File((folder / name).read_bytes()) for name in TOOLS}
    files["disk.json"] = File(json.dumps(asked(settings), indent=2).encode())
    files["mke2fs.conf"] = File(MKE2FS_CONF.encode())
    if "bios" in settings.boots_under:
        files["grub.cfg"] = File(grub_config(settings.kernel_cmdline).encode())
    return Step("disk", script(settings.boots_under), files)


def asked(settings: Settings) -> dict[str, object]:
    """What build/tools/layout.py and ext4.py must know of the settings."""
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


def script(firmware: tuple[str, ...]) -> str:
    """The script, with the parts that the firmware asks for."""
    bios, uefi = "bios" in firmware, "uefi" in firmware
    # The numbers of the partitions follow from what there is: BIOS boot, ESP, root.
    parts = [CHECK, (STUB_THERE if uefi else "stub=\n"), (GRUB_THERE if bios else ""), LAY_OUT]
    parts += [
        core_image(1 + bios + uefi) if bios else "",
        UNIFIED if uefi else "",
        'menu=("$WORK/grub.cfg")\n' if bios else "menu=()\n",
        ROOT_SYSTEM,
    ]
    parts += [EFI_SYSTEM if uefi else "", BOOT_CODE if bios else "", FINISH]
    return "\n".join(part for part in parts if part)


def core_image(root_number: int) -> str:
    """Shell lines that make GRUB's core.img; it looks for its menu on the disk it was started from."""
    prefix = quote(f"(,gpt{root_number})/boot/grub")
    return f"""\
in_tree grub-mkimage --format=i386-pc --prefix={prefix} \\
    {words(GRUB_MODULES[:10])} \\
    {words(GRUB_MODULES[10:])} >"$WORK/core.img"
device="$(cut -d' ' -f1 "$WORK/cmdline")"
sed "s/@ROOT@/$device/" "$FILES/grub.cfg" >"$WORK/grub.cfg"
grep -qF " $device " "$WORK/grub.cfg"
"""


CHECK = r"""# tool NAME ARGUMENT...: run a tool of this step
tool() { "$PYTHON" -I -B "$FILES/$1" "${@:2}"; }

# shown COMMAND ARGUMENT...: run a command and pass its progress on
shown() {
    "$@" | while IFS=$'\t' read -r label reached total; do
        progress "$label" "$reached" "$total"
    done
}

# No root was needed for this: device nodes of a tree that root built would be the only difference.
# The kernel fills /dev by itself.
mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"

kernel="$(in_tree readlink -e /vmlinuz)" ||
    fail "the tree has no kernel at /vmlinuz" "add a kernel package, or mend the link"
initramfs="$(in_tree readlink -e /initrd.img)" ||
    fail "the tree has no initramfs at /initrd.img" "mend the link, or make it: update-initramfs -c -k all"
version="${kernel##*/vmlinuz-}"
[ "${initramfs##*/}" = "initrd.img-$version" ] ||
    fail "/vmlinuz leads to $kernel and /initrd.img to $initramfs" "let both lead to one version"
[ ! -e "$ROOT/boot/grub/grub.cfg" ] ||
    fail "the tree brings its own /boot/grub/grub.cfg" "take it out; set kernel_cmdline"
[ -x "$ROOT/usr/sbin/mke2fs" ] || fail "the tree has no mke2fs" "add e2fsprogs to the packages"
"""

STUB_THERE = f"""\
stub="$ROOT/{STUB}"
[ -f "$stub" ] || fail "the tree has no stub for UEFI" "add systemd-boot-efi to the packages"
"""

GRUB_THERE = """\
[ -f "$ROOT/usr/lib/grub/i386-pc/boot.img" ] ||
    fail "the tree has no GRUB for BIOS" "add grub-pc-bin to the packages"
"""

LAY_OUT = r"""boots=("$ROOT$kernel" "$ROOT$initramfs" "$stub")
in_tree lsinitramfs "$initramfs" >"$WORK/initramfs" &
listing=$!
if ! refused="$(tool layout.py "$FILES/disk.json" "$ROOT" "${boots[@]}" "$WORK")"; then
    [ -n "$refused" ] || refused=$'the disk cannot be laid out\tread the log of this step'
    fail "${refused%%$'\t'*}" "${refused#*$'\t'}"
fi
if ! wait "$listing" || ! grep -qx init "$WORK/initramfs"; then
    fail "the initramfs $initramfs is damaged" "make it anew: update-initramfs -u"
fi
grep -q "lib/modules/$version/" "$WORK/initramfs" ||
    fail "the initramfs $initramfs holds no module for $version" "make it anew: update-initramfs -u"
"""

UNIFIED = r"""printf '%s' "$version" >"$WORK/uname"
# The kernel comes last: it unpacks itself over what follows.
tool uki.py "$stub" "$WORK/linux.efi" .osrel="$ROOT/usr/lib/os-release" .cmdline="$WORK/cmdline" \
    .uname="$WORK/uname" .initrd="$ROOT$initramfs" .linux="$ROOT$kernel"
"""

ROOT_SYSTEM = r"""# An image that is cut off is thrown away: one wait for the disk, at the end, is enough.
quickly() { tool nosync.py "$PYTHON" -I -B "$FILES/$1" "${@:2}"; }
shown quickly ext4.py "$WORK/plan.json" "$FILES/disk.json" "$ROOT" "$OUT" "$FILES/mke2fs.conf" \
    "$WORK" "${menu[@]}"
"""

EFI_SYSTEM = r"""tool fat.py "$WORK/plan.json" "$OUT" EFI/BOOT/BOOTX64.EFI="$WORK/linux.efi"
"""

BOOT_CODE = r"""tool bios.py "$WORK/plan.json" "$OUT" "$ROOT/usr/lib/grub/i386-pc/boot.img" "$WORK/core.img"
"""

FINISH = r"""tool gpt.py "$WORK/plan.json" "$OUT"
shown tool digest.py "$WORK/plan.json" "$OUT" "$OUT.json"
"""
