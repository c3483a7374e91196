"""What `inv repair` shows: each change in one line."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from build import wire
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.printable import printable


def default_output(file: str) -> str:
    """Where a repaired file goes when nobody says: beside it, `NAME-vsphere.ova`; BuildError for no file."""
    path = PurePosixPath(file)
    if not path.name:
        raise BuildError(f"{file or 'nothing'} is no file", "name an OVA")
    return str(path.with_name(f"{path.stem}-vsphere.ova"))


def lines(file: str, done: wire.Repaired) -> list[str]:
    """What was changed, or that nothing had to be."""
    if not done.file:
        return [f"{printable(file)}: nothing to change, nothing written"]
    return [
        *(f"changed: {printable(change)}" for change in done.changes),
        f"wrote {printable(done.file)}: {done.size} bytes, SHA-256 {done.sha256}",
    ]


def repair(build: Build, file: str, output: str, json: bool) -> None:
    """Make an OVA into one that vSphere imports; raises BuildError for one that would lose data."""
    target = output or default_output(file)
    if not build.host.remote:
        file, target = str(Path(file).resolve()), str(Path(target).absolute())
    hardware = build.settings.convert.ovf.hardware_version
    done = build.host.ask(wire.Repair(file, target, hardware), build.follow)
    build.console.done()
    if json:
        build.console.json(**wire.dump(done))
        return
    for line in lines(file, done):
        build.console.line(line)
