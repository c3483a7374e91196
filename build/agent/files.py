"""Small files of the host, read whole and written whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def read(path: str | Path) -> str:
    """Text of a small file; what is not there or cannot be read counts as empty."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def neutral(folder: Path) -> Iterator[tuple[Path, int]]:
    """Give a path of a folder that has no odd character, whatever its name, for us and for a child of ours.

    It holds while the descriptor, which comes along, is open: the child must inherit it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{handle}"), handle
    finally:
        os.close(handle)


def write(path: Path, data: bytes) -> None:
    """Write aside and rename: a file is old or new, never half. Its folder is made; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, 0o644)
            os.fsync(handle)
        os.rename(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
