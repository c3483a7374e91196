"""Scripts of a management server: its host copies them over SSH at a start, and the guest takes them in.

A host (CloudStack 4.17 and later) copies `agent.zip`, `cloud-scripts.tgz` and `patch-sysvms.sh`, in this
order, to /var/cache/cloud as soon as sshd answers, and starts nothing. Everything else is up to the guest.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import zipfile
import zlib
from dataclasses import dataclass

from systemvm.machine import Machine
from systemvm.setup import KEYS

CACHE = "/var/cache/cloud"
COPIED = f"{CACHE}/cloud-scripts.tgz"
AGENT = f"{CACHE}/agent.zip"
COPIED_KEYS = f"{CACHE}/authorized_keys"
SIGNATURE = f"{CACHE}/cloud-scripts-signature"
REQUIRED = f"{CACHE}/patch.required"
"""Tells the scripts that came that the agent has to be unpacked as well."""
KEPT = "/usr/share/cloud/cloud-scripts.tgz"
"""Where an archive lies once it is in place."""
PLACED = "/var/lib/systemvm/scripts"
"""SHA-512 of the archive of a management server that is in place; of the image's own there is none."""
AGENT_HOME = "/usr/local/cloud/systemvm"
BOOTSTRAP = "/opt/cloud/bin/setup/bootstrap.sh"
"""Set-up of the scripts that came; the image's own scripts have no such file."""

LIMIT = 32 << 20
"""Bytes that an archive may unpack to: a real one has less than one MiB, and all of it is held in memory."""
INTERVAL = 1.0
"""Seconds between two looks at what has been copied."""
STILL = 5.0
"""Seconds without a change after which a part is taken for all that comes."""
BOOTSTRAP_SECONDS = 540.0
"""For the scripts' own set-up; cloud-early-config.service has 15 minutes in all."""


@dataclass(frozen=True)
class Archive:
    """A look at an archive: how it is signed, or why it cannot be used."""

    signature: str = ""
    refused: str = ""


def inspect(machine: Machine, name: str = COPIED) -> Archive:
    """Read an archive to its end and judge its members; nothing is unpacked.

    The end tells a whole one from a half-copied one: gzip's checksum stands there (RFC 1952). Names that lead
    out of the tree, and devices, are refused: scripts and settings have no use for either.
    """
    try:
        with gzip.open(machine.path(name)) as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            return Archive(refused=f"it unpacks to more than {LIMIT >> 20} MiB")
        scripts = b""
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = archive.getmembers()
            for member in members:
                if refused := _refuse(member):
                    return Archive(refused=refused)
                if member.isreg() and member.name.removeprefix("./").startswith("opt/cloud/bin/setup/"):
                    content = archive.extractfile(member)
                    scripts += content.read() if content else b""
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        return Archive(refused=f"it is no whole archive: {str(error)[:80]}")
    if not members:
        return Archive(refused="it is empty")
    # Scripts compare the signature with a checksum of their own: MD5 up to 4.21, SHA-512 from 4.22 on.
    return Archive(signature=checksum(machine, name, "md5" if b"md5sum" in scripts else "sha512"))


def _refuse(member: tarfile.TarInfo) -> str:
    """Why a member must not be unpacked at /, or nothing."""
    names = [member.name, *([member.linkname] if member.islnk() else [])]
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            return f"{name[:80]!r} leads out of the tree"
    known = member.isreg() or member.isdir() or member.issym() or member.islnk()
    return "" if known else f"{member.name[:80]!r} is no file, folder or link"


def checksum(machine: Machine, name: str, form: str = "sha512") -> str:
    """Checksum of a file, in hexadecimal; empty when it is not there."""
    try:
        with machine.path(name).open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new(form, usedforsecurity=False)).hexdigest()
    except OSError:
        return ""


def in_place(machine: Machine) -> bool:
    """Whether scripts of a management server were taken in at an earlier start, and are whole."""
    placed = machine.read(PLACED).strip()
    return bool(placed) and placed == checksum(machine, KEPT)


def wait(machine: Machine, seconds: float) -> str:
    """Wait for a whole archive; returns its signature, or an empty one when none came in that time.

    One that cannot be used is told once, and looked at again when it has changed: the host may copy another.
    """
    end = machine.now() + seconds
    before, since, found, told = (0, 0), machine.now(), Archive(), False
    while True:
        current = _state(machine)
        if current != before:
            before, since, found, told = current, machine.now(), Archive(), False
        elif current[0]:
            if found == Archive():
                found = inspect(machine)
            if found.signature and not _arriving(machine):
                return found.signature
            if found.refused and not told and machine.now() >= min(since + STILL, end):
                machine.log(f"{COPIED} is refused: {found.refused}")
                told = True
        if machine.now() >= end:
            return ""
        machine.sleep(INTERVAL)


def _state(machine: Machine) -> tuple[int, int]:
    """Size and time of what has been copied; a size of 0 when there is nothing."""
    try:
        status = machine.path(COPIED).stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _arriving(machine: Machine) -> bool:
    """Whether the agent is there, but not whole; not every host brings one."""
    path = machine.path(AGENT)
    return path.exists() and not zipfile.is_zipfile(path)


def take_in(machine: Machine, signature: str) -> bool:
    """Unpack the copied archive at /, unless it is the one in place; says whether its scripts are there."""
    if machine.read(SIGNATURE).strip() != signature:
        # Links of the tree to folders stay: an archive may know /lib as a folder.
        unpack = ("tar", "-xzf", COPIED, "-C", "/", "--no-same-owner", "--keep-directory-symlink")
        if not machine.run(*unpack, seconds=300).ok:
            machine.log(f"{COPIED} does not unpack")
            return False
        machine.write(SIGNATURE, f"{signature}\n")
        machine.write(REQUIRED, "")
        machine.log(f"unpacked {COPIED}, {signature}")
        # The units that came take over in this boot.
        machine.run("systemctl", "daemon-reload")
    if keys := machine.read_bytes(COPIED_KEYS):
        machine.write(KEYS, keys, 0o600)
    return True


def bootstrap(machine: Machine) -> None:
    """Run the set-up of the scripts that came."""
    machine.log("the management server's own scripts go on from here")
    machine.run(BOOTSTRAP, seconds=BOOTSTRAP_SECONDS)


def clean_up(machine: Machine, agent: bool) -> None:
    """Put the archive where it is kept, and remove what is of no use any more; `agent`: the agent stays."""
    machine.remove(AGENT)
    if machine.path(COPIED).exists():
        machine.path(KEPT).parent.mkdir(parents=True, exist_ok=True)
        os.replace(machine.path(COPIED), machine.path(KEPT))
        machine.write(PLACED, f"{checksum(machine, KEPT)}\n")
    if not agent:
        shutil.rmtree(machine.path(AGENT_HOME), ignore_errors=True)
