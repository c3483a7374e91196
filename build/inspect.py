"""What `inv inspect` shows: lines from what the agent's `inspect` found, and the exit status they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ORDER = ("error", "warning", "info")


def lines(told: Mapping[str, Any]) -> list[str]:
    """Describe a file and its findings, errors first; escape sequences in a hostile file stay harmless."""
    wrapped = f" inside {told['outer']}" if told["outer"] else ""
    head = [f"{plain(told['file'])}: {told['format'] or 'unreadable'}{wrapped}"]
    rows: list[tuple[str, object]] = [("file size", f"{told['size']} bytes ({told['allocated']} on disk)")]
    if told["virtual_size"] is not None:
        rows.append(
            ("virtual size", f"{told['virtual_size']} bytes ({told['virtual_size'] / (1 << 20):g} MiB)")
        )
    rows += told["facts"].items()
    if told["guest_sha256"]:
        rows.append(("guest sha256", told["guest_sha256"]))
    width = max(len(name) for name, _ in rows)
    head += [f"  {plain(name):<{width}}  {plain(value)}" for name, value in rows]
    found = sorted(told["findings"], key=lambda finding: ORDER.index(finding["severity"]))
    return [*head, *(line for finding in found for line in _finding(finding)), summary(told["findings"])]


def _finding(finding: Mapping[str, str]) -> list[str]:
    who = f"  [{plain(finding['refused_by'])}]" if finding["refused_by"] else ""
    shown = [f"{finding['severity']}: {plain(finding['where'])}: {plain(finding['text'])}{who}"]
    return [*shown, f"  hint: {plain(finding['fix'])}"] if finding["fix"] else shown


def summary(findings: Sequence[Mapping[str, str]]) -> str:
    """Count the findings in one line."""
    counts = [(sum(finding["severity"] == kind for finding in findings), kind) for kind in ORDER]
    told = ", ".join(
        f"{count} {kind}{'s' if count > 1 and kind != 'info' else ''}" for count, kind in counts if count
    )
    return f"findings: {told}" if told else "no findings"


def status(told: Mapping[str, Any]) -> int:
    """Exit status: 1 when a hypervisor would refuse the file."""
    return int(any(finding["severity"] == "error" for finding in told["findings"]))


def plain(value: object) -> str:
    """Text without control characters."""
    return "".join(char if char.isprintable() else "?" for char in str(value))
