"""Verb: make an OVA of VirtualBox's or an old one into one that vSphere imports.

The file is only read. The new one is written aside, read back (no error for vSphere, every disk with the same
bytes for a guest) and only then gets its name.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from build import wire
from build.agent import files, image
from build.agent.events import Emit, Failure
from build.formats import ova, vmdk
from build.formats.lib import manifest, ovf, pieces, repair, tar
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, Finding, collect
from build.formats.lib.places import PLACES, is_affected
from build.formats.lib.reader import BoundedReader, Budget

_STEP = 1 << 20
_PLACE = PLACES["vsphere"]


@dataclass(frozen=True)
class Part:
    """A file of the new archive: bytes that lie somewhere, some of them replaced."""

    name: str
    content: BoundedReader
    patches: tuple[tuple[int, bytes], ...] = ()
    """Offsets in the content, and what stands there instead."""
    guest: str = ""
    """SHA-256 of what a guest sees; empty: it is no disk."""

    def blocks(self) -> Iterator[bytes]:
        """Its bytes in order."""
        for offset in range(0, self.content.size, _STEP):
            data = self.content.read(offset, min(_STEP, self.content.size - offset))
            for place, patch in self.patches:
                if offset <= place < offset + len(data):
                    data = data[: place - offset] + patch + data[place - offset + len(patch) :]
            yield data


def run(request: wire.Repair, emit: Emit) -> wire.Repaired:
    """Repair one file; raises Failure for one that would lose data, or that is no OVA."""
    path, output = Path(request.file), Path(request.output)
    if output.exists() or output.is_symlink():
        raise Failure(f"{output} is already there", "remove it, or name another file with --output")
    if not output.parent.is_dir():
        raise Failure(f"there is no folder {output.parent}", "make it, or name another with --output")
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(image.opened_file(path))
            reader = BoundedReader.whole(fd)
            reader.budget = Budget(16 * reader.size + (1 << 30))
            if not tar.is_tar(reader.read(0, min(reader.size, 1024))):
                raise Failure(f"{path} is no OVA", f"look at what it is: inv inspect {path}")
            return _repair(reader, request, output, emit, stack)
        except Damaged as damage:
            raise image.unreadable(path.name, damage) from None
        except Unsupported as refusal:
            raise Failure(f"{path.name}: {refusal.message}", refusal.hint) from None


def _repair(
    reader: BoundedReader, request: wire.Repair, output: Path, emit: Emit, stack: contextlib.ExitStack
) -> wire.Repaired:
    archive = tar.Archive(reader)
    how = stack.enter_context(image.opener(emit, work=request.work))
    bench = _Bench(Path(request.file).name, archive, ova.plain_files(archive), how)
    described = ova.find_descriptor(bench.members)
    if described is None:
        raise Damaged(ova.NO_DESCRIPTOR, "archive")
    found = collect(ova.lint(reader))
    _refuse(found)
    parts = _parts(bench, described, request.hardware)
    changes = [*bench.changes, *(repair.ACTIONS[each.code.repair] for each in found if _is_fixed(each))]
    if not changes:
        return wire.Repaired("", ())
    private = files.is_private(os.fstat(reader.fd))
    size, digest = _write(output, parts, _epoch(reader, described), private, emit)
    return wire.Repaired(str(output), tuple(dict.fromkeys(changes)), size, digest)


def _is_fixed(finding: Finding) -> bool:
    """Whether a new archive with a new manifest fixes it by itself."""
    return finding.code.repair in repair.ACTIONS


def _refuse(found: list[Finding]) -> None:
    """Raise Damaged for what a new archive would carry on as if it were right."""
    for finding in found:
        if finding.code.repair == repair.REFUSE or (finding.lossy and not _is_fixed(finding)):
            raise Damaged.by(finding)


def _epoch(reader: BoundedReader, member: tar.Member) -> int:
    """Time of the descriptor in the old archive: the same file gives the same bytes."""
    try:
        return tar.octal(reader.read(member.header_at + 136, 12))
    except ValueError:
        return 0


@dataclass
class _Bench:
    """An archive that is being taken apart, and what was changed in its files."""

    name: str
    archive: tar.Archive
    members: dict[str, tar.Member]
    how: image.Opener
    changes: list[str] = field(default_factory=list)

    def keep(self, content: bytes) -> BoundedReader:
        """A reader of bytes that were made here."""
        space = self.how.space()
        space.write(content)
        space.flush()
        return BoundedReader.whole(space.fileno())


def _parts(bench: _Bench, described: tar.Member, hardware: int) -> list[Part]:
    """The files of the new archive but for the manifest: the descriptor, what it references, the rest."""
    content = ova.read_content(bench.archive, described)
    read = ovf.read_descriptor(content)
    stored: dict[str, repair.Stored] = {}
    referenced: dict[str, Part] = {}
    used = {described.name}
    disks = {file.href for _, file in read.stored}
    for file in read.files:
        members = ovf.find_parts(bench.members, file)
        names = {member.name for member in members}
        if members and file.href not in stored:
            if names & used:
                raise Damaged(repair.SHARED_FILE, "References")
            used |= names
            part, size = _one(bench, file, members, file.href in disks)
            stored[file.href] = repair.Stored(part.name, part.content.size, size)
            referenced[part.name] = part
    text, edits = repair.edit_descriptor(content, stored, hardware)
    bench.changes += edits
    parts = [Part(_flat(described.name), bench.keep(text)), *referenced.values()]
    for name, member in bench.members.items():
        if member.name in used or name.lower().endswith(".mf"):
            continue
        if name.lower().endswith(".cert"):
            bench.changes.append(f"{name} left out: its signature is of the old manifest")
            continue
        parts.append(Part(_flat(name), bench.archive.window(member)))
    if len({part.name for part in parts}) != len(parts):
        raise Damaged(repair.SAME_NAMES, "archive")
    return parts


def _flat(name: str) -> str:
    return name.rpartition("/")[2]


def _one(
    bench: _Bench, file: ovf.FileRef, members: tuple[tar.Member, ...], is_disk: bool
) -> tuple[Part, int]:
    """A referenced file in one piece, and the virtual size when it is a disk."""
    name = _flat(members[0].name)
    windows = [bench.archive.window(member) for member in members]
    content = windows[0]
    if file.chunk and name.endswith(ovf.CHUNK.format(0)):
        name = name.rpartition(".")[0]
        content = bench.how.join(windows)
        bench.changes.append(f"{name}: {len(windows)} chunk{'s' if len(windows) > 1 else ''} joined")
    if not is_disk:
        return Part(name, content), 0
    if content.size >= 3 and content.read(0, 3) == ova.GZIP:
        name = name.removesuffix(".gz")
        content = bench.how.expand("gz", content)
        bench.changes.append(f"{name}: the disk is unpacked")
    patches = tuple(_patches(name, content, bench.changes))
    _check_disk(bench, name, content, bool(patches))
    disk = vmdk.VmdkDisk(content)
    return Part(name, content, patches, pieces.sha256(disk)), disk.size


def _patches(name: str, content: BoundedReader, changes: list[str]) -> Iterator[tuple[int, bytes]]:
    """Version 1 of a streamOptimized header and of its footer is 3, as QEMU's has been since 2.5.1."""
    header = vmdk.read_header(content, 0)
    if header.version not in (1, 2) or not header.flags & vmdk.COMPRESSED or not header.flags & vmdk.MARKERS:
        return
    yield 4, (3).to_bytes(4, "little")
    if header.directory == vmdk.AT_END and content.size % vmdk.SECTOR == 0:
        yield content.size - 2 * vmdk.SECTOR + 4, (3).to_bytes(4, "little")
    changes.append(f"{name}: header version {header.version} is 3 (bytes 4 to 7 of the header)")


def _check_disk(bench: _Bench, name: str, content: BoundedReader, version_fixed: bool) -> None:
    for finding in collect(vmdk.lint(content)):
        if finding.severity != "error" or (version_fixed and finding.code == vmdk.OLD_VERSION):
            continue
        hint = "convert the disk: inv convert.ova --from FILE" if not finding.lossy else finding.fix
        what = f"{bench.name}: {name}: {finding.where}: {finding.text}"
        raise Failure(what, hint, code=finding.code.id)


def _write(output: Path, parts: list[Part], epoch: int, private: bool, emit: Emit) -> tuple[int, str]:
    """Write aside, read back, and give the name; size and SHA-256 of the archive.

    `private`: only its owner may read it, as the file that it was made from.
    """
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _archive(file, parts, epoch, emit)
            os.fchmod(file.fileno(), 0o600 if private else 0o666 & ~_umask())
        digest = _proven(aside, parts)
        size = aside.stat().st_size
        if output.exists():
            raise Failure(f"{output} is there by now", "remove it, or name another file with --output")
        files.publish(aside, output)
        return size, digest
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _archive(file: BinaryIO, parts: list[Part], epoch: int, emit: Emit) -> None:
    """Descriptor, manifest, the rest; the manifest's place is kept free until the digests are known."""
    lines = "".join(manifest.line(part.name, bytes(32)) for part in parts).encode()
    mf = f"{parts[0].name.rpartition('.')[0]}.mf"
    total, done = sum(part.content.size for part in parts), 0
    digests: list[bytes] = []
    for number, part in enumerate(parts):
        if number == 1:
            place = file.tell()
            file.seek(tar.BLOCK + tar.padded(len(lines)), os.SEEK_CUR)
        file.write(tar.member_header(part.name, part.content.size, epoch))
        digests.append(_copy(part, file))
        file.write(bytes(tar.padded(part.content.size) - part.content.size))
        done += part.content.size
        emit("progress", label="repair", done=done, total=total)
    if len(parts) == 1:
        place = file.tell()
        file.seek(tar.BLOCK + tar.padded(len(lines)), os.SEEK_CUR)
    file.truncate(tar.archive_size(file.tell()))
    rows = zip(parts, digests, strict=True)
    written = "".join(manifest.line(part.name, digest) for part, digest in rows).encode()
    file.seek(place)
    file.write(tar.member_header(mf, len(written), epoch) + written)


def _copy(part: Part, target: BinaryIO) -> bytes:
    state = manifest.HASHES["SHA256"]()
    for data in part.blocks():
        state.update(data)
        target.write(data)
    return state.digest()


def _proven(aside: Path, parts: list[Part]) -> str:
    """SHA-256 of the new archive; raises Unsupported when vSphere would refuse it or a disk is another."""
    with image.opened_file(aside) as fd:
        reader = BoundedReader.whole(fd)
        for finding in collect(ova.lint(reader)):
            if finding.severity == "error" and (finding.lossy or is_affected(_PLACE, finding.affects)):
                raise Unsupported(f"{finding.where}: not fixed: {finding.text}", finding.fix)
        guests = [part.guest for part in parts if part.guest]
        again = [
            pieces.sha256(vmdk.VmdkDisk(disk.whole)) for disk in ova.inner(reader) if disk.whole is not None
        ]
        if sorted(guests) != sorted(again):
            raise Unsupported("what was written does not have the bytes that were read", "try again")
        return manifest.digest([reader]).hex()
