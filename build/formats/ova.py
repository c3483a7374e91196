"""OVA: a tar archive of an OVF descriptor, a manifest and one streamOptimized VMDK, in this order.

Rules from the OVF specification (DMTF DSP0243) and from what vSphere and CloudStack take: ustar without
extensions, owners and times fixed, the manifest as `SHA256(name)= hex`. The descriptor's text comes rendered
but for numbers that are known when the VMDK is written; it is padded with line ends, so that its place
can be kept free in front of the VMDK and nothing is copied.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import unquote

from build.formats import vmdk
from build.formats.lib import manifest, ovf
from build.formats.lib.codec import Zlib
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code, Damage, Damaged, Finding, Group, at
from build.formats.lib.format import OTHER, Format, Kind, Match, Options, Target, Template
from build.formats.lib.inner import Inner
from build.formats.lib.platforms import CLOUDSTACK, VSPHERE, Affected
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import BLOCK, Archive, Member, archive_size, is_tar, member_header, padded
from build.formats.lib.writer import Units, put
from build.formats.vmdk import VmdkDisk, VmdkWriter

PLACEHOLDERS = ("@capacity@", "@populated@", "@vmdk_size@")
DIGITS = 20
"""Digits of the largest number that may take a placeholder's place."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PLAIN = "0\0"
FOLDER = "5"
GZIP = b"\x1f\x8b\x08"
DISK_NAMES = (".vmdk", ".vmdk.gz")
MOST_TOLD = 10
"""Files and disks that facts name one by one."""

GROUP = Group("OVA", "The archive of an OVA", "DMTF DSP0243, OVF Package; what vSphere's importers take")
_VSPHERE, _BOTH = (VSPHERE,), (VSPHERE, CLOUDSTACK)
NO_DESCRIPTOR = Damage("OVA001", "no OVF descriptor in the archive", _BOTH, "put in the .ovf")
LARGE_DESCRIPTOR = Damage("OVA002", "a descriptor of more than 4 MiB", _VSPHERE)
NO_DISK = Damage("OVA003", "no disk in the archive", _VSPHERE, "put the disk in as VMDK")
GZIP_DISK = Code(
    "OVA004",
    "error",
    "the disk is compressed by gzip inside of the OVA",
    (Affected("vsphere", since="6.5"),),
    "unpack it: inv repair",
    repair="gunzip",
)
NOT_COMPRESSED = Code(
    "OVA005",
    "error",
    "ovf:compression says {said}, the file is not compressed",
    _BOTH,
    "remove ovf:compression: inv repair",
    repair="descriptor",
)
PAX = Code(
    "OVA006",
    "error",
    "the archive is in pax format",
    _VSPHERE,
    "write it as ustar or gnu (tar --format=ustar): inv repair",
    repair="ustar",
)
OLD_FORM = Code(
    "OVA007",
    "warning",
    "the archive is of the old kind, neither ustar nor gnu",
    fix="write it as ustar: inv repair",
    repair="ustar",
)
NOT_FIRST = Code(
    "OVA008",
    "error",
    "the first file is not the OVF descriptor",
    _VSPHERE,
    "put the .ovf first: inv repair",
    repair="order",
)
TWICE = Code(
    "OVA009", "error", "{name} is twice in the archive", _VSPHERE, "keep one of them", repair="refuse"
)
FOLDERS = Code(
    "OVA010",
    "warning",
    "files lie in folders of the archive",
    fix="put all files at the top: inv repair",
    repair="top",
)
OWNER = Code("OVA011", "info", "{name} belongs to user {user}, group {group}", fix="write owner and group 0")
NO_PLAIN_FILE = Code(
    "OVA012",
    "error",
    "a tar member of type {type!r} that is no plain file",
    _VSPHERE,
    "put in the file itself",
    repair="refuse",
)
LEADS_OUT = Code(
    "OVA013",
    "error",
    "the name {name!r} leads out of the folder",
    _VSPHERE,
    "use plain names",
    repair="refuse",
)
ODD_NAME = Code(
    "OVA014",
    "warning",
    "the name {name!r} has unusual characters",
    fix="use letters, digits, dots and dashes",
)


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
        descriptor: str,
        epoch: int,
        codec: Zlib = vmdk.CODEC,
        adapter: vmdk.Adapter = "lsilogic",
    ) -> None:
        if not _NAME.fullmatch(base):
            raise Unsupported(
                f"{base!r} cannot name the files of an OVA", "use letters, digits, dots and dashes"
            )
        self.file, self.size, self.ovf, self.epoch, self.codec = file, size, descriptor, epoch, codec
        self.names = (f"{base}.ovf", f"{base}.mf", f"{base}-disk1.vmdk")
        widest = fill(descriptor, dict.fromkeys(PLACEHOLDERS, 10**DIGITS))
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
        text = fill(self.ovf, values).encode()
        text += b"\n" * (self.ovf_length - len(text))
        self.file.flush()
        disk = BoundedReader(self.file.fileno(), self.vmdk_at, length)
        lines = self._manifest(hashlib.sha256(text).digest(), manifest.digest([disk]))
        put(self.file, 0, self._member(0, text))
        put(self.file, self.mf_at, self._member(1, lines))
        put(self.file, self.vmdk_at - BLOCK, member_header(self.names[2], length, self.epoch))
        end = self.vmdk_at + padded(length)
        self.file.truncate(archive_size(end))

    def _member(self, number: int, content: bytes) -> bytes:
        return member_header(self.names[number], len(content), self.epoch) + content.ljust(
            padded(len(content)), b"\0"
        )

    def _manifest(self, text: bytes, disk: bytes) -> bytes:
        return (manifest.line(self.names[0], text) + manifest.line(self.names[2], disk)).encode()


def plain_files(archive: Archive) -> dict[str, Member]:
    """Files of an archive by name, the first of each; without links, folders and extended headers."""
    found: dict[str, Member] = {}
    for member in archive.members:
        if member.kind in PLAIN:
            found.setdefault(member.name.removeprefix("./"), member)
    return found


def find_descriptor(members: Mapping[str, Member]) -> Member | None:
    """The OVF descriptor: the first file that is called so."""
    return next((member for name, member in members.items() if name.lower().endswith(".ovf")), None)


def read_content(archive: Archive, member: Member) -> bytes:
    """A descriptor's bytes; Damaged when they are too many to be one."""
    if member.size > ovf.LARGEST:
        raise Damaged(LARGE_DESCRIPTOR, at(member.offset))
    return archive.window(member).read(0, member.size)


def inner(reader: BoundedReader) -> tuple[Inner, ...]:
    """The disk images of an OVA, in the order of its Disks; without a readable descriptor, its VMDKs."""
    archive = Archive(reader)
    return tuple(row.disk for row in _stored(archive, plain_files(archive)))


@dataclass(frozen=True)
class _Stored:
    """A disk image, and the files that it lies in."""

    disk: Inner
    parts: tuple[Member, ...]
    file: ovf.FileRef | None = None
    """What the descriptor says of it."""


def _stored(archive: Archive, members: Mapping[str, Member]) -> list[_Stored]:
    """Disk images, in the order in which they are counted."""
    member = find_descriptor(members)
    found: list[_Stored] = []
    if member:
        try:
            described = ovf.read_descriptor(read_content(archive, member))
        except Damaged:
            described = None
        for _, file in described.stored if described else ():
            if parts := ovf.find_parts(members, file):
                found.append(_Stored(_inner(archive, file.href, parts), parts, file))
    if not found:
        vmdks = [member for name, member in members.items() if name.lower().endswith(DISK_NAMES)]
        found = [_Stored(_inner(archive, member.name, (member,)), (member,)) for member in vmdks]
    return found


def _owners(stored: Sequence[_Stored]) -> dict[str, int]:
    """Numbers of the disks that files belong to, by the file's name; not of one that several share."""
    rows = [(part.name, number) for number, row in enumerate(stored, 1) for part in row.parts]
    uses = Counter(name for name, _ in rows)
    return {name: number for name, number in rows if uses[name] == 1}


def _inner(archive: Archive, name: str, parts: Sequence[Member]) -> Inner:
    """A disk image; gzip is told by its first bytes, whatever the descriptor says."""
    windows = tuple(archive.window(part) for part in parts)
    compressed = windows[0].size >= 3 and windows[0].read(0, 3) == GZIP
    return Inner(unquote(name), windows, "gz" if compressed else "")


def _virtual_size(disk: Inner) -> int | None:
    """Bytes that a VMDK's first sector says its disk has; None for anything else."""
    try:
        head = disk.head(vmdk.SECTOR)
    except Damaged:
        return None
    if len(head) < vmdk.SECTOR or not head.startswith(b"KDMV"):
        return None
    return int.from_bytes(head[12:20], "little") * vmdk.SECTOR


def packed(disk: Inner) -> Finding:
    """Why a disk cannot be read where it lies."""
    if not disk.compression:
        return ovf.chunked(disk.name, len(disk.parts))
    return Finding(GZIP_DISK, disk.name[:100])


class OvaDisk:
    """Reads the first disk of an OVA, where it lies in one piece."""

    def __init__(self, reader: BoundedReader) -> None:
        self.archive = Archive(reader)
        self.members = plain_files(self.archive)
        disks = _stored(self.archive, self.members)
        if not disks:
            raise Damaged(NO_DISK, "archive")
        self.inner = disks[0].disk
        whole = self.inner.whole
        self.disk = VmdkDisk(whole) if whole else None
        size = self.disk.size if self.disk else _virtual_size(self.inner)
        if size is None:
            raise self._packed()
        self.size = size

    def _packed(self) -> Damaged:
        return Damaged.by(packed(self.inner))

    def piece(self, index: int) -> bytes | None:
        """Guest-visible bytes of a piece."""
        if self.disk is None:
            raise self._packed()
        return self.disk.piece(index)

    def facts(self) -> dict[str, str]:
        """The archive's files, the disks that an import makes, and what the first disk says."""
        rows = list(self.members.values())
        files = [f"{member.name[:60]} ({member.size} bytes)" for member in rows[:MOST_TOLD]]
        files += [f"{len(rows) - MOST_TOLD} more"] * (len(rows) > MOST_TOLD)
        empty = ", ".join(_empty(self.archive, self.members))
        return {
            "files": ", ".join(files),
            **({"empty disks": empty} if empty else {}),
            **(self.disk.facts() if self.disk else {}),
        }


def _empty(archive: Archive, members: Mapping[str, Member]) -> Iterator[str]:
    """Disks that an import makes, empty."""
    member = find_descriptor(members)
    if member is None:
        return
    try:
        described = ovf.read_descriptor(read_content(archive, member))
    except Damaged:
        return
    for disk in [disk for disk in described.disks if not disk.ref][:MOST_TOLD]:
        size = ovf.capacity(disk.capacity, disk.units)
        yield f"{disk.id[:60]} ({f'{size} bytes' if size else 'of a size given at the import'})"


def lint(reader: BoundedReader) -> Iterator[Finding]:
    """Check archive, manifest, descriptor and every disk, as vSphere's and CloudStack's importers do."""
    archive = Archive(reader)
    yield from archive.findings
    members = plain_files(archive)
    yield from _lint_archive(archive, members)
    descriptor = find_descriptor(members)
    if descriptor is None:
        raise Damaged(NO_DESCRIPTOR, "archive")
    stored = _stored(archive, members)
    yield from manifest.lint(archive, members, _owners(stored))
    sizes = {row.file.href: _virtual_size(row.disk) for row in stored if row.file}

    def size_of(file: ovf.FileRef) -> int | None:
        return sizes.get(file.href)

    try:
        yield from ovf.lint_descriptor(read_content(archive, descriptor), members, size_of)
    except Damaged as damage:
        yield damage.finding
    for number, row in enumerate(stored, 1):
        for finding in _lint_packing(row):
            yield finding.but(disk=number)
        if row.disk.whole:
            for finding in _lint_disk(row.disk.whole):
                yield finding.on(number, row.disk.name)


def _lint_packing(row: _Stored) -> Iterator[Finding]:
    if row.disk.compression:
        yield packed(row.disk)
    elif row.file and row.file.compression.lower() not in ("", "identity"):
        yield Finding(NOT_COMPRESSED, row.disk.name[:100], said=row.file.compression)


def _lint_disk(reader: BoundedReader) -> Iterator[Finding]:
    """A disk's own findings; what is broken in one ends the look at this one only."""
    try:
        yield from vmdk.lint(reader)
    except Damaged as damage:
        yield damage.finding


def _lint_archive(archive: Archive, members: Mapping[str, Member]) -> Iterator[Finding]:
    if archive.form == "pax":
        yield Finding(PAX, "archive")
    elif archive.form == "v7":
        yield Finding(OLD_FORM, "archive")
    first = archive.members[0] if archive.members else None
    if first and not first.name.lower().endswith(".ovf") and find_descriptor(members):
        yield Finding(NOT_FIRST, at(first.header_at))
    names: set[str] = set()
    folders = 0
    for member in archive.members:
        name = member.name.removeprefix("./")
        folders += member.kind == FOLDER or "/" in name.strip("/")
        yield from _lint_member(member, name)
        if name in names:
            yield Finding(TWICE, at(member.header_at), name=name)
        names.add(name)
    if folders:
        yield Finding(FOLDERS, "archive")
    if first and any(first.owner):
        user, group = first.owner
        yield Finding(OWNER, at(first.header_at), name=first.name, user=user, group=group)


def _lint_member(member: Member, name: str) -> Iterator[Finding]:
    where = at(member.header_at)
    if member.kind not in PLAIN and member.kind != FOLDER:
        yield Finding(NO_PLAIN_FILE, where, type=member.kind)
    parts = re.split(r"[/\\]", name.rstrip("/"))
    if ".." in parts or (not parts[0] and member.kind != FOLDER) or "\\" in name:
        yield Finding(LEADS_OUT, where, name=name)
    elif not (name.isascii() and name.isprintable()):
        yield Finding(ODD_NAME, where, name=name)


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
    inner=inner,
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
