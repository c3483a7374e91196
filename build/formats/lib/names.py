"""What a file's name says of it, against what it is: importers go by the one or the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from build.formats.lib.findings import Finding
from build.formats.lib.format import Kind

CLAIMS: Mapping[str, str] = {
    "vhd": "VHD",
    "vhdx": "VHDX",
    "avhd": "VHD",
    "avhdx": "VHDX",
    "vmdk": "VMDK",
    "qcow2": "QCOW2",
    "qcow": "QCOW",
    "vdi": "VDI",
    "ova": "OVA",
    "xva": "XVA",
    "box": "Vagrant box",
}
"""Ends of names that only files of that format have."""


def lint(name: str, kind: Kind) -> Iterator[Finding]:
    """Compare a file's name, without what is packed around it, with its kind."""
    shown, end = name[:80], name.lower().rpartition(".")[2]
    if kind.name == "raw" and end in CLAIMS:
        yield Finding(
            "error",
            f"name {shown}",
            *_raw(name.lower(), CLAIMS[end]),
        )
    elif kind.suffix and end != kind.suffix:
        yield Finding(
            "warning",
            f"name {shown}",
            f"a {kind.name} file that is not called *.{kind.suffix}",
            "CloudStack",
            f"rename it to end in .{kind.suffix}",
        )


def _raw(name: str, claimed: str) -> tuple[str, str, str]:
    """What is wrong, who minds and what to do, of raw bytes under the name of a format."""
    if name.endswith(("-flat.vmdk", "-rdm.vmdk", "-rdmp.vmdk")):
        return (
            "these are the bytes of a VMDK whose descriptor is another file",
            "every importer",
            "convert it with its descriptor beside it, or rename it to .raw",
        )
    if claimed == "VHD":
        return (
            "the name says VHD, but no footer ends the file: it is cut off, or a raw disk",
            "every importer",
            "copy it again; if it is a raw disk rename it to .raw, or: inv convert.vhd --from FILE",
        )
    return (
        f"the name says {claimed}, the content is none: a raw disk, or something cut off at its beginning",
        "every importer",
        "copy it again, or rename it to .raw",
    )
