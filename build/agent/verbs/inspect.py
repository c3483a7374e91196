"""Verb: say what an image file is, ours or anybody's, and lint it; nothing in it is trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from build import wire
from build.agent import image
from build.agent.events import Emit
from build.agent.guest import media
from build.agent.image import Image, bounded
from build.formats import raw
from build.formats.lib import names, partitions, pieces, unwrap
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import NOT_HASHED, NOT_LOOKED_INTO, Damaged, Finding, collect
from build.formats.lib.inner import Inner
from build.formats.lib.reader import BoundedReader

Which = tuple[int, str]
"""A disk of an archive, by its number from 1 on and its name."""


def run(request: wire.Inspect, emit: Emit) -> wire.Inspected:
    """Describe and check one file; raises Failure when it cannot be opened, or has no such disk."""
    path = Path(request.file)
    with image.opened_file(path) as fd, image.opener(emit, request.limit, request.work) as how:
        reader = BoundedReader.whole(fd)
        seen = wire.Inspected(str(path), reader.size, reader.allocated(), "")
        try:
            seen = replace(seen, outer=unwrap.recognize(reader))
            file = image.unwrapped(reader, path.name, how)
        except Damaged as damage:
            return replace(seen, findings=_told([damage.finding]))
        seen = replace(seen, outer=file.outer, format=file.kind.name)
        report = _look(file, request, emit)
    return replace(
        seen,
        virtual_size=report.virtual_size,
        facts=report.facts,
        guest_sha256=report.sha256,
        findings=_told(report.findings),
    )


def _told(found: Sequence[Finding]) -> tuple[wire.Finding, ...]:
    return tuple(wire.Finding(**finding.as_json()) for finding in found)


@dataclass
class Report:
    """What is known of a file so far."""

    findings: list[Finding]
    virtual_size: int | None = None
    facts: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None

    def is_lossy(self, disk: Which | None = None) -> bool:
        """Whether data of a disk is missing or wrong, which explains whatever is found of it after that."""
        about = (None, disk[0]) if disk else (None,)
        return any(finding.lossy and finding.disk in about for finding in self.findings)

    def add(self, found: Sequence[Finding], disk: Which | None = None) -> None:
        """Findings that are not known yet; `disk`: of one of an archive."""
        for finding in found:
            placed = finding.on(*disk) if disk else finding
            if finding not in self.findings and placed not in self.findings:
                self.findings.append(placed)


def _look(file: Image, request: wire.Inspect, emit: Emit) -> Report:
    report = Report(collect(file.kind.lint(bounded(file.reader))))
    try:
        disks = file.kind.inner(file.reader)
    except Damaged as damage:
        report.add([damage.finding])
        return report
    if disks or request.disk != 1:
        _look_inside(file, disks, request, emit, report)
    else:
        _look_at(file, request, report)
    if not any(finding.lossy for finding in report.findings):
        report.add(collect(names.lint(file.name, file.kind)))
    return report


def _look_at(found: Image, request: wire.Inspect, report: Report, disk: Which | None = None) -> None:
    """A disk itself: its size, its partitions, its content."""
    try:
        read = found.kind.read(bounded(found.reader))
        report.virtual_size = read.size
        report.facts |= read.facts()
        if found.kind is not raw.KIND:
            told = collect(partitions.lint(read))
            report.add([finding for finding in told if not (finding.lossy and report.is_lossy(disk))], disk)
        limit = request.limit or media.LIMIT
        if request.content and read.size <= limit:
            report.sha256 = pieces.sha256(found.kind.read(found.reader))
        elif request.content:
            report.add([Finding(NOT_HASHED, "content", gib=limit >> 30)], disk)
    except Damaged as damage:
        if not report.is_lossy(disk):
            report.add([damage.finding], disk)


def _look_inside(
    file: Image, disks: Sequence[Inner], request: wire.Inspect, emit: Emit, report: Report
) -> None:
    """Every disk of an archive by its own kind, and the chosen one's size and content."""
    image.need_disk(file, disks, request.disk)
    if not disks[0].disk:
        with contextlib.suppress(Damaged):  # its linter says why
            report.facts = file.kind.read(bounded(file.reader)).facts()
    left = request.limit or media.LIMIT
    for number, disk in enumerate(disks, 1):
        chosen, which = number == request.disk, (number, disk.name)
        with image.opener(emit, left, request.work) as how:
            try:
                found = image.chosen(file, disks, number, how)
            except Damaged as damage:
                report.add([damage.finding], which)
                continue
            except Unsupported as error:
                told = Finding(NOT_LOOKED_INTO, "disk", reason=error.message, hint=error.hint)
                report.add([told], which)
                continue
            if not disk.whole and not disk.disk:
                left = max(left - found.reader.size, 1)
            if file.kind.name != "ova" or not disk.whole:  # those its own linter knows
                report.add(collect(found.kind.lint(bounded(found.reader))), which)
            ours = report if chosen else Report([])
            asked = request if chosen else replace(request, content=False)
            _look_at(found, asked, ours, which)
            if "disks" not in report.facts:  # its own kind does not list them
                report.facts[f"disk {number}"] = _described(disk, found, ours)
            if not chosen:
                report.add(ours.findings)
    if request.content and len(disks) > 1:
        report.facts["hashed"] = f"disk {request.disk}"


def _described(disk: Inner, found: Image, report: Report) -> str:
    size = "of unknown size" if report.virtual_size is None else f"{report.virtual_size} bytes"
    return f"{disk.name[:60]} ({found.kind.name}, {size})"
