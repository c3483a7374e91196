"""What `inv inspect` shows: lines from what the agent's `inspect` found, and the exit status they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from build import wire
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.printable import printable

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
    found = sorted(seen.findings, key=lambda finding: ORDER.index(finding["severity"]))
    return [*head, *(line for finding in found for line in _finding(finding)), summary(seen.findings)]


def _finding(finding: Mapping[str, str]) -> list[str]:
    who = f"  [{printable(finding['refused_by'])}]" if finding["refused_by"] else ""
    shown = [f"{finding['severity']}: {printable(finding['where'])}: {printable(finding['text'])}{who}"]
    return [*shown, f"  hint: {printable(finding['fix'])}"] if finding["fix"] else shown


def summary(findings: Sequence[Mapping[str, str]]) -> str:
    """Count the findings in one line."""
    counts = [(sum(finding["severity"] == kind for finding in findings), kind) for kind in ORDER]
    told = ", ".join(
        f"{count} {kind}{'s' if count > 1 and kind != 'info' else ''}" for count, kind in counts if count
    )
    return f"findings: {told}" if told else "no findings"


def status(seen: wire.Inspected) -> int:
    """Exit status: 1 when a hypervisor would refuse the file."""
    return int(any(finding["severity"] == "error" for finding in seen.findings))


def inspect(build: Build, file: str, json: bool) -> None:
    """Say what an image file is and what is wrong with it; fails when a hypervisor would refuse it."""
    path = file if build.host.remote else str(Path(file).resolve())
    seen = build.host.ask(wire.Inspect(path), build.follow)
    build.console.done()
    if json:
        build.console.json(**wire.dump(seen))
    for line in () if json else lines(seen):
        build.console.line(line)
    if status(seen):
        raise BuildError(f"{file} would be refused", "correct what the findings name, or convert again")
