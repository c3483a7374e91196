"""Small files of the host, read whole and written whole."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


def read(path: str | Path) -> str:
    """Text of a small file; what is not there or cannot be read counts as empty."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def is_private(status: os.stat_result) -> bool:
    """Whether not everybody may read a file."""
    return not status.st_mode & stat.S_IROTH


def opener(private: bool) -> Callable[[str, int], int]:
    """What makes files for `open`: private ones are their owner's from the start, others go by the umask."""
    return lambda path, flags: os.open(path, flags, 0o600 if private else 0o666)


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write aside and rename: a file is old or new, never half. Its folder is made; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
        os.rename(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
