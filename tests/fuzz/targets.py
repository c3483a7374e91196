"""One function a reader: it takes any bytes, and may end with nothing but what the reader declares."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from unittest import mock

from build import debian
from build.agent import deb as agent_deb
from build.agent.debian import release
from build.agent.events import Failure
from build.agent.verbs import outdated
from build.debootstrap import unpack
from build.engine import lockfile
from build.engine.errors import BuildError
from build.formats import KINDS, foreign, recognize, vhdx
from build.formats.lib import ext, partitions, pieces, unwrap
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged, collect
from build.formats.lib.reader import BoundedReader, Budget
from build.formats.lib.tar import octal
from build.verbs.boot_line import guest

boot_line = guest("boot_line")

LIMIT = 64 << 20
"""Bytes that an outer compression may expand to here."""
_RUN = struct.Struct("<QH")
_FARTHEST = (1 << 46) - 1


def pack(content: bytes) -> bytes:
    """A sparse file as an input has it: where each run of sectors that are not zero lies, and its bytes."""
    runs: list[tuple[int, bytearray]] = []
    for start in range(0, len(content), 512):
        sector = content[start : start + 512]
        if not any(sector):
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == start and len(runs[-1][1]) < 0xFE00:
            runs[-1][1].extend(sector)
        else:
            runs.append((start, bytearray(sector)))
    return b"".join(_RUN.pack(start, len(run)) + run for start, run in [*runs, (len(content), bytearray())])


@contextlib.contextmanager
def spread(data: bytes) -> Iterator[BoundedReader]:
    """The file that `pack` made an input of; it lies in memory and takes none for its holes."""
    fd = os.memfd_create("input")
    try:
        size = place = 0
        while place + _RUN.size <= len(data):
            start, length = _RUN.unpack_from(data, place)
            place += _RUN.size
            run = data[place : place + length]
            place += len(run)
            os.pwrite(fd, run, start & _FARTHEST)
            size = max(size, (start & _FARTHEST) + len(run))
        os.ftruncate(fd, size)
        yield BoundedReader.whole(fd)
    finally:
        os.close(fd)


def image(kind: str, data: bytes) -> None:
    """What `inv inspect` does with a file, taken for one of a kind."""
    with spread(data) as whole, mock.patch.object(vhdx, "_right", return_value=True):  # or no change gets in
        if kind == "ova":
            _sign(whole)
        reader = BoundedReader(whole.fd, 0, whole.size, Budget(8 * whole.allocated() + (1 << 30)))
        recognize(reader)
        collect(KINDS[kind].lint(reader))
        disk = KINDS[kind].read(reader)
        disk.facts()
        collect(partitions.lint(disk))
        for index in {0, pieces.count(disk.size) // 2, pieces.count(disk.size) - 1}:
            if 0 <= index < pieces.count(disk.size):
                disk.piece(index)
        for file in KINDS[kind].inner(reader):
            file.head(512)


def _sign(reader: BoundedReader) -> None:
    """Make the checksums of an archive's headers right, as no mutation does."""
    offset = 0
    while offset + 512 <= reader.size and any(head := reader.read(offset, 512)):
        os.pwrite(reader.fd, b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:])), offset + 148)
        try:
            offset += 512 + -(-octal(head[124:136]) // 512) * 512
        except ValueError:
            return


def files(data: bytes) -> None:
    """A file in a file system, and all on the way to it."""
    with spread(data) as reader:
        system = ext.FileSystem(KINDS["raw"].read(reader), 0)
        for name in ("var/lib/dpkg/status", "usr/lib/os-release"):
            list(outdated.installed((system.read(name) or b"").decode(errors="replace")))


def changelog(data: bytes) -> None:
    """A Debian changelog."""
    found = list(agent_deb.entries(data.decode(errors="replace")))
    agent_deb.urgency(found)
    agent_deb.cves(found)


def lock(data: bytes) -> None:
    """A lock: what can be read can be written, and is the same then."""
    read = lockfile.parse(data.decode(errors="replace"), "x.lock")
    assert lockfile.parse(lockfile.text(read), "x.lock").packages == tuple(
        sorted(read.packages, key=lambda package: (package.name, package.arch))
    )


def outer(data: bytes) -> None:
    """What is around an image."""
    fd = os.memfd_create("input")
    try:
        os.pwrite(fd, data, 0)
        reader = BoundedReader.whole(fd)
        if kind := unwrap.recognize(reader):
            with tempfile.TemporaryFile(dir="/dev/shm") as space:
                unwrap.expand(kind, reader, space, LIMIT, LIMIT // 2, lambda done: None)
    finally:
        os.close(fd)


def inrelease(data: bytes) -> None:
    """The signed text of an archive's suite."""
    told = release.parse(data.decode(errors="replace"))
    release.check(told, told.suite, "here", 1_707_600_000)
    release.index_paths(told, told.components, told.architectures, "here")


def keyring(data: bytes) -> None:
    """An armoured keyring."""
    list(release.dearmor(data))


def packages(data: bytes) -> None:
    """An index of packages."""
    text = data.decode(errors="replace")
    for fields in debian.stanzas(text):
        debian.names(fields.get("Depends", ""))
    debian.base_names(debian.paragraphs(text))


def deb(data: bytes) -> None:
    """A package: its two archives, to their ends."""
    with unpack.sound("a.deb"):
        file = io.BytesIO(data)
        for name, size in unpack.members(file):
            if name.startswith("control.tar"):
                controls = unpack.read_control(file, name, size)
                unpack.parse_conffiles(unpack.text_of(controls, "conffiles"), "a.deb")
            elif name.startswith("data.tar"):
                with unpack.tar_of(file, name, size) as tar:
                    list(tar)


def boot(data: bytes) -> None:
    """A boot line, and every way in which its parameters are asked for."""
    raw = boot_line.parse(data.decode(errors="surrogateescape"))
    params = boot_line.Params(raw)
    boot_line.cmd_line_json(raw)
    boot_line.cmdline_json(raw)
    assert params.name
    assert params.nic(0) in (*params.nics, boot_line.Nic(0))
    assert params.redundant == ("redundant_router" in raw)
    assert len(set(params.macs)) == len(params.macs)
    for key in raw:
        params.flag(key)
        params.matching(key, boot_line.DOMAIN)
        params.integer(key, 1, 1, 10)
        params.networks(key)
        params.address(key)
        params.address6(key)
        params.base64(key)


IMAGES = [kind for kind in KINDS if KINDS[kind] not in foreign.KINDS]
Target = tuple[Callable[[bytes], None], tuple[type[Exception], ...]]
TARGETS: Mapping[str, Target] = {
    **{kind: (partial(image, kind), (Damaged, Unsupported)) for kind in IMAGES},
    "outer": (outer, (Damaged, Unsupported)),
    "inrelease": (inrelease, (ValueError, Failure)),
    "keyring": (keyring, (Failure,)),
    "packages": (packages, ()),
    "deb": (deb, (unpack.UnsupportedPackage,)),
    "boot": (boot, ()),
    "files": (files, (Damaged,)),
    "changelog": (changelog, ()),
    "lock": (lock, (BuildError,)),
}
"""Functions by name, and what each reader may raise."""


def play(name: str, data: bytes) -> None:
    """Give one input to a target; what it declares is no error."""
    target, declared = TARGETS[name]
    with contextlib.suppress(*declared):
        target(data)
