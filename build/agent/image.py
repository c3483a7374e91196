"""An image file of any maker, opened: whatever is around it taken off, one of its disks chosen."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build.agent.events import Emit, Failure
from build.agent.guest import media
from build.formats import recognize
from build.formats.lib import unwrap
from build.formats.lib.format import Kind
from build.formats.lib.reader import BoundedReader

SPACE = os.environ.get("TMPDIR", "/var/tmp")
"""Where a file is expanded: /tmp may be memory."""


@dataclass(frozen=True)
class Image:
    """A file that holds a disk."""

    outer: str
    """Compression or archive around it; empty: none."""
    kind: Kind
    reader: BoundedReader
    """Of the file in that kind."""
    name: str
    """Its name without what is around it."""

    @property
    def described(self) -> str:
        """What the file is, in a few words."""
        return f"{self.kind.name} inside {self.outer}" if self.outer else self.kind.name


@contextlib.contextmanager
def opened_file(path: Path) -> Iterator[int]:
    """A descriptor of an image file or block device; raises Failure for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Failure(f"there is no file {path}", "name an image file") from None
    try:
        if not path.is_file() and not path.is_block_device():
            raise Failure(f"{path} is no file", "name an image file")
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(fd: int, name: str, emit: Emit, limit: int = 0, work: str | None = None) -> Iterator[Image]:
    """The image in an open file called `name`, expanded below `work` (default: SPACE) where it must be.

    `limit` bounds what comes out of a compression (default: media.LIMIT). Raises Damaged and Unsupported.
    """
    reader = BoundedReader.whole(fd)
    outer = unwrap.recognize(reader)
    if not outer:
        yield Image("", recognize(reader), reader, name)
        return
    with tempfile.TemporaryFile(dir=work or SPACE) as space:
        media.expand(outer, reader, space, emit, limit or media.LIMIT)
        inner = BoundedReader.whole(space.fileno())
        yield Image(outer, recognize(inner), inner, name.removesuffix(f".{outer}"))
