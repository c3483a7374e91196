"""What the outside world held when it was last asked: the exact package set of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from build import debian


@dataclass(frozen=True)
class Package:
    """One binary package of the set, as the archive names it."""

    name: str
    version: str
    arch: str
    sha256: str
    size: int
    """Bytes of the .deb."""
    url: str
    """Where it was found; not part of any key, mirrors may change."""
    essential: bool = False
    """Part of the base that is unpacked before apt runs in the tree."""
    path: str = ""
    """Where it lies below its archive."""
    suite: str = ""
    source: str = ""
    """Name of the source package."""

    @property
    def filename(self) -> str:
        """Name of the .deb in the cache."""
        return debian.deb(self.name, self.version, self.arch)


@dataclass(frozen=True)
class Release:
    """A Release file that a set was solved from."""

    date: int
    """Seconds since 1970."""
    sha256: str
    """Of the InRelease."""
    signers: tuple[str, ...]
    """Fingerprints of the keys."""


@dataclass(frozen=True)
class Resolution:
    """The solved package set and the time it was first solved."""

    packages: tuple[Package, ...]
    epoch: int
    """SOURCE_DATE_EPOCH: newest Date of the InRelease files when this set was first solved, seconds."""
    checked: int
    """When the mirror was last asked, seconds since 1970."""
    default_mirror: str = ""
    """The bootstrap tool's own mirror: what the image's sources list names when settings do not."""
    releases: Mapping[str, Release] = field(default_factory=dict)
    """By suite."""
    origin: str = ""
    """The lock that it comes from, and what is newer; empty for what a mirror was asked for."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Resolution:
        """Read what the agent's `resolve` returned or stored."""
        packages = tuple(Package(**package) for package in data["packages"])
        releases = {
            suite: Release(seen["date"], seen["sha256"], tuple(seen["signers"]))
            for suite, seen in data["releases"].items()
        }
        return cls(packages, int(data["epoch"]), int(data["checked"]), data["default_mirror"], releases)

    def lock(self) -> str:
        """The set as text, one package a line: name, version, arch, SHA-256. This is what enters the key."""
        return "".join(
            f"{p.name} {p.version} {p.arch} {p.sha256}\n"
            for p in sorted(self.packages, key=lambda p: (p.name, p.arch))
        )
