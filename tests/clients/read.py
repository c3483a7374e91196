"""Reads a disk image through dissect.hypervisor; prints its size and the SHA-256 of what a guest sees."""

import hashlib
import sys

from dissect.hypervisor.disk.qcow2 import QCow2
from dissect.hypervisor.disk.vdi import VDI
from dissect.hypervisor.disk.vhd import VHD
from dissect.hypervisor.disk.vhdx import VHDX
from dissect.hypervisor.disk.vmdk import VMDK

READERS = {
    "qcow2": lambda file: QCow2(file).open(),
    "vdi": lambda file: VDI(file).open(),
    "vhd": VHD,
    "vhdx": VHDX,
    "vmdk": VMDK,
}

kind, path = sys.argv[1:]
with open(path, "rb") as file:
    disk = READERS[kind](file)
    digest, done = hashlib.sha256(), 0
    while data := disk.read(min(1 << 20, disk.size - done)):
        digest.update(data)
        done += len(data)
print(disk.size, digest.hexdigest())
