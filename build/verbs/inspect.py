"""What `inv inspect` shows: lines from what the agent's `inspect` found, and the exit status they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from build import wire
from build.engine import findings
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.formats.lib.places import PLACES, Place, Seen, is_affected, refusals
from build.formats.lib.platforms import Affected
from build.printable import printable
from build.verbs.convert import disk_number

ORDER = ("error", "warning", "info")


def lines(seen: wire.Inspected) -> list[str]:
    """Describe a file and its findings, errors first; escape sequences in a hostile file stay harmless."""
    wrapped = f" inside {seen.outer}" if seen.outer else ""
    head = [f"{printable(seen.file)}: {seen.format or 'unreadable'}{wrapped}"]
    rows: list[tuple[str, object]] = [("file size", f"{seen.size} bytes ({seen.allocated} on disk)")]
    if seen.virtual_size is not None:
        rows.append(("virtual size", f"{seen.virtual_size} bytes ({seen.virtual_size / (1 << 20):g} MiB)"))
    rows += seen.facts.items()
    if seen.guest_sha256:
        rows.append(("guest sha256", seen.guest_sha256))
    width = max(len(name) for name, _ in rows)
    head += [f"  {printable(name):<{width}}  {printable(value)}" for name, value in rows]
    found = sorted(seen.findings, key=lambda finding: ORDER.index(finding.severity))
    return [*head, *(line for finding in found for line in _finding(finding)), summary(seen.findings)]


def _finding(finding: wire.Finding) -> list[str]:
    who = f"  [{printable(finding.refused_by)}]" if finding.refused_by else ""
    line = f"{finding.severity} {finding.code}: {printable(finding.where)}: {printable(finding.text)}{who}"
    return [line, f"  hint: {printable(finding.fix)}"] if finding.fix else [line]


def summary(findings: Sequence[wire.Finding]) -> str:
    """Count the findings in one line."""
    counts = [(sum(finding.severity == kind for finding in findings), kind) for kind in ORDER]
    told = ", ".join(
        f"{count} {kind}{'s' if count > 1 and kind != 'info' else ''}" for count, kind in counts if count
    )
    return f"findings: {told}" if told else "no findings"


def status(seen: wire.Inspected) -> int:
    """Exit status: 1 when a hypervisor would refuse the file."""
    return int(any(finding.severity == "error" for finding in seen.findings))


def judged(seen: wire.Inspected, places: Sequence[Place]) -> wire.Inspected:
    """The same for some places: what one of them refuses is an error, everything else is not."""
    known = Seen(seen.outer, seen.format or "", seen.virtual_size or 0, seen.facts)
    found = [_judged(finding, places) for finding in seen.findings]
    if seen.format:
        found += [wire.Finding(**each.as_json()) for place in places for each in refusals(place, known)]
    return replace(seen, findings=tuple(found))


def _judged(finding: wire.Finding, places: Sequence[Place]) -> wire.Finding:
    if finding.severity == "info":
        return finding
    counts = any(_minds(place, finding) for place in places)
    return replace(finding, severity="error" if counts else "info")


def _minds(place: Place, finding: wire.Finding) -> bool:
    return finding.lossy or is_affected(place, (Affected(**each) for each in finding.affects))


def _refuses(place: Place, seen: wire.Inspected) -> bool:
    return any(finding.severity == "error" and _minds(place, finding) for finding in seen.findings)


def chosen(text: str) -> list[Place]:
    """Places by their names, set apart by commas; raises BuildError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PLACES:
            close = get_close_matches(name, PLACES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise BuildError(f"unknown place {name!r}", f"{hint}known places: {', '.join(PLACES)}")
    return [PLACES[name] for name in dict.fromkeys(names)]


def explain(code: str) -> str:
    """Return what a code of a finding means; raises BuildError for an unknown one."""
    return findings.explain(code)


def inspect(build: Build, file: str, places: str, disk: str, content: bool, json: bool) -> None:
    """Say what an image file is and what is wrong with it; fails when a hypervisor would refuse it.

    With `places` only what one of them would refuse counts.
    """
    wanted = chosen(places)
    path = file if build.host.remote else str(Path(file).resolve())
    seen = build.host.ask(wire.Inspect(path, disk=disk_number(disk), content=content), build.follow)
    seen = judged(seen, wanted) if wanted else seen
    build.console.done()
    if json:
        build.console.json(**wire.dump(seen))
    for line in () if json else lines(seen):
        build.console.line(line)
    if status(seen):
        whom = ", ".join(place.title for place in wanted if _refuses(place, seen))
        raise BuildError(
            f"{file} would be refused{whom and f' by {whom}'}",
            "correct what the findings name, or convert again",
        )
