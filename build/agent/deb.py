"""What a package says of itself, by dpkg-deb: its control fields, and its changelog.

Sources: deb(5), deb-changelog(5), Debian Policy 12.7 for where a changelog lies.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build.agent import process
from build.agent.events import Failure

LONGEST = 8 << 20
"""Bytes of a changelog that are read; Debian's longest has 2 MiB."""
URGENCIES = ("low", "medium", "high", "emergency", "critical")
HEAD = re.compile(r"^(\S+) \(([^()\s]+)\)[^;]*;(.*)$")
CVE = re.compile(r"CVE-\d{4}-\d{4,}")


@dataclass(frozen=True)
class Entry:
    """What a changelog says of one version."""

    version: str
    urgency: str
    lines: tuple[str, ...]


def control(path: Path) -> str:
    """The control paragraph of a package; raises Failure for what is none."""
    return process.run(["dpkg-deb", "--field", str(path)]).stdout


def newer(one: str, other: str) -> bool:
    """Whether a version is greater than another one, as dpkg has it."""
    line = ["dpkg", "--compare-versions", one, "gt", other]
    return one != other and process.run(line, check=False).returncode == 0


def changelog(path: Path, name: str) -> str:
    """The Debian changelog in a package; empty where it has none, as when it lies in another one."""
    wanted = [f"./usr/share/doc/{name}/{file}" for file in ("changelog.Debian.gz", "changelog.gz")]
    found: dict[str, bytes] = {}
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        try:
            with tarfile.open(fileobj=child.stdout, mode="r|") as archive:
                for member in archive:
                    if member.name in wanted and member.isreg() and (file := archive.extractfile(member)):
                        found[member.name] = file.read(LONGEST)
                        if member.name == wanted[0]:
                            break
        except (tarfile.TarError, EOFError) as error:
            raise Failure(f"{path} cannot be read: {error}", "remove it, and run: inv fetch") from error
        finally:
            child.kill()
    packed = next((found[name] for name in wanted if name in found), b"")
    try:
        unpacked = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packed, LONGEST)
    except zlib.error as error:
        raise Failure(f"the changelog of {path} is damaged: {error}", "use another mirror") from error
    return unpacked.decode("utf-8", "replace")


def entries(text: str) -> Iterator[Entry]:
    """The entries of a changelog, newest first."""
    head: re.Match[str] | None = None
    lines: list[str] = []
    for line in [*text.split("\n"), None]:
        begun = HEAD.match(line) if line is not None else None
        if head and (begun or line is None):
            found = re.search(r"urgency=(\w+)", head[3], re.I)
            yield Entry(head[2], found[1].lower() if found else "", tuple(lines))
            lines = []
        head = begun or head
        if head and not begun and line and line.strip() and not line.startswith(" --"):
            lines.append(line.strip())


def between(text: str, old: str) -> list[Entry]:
    """The entries that are newer than a version."""
    found = []
    for entry in entries(text):
        if entry.version == old or not newer(entry.version, old):
            break
        found.append(entry)
    return found


def urgency(found: list[Entry]) -> str:
    """The greatest urgency of some entries."""
    ranks = [URGENCIES.index(entry.urgency) for entry in found if entry.urgency in URGENCIES]
    return URGENCIES[max(ranks)] if ranks else ""


def cves(found: list[Entry]) -> list[str]:
    """Ids of the vulnerabilities that some entries name."""
    return sorted({each for entry in found for line in entry.lines for each in CVE.findall(line)})
