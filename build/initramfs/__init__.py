"""Make the initramfs, the only one of the build, in a layer keyed by nothing but what goes into it.

It holds a list of drivers, enough to find the root file system on every hypervisor's disk, instead of
most of the kernel's: a third of the size in an eighth of the time. The drivers are copied, never
force-loaded: udev loads those that a machine has.
"""

from __future__ import annotations

from collections.abc import Mapping

from build.engine import script
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded
from build.engine.shell import words

DRIVERS: Mapping[str, tuple[str, ...]] = {
    "KVM": ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "virtio_net", "virtio_console"),
    "Xen": ("xen-blkfront", "xen-netfront", "xen-scsifront"),
    "VMware": ("vmw_pvscsi", "mptspi", "mptsas", "BusLogic", "vmxnet3"),
    "Hyper-V": ("hv_vmbus", "hv_storvsc", "hv_netvsc", "hyperv-keyboard"),
    "VirtualBox and other emulated disks": ("ahci", "ata_piix", "ata_generic", "sym53c8xx", "nvme"),
    "emulated network cards": ("e1000", "e1000e", "8139cp", "8139too", "pcnet32", "ne2k-pci"),
    "what a disk needs to be a root file system": ("sd_mod", "sr_mod", "ext4", "crc32c_generic"),
}
"""Kernel modules by what needs them; each must be in the kernel's package, built in or as a module."""
CONFIGURATION = """\
# Only the drivers that hooks/systemvm lists.
MODULES=list
# The one every kernel and every boot loader of these suites reads.
COMPRESS=gzip
# A tenth larger, in a third of the time.
COMPRESSLEVEL=1
# A system VM has no hibernation to resume from.
RESUME=none
# The root file system; fstab does not have to be known.
FSTYPE=ext4
"""
BLACKLIST = "# No hypervisor has a floppy drive worth waiting for.\nblacklist floppy\n"
HOOK = """\
#!/bin/sh
# Copy the drivers of every hypervisor; see initramfs-tools(7), "Hook scripts".
set -e
[ "$1" != prereqs ] || exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules {drivers}
"""


def drivers() -> tuple[str, ...]:
    """Every driver of the list, once."""
    return tuple(dict.fromkeys(name for row in DRIVERS.values() for name in row))


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Describe the making of the initramfs and of the links that boot loaders follow."""
    files = {
        "systemvm.conf": File(CONFIGURATION.encode()),
        "blacklist": File(BLACKLIST.encode()),
        "hook": File(HOOK.format(drivers=words(drivers())).encode(), 0o755),
    }
    text = script.of(__file__, drivers=drivers(), package=loaded.settings.kernel)
    return Step("initramfs", text, files)
