"""OVAs for the tests: descriptors of several makers, disks, and archives of any form."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from build.formats.lib import ovf
from tests.disks import MIB, one, usual

SIZE = 48 * MIB
RASD = "rasd"
HEAD = (
    '<?xml version="1.0"?>\n<Envelope xmlns="{ovf}" xmlns:ovf="{ovf}" xmlns:rasd="{rasd}" xmlns:vssd="{vssd}"'
    ' xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vbox="http://www.virtualbox.org/ovf/machine">\n'
)


def vmdk(folder: Path) -> bytes:
    """A streamOptimized VMDK of the usual disk."""
    folder.mkdir(exist_ok=True)
    return one(usual(folder / "disk.img", SIZE), folder, "vmdk").read_bytes()


def item(prefix: str = RASD, attributes: str = "", extra: str = "", **values: object) -> str:
    """A device; its values as they are given, in that order."""
    name = {"sasd": "StorageItem", "epasd": "EthernetPortItem"}.get(prefix, "Item")
    rows = "".join(f"<{prefix}:{key}>{value}</{prefix}:{key}>" for key, value in values.items())
    return f"<{name}{attributes}>{rows}{extra}</{name}>\n"


CPU = item(ElementName="cpu", InstanceID=1, ResourceType=3, VirtualQuantity=1)
SCSI = item(ElementName="scsi", InstanceID=3, ResourceSubType="lsilogic", ResourceType=6)


def drive(number: int = 1) -> str:
    """The device of disk `number`."""
    return item(
        ElementName="disk",
        HostResource=f"ovf:/disk/d{number}",
        InstanceID=9 + number,
        Parent=3,
        ResourceType=17,
    )


def reference(name: str, size: int | str, number: int = 1, more: str = "") -> str:
    """A file of the package."""
    return f'<File ovf:href="{name}" ovf:id="f{number}" ovf:size="{size}" {more}/>'


def disk(number: int = 1, capacity: object = SIZE, units: str = "byte", ref: bool = True, **more: str) -> str:
    """A disk; one without `ref` is made by the import."""
    given = {"format": ovf.STREAM, "populatedSize": "1", **more}
    rest = "".join(f' ovf:{key}="{value}"' for key, value in given.items() if value)
    of = f' ovf:fileRef="f{number}"' if ref else ""
    size = f'ovf:capacity="{capacity}"' + (f' ovf:capacityAllocationUnits="{units}"' if units else "")
    return f'<Disk ovf:diskId="d{number}" {size}{of}{rest}/>'


def descriptor(
    files: Sequence[str],
    disks: Sequence[str],
    items: Sequence[str] = (CPU, SCSI, drive()),
    family: str = "vmx-13",
    space: str = ovf.OVF,
    systems: str = "",
) -> bytes:
    """A descriptor of one machine."""
    kinds = systems or f"<System><vssd:VirtualSystemType>{family}</vssd:VirtualSystemType></System>"
    return (
        HEAD.format(ovf=space, rasd=ovf.RASD, vssd=ovf.VSSD) + f"<References>{''.join(files)}</References>\n"
        f"<DiskSection><Info>d</Info>{''.join(disks)}</DiskSection>\n"
        f'<VirtualSystem ovf:id="vm"><Info>v</Info><VirtualHardwareSection><Info>h</Info>{kinds}\n'
        f"{''.join(items)}</VirtualHardwareSection></VirtualSystem></Envelope>\n"
    ).encode()


def sums(files: Mapping[str, bytes], algorithm: str = "SHA256", form: str = "{a}({n})= {h}\n") -> bytes:
    """A manifest."""
    return "".join(
        form.format(a=algorithm, n=name, h=hashlib.new(algorithm, data).hexdigest())
        for name, data in files.items()
    ).encode()


def pack(
    path: Path, files: Mapping[str, bytes], form: int = tarfile.USTAR_FORMAT, manifest: bytes | None = None
) -> Path:
    """An archive of the files, with a manifest unless it is empty."""
    name = next(iter(files)).removesuffix(".ovf") + ".mf"
    written = sums(files) if manifest is None else manifest
    time = 1_600_000_000.5 if form == tarfile.PAX_FORMAT else 1_600_000_000
    with tarfile.open(path, "w", format=form) as archive:
        for called, data in {**files, **({name: written} if written else {})}.items():
            entry = tarfile.TarInfo(called)
            entry.size, entry.mtime = len(data), time
            archive.addfile(entry, io.BytesIO(data))
    return path
