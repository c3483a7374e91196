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

from build.formats.lib.findings import Finding, at
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import VSPHERE, Archive, Member

LARGEST = 1 << 20
"""Bytes of a manifest; real ones have some hundreds."""
HASHES = {"SHA1": hashlib.sha1, "SHA256": hashlib.sha256, "SHA512": hashlib.sha512}
_LINE = re.compile(r"(SHA1|SHA256|SHA512)([ \t]*)\((.+)\)[ \t]*=[ \t]*([0-9a-fA-F]+)[ \t]*")
_STEP = 1 << 20


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


def lint(archive: Archive, members: Mapping[str, Member]) -> Iterator[Finding]:
    """Check the manifest of an archive whose plain files are `members`; each listed file is read once."""
    member = archive.find(".mf")
    if member is None:
        text = "no manifest (.mf): nobody can tell whether the files are whole"
        yield Finding("info", "archive", text, "", "add a SHA256 manifest")
        return
    if member.size > LARGEST:
        yield Finding(
            "error", at(member.offset), "a manifest of more than 1 MiB", VSPHERE, "write one line a file"
        )
        return
    text = archive.window(member).read(0, member.size).decode("utf-8", "replace")
    listed: set[str] = set()
    blanks = False
    for number, row in enumerate(text.rstrip().splitlines(), 1):
        where = f"{member.name[:100]} line {number}"
        if not row.strip():
            yield Finding("warning", where, "an empty line", "vSphere 6.5", "remove it")
            continue
        match = _LINE.fullmatch(row)
        if match is None:
            yield Finding(
                "error",
                where,
                f"{row[:80]!r} is not of the form SHA256(name)= hex",
                VSPHERE,
                "write it in that form",
            )
            continue
        algorithm, blank, name, stored = match.groups()
        if blank and not blanks:
            blanks = True
            yield Finding(
                "error",
                where,
                f"a blank between {algorithm} and the bracket",
                "vSphere 6.5 and later",
                f"write {algorithm}(name)= hex in every line",
            )
        found = named(members, name)
        if found is None:
            yield Finding(
                "error", where, f"{name[:100]} is not in the archive", VSPHERE, "list only what is there"
            )
        elif found.name in listed:
            yield Finding("error", where, f"{name[:100]} is listed twice", VSPHERE, "list it once")
        else:
            listed.add(found.name)
            if digest([archive.window(found)], algorithm) != bytes.fromhex(_even(stored)):
                yield Finding(
                    "error",
                    where,
                    f"the digest of {name[:100]} is wrong",
                    f"{VSPHERE}, VirtualBox, virt-v2v",
                    "copy the file again; if it was changed on purpose, write the manifest again",
                    lossy=not found.name.lower().endswith(".ovf"),
                )
    if re.search(r"^SHA1\b", text, re.MULTILINE):
        yield Finding("info", member.name[:100], "the manifest uses SHA1, which is broken", "", "use SHA256")
    for name in sorted(found.name for found in members.values()):
        if name not in listed and name != member.name and not name.lower().endswith(".cert"):
            yield Finding(
                "warning", member.name[:100], f"{name[:100]} is not listed", "vCenter 6.5", "list every file"
            )


def _even(digits: str) -> str:
    return digits if len(digits) % 2 == 0 else ""
