"""The lock of an image: a text file beside its definition that names every package exactly.

One thing a line, the first word says what. Lines of one kind are sorted, so that a change of the set is a
change of those lines alone. No mirror is named: packages come from where settings say when it is used.
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from build.agent import files
from build.engine.errors import BuildError
from build.engine.resolution import Package, Release, Resolution
from build.engine.settings import Settings
from build.wire import Seen

VERSION = "1"
HEAD = "# The exact package set of an image; made by `inv lock`, used by every build. docs/lock.md\n"
STAMP = "%Y-%m-%dT%H:%M:%SZ"
SINGLE = ("lock", "image", "suite", "arch", "components", "security", "epoch")
"""Lines that are there once."""
NAME = r"[a-z0-9][a-z0-9+.-]*"
SHAPES = {
    "name": NAME,
    "version": r"[0-9][A-Za-z0-9.+:~-]*",
    "architecture": r"[a-z0-9][a-z0-9-]*",
    "suite": r"[a-z][a-z0-9-]*",
    "size": r"[1-9][0-9]{0,11}",
    "SHA-256": r"[0-9a-f]{64}",
    "source": NAME,
    "file": r"(?!.*(?:^|/)\.{0,2}/)[A-Za-z0-9][A-Za-z0-9+.~_%/-]*\.deb",
}
"""What each word of a `package` line has to look like; deb-control(5) on names and versions."""


@dataclass(frozen=True)
class Lock:
    """A lock as it was read, or as it will be written."""

    image: str
    suite: str
    arch: str
    components: tuple[str, ...]
    security: bool
    epoch: int
    """SOURCE_DATE_EPOCH of the set, seconds."""
    asked: tuple[str, ...]
    """Names that the image definition asks for."""
    releases: Mapping[str, Release]
    packages: tuple[Package, ...]
    file: str = ""
    lines: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Where in `file` each package stands, by name and architecture."""

    @property
    def date(self) -> int:
        """Newest Date of the Release files, seconds."""
        return max(release.date for release in self.releases.values())

    @property
    def title(self) -> str:
        """The lock for messages: its file and day."""
        return f"{Path(self.file).name} of {time.strftime('%Y-%m-%d', time.gmtime(self.date))}"

    @property
    def consent(self) -> dict[str, str]:
        """SHA-256 of its own Release files, by suite."""
        return {suite: release.sha256 for suite, release in self.releases.items()}

    def records(self) -> tuple[dict[str, Any], ...]:
        """The packages as requests name them."""
        return tuple(dict(package.__dict__) for package in self.packages)


def path_of(definition: Path, arch: str) -> Path:
    """Where the lock of an image definition lies."""
    return definition.with_name(f"{definition.stem}.{arch}.lock")


def of(settings: Settings, resolution: Resolution) -> Lock:
    """The lock of a resolved set; raises BuildError for one that a version before has stored."""
    if not resolution.releases:
        raise BuildError("the stored package set does not say what it was solved from", "run: inv resolve")
    return Lock(
        settings.imagename,
        settings.suite,
        settings.arch,
        tuple(settings.components),
        settings.security,
        resolution.epoch,
        tuple(sorted(set(settings.package_list))),
        resolution.releases,
        resolution.packages,
    )


def text(lock: Lock) -> str:
    """Write a lock down."""
    packages = sorted(lock.packages, key=lambda package: (package.name, package.arch))
    lines = [
        f"lock {VERSION}",
        f"image {lock.image}",
        f"suite {lock.suite}",
        f"arch {lock.arch}",
        f"components {' '.join(lock.components)}",
        f"security {'yes' if lock.security else 'no'}",
        f"epoch {lock.epoch}",
        *(f"asked {name}" for name in sorted(lock.asked)),
        *(
            f"release {suite} {_stamp(seen.date)} {seen.sha256} {','.join(seen.signers)}"
            for suite, seen in sorted(lock.releases.items())
        ),
        *(
            f"package {p.name} {p.version} {p.arch} {p.suite} {p.size} {p.sha256} {p.source} {p.path}"
            + (" base" if p.essential else "")
            for p in packages
        ),
    ]
    return HEAD + "".join(f"{line}\n" for line in lines)


def write(file: Path, lock: Lock) -> None:
    """Replace a lock, whole or not at all."""
    files.write(file, text(lock).encode())


def _stamp(seconds: int) -> str:
    return time.strftime(STAMP, time.gmtime(seconds))


def read(file: Path) -> Lock | None:
    """Read a lock, None where there is none; raises BuildError that names the line which cannot be right."""
    try:
        content = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"{file} cannot be read: {error}", "look at it, or remove it: inv lock") from error
    return parse(content, str(file))


def parse(content: str, file: str) -> Lock:
    """Read the text of a lock; raises BuildError as `read` does."""
    reader = _Reader(file)
    for number, line in enumerate(content.split("\n"), 1):
        if line and not line.startswith("#"):
            reader.take(number, line)
    return reader.lock()


class _Reader:
    """Takes line after line."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._single: dict[str, str] = {}
        self._asked: list[str] = []
        self._releases: dict[str, Release] = {}
        self._packages: list[Package] = []
        self._lines: dict[tuple[str, str], int] = {}
        self._number = 0

    def take(self, number: int, line: str) -> None:
        self._number = number
        kind, _, rest = line.partition(" ")
        if kind not in (*SINGLE, "asked", "release", "package") or not rest:
            self._wrong(f"not a line of a lock: {line[:60]!r}")
        if not self._single and line != f"lock {VERSION}":
            self._wrong(f"the first line is `lock {VERSION}` in what this version can read")
        if kind in SINGLE:
            if kind in self._single:
                self._wrong(f"{kind} is there twice")
            self._single[kind] = rest
        elif kind == "asked":
            self._asked.append(rest)
        elif kind == "release":
            self._release(rest.split(" "))
        else:
            self._package(rest.split(" "))

    def _release(self, words: Sequence[str]) -> None:
        try:
            suite, stamp, sha256, signers = words
            date = calendar.timegm(time.strptime(stamp, STAMP))
        except (ValueError, OverflowError):
            self._wrong("write: release SUITE DATE SHA-256 KEYS")
        if not re.fullmatch(SHAPES["SHA-256"], sha256):
            self._wrong(f"{sha256[:20]!r} is no SHA-256")
        if suite in self._releases:
            self._wrong(f"the release of {suite} is there twice")
        self._releases[suite] = Release(date, sha256, tuple(signers.split(",")))

    def _package(self, words: Sequence[str]) -> None:
        essential = list(words[len(SHAPES) :]) == ["base"]
        if len(words) != len(SHAPES) + essential:
            self._wrong("write: package NAME VERSION ARCH SUITE SIZE SHA-256 SOURCE FILE [base]")
        for (what, shape), word in zip(SHAPES.items(), words, strict=False):
            if not re.fullmatch(shape, word):
                self._wrong(f"{word[:60]!r} is no {what}")
        name, version, arch, suite, size, sha256, source, path = words[: len(SHAPES)]
        if (name, arch) in self._lines:
            self._wrong(f"{name} ({arch}) stands in line {self._lines[name, arch]}, too")
        if path.rpartition("/")[2].replace("%3a", ":") not in _files(name, version, arch):
            self._wrong(f"{path.rpartition('/')[2]} is not the file of {name} {version} {arch}")
        if suite not in self._releases:
            self._wrong(f"no release of {suite} is named above")
        self._lines[name, arch] = self._number
        self._packages.append(
            Package(name, version, arch, sha256, int(size), "", essential, path, suite, source)
        )

    def lock(self) -> Lock:
        for kind in SINGLE:
            if kind not in self._single:
                self._wrong(f"the line `{kind}` is missing")
        if not self._packages:
            self._wrong("it names no package")
        one = self._single
        if not re.fullmatch("[0-9]{1,12}", one["epoch"]) or one["security"] not in ("yes", "no"):
            self._wrong("epoch is a number of seconds, security is yes or no")
        return Lock(
            one["image"],
            one["suite"],
            one["arch"],
            tuple(one["components"].split(" ")),
            one["security"] == "yes",
            int(one["epoch"]),
            tuple(self._asked),
            self._releases,
            tuple(self._packages),
            self._file,
            self._lines,
        )

    def _wrong(self, what: str) -> NoReturn:
        raise BuildError(
            f"{self._file}:{max(self._number, 1)}: {what}",
            "undo what was edited by hand, or run: inv lock --update",
        )


def _files(name: str, version: str, arch: str) -> Iterable[str]:
    """Names that an archive may give a package's file: with and without the epoch of its version."""
    return {f"{name}_{each}_{arch}.deb" for each in (version, version.partition(":")[2] or version)}


def check_kind(lock: Lock, settings: Settings) -> None:
    """Raise BuildError when a lock is another image's."""
    for what, locked, wanted in (
        ("image", lock.image, settings.imagename),
        ("suite", lock.suite, settings.suite),
        ("arch", lock.arch, settings.arch),
    ):
        if locked != wanted:
            raise BuildError(
                f"{lock.file} is of {what} {locked}, not of {wanted}",
                "build without it: --unlocked; or write it anew: inv lock --update",
            )


def check(lock: Lock, settings: Settings) -> None:
    """Raise BuildError when a lock is another image's, or of another definition than today's."""
    check_kind(lock, settings)
    changes = [
        *(f"+{name}" for name in sorted(set(settings.package_list) - set(lock.asked))),
        *(f"-{name}" for name in sorted(set(lock.asked) - set(settings.package_list))),
    ]
    if set(lock.components) != set(settings.components):
        changes.append(f"components {' '.join(settings.components)}")
    if lock.security != settings.security:
        changes.append(f"security {settings.security}".lower())
    if changes:
        shown = ", ".join([*changes[:6], *([f"and {len(changes) - 6} more"] if changes[6:] else [])])
        raise BuildError(
            f"the image definition has changed since {Path(lock.file).name} was made: {shown}",
            "keep what is locked, and add what is new: inv lock",
        )


def age(lock: Lock, seen: Seen) -> str:
    """How far a lock is behind, by the Release file of the security suite (of the suite, without one)."""
    suite = f"{lock.suite}-security" if lock.security else lock.suite
    if not seen.dates:
        return f"what is newer is not known: {seen.unknown}"
    newer = seen.dates.get(suite, 0) - lock.releases[suite].date if suite in lock.releases else 0
    if newer <= 0:
        return f"{suite} has nothing newer"
    days, hours = newer // 86400, newer // 3600
    return f"{suite} is {f'{days} days' if days > 1 else f'{hours} hours'} newer: inv outdated"


@dataclass(frozen=True)
class Change:
    """A package that is another one in a new set; an empty version: it is not there."""

    name: str
    arch: str
    source: str
    old: str
    new: str


def changes(old: Iterable[Package], new: Iterable[Package]) -> list[Change]:
    """What differs between two sets."""
    before = {(package.name, package.arch): package for package in old}
    after = {(package.name, package.arch): package for package in new}
    found = []
    for key in sorted({*before, *after}):
        was, now = before.get(key), after.get(key)
        versions = was.version if was else "", now.version if now else ""
        if not was or not now or (was.version, was.sha256) != (now.version, now.sha256):
            found.append(Change(*key, (now or was or after[key]).source, *versions))
    return found
