"""OVA: a tar archive of an OVF descriptor, a manifest and one streamOptimized VMDK, in this order.

Rules from the OVF specification (DMTF DSP0243) and from what vSphere and CloudStack take: ustar without
extensions, owners and times fixed, the manifest as `SHA256(name)= hex`. The descriptor's text comes rendered
but for numbers that are known when the VMDK is written; it is padded with line ends, so that its place
can be kept free in front of the VMDK and nothing is copied.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from build.formats import vmdk
from build.formats.lib.codec import Zlib
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, Finding, at
from build.formats.lib.format import OTHER, Format, Kind, Match, Options, Target, Template
from build.formats.lib.ovf import CLOUDSTACK, lint_descriptor
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import BLOCK, RECORD, VSPHERE, Archive, is_tar, member_header, padded
from build.formats.lib.writer import Units, put
from build.formats.vmdk import VmdkDisk, VmdkWriter

PLACEHOLDERS = ("@capacity@", "@populated@", "@vmdk_size@")
DIGITS = 20
"""Digits of the largest number that may take a placeholder's place."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MANIFEST_LINE = re.compile(r"(SHA1|SHA256|SHA512)\(([^)]+)\)= ([0-9a-f]+)")
_HASHES = {"SHA1": hashlib.sha1, "SHA256": hashlib.sha256, "SHA512": hashlib.sha512}


def fill(text: str, values: Mapping[str, int]) -> str:
    """Put numbers in the place of a descriptor's placeholders; Unsupported when one is missing."""
    for name in PLACEHOLDERS:
        if name not in text:
            raise Unsupported(f"the OVF template never uses {name}", "put it back: readers need the number")
        text = text.replace(name, str(values[name]))
    return text


class OvaWriter:
    """Writes the VMDK behind room for descriptor and manifest, which come last."""

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        base: str,
        ovf: str,
        epoch: int,
        codec: Zlib = vmdk.CODEC,
        adapter: vmdk.Adapter = "lsilogic",
    ) -> None:
        if not _NAME.fullmatch(base):
            raise Unsupported(
                f"{base!r} cannot name the files of an OVA", "use letters, digits, dots and dashes"
            )
        self.file, self.size, self.ovf, self.epoch, self.codec = file, size, ovf, epoch, codec
        self.names = (f"{base}.ovf", f"{base}.mf", f"{base}-disk1.vmdk")
        widest = fill(ovf, dict.fromkeys(PLACEHOLDERS, 10**DIGITS))
        self.ovf_length = len(widest.encode())
        self.mf_length = len(self._manifest(bytes(32), bytes(32)))
        self.mf_at = BLOCK + padded(self.ovf_length)
        self.vmdk_at = self.mf_at + BLOCK + padded(self.mf_length) + BLOCK
        self.vmdk = VmdkWriter(file, size, self.names[2], adapter, codec, self.vmdk_at)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write the grains of a piece."""
        self.vmdk.add(index, data, units)

    def close(self, seed: str) -> None:
        """End the VMDK, hash it, write descriptor, manifest and the archive's end."""
        self.vmdk.close(seed)
        length = self.vmdk.length
        values = {"@capacity@": self.size, "@populated@": self.vmdk.populated, "@vmdk_size@": length}
        ovf = fill(self.ovf, values).encode()
        ovf += b"\n" * (self.ovf_length - len(ovf))
        self.file.flush()
        disk = BoundedReader(self.file.fileno(), self.vmdk_at, length)
        manifest = self._manifest(hashlib.sha256(ovf).digest(), _sha256(disk))
        put(self.file, 0, self._member(0, ovf))
        put(self.file, self.mf_at, self._member(1, manifest))
        put(self.file, self.vmdk_at - BLOCK, member_header(self.names[2], length, self.epoch))
        end = self.vmdk_at + padded(length)
        self.file.truncate(-(-(end + 2 * BLOCK) // RECORD) * RECORD)

    def _member(self, number: int, content: bytes) -> bytes:
        return member_header(self.names[number], len(content), self.epoch) + content.ljust(
            padded(len(content)), b"\0"
        )

    def _manifest(self, ovf: bytes, disk: bytes) -> bytes:
        return f"SHA256({self.names[0]})= {ovf.hex()}\nSHA256({self.names[2]})= {disk.hex()}\n".encode()


def _sha256(reader: BoundedReader) -> bytes:
    return _digest(reader, "SHA256")


def _digest(reader: BoundedReader, algorithm: str) -> bytes:
    digest = _HASHES[algorithm]()
    for offset in range(0, reader.size, 1 << 20):
        digest.update(reader.read(offset, min(1 << 20, reader.size - offset)))
    return digest.digest()


class OvaDisk:
    """Reads the disk of an OVA."""

    def __init__(self, reader: BoundedReader) -> None:
        self.archive = Archive(reader)
        member = self.archive.find(".vmdk")
        if member is None:
            raise Damaged("archive", "no file ending in .vmdk", VSPHERE, "put the disk in as VMDK")
        self.disk = VmdkDisk(self.archive.window(member))
        self.size = self.disk.size

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece."""
        return self.disk.piece(index)

    def facts(self) -> dict[str, str]:
        """The archive's files, and what the disk says."""
        files = ", ".join(f"{member.name[:60]} ({member.size} bytes)" for member in self.archive.members[:10])
        return {"files": files, **self.disk.facts()}


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check archive, manifest, descriptor and disk, as vSphere's and CloudStack's importers do."""
    archive = Archive(reader)
    yield from archive.findings
    yield from _lint_archive(archive)
    descriptor = archive.find(".ovf")
    if descriptor is None:
        raise Damaged("archive", "no OVF descriptor in the archive", f"{VSPHERE}, {CLOUDSTACK}")
    yield from _lint_manifest(archive)
    disk = archive.find(".vmdk")
    yield from lint_descriptor(archive, descriptor, lambda member: VmdkDisk(archive.window(member)).size)
    if disk:
        for finding in vmdk.lint(archive.window(disk)):
            yield Finding(
                finding.severity,
                f"{disk.name}: {finding.where}",
                finding.text,
                finding.refused_by,
                finding.fix,
            )


def _lint_archive(archive: Archive) -> Iterator[Finding]:
    names = set()
    for member in archive.members:
        where = at(member.header_at)
        if member.kind not in "0\0":
            yield Finding(
                "error",
                where,
                f"a tar member of type {member.kind!r} that is no plain file",
                VSPHERE,
                "write a plain ustar archive",
            )
        if "/" in member.name or "\\" in member.name or member.name in ("", ".", ".."):
            yield Finding(
                "error",
                where,
                f"the name {member.name[:100]!r} leads out of the folder",
                VSPHERE,
                "use plain file names",
            )
        elif not _NAME.fullmatch(member.name):
            yield Finding(
                "warning",
                where,
                f"the name {member.name[:100]!r} has unusual characters",
                VSPHERE,
                "use letters and digits",
            )
        if member.name in names:
            yield Finding(
                "error", where, f"{member.name[:100]} is twice in the archive", VSPHERE, "keep one of them"
            )
        names.add(member.name)
        if archive.reader.read(member.header_at + 257, 6) != b"ustar\0":
            yield Finding(
                "warning", where, "a tar header that is not ustar", VSPHERE, "write the archive as ustar"
            )
        if any(member.owner):
            yield Finding(
                "info", where, f"{member.name[:100]} belongs to {member.owner}", "", "write owner and group 0"
            )
    if archive.members and not archive.members[0].name.endswith(".ovf"):
        yield Finding(
            "error", at(0), "the first file is not the OVF descriptor", VSPHERE, "put the .ovf first"
        )


def _lint_manifest(archive: Archive) -> Iterator[Finding]:
    member = archive.find(".mf")
    if member is None:
        yield Finding(
            "warning", "archive", "no manifest (.mf)", f"{VSPHERE} content library", "add a SHA256 manifest"
        )
        return
    if member.size > 1 << 20:
        yield Finding(
            "error", at(member.offset), "a manifest of more than 1 MiB", VSPHERE, "write one line a file"
        )
        return
    listed = set()
    by_name = {other.name: other for other in archive.members}
    for number, line in enumerate(
        archive.window(member).read(0, member.size).decode("utf-8", "replace").splitlines(), 1
    ):
        where = f"{member.name} line {number}"
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            yield Finding(
                "error",
                where,
                f"not of the form SHA256(name)= hex: {line[:80]!r}",
                VSPHERE,
                "write it in that form",
            )
            continue
        algorithm, name, stored = match.groups()
        if name in listed:
            yield Finding("error", where, f"{name} is listed twice", VSPHERE, "list it once")
            continue
        listed.add(name)
        if algorithm == "SHA1":
            yield Finding("warning", where, "the manifest uses SHA1", "vSphere 7 and later", "use SHA256")
        if name not in by_name:
            yield Finding("error", where, f"{name} is not in the archive", VSPHERE, "list only what is there")
        elif _digest(archive.window(by_name[name]), algorithm).hex() != stored:
            yield Finding(
                "error", where, f"the digest of {name} is wrong", VSPHERE, "write the manifest again"
            )
    for name in sorted(set(by_name) - listed - {member.name}):
        if not name.endswith(".cert"):
            yield Finding("warning", member.name, f"{name[:100]} is not listed", VSPHERE, "list every file")


def _recognize(reader: BoundedReader, head: bytes) -> Match:
    return Match.LIKELY if is_tar(head) else Match.NO


def _write(target: Target, options: Options) -> OvaWriter:
    return OvaWriter(
        target.file,
        target.size,
        target.name.removesuffix(".ova"),
        options["ovf"],
        target.epoch,
        vmdk.codec(options),
        options.get("adapter", "lsilogic"),
    )


def _disk(reader: BoundedReader) -> BoundedReader:
    member = Archive(reader).find(".vmdk")
    if member is None:
        raise Damaged("archive", "the OVA holds no VMDK", VSPHERE)
    return reader.window(member.offset, member.size)


KIND = Kind(
    name="ova",
    suffix="ova",
    version=1,
    driver="vmdk",
    recognize=_recognize,
    write=_write,
    read=OvaDisk,
    lint=lint,
    check_size=vmdk.check_size,
    options=vmdk.adapter,
    disk=_disk,
)
FORMATS = (
    Format(
        name="ova",
        help="OVA for VMware",
        kind=KIND,
        file="{imagename}.ova",
        machine=vmdk.MACHINE,
        efi=vmdk.EFI,
        descriptor="systemvm.ovf.j2",
        cloudstack=Template("VMware", "OVA", "vmware.ova", OTHER, ("vmware",)),
    ),
)
