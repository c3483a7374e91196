"""Vagrant boxes for libvirt and VirtualBox: a tar of metadata.json, a Vagrantfile and the machine's disk.

What is in them follows Vagrant's documentation ("Box File Format", "VirtualBox: Creating a Base Box") and
vagrant-libvirt's ("Create Box"): `box.img` as QCOW2 with its size in whole GiB, or `box.ovf` with a VMDK and
a base MAC address, by which VirtualBox's NAT card is found. Vagrant takes a tar without compression; what is
large is compressed within.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from build.formats import ova, qcow2, vmdk
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group
from build.formats.lib.format import Format, Kind, Machine, Match, Options, Target
from build.formats.lib.inner import Inner
from build.formats.lib.pieces import Disk
from build.formats.lib.platforms import VAGRANT, Affected
from build.formats.lib.qcow2 import Qcow2Disk
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import BLOCK, Archive, Member, archive_size, is_tar, member_header, padded
from build.formats.lib.writer import Shifted, Units, Writer, put

METADATA, VAGRANTFILE, OVF = "metadata.json", "Vagrantfile", "box.ovf"
IMAGE = "box.img"
DISKS = (".img", ".vmdk", ".vhdx", ".vhd", ".qcow2")
_LIBVIRT = """\
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |libvirt|
    libvirt.disk_bus = "virtio"
  end
end
"""
_VIRTUALBOX = """\
Vagrant.configure("2") do |config|
  config.vm.base_mac = "080027A1B2C3"
end
"""
"""Vagrant gives each machine an address of its own when it imports the box."""
_LARGEST_TEXT = 1 << 20

GROUP = Group("BOX", "Vagrant boxes", "Vagrant, Box File Format; vagrant-libvirt, Create Box")
_VAGRANT = (VAGRANT,)
NO_DISK = Damage("BOX001", "no disk in the box", _VAGRANT, "pack it again with its disk")
NOT_WHOLE = Damage("BOX002", "the disk does not lie in the box byte by byte", _VAGRANT, "unpack the box")
NO_METADATA = Code("BOX003", "error", f"no {METADATA} in the box", _VAGRANT, "write one with the provider")
NO_PROVIDER = Code("BOX004", "error", "it names no provider", _VAGRANT, 'write {{"provider": "libvirt"}}')
NO_OVF = Code("BOX005", "error", f"no {OVF} in the box", _VAGRANT, "export the machine as box.ovf")
NO_VAGRANTFILE = Code(
    "BOX006",
    "warning",
    f"no {VAGRANTFILE} in the box",
    (Affected("vagrant", case="with VirtualBox"),),
    "write one with config.vm.base_mac",
)
OTHER_FORMAT = Code("BOX007", "error", "the format is not qcow2", _VAGRANT, 'write "format": "qcow2"')
NO_SIZE = Code("BOX008", "error", "virtual_size is no number", _VAGRANT, "write it in whole GiB")
NO_IMAGE = Code("BOX009", "error", f"no {IMAGE} in the box", _VAGRANT, f"call the disk {IMAGE}")
NO_QCOW2 = Code(
    "BOX010", "error", f"{IMAGE} is no QCOW2, as the box says", _VAGRANT, "copy the box again", lossy=True
)


class Box:
    """Texts and one disk in a tar, whose writer writes behind their headers."""

    def __init__(self, file: BinaryIO, epoch: int, texts: dict[str, bytes], disk: str) -> None:
        self.file, self.epoch, self.disk = file, epoch, disk
        self.base = sum(BLOCK + padded(len(text)) for text in texts.values()) + BLOCK
        self.texts = texts

    def close(self, length: int) -> None:
        """Write texts, the disk's header and the archive's end; the disk has `length` bytes."""
        offset = 0
        for name, text in self.texts.items():
            head = member_header(name, len(text), self.epoch)
            put(self.file, offset, head + text.ljust(padded(len(text)), b"\0"))
            offset += BLOCK + padded(len(text))
        put(self.file, offset, member_header(self.disk, length, self.epoch))
        self.file.truncate(archive_size(self.base + padded(length)))


class LibvirtWriter:
    """Writes a QCOW2 as box.img."""

    def __init__(self, target: Target) -> None:
        gib = -(-target.size >> 30)
        metadata = {"provider": "libvirt", "format": "qcow2", "virtual_size": gib}
        texts = {METADATA: _json(metadata), VAGRANTFILE: _LIBVIRT.encode()}
        self.box = Box(target.file, target.epoch, texts, IMAGE)
        self.image = qcow2.Qcow2Writer(Shifted.over(target.file, self.box.base), target.size)
        self.codec = self.image.codec

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the clusters of a piece."""
        self.image.add(index, data, units)

    def close(self, seed: str) -> None:
        """End the image and the archive."""
        self.image.close(seed)
        self.box.close(self.image.position)


class VirtualboxWriter:
    """Writes a VMDK and its descriptor as box.ovf."""

    def __init__(self, target: Target, ovf: str) -> None:
        self.ovf, self.size = ovf, target.size
        disk = f"{target.name.removesuffix('.box')}-disk1.vmdk"
        room = len(ova.fill(ovf, dict.fromkeys(ova.PLACEHOLDERS, 10**ova.DIGITS)).encode())
        texts = {METADATA: _json({"provider": "virtualbox"}), VAGRANTFILE: _VIRTUALBOX.encode()}
        texts[OVF] = bytes(room)
        self.box = Box(target.file, target.epoch, texts, disk)
        self.image = vmdk.VmdkWriter(target.file, target.size, disk, base=self.box.base)
        self.codec = self.image.codec

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the grains of a piece."""
        self.image.add(index, data, units)

    def close(self, seed: str) -> None:
        """End the disk, then write what tells its size."""
        self.image.close(seed)
        length = self.image.length
        values = {"@capacity@": self.size, "@populated@": self.image.populated, "@vmdk_size@": length}
        text = ova.fill(self.ovf, values).encode()
        self.box.texts[OVF] = text.ljust(len(self.box.texts[OVF]), b"\n")
        self.box.close(length)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _names(archive: Archive) -> dict[str, Member]:
    """Members by their names without a leading `./`, as some tools pack them."""
    return {member.name.removeprefix("./"): member for member in archive.members}


def inner(reader: BoundedReader) -> tuple[Inner, ...]:
    """The box's disks; raises Damaged when there are none."""
    archive = Archive(reader)
    disks = _disks(archive)
    if not disks:
        raise Damaged(NO_DISK, "archive")
    return tuple(map(archive.inner, disks.values()))


def _disks(archive: Archive) -> dict[str, Member]:
    return {name: member for name, member in _names(archive).items() if name.lower().endswith(DISKS)}


def read(reader: BoundedReader) -> Disk:
    """What a guest sees of a box of ours; raises Damaged."""
    disk = inner(reader)[0]
    window = disk.whole
    if window is None:
        raise Damaged(NOT_WHOLE, disk.name)
    return (Qcow2Disk if disk.name.endswith(IMAGE) else vmdk.VmdkDisk)(window)


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check what Vagrant and its providers want of a box; its disks are checked by their own kinds."""
    archive = Archive(reader)
    yield from archive.findings
    names = _names(archive)
    if METADATA not in names:
        yield Finding(NO_METADATA, "archive")
        return
    try:
        told = json.loads(archive.window(names[METADATA]).read(0, min(names[METADATA].size, _LARGEST_TEXT)))
        provider = str(told["provider"])
    except (ValueError, KeyError, TypeError):
        yield Finding(NO_PROVIDER, METADATA)
        return
    if provider == "libvirt":
        yield from _lint_libvirt(archive, told, names)
    elif provider == "virtualbox" and OVF not in names:
        yield Finding(NO_OVF, "archive")
    if VAGRANTFILE not in names:
        yield Finding(NO_VAGRANTFILE, "archive")


def _lint_libvirt(archive: Archive, told: dict[str, Any], names: dict[str, Member]) -> Iterator[Finding]:
    several = told.get("disks")
    if not several and told.get("format") != "qcow2":
        yield Finding(OTHER_FORMAT, METADATA)
    if not several and not isinstance(told.get("virtual_size"), int):
        yield Finding(NO_SIZE, METADATA)
    if not several and IMAGE not in names:
        yield Finding(NO_IMAGE, "archive")
    elif not several and archive.inner(names[IMAGE]).head(4) != b"QFI\xfb":
        yield Finding(NO_QCOW2, IMAGE).but(disk=[*_disks(archive)].index(IMAGE) + 1)


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    if not is_tar(head):
        return Match.NO
    try:
        return Match.CERTAIN if METADATA in _names(Archive(reader)) else Match.NO
    except Damaged:
        return Match.NO


def _write(target: Target, options: Options) -> Writer:
    if options["provider"] == "libvirt":
        return LibvirtWriter(target)
    return VirtualboxWriter(target, options["ovf"])


KIND = Kind(
    name="vagrant",
    suffix="box",
    version=1,
    driver="vmdk",
    recognize=_recognize,
    write=_write,
    read=read,
    lint=lint,
    check_size=vmdk.check_size,
    inner=inner,
)
FORMATS = (
    Format(
        name="vagrant-libvirt",
        help="a Vagrant box for libvirt",
        kind=KIND,
        file="{imagename}-libvirt.box",
        machine=Machine("virtio", "virtio"),
        options={"provider": "libvirt"},
        family="vagrant",
    ),
    Format(
        name="vagrant-virtualbox",
        help="a Vagrant box for VirtualBox",
        kind=KIND,
        file="{imagename}-virtualbox.box",
        machine=Machine("ahci", "e1000"),
        options={"provider": "virtualbox"},
        descriptor="systemvm.ovf.j2",
        family="vagrant",
    ),
)
