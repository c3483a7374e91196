"""What a file's name says of it, against what it is: importers go by the one or the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from build.formats.lib.findings import Code, Finding, Group
from build.formats.lib.format import Kind
from build.formats.lib.platforms import CLOUDSTACK, EVERY_IMPORTER

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


GROUP = Group("NAME", "The name of a file", "build/formats/lib/names.py")
_IMPORTER = (EVERY_IMPORTER,)
OTHER_SUFFIX = Code(
    "NAME001",
    "warning",
    "a {kind} file that is not called *.{suffix}",
    (CLOUDSTACK,),
    "rename it to end in .{suffix}",
)
BARE_EXTENT = Code(
    "NAME002",
    "error",
    "these are the bytes of a VMDK whose descriptor is another file",
    _IMPORTER,
    "convert it with its descriptor beside it, or rename it to .raw",
)
NO_FOOTER = Code(
    "NAME003",
    "error",
    "the name says VHD, but no footer ends the file: it is cut off, or a raw disk",
    _IMPORTER,
    "copy it again; if it is a raw disk rename it to .raw, or: inv convert.vhd --from FILE",
)
NOT_AS_NAMED = Code(
    "NAME004",
    "error",
    "the name says {claimed}, the content is none: a raw disk, or something cut off at its beginning",
    _IMPORTER,
    "copy it again, or rename it to .raw",
)


def lint(name: str, kind: Kind) -> Iterator[Finding]:
    """Compare a file's name, without what is packed around it, with its kind."""
    where, end = f"name {name[:80]}", name.lower().rpartition(".")[2]
    if kind.name == "raw" and end in CLAIMS:
        yield _raw(where, name.lower(), CLAIMS[end])
    elif kind.suffix and end != kind.suffix:
        yield Finding(OTHER_SUFFIX, where, kind=kind.name, suffix=kind.suffix)


def _raw(where: str, name: str, claimed: str) -> Finding:
    """What to say of raw bytes under the name of a format."""
    if name.endswith(("-flat.vmdk", "-rdm.vmdk", "-rdmp.vmdk")):
        return Finding(BARE_EXTENT, where)
    return Finding(NO_FOOTER, where) if claimed == "VHD" else Finding(NOT_AS_NAMED, where, claimed=claimed)
