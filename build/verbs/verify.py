"""What `inv verify` expects of an image, and how its answers look to people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any, Protocol

from build import wire
from build.engine.errors import BuildError
from build.engine.options import Options
from build.engine.pipeline import Build
from build.engine.settings import Settings
from build.formats import FORMATS
from build.formats.lib.format import Machine
from build.verbs import artifacts, convert
from build.verbs.enter import mebibytes

Result = Mapping[str, Any]
Guest = Mapping[str, Any]
Check = Mapping[str, Any]

WIDTH = 50
"""Characters of a row for all guests' values; what is not as expected is told in full below the table."""


def machine(name: str, options: Options) -> Machine:
    """The machine on which a format is tried."""
    row = FORMATS[name]
    return row.efi if row.efi and options.ovf.firmware == "efi" else row.machine


def guests(settings: Settings, files: Mapping[str, str]) -> tuple[wire.Guest, ...]:
    """What the agent's `verify` boots: for each converted file, by format, its hypervisor's machine."""
    asked = []
    for name, path in files.items():
        model = machine(name, settings.convert)
        for firmware in [
            one for one in settings.boots_under if one in model.firmware
        ] or settings.boots_under[:1]:
            kind = FORMATS[name].kind.name
            asked.append(wire.Guest(path, firmware, name, kind, model.disk, model.nic))
    return tuple(asked)


class Output(Protocol):
    """What the rows are shown on: the console."""

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows in columns."""

    def line(self, text: str) -> None:
        """Print a line."""


def expectations(settings: Settings, overlays: Sequence[Path] = ()) -> dict[str, Any]:
    """Return what the agent's `verify` is to find; the port of sshd only if an overlay sets it."""
    release = settings.cloudstack_release
    return {
        "release": f"Cloudstack Release {release}" if release else None,
        "ssh_port": ssh_port(overlays),
        "kernel_cmdline": settings.kernel_cmdline,
        "min_disk": settings.size,
    }


def ssh_port(overlays: Sequence[Path]) -> int | None:
    """Read the port from the last overlay that sets one in its sshd_config or below sshd_config.d."""
    for overlay in reversed(overlays):
        files = [*sorted(overlay.glob("etc/ssh/sshd_config.d/*.conf")), overlay / "etc/ssh/sshd_config"]
        for file in files:
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            if found := re.search(r"^\s*Port[\s=]+(\d+)\s*$", text, re.MULTILINE | re.IGNORECASE):
                return int(found[1])
    return None


def passed(result: Result) -> bool:
    """Say whether every check of every guest is as expected."""
    return all(guest["ok"] for guest in result["guests"])


def head(result: Result) -> list[str]:
    """Name the columns: state, check, and one for each guest."""
    return ["STATE", "CHECK", *(_label(guest, result).upper() for guest in result["guests"])]


def table(result: Result) -> list[list[str]]:
    """Lay out the checks, a row each; a check that a guest was not asked is a dash."""
    guests = result["guests"]
    names = list(dict.fromkeys(check["name"] for guest in guests for check in guest["checks"]))
    rows = []
    for name in names:
        found = [_find(guest, name) for guest in guests]
        state = "ok" if all(check["ok"] for check in found if check) else "FAIL"
        rows.append([state, name, *(_cell(check, max(16, WIDTH // len(found))) for check in found)])
    return rows


def faults(result: Result) -> list[str]:
    """Tell each check that is not as expected in full: guest, name, value, expectation."""
    lines = []
    for guest in result["guests"]:
        for check in guest["checks"]:
            if not check["ok"]:
                first, *rest = check["value"].splitlines() or [""]
                lines.append(
                    f"{_label(guest, result)}: {check['name']}: {first} (expected: {check['expected']})"
                )
                lines += [f"    {line}" for line in rest]
    return lines


def summary(result: Result) -> list[str]:
    """Say how long each guest took, by what it ran, and where its serial log lies."""
    return [
        f"{_label(guest, result)}: {guest['seconds']:.1f} s under {guest['accel'].upper()}, "
        f"serial log {guest['serial_log']}"
        for guest in result["guests"]
    ]


def show(console: Output, result: Result) -> None:
    """Print table, faults and logs."""
    console.table(head(result), table(result))
    for line in (*faults(result), *summary(result)):
        console.line(line)


def _label(guest: Guest, result: Result) -> str:
    """Name a guest by its firmware, and by what else tells it from the others."""
    others = result["guests"]
    parts = [guest[key] for key in ("name", "disk") if len({other[key] for other in others}) > 1]
    return " ".join([*parts, guest["firmware"]])


def _find(guest: Guest, name: str) -> Check | None:
    return next((check for check in guest["checks"] if check["name"] == name), None)


def _cell(check: Check | None, width: int) -> str:
    if check is None:
        return "-"
    text = (check["value"].splitlines() or [""])[0]
    return text if len(text) <= width else f"{text[: width - 3]}..."


def verify(build: Build, memory: str, target: str, json: bool) -> None:
    """Boot the raw image, or with --formats what it was converted to, and check it from inside.

    Prints the table, or the report as JSON, and writes the report; fails if any check does.
    """
    wanted = build.settings
    size = mebibytes(memory)
    grow_to: int | None = None
    if build.flags.formats:
        formats = convert.chosen(build.flags.formats, wanted)
        made = convert.order(build, formats, artifacts.need_image(build).get("epoch", 0))
        if made is None:
            raise BuildError("verify is not left to a host", "leave --detach out")
        files = {file["format"]: f"{made.folder}/{file['file']}" for file in made.files}
        booted = guests(wanted, files)
    else:
        artifacts.need_image(build)
        booted = tuple(wire.Guest(build.prospect.image, firmware) for firmware in wanted.boots_under)
        grow_to = wanted.size + 512
    request = wire.Verify(
        guests=booted,
        memory=size,
        arch=wanted.arch,
        expect=expectations(wanted, build.loaded.overlays),
        work=f"{build.prospect.place.location}/logs",
        grow_to=grow_to,
    )
    result = build.host.ask(request, build.follow)
    build.console.done()
    if json:
        build.console.json(passed=passed(result), **result)
    else:
        show(build.console, result)
    report = Path(target) if target else artifacts.home(build) / f"{wanted.imagename}.verify.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    build.console.line(f"report {report}")
    if not passed(result):
        raise BuildError(
            "the image does not pass", "read the rows that say FAIL and the serial logs named above"
        )
