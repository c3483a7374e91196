"""Verb: say what an image file is, ours or anybody's, and lint it; nothing in it is trusted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from build.agent import media
from build.agent.events import Emit, Failure
from build.formats import pieces, raw, unwrap
from build.formats.extent import Budget, Extent
from build.formats.findings import Damaged, Finding, collect
from build.formats.table import KINDS, recognize


def run(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Describe and check one file.

    Request: file, optionally work (folder for what is expanded), content (also hash what a guest would
    see) and limit (bytes). Answers file, size, allocated, outer, format, virtual_size, facts, guest_sha256
    and findings (severity, where, text, refused_by, fix). Raises Failure when the file cannot be opened.
    """
    path = Path(request["file"])
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Failure(f"there is no file {path}", "name an image file") from None
    try:
        if not path.is_file() and not path.is_block_device():
            raise Failure(f"{path} is no file", "name an image file")
        return _inspect(fd, path, request, emit)
    finally:
        os.close(fd)


def _inspect(fd: int, path: Path, request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    extent = Extent.whole(fd)
    told: dict[str, Any] = {
        "file": str(path),
        "size": extent.size,
        "allocated": extent.allocated(),
        "outer": unwrap.recognize(extent),
        "format": None,
        "virtual_size": None,
        "facts": {},
        "guest_sha256": None,
        "findings": [],
    }
    limit = int(request.get("limit") or media.LIMIT)
    if not told["outer"]:
        return {**told, **_look(extent, path.name, limit, request)}
    with tempfile.TemporaryFile(dir=request.get("work")) as space:
        try:
            media.expand(told["outer"], extent, space, emit, limit)
        except Damaged as damage:
            return {**told, "findings": [damage.finding.as_json()]}
        inner = path.name.removesuffix(f".{told['outer']}")
        return {**told, **_look(Extent.whole(space.fileno()), inner, limit, request)}


def _look(extent: Extent, name: str, limit: int, request: dict[str, Any]) -> dict[str, Any]:
    format_name = recognize(extent)
    kind = KINDS[format_name]
    checked = Extent(extent.fd, extent.start, extent.size, Budget(8 * extent.allocated() + (1 << 30)))
    found = collect(kind.lint(checked))
    told: dict[str, Any] = {"format": format_name}
    try:
        disk = kind.read(checked)
        told["virtual_size"], told["facts"] = disk.size, disk.facts()
        if format_name != "raw":
            found += collect(raw.lint_partitions(disk))
        found += collect(_lint_name(name, format_name))
        if request.get("content"):
            found += collect(_hash(kind.read(extent), limit, told))
    except Damaged as damage:
        if damage.finding not in found:
            found.append(damage.finding)
    return {**told, "findings": [finding.as_json() for finding in found]}


def _hash(disk: pieces.Disk, limit: int, told: dict[str, Any]) -> Iterator[Finding]:
    if disk.size > limit:
        yield Finding("info", "content", f"the disk is larger than {limit >> 30} GiB: it was not hashed")
    else:
        told["guest_sha256"] = pieces.sha256(disk)


def _lint_name(name: str, format_name: str) -> Iterator[Finding]:
    """CloudStack goes by the name: it refuses a template whose suffix is not the format's."""
    suffixes = {
        "vhdx": (".vhdx",),
        "vhd": (".vhd",),
        "qcow2": (".qcow2",),
        "ova": (".ova",),
        "vmdk": (".vmdk",),
    }
    wanted = suffixes.get(format_name, ())
    if wanted and not name.lower().endswith(wanted):
        yield Finding(
            "warning",
            f"name {name[:80]!r}",
            f"a {format_name} file that is not called *{wanted[0]}",
            "CloudStack",
            f"rename it to end in {wanted[0]}",
        )
