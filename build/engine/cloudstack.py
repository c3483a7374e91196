"""What each release of CloudStack expects of a system VM template: names, checksums, guest systems. Pure.

Every fact was read in the sources of 4.20.0.0, 4.20.1.0, 4.21.0.0 and 4.22.0.0; the file is named beside it.
`docs/cloudstack.md` tells them to people, and a test holds it to this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from build import formats
from build.formats.lib.format import Template

Version = tuple[int, int, int]

TEMPLATES = "/usr/share/cloudstack-management/templates/systemvm"
"""A management server's folder of templates and metadata.ini (SystemVmTemplateRegistration.java)."""


@dataclass(frozen=True)
class Line:
    """Releases from `first` on, up to the next line's."""

    first: Version
    checksum: str
    """What the management server makes of a template before it takes it (DigestHelper.calculateChecksum)."""
    arches: tuple[str, ...]
    """Arches whose KVM template metadata.ini can name; with more than one the section carries the arch."""
    every_section: bool = False
    """Whether a metadata.ini that lacks a section is not read at all (parseMetadataFile fails on it)."""


LINES = (
    Line((4, 20, 0), "md5", ("x86_64",), every_section=True),
    Line((4, 20, 1), "md5", ("x86_64", "aarch64")),
    Line((4, 22, 0), "sha512", ("x86_64", "aarch64")),
)

SHARED: Mapping[Version, Version] = {(4, 20, 3): (4, 20, 2), (4, 21, 0): (4, 20, 2)}
"""Releases that came with an earlier one's template: project.systemvm.template.version in pom.xml."""


SECTIONS = ("kvm", "vmware", "xenserver", "hyperv", "lxc", "ovm3")
"""Sections of metadata.ini beside [default], in order (templateConfig.sh)."""


def _templates() -> Iterator[tuple[str, Template]]:
    """Formats with a template, in the order of the sections that name them first."""
    rows = [(name, row.cloudstack) for name, row in formats.FORMATS.items() if row.cloudstack]
    yield from sorted(rows, key=lambda row: min(SECTIONS.index(section) for section in row[1].sections))


FORMATS: Mapping[str, Template] = dict(_templates())
"""Formats that CloudStack has system VM templates of."""


def parse(release: str) -> Version:
    """First three numbers of a release, N.N.N or N.N.N.N; raises ValueError for what is none or too old."""
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4}){2,3}", release):
        raise ValueError("write a release of CloudStack with three or four numbers: 4.22.0 or 4.22.0.0")
    major, minor, patch = (int(part) for part in release.split(".")[:3])
    if (major, minor, patch) < LINES[0].first:
        raise ValueError(
            "its scripts need Python 2, which Debian 12 does not have; use 4.20.0 or later, "
            "or the template that this release came with"
        )
    return major, minor, patch


def line_of(release: str) -> Line:
    """The line that a release belongs to; raises ValueError as `parse` does."""
    version = parse(release)
    return next(line for line in reversed(LINES) if line.first <= version)


def template_version(release: str) -> str:
    """Version that the release's template goes by, three numbers; raises ValueError as `parse` does."""
    version = parse(release)
    return ".".join(map(str, SHARED.get(version, version)))


def template_name(hypervisor: str, release: str, arch: str) -> str:
    """Name by which a management server looks a template up (templateConfig.sh)."""
    return f"systemvm-{hypervisor.lower()}-{template_version(release)}-{arch}"


def section_format(section: str) -> str:
    """Our format of the template that a section of metadata.ini names."""
    return next(name for name, template in FORMATS.items() if section in template.sections)


def metadata(release: str, arch: str, files: Mapping[str, str], base: str) -> dict[str, object]:
    """What the build host makes metadata.ini of, once it knows the checksums.

    `files` has the file name of every format, `base` the URL of the folder that they are served from.
    """
    line, rows = line_of(release), []
    for hypervisor in SECTIONS:
        name = section_format(hypervisor)
        file = files[name]
        keys = {
            "templatename": template_name(hypervisor, release, arch),
            "checksum": "",  # comes with the file; here it has its place among the keys
            "downloadurl": f"{base}/{file}",
            "filename": file,
            "arch": arch,
            "guestos": FORMATS[name].guest_os,
        }
        section = f"{hypervisor}-{arch}" if hypervisor == "kvm" and len(line.arches) > 1 else hypervisor
        rows.append({"section": section, "format": name, "file": file, "keys": keys})
    return {
        "version": f"{template_version(release)}.0",
        "checksum": line.checksum,
        "every_section": line.every_section,
        "sections": rows,
    }
