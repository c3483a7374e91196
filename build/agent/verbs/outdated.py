"""Verb: which packages of a lock, or of the system in an image file of any format, have security updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from build import debian, wire
from build.agent import deb, image
from build.agent.debian import archives, indices, web
from build.agent.events import Emit, Failure
from build.agent.verbs import changes
from build.formats.lib import ext, partitions
from build.formats.lib.findings import Damaged

STATUS, RELEASE = "/var/lib/dpkg/status", "/usr/lib/os-release"
INSTALLED = "install ok installed"


@dataclass(frozen=True)
class Installed:
    """A package of the set."""

    name: str
    arch: str
    version: str


@dataclass(frozen=True)
class System:
    """A set of packages, and the suite and architecture that it is of."""

    suite: str
    arch: str
    packages: tuple[Installed, ...]


def run(request: wire.Outdated, emit: Emit) -> wire.Behind:
    """Compare; raises Failure when the suite's updates cannot be had, or the file holds no Debian."""
    named = tuple(Installed(p["name"], p["arch"], p["version"]) for p in request.packages)
    system = System(request.mirrors.suite, request.arch, named)
    if request.file:
        system = look(Path(request.file), request.disk, emit)
    mirrors = replace(request.mirrors, suite=system.suite, security=True)
    try:
        found = [each for each in archives.find(mirrors, emit) if each.suite == f"{system.suite}-security"]
        archs = list(dict.fromkeys([system.arch, *(p.arch for p in system.packages if p.arch != "all")]))
        lists = indices.fetch_all(
            indices.paths(found, request.components, archs), Path(mirrors.store) / "indices"
        )
    finally:
        web.hang_up()
    newest = candidates((text for index in lists for text in debian.paragraphs(index.text)), system.packages)
    pending = [(package, newest[key]) for package in system.packages if (key := _key(package)) in newest]
    return wire.Behind(
        found[0].suite, found[0].release.date, len(system.packages), tuple(_told(request, pending, emit))
    )


def _key(package: Installed) -> tuple[str, str]:
    return package.name, package.arch


def candidates(
    texts: Iterable[str], packages: Sequence[Installed]
) -> dict[tuple[str, str], Mapping[str, str]]:
    """The newest version of each package that is newer than what is installed."""
    installed = {_key(package): package.version for package in packages}
    names = {name for name, _ in installed}
    found: dict[tuple[str, str], Mapping[str, str]] = {}
    for text in texts:
        if debian.name_of(text) not in names:
            continue
        fields = debian.fields(text)
        key = (fields["Package"], fields["Architecture"])
        known = found[key]["Version"] if key in found else installed.get(key)
        if known and deb.newer(fields["Version"], known):
            found[key] = fields
    return found


def _told(
    request: wire.Outdated, pending: Sequence[tuple[Installed, Mapping[str, str]]], emit: Emit
) -> Iterable[wire.Pending]:
    """The updates, with what the changelogs say of those packages that are there."""
    described = [(package, _described(fields)) for package, fields in pending]
    updates = tuple(wire.Update(package.version, fields) for package, fields in described)
    known = changes.run(wire.Changes(updates, request.debs, offline=True), emit) if updates else ()
    news = {each.source: each for each in known}
    for package, fields in described:
        told = news[fields["source"]]
        yield wire.Pending(
            package.name,
            package.arch,
            fields["source"],
            package.version,
            fields["version"],
            told.urgency,
            told.cves,
        )


def _described(fields: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": fields["Package"],
        "version": fields["Version"],
        "arch": fields["Architecture"],
        "sha256": fields["SHA256"],
        "size": int(fields["Size"]),
        "source": fields.get("Source", fields["Package"]).partition(" ")[0],
    }


def look(path: Path, disk: int, emit: Emit) -> System:
    """The Debian system on a disk in an image file; raises Failure where there is none that can be read."""
    with image.opened_file(path) as fd:
        try:
            with image.opened(fd, path.name, emit, disk=disk) as found:
                seen = found.kind.read(image.bounded(found.reader))
                for start in partitions.starts(seen):
                    if system := _system(seen, start):
                        return system
        except Damaged as damage:
            what, code = f"{path} cannot be read: {damage}", damage.finding.code.id
            raise Failure(what, f"run: inv inspect {path}", code=code) from damage
    raise Failure(
        f"{path} holds no Debian system on an ext file system that can be read", "name an image of Debian"
    )


def _system(disk: Any, start: int) -> System | None:
    try:
        files = ext.FileSystem(disk, start)
    except Damaged:
        return None
    status, release = files.read(STATUS), files.read(RELEASE)
    if status is None or release is None:
        return None
    told = dict(line.split("=", 1) for line in release.decode("utf-8", "replace").splitlines() if "=" in line)
    packages = tuple(installed(status.decode("utf-8", "replace")))
    arch = next((package.arch for package in packages if package.name == "dpkg"), "")
    suite = told.get("VERSION_CODENAME", "").strip("\"'")
    return System(suite, arch, packages) if suite.isalnum() and arch.isalnum() else None


def installed(status: str) -> Iterable[Installed]:
    """The packages that dpkg's status file says are installed (deb-control(5), dpkg(1))."""
    for text in debian.paragraphs(status):
        fields = debian.fields(text)
        if fields.get("Status") == INSTALLED and {"Package", "Architecture", "Version"} <= fields.keys():
            yield Installed(fields["Package"], fields["Architecture"], fields["Version"])
