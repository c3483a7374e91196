"""Package indices of archives: the lists that a Release file has signed.

Source: the Debian wiki's RepositoryFormat page.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build.agent import files
from build.agent.debian import release, web
from build.agent.debian.archives import Archive
from build.agent.debian.web import Absent, Limit
from build.agent.events import Failure

UNLISTED = 1 << 28
"""Bytes that an index may have unpacked when only its packed form is signed."""


@dataclass(frozen=True)
class Index:
    """One list of packages: where it belongs, and its text."""

    archive: Archive
    path: str
    text: str


def paths(
    archives: Sequence[Archive], components: Sequence[str], archs: Sequence[str]
) -> list[tuple[Archive, str]]:
    """Pairs of an archive and the path, below its suite, of each list that is wanted."""
    return [
        (archive, path)
        for archive in archives
        for path in release.index_paths(archive.release, components, archs, archive.where)
    ]


def fetch(archive: Archive, path: str, folder: Path) -> Index:
    """Fetch one index unless the same one is at hand; what is read is what was signed."""
    name = release.compressed(archive.release, path, archive.where)
    digest, size = archive.release.files[name]
    kept = folder / digest
    data = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        data = _signed(archive, name, digest, size)
        files.write(kept, data)
    _, plain = archive.release.files.get(path, ("", UNLISTED))
    try:
        text = unpacked(name, data, plain)
    except ValueError as error:
        raise Failure(f"{archive.where}/{name} {error}", "use another mirror") from error
    return Index(archive, path, text.decode("utf-8", "replace"))


def fetch_all(wanted: Sequence[tuple[Archive, str]], folder: Path) -> list[Index]:
    """Fetch lists side by side."""
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(lambda pair: fetch(pair[0], pair[1], folder), wanted))


def _signed(archive: Archive, name: str, digest: str, size: int) -> bytes:
    folder, _, _ = name.rpartition("/")
    plain = f"{archive.where}/{name}"
    urls = (
        [f"{archive.where}/{folder}/by-hash/SHA256/{digest}", plain] if archive.release.by_hash else [plain]
    )
    seen = "is missing"
    for url in urls:
        try:
            data = web.get(url, archive.source, Limit.of(size)).body or b""
        except Absent:
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        seen = f"is not what was signed ({len(data)} bytes, {size} expected)"
    raise Failure(
        f"{plain} {seen}", "try again in some minutes: the mirror may be in the middle of an update"
    )


def unpacked(name: str, data: bytes, size: int) -> bytes:
    """Unpack an index by the suffix of its name; raises ValueError behind `size` bytes, and for damage."""
    packed = io.BytesIO(data)
    try:
        if name.endswith(".xz"):
            text = lzma.open(packed).read(size + 1)
        else:
            text = (gzip.open(packed) if name.endswith(".gz") else packed).read(size + 1)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"cannot be unpacked: {error}") from error
    if len(text) > size:
        raise ValueError(f"unpacks to more than the {size} bytes that are signed")
    return text


def digest(archive: Archive, path: str) -> str:
    """SHA-256 of a list as it is packed."""
    return archive.release.files[release.compressed(archive.release, path, archive.where)][0]
