"""The archives that packages come from: their Release files, fetched and verified, and what may be believed.

Sources: the Debian wiki's RepositoryFormat page, apt.conf(5) on Valid-Until.
"""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build import debian, wire
from build.agent import files
from build.agent.debian import release, web
from build.agent.debian.release import Release
from build.agent.debian.web import Absent, Source
from build.agent.events import Emit, Failure

STALE = 14 * 86400
"""Seconds after which a security suite without news is worth a word; Debian's gets some every few days."""


@dataclass(frozen=True)
class Archive:
    """One suite at one mirror, verified."""

    suite: str
    mirror: str
    source: Source
    release: Release
    signers: tuple[str, ...]
    """Fingerprints of the keys that signed it."""
    sha256: str
    """Of the InRelease as it was served."""

    @property
    def where(self) -> str:
        """The suite's folder, for messages and URLs."""
        return f"{self.mirror}/dists/{self.suite}"


def default_mirror() -> str:
    """The mirror that this host's own bootstrap tools use when none is given."""
    patterns = (
        ("/usr/bin/mmdebstrap", r"^\s*my \$mirror\s*=\s*'(https?://[^']+)'"),
        ("/usr/sbin/debootstrap", r'^DEF_MIRROR="(https?://[^"$]+)"'),
    )
    for path, pattern in patterns:
        tool = Path(path)
        if tool.is_file() and (
            found := re.search(pattern, tool.read_text(encoding="utf-8", errors="replace"), re.M)
        ):
            return found[1].rstrip("/")
    raise Failure(
        "no bootstrap tool on this host names a default mirror", "install mmdebstrap, or set debian_mirror"
    )


def image_mirror(mirrors: wire.Mirrors) -> str:
    """The mirror for the image's own sources list; empty when this host knows none and another is asked."""
    try:
        return default_mirror()
    except Failure:
        if mirrors.mirror:
            return ""
        raise


def security_mirrors(mirror: str, asked: str) -> list[str]:
    """Where the security suite may stand, in the order to look."""
    if asked:
        return [asked]
    base, snapshot = mirror, ""
    if found := re.fullmatch(r"(.*)(/\d{8}T\d{6}Z)", mirror):  # of a snapshot, below the archive's name
        base, snapshot = found[1], found[2]
    parent, _, name = base.rpartition("/")
    siblings = [f"{base}-security"] if name == "debian" else [f"{parent}/debian-security", f"{base}-security"]
    return list(dict.fromkeys(f"{place}{snapshot}" for place in (*siblings, base)))


def mirror_of(mirrors: wire.Mirrors) -> str:
    """The mirror of the suite and its updates: the one asked for, or this host's own."""
    return (mirrors.mirror or default_mirror()).rstrip("/")


def security_places(mirrors: wire.Mirrors) -> list[str]:
    """Where to look for the security suite, in this order; nowhere when it is switched off."""
    if not mirrors.security:
        return []
    return security_mirrors(mirror_of(mirrors), mirrors.security_mirror.rstrip("/"))


def find(mirrors: wire.Mirrors, emit: Emit) -> list[Archive]:
    """Fetch and verify every InRelease at the same time.

    Raises Failure for a suite that is missing, expired, from the future, or older than one seen before; not
    when a lock names this very Release file, or when a named snapshot explains it (then a note says so).
    """
    suite, store, mirror = mirrors.suite, Path(mirrors.store), mirror_of(mirrors)
    keys = release.keyring(mirrors.keyring)
    main = Source(mirrors.apt_proxy)
    guard = Source(mirrors.apt_proxy, "security_mirror" if mirrors.security_mirror else "debian_mirror")
    places = security_places(mirrors)
    asked = [(suite, [mirror], main), (f"{suite}-updates", [mirror], main)]
    asked += [(f"{suite}-security", places, guard)] if places else []
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda row: _archive(row[0], row[1], row[2], keys, store), asked))
    found = [archive for archive in answers if archive]
    names = {archive.suite for archive in found}
    if missing := [name for name, _, _ in asked[:2] if name not in names]:
        raise _no_suite(missing[0], suite, mirror, main)
    if places and f"{suite}-security" not in names:
        raise Failure(
            f"no suite {suite}-security at {' or '.join(places)}",
            "set security_mirror to a mirror that has it, or security: false to build without",
        )
    locked = [archive for archive in found if mirrors.consent.get(archive.suite) == archive.sha256]
    others = [archive for archive in found if archive not in locked]
    for archive in others:
        _check_time(archive, mirrors.snapshot, emit)
    why_older = "accept_older is set" if mirrors.accept_older else ""
    if mirrors.snapshot:
        why_older = f"snapshot {mirrors.snapshot} is asked for"
    for note in remember(others, store, why_older):
        emit("note", text=note)
    for archive in others if not mirrors.snapshot else ():
        age = time.time() - archive.release.date
        if archive.suite == f"{suite}-security" and age > STALE:
            dated = f"{release.utc(archive.release.date)}, {age // 86400:.0f} days ago"
            emit("note", text=f"{archive.where} is of {dated}: its mirror may hold updates back")
    if not mirrors.security:
        emit("note", text=f"built without {suite}-security: security is switched off")
    return found


def _check_time(archive: Archive, snapshot: str, emit: Emit) -> None:
    """Hold a Release against the clock, and one of a snapshot against the moment that it is named for."""
    where, told = f"{archive.where}/InRelease", archive.release
    if not snapshot:
        release.check(told, archive.suite, where, time.time())
        return
    release.check(told, archive.suite, where, moment(snapshot))
    if told.valid_until is not None and told.valid_until < time.time():
        because = f"it is taken because snapshot {snapshot} is asked for"
        emit("note", text=f"{archive.where} expired on {release.utc(told.valid_until)}; {because}")


def moment(snapshot: str) -> int:
    """Seconds since 1970 of a snapshot's name; raises ValueError."""
    return calendar.timegm(time.strptime(snapshot, debian.SNAPSHOT))


def _no_suite(name: str, suite: str, mirror: str, source: Source) -> Failure:
    if name != suite:
        return Failure(
            f"mirror {mirror} has no suite {name}", "use a mirror that holds the updates of its suites too"
        )
    for known in ("dists/stable/InRelease", "dists/stable/Release", "dists/", "dists/sid/InRelease"):
        try:
            web.get(f"{mirror}/{known}", source, web.RELEASE)
        except Absent:
            continue
        return Failure(f"mirror {mirror} has no suite {suite}", f"look into {mirror}/dists/ for what it has")
    return Failure(
        f"{mirror} is not a Debian mirror with suite {suite}", "correct debian_mirror; it ends before /dists"
    )


def _archive(suite: str, mirrors: Sequence[str], source: Source, keys: Path, store: Path) -> Archive | None:
    """A suite at the first of these mirrors that has it."""
    for mirror in mirrors:
        with contextlib.suppress(Absent):
            return _verified(suite, mirror, source, keys, store)
    return None


def _verified(suite: str, mirror: str, source: Source, keys: Path, store: Path) -> Archive:
    """Fetch one InRelease if it changed, and verify it."""
    url = f"{mirror}/dists/{suite}/InRelease"
    file = store / "releases" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    seen = read(file)
    known = seen["validators"] if seen else {}
    answer = web.get(url, source, web.RELEASE, known)
    if answer.body is None and seen:
        body, validators = seen["text"].encode("utf-8", "surrogateescape"), seen["validators"]
    else:
        body, validators = answer.body or b"", answer.validators
    signed = release.verify(body, keys, url)
    try:
        told = release.parse(signed.text)
    except ValueError as error:
        raise Failure(f"{url} cannot be read: {error}", "use another mirror") from error
    if not seen or answer.body is not None:
        kept = {"url": url, "validators": dict(validators)}
        write(file, {**kept, "text": body.decode("utf-8", "surrogateescape")})
    return Archive(suite, mirror, source, told, signed.signers, hashlib.sha256(body).hexdigest())


def remember(archives: Sequence[Archive], store: Path, accept_older: str) -> list[str]:
    """Note the newest Date of each suite by who signs it, so that no mirror can go behind another one.

    Raises Failure for a suite that is older than one seen before, wherever that was; with a reason in
    `accept_older` returns what there is to say of it.
    """
    file, notes = store / "releases" / "seen.json", []
    with _locked(file.parent):
        newest: dict[str, int] = read(file) or {}
        before = dict(newest)
        for archive in archives:
            date = archive.release.date
            keys = [f"{signer} {archive.suite} {archive.release.origin}" for signer in archive.signers]
            last = max(newest.get(key, 0) for key in keys)
            if date < last:
                dates = f"of {release.utc(date)}, not {release.utc(last)}"
                older = f"{archive.where} is older than what was seen before: {dates}"
                if not accept_older:
                    raise Failure(
                        older, "use a mirror that is kept up to date; accept_older: true takes it on purpose"
                    )
                notes.append(f"{older}; it is taken because {accept_older}")
            newest |= {key: max(date, newest.get(key, 0)) for key in keys}
        if newest != before:
            write(file, newest)
    return notes


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other builds of the same LOCATION out."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read(file: Path) -> dict[str, Any] | None:
    """A stored answer, or None when there is none that can be read."""
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value


def write(file: Path, value: Mapping[str, Any]) -> None:
    """Store an answer, whole or not at all."""
    files.write(file, json.dumps(value, indent=1, sort_keys=True).encode())
