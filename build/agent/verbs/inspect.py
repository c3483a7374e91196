"""Verb: say what an image file is, ours or anybody's, and lint it; nothing in it is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from build import wire
from build.agent import image
from build.agent.events import Emit
from build.agent.guest import media
from build.formats import raw, recognize
from build.formats.lib import pieces, unwrap
from build.formats.lib.findings import Damaged, Finding, collect
from build.formats.lib.format import Kind
from build.formats.lib.reader import BoundedReader, Budget


def run(request: wire.Inspect, emit: Emit) -> wire.Inspected:
    """Describe and check one file; raises Failure when it cannot be opened."""
    path = Path(request.file)
    with image.opened_file(path) as fd:
        reader = BoundedReader.whole(fd)
        seen = wire.Inspected(str(path), reader.size, reader.allocated(), "")
        limit = request.limit or media.LIMIT
        try:
            seen = replace(seen, outer=unwrap.recognize(reader))
            with image.opened(fd, path.name, emit, limit, request.work) as found:
                return _look(seen, found.reader, found.name, limit, request.content)
        except Damaged as damage:
            return replace(seen, findings=(damage.finding.as_json(),))


def _look(
    seen: wire.Inspected, reader: BoundedReader, name: str, limit: int, content: bool
) -> wire.Inspected:
    kind = recognize(reader)
    checked = BoundedReader(reader.fd, reader.start, reader.size, Budget(8 * reader.allocated() + (1 << 30)))
    found = collect(kind.lint(checked))
    seen = replace(seen, format=kind.name)
    try:
        disk = kind.read(checked)
        seen = replace(seen, virtual_size=disk.size, facts=disk.facts())
        if kind is not raw.KIND:
            found += collect(raw.lint_partitions(disk))
        found += collect(_lint_name(name, kind))
        if content and disk.size <= limit:
            seen = replace(seen, guest_sha256=pieces.sha256(kind.read(reader)))
        elif content:
            text = f"the disk is larger than {limit >> 30} GiB: it was not hashed"
            found.append(Finding("info", "content", text))
    except Damaged as damage:
        if damage.finding not in found:
            found.append(damage.finding)
    return replace(seen, findings=tuple(finding.as_json() for finding in found))


def _lint_name(name: str, kind: Kind) -> Iterator[Finding]:
    """CloudStack goes by the name: it refuses a template whose suffix is not the format's."""
    if kind.suffix and not name.lower().endswith(f".{kind.suffix}"):
        yield Finding(
            "warning",
            f"name {name[:80]!r}",
            f"a {kind.name} file that is not called *.{kind.suffix}",
            "CloudStack",
            f"rename it to end in .{kind.suffix}",
        )
