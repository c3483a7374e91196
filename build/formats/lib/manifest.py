"""Manifests of OVF packages: one line a file, `SHA256(name)= hex`.

Form from DSP0243, "Distribution". Readers differ: virt-v2v and ovftool take blanks before the bracket and
around the equals sign, vSphere takes them around the equals sign only ("Invalid OVF checksum algorithm:
SHA256 "; home-assistant/operating-system issue 826, nextcloud/vm issue 2607).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from build.formats.lib.findings import Code, Finding, Group, at
from build.formats.lib.platforms import VIRT_V2V, VIRTUALBOX, VSPHERE, Affected
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import Archive, Member

LARGEST = 1 << 20
"""Bytes of a manifest; real ones have some hundreds."""
HASHES = {"SHA1": hashlib.sha1, "SHA256": hashlib.sha256, "SHA512": hashlib.sha512}
_LINE = re.compile(r"(SHA1|SHA256|SHA512)([ \t]*)\((.+)\)[ \t]*=[ \t]*([0-9a-fA-F]+)[ \t]*")
_STEP = 1 << 20

GROUP = Group("MF", "The manifest of an OVA", "DMTF DSP0243, Distribution")
_SAID = "Invalid OVF checksum algorithm: home-assistant/operating-system issue 826, nextcloud/vm issue 2607"
_WRITTEN_AGAIN = "copy the file again; if it was changed on purpose, write the manifest again"
NONE = Code(
    "MF001",
    "info",
    "no manifest (.mf): nobody can tell whether the files are whole",
    fix="add a SHA256 manifest",
    repair="manifest",
)
LARGE = Code("MF002", "error", "a manifest of more than 1 MiB", (VSPHERE,), "write one line a file")
EMPTY_LINE = Code(
    "MF003", "warning", "an empty line", (Affected("vsphere", only="6.5"),), "remove it", repair="form"
)
FORM = Code(
    "MF004",
    "error",
    "{line!r} is not of the form SHA256(name)= hex",
    (VSPHERE,),
    "write it in that form",
    repair="form",
)
BLANK = Code(
    "MF005",
    "error",
    "a blank between {algorithm} and the bracket",
    (Affected("vsphere", since="6.5"),),
    "write {algorithm}(name)= hex in every line",
    repair="form",
    source=_SAID,
)
NOT_THERE = Code(
    "MF006",
    "error",
    "{name} is not in the archive",
    (VSPHERE,),
    "list only what is there",
    repair="list what is there",
)
TWICE = Code("MF007", "error", "{name} is listed twice", (VSPHERE,), "list it once")
DIGEST = Code(
    "MF008",
    "error",
    "the digest of {name} is wrong",
    (VSPHERE, VIRTUALBOX, VIRT_V2V),
    _WRITTEN_AGAIN,
    lossy=True,
    repair="refuse",
)
DESCRIPTOR_DIGEST = Code(
    "MF009",
    "error",
    "the digest of {name} is wrong",
    (VSPHERE, VIRTUALBOX, VIRT_V2V),
    _WRITTEN_AGAIN,
    repair="refuse",
)
SHA1 = Code("MF010", "info", "the manifest uses SHA1, which is broken", fix="use SHA256", repair="sha256")
UNLISTED = Code(
    "MF011",
    "warning",
    "{name} is not listed",
    (Affected("vcenter", only="6.5"),),
    "list every file",
    repair="list all",
)


def line(name: str, digest: bytes) -> str:
    """A file's line, as every reader takes it."""
    return f"SHA256({name})= {digest.hex()}\n"


def digest(parts: tuple[BoundedReader, ...] | list[BoundedReader], algorithm: str = "SHA256") -> bytes:
    """Hash some windows one after the other."""
    state = HASHES[algorithm]()
    for part in parts:
        for offset in range(0, part.size, _STEP):
            state.update(part.read(offset, min(_STEP, part.size - offset)))
    return state.digest()


def named(members: Mapping[str, Member], name: str) -> Member | None:
    """The file that a reference means: by its very name, or with the URL's percent escapes undone."""
    return members.get(name) or members.get(unquote(name))


def lint(archive: Archive, members: Mapping[str, Member], owners: Mapping[str, int]) -> Iterator[Finding]:
    """Check the manifest of an archive whose plain files are `members`; each listed file is read once.

    `owners` are the numbers of the disks that files belong to, by the file's name.
    """
    member = archive.find(".mf")
    if member is None:
        yield Finding(NONE, "archive")
        return
    if member.size > LARGEST:
        yield Finding(LARGE, at(member.offset))
        return
    text = archive.window(member).read(0, member.size).decode("utf-8", "replace")
    listed: set[str] = set()
    blanks = False
    for number, row in enumerate(text.rstrip().splitlines(), 1):
        where = f"{member.name[:100]} line {number}"
        if not row.strip():
            yield Finding(EMPTY_LINE, where)
            continue
        match = _LINE.fullmatch(row)
        if match is None:
            yield Finding(FORM, where, line=row)
            continue
        algorithm, blank, name, stored = match.groups()
        if blank and not blanks:
            blanks = True
            yield Finding(BLANK, where, algorithm=algorithm)
        found = named(members, name)
        if found is None:
            yield Finding(NOT_THERE, where, name=name)
        elif found.name in listed:
            yield Finding(TWICE, where, name=name)
        else:
            listed.add(found.name)
            if digest([archive.window(found)], algorithm) != bytes.fromhex(_even(stored)):
                code = DESCRIPTOR_DIGEST if found.name.lower().endswith(".ovf") else DIGEST
                yield Finding(code, where, name=name).but(disk=owners.get(found.name))
    if re.search(r"^SHA1\b", text, re.MULTILINE):
        yield Finding(SHA1, member.name[:100])
    for name in sorted(found.name for found in members.values()):
        if name not in listed and name != member.name and not name.lower().endswith(".cert"):
            yield Finding(UNLISTED, member.name[:100], name=name)


def _even(digits: str) -> str:
    return digits if len(digits) % 2 == 0 else ""
