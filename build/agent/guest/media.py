"""An image file as QEMU is to open it: by which driver, which of its bytes, without a copy where possible."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from build.agent import process
from build.agent.events import Emit, Failure
from build.formats import KINDS, recognize
from build.formats.lib import unwrap
from build.formats.lib.findings import Damaged
from build.formats.lib.reader import BoundedReader

LIMIT = 64 << 30
"""Bytes that an outer compression may expand to, unless somebody says otherwise."""
_SPARED = 16
"""The part of what is free, one in so many, that is left to others."""


@dataclass(frozen=True)
class Media:
    """What QEMU opens for reading; descriptors stay open for as long as it may."""

    driver: str
    path: str
    descriptors: tuple[int, ...] = ()
    window: tuple[int, int] | None = None
    """Offset and length of the disk in a file that holds more, as an OVA does."""

    def node(self) -> dict[str, Any]:
        """The block node. No path goes through QEMU's own parsing."""
        file: dict[str, Any] = {"driver": "file", "filename": self.path, "read-only": True}
        if self.window:
            offset, length = self.window
            file = {"driver": "raw", "offset": offset, "size": length, "read-only": True, "file": file}
        return {"driver": self.driver, "read-only": True, "file": file}

    def size(self) -> int:
        """Bytes of disk that a guest sees, as QEMU reads them from the file."""
        if self.driver == "raw":
            return self.window[1] if self.window else Path(self.path).stat().st_size
        line = ["qemu-img", "info", "--output=json", f"json:{json.dumps(self.node())}"]
        return int(json.loads(process.run(line, pass_fds=self.descriptors).stdout)["virtual-size"])


def need(image: str | Path) -> None:
    """Raise Failure for an image that is not there, or that we may not read."""
    if not Path(image).is_file():
        raise Failure(f"no image {image}", "run `inv build` first")
    if not os.access(image, os.R_OK):
        raise Failure(f"you may not read {image}", "run it as its owner: it may hold a root password")


@contextlib.contextmanager
def opened(image: str, kind: str, work: Path, emit: Emit) -> Iterator[Media]:
    """Open an image of a format (a key of KINDS), also inside bz2, gz, xz, zip or zst; Failure if it is none.

    What has to be expanded goes into a file without a name in `work`, so that nothing can be left of it.
    """
    if kind not in KINDS:
        raise Failure(f"unknown format {kind!r}", f"known: {', '.join(KINDS)}")
    need(image)
    if kind == "raw" and Path(image).suffix[1:] not in unwrap.KINDS:
        yield Media("raw", image)
        return
    with contextlib.ExitStack() as stack:
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        try:
            reader = BoundedReader.whole(descriptor)
            if around := unwrap.recognize(reader):
                space = stack.enter_context(tempfile.TemporaryFile(dir=work))
                expand(around, reader, space, emit)
                descriptor = space.fileno()
            driver, window = _disk(descriptor, kind)
            yield Media(driver, f"/proc/self/fd/{descriptor}", (descriptor,), window)
        except Damaged as damage:
            raise Failure(
                f"{image}: {damage.finding.text}", f"convert again; see: inv inspect {image}"
            ) from None


def expand(around: str, reader: BoundedReader, space: BinaryIO, emit: Emit, limit: int = LIMIT) -> None:
    """Expand an outer compression, to `limit` bytes and what is free there, and tell how far it is."""
    report = _progress(f"expand {around}", reader.size, emit)
    unwrap.expand(around, reader, space, limit, _room(space), report)


def join(parts: Sequence[BoundedReader], space: BinaryIO, emit: Emit, limit: int = LIMIT) -> None:
    """Put an image that lies in parts together, within the same bounds."""
    report = _progress("join", sum(part.size for part in parts), emit)
    unwrap.join(parts, space, limit, _room(space), report)


def _progress(label: str, total: int, emit: Emit) -> Callable[[int], None]:
    done = 0

    def report(length: int) -> None:
        nonlocal done
        done += length
        emit("progress", label=label, done=done, total=total)

    return report


def _room(space: BinaryIO) -> int:
    """Bytes that may be written to a file: not the last ones of its file system, which others need, too."""
    there = os.fstatvfs(space.fileno())
    free = there.f_bavail * there.f_frsize
    return free - free // _SPARED


def _disk(descriptor: int, kind: str) -> tuple[str, tuple[int, int] | None]:
    """The driver of the (first) disk in a file, and where in it that lies: None for all of it.

    Failure when the file is of another format, or the disk does not lie there byte by byte.
    """
    reader = BoundedReader.whole(descriptor)
    if (found := recognize(reader).name) != kind:
        raise Failure(f"this is a {found} image, not in {kind} format", "convert it again")
    disks = KINDS[kind].inner(reader)
    if not disks:
        return KINDS[kind].driver, None
    if (disk := disks[0].whole) is None:
        raise Failure(f"{disks[0].name} is packed inside of the {kind}", "convert it again")
    return recognize(disk).driver, (disk.start, disk.size)
