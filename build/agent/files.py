"""Files of the host: small ones read whole and written whole, names given, folders held."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
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


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write aside and rename: a file is old or new, never half. Its folder is made; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, mode)
        publish(Path(aside), path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def publish(aside: Path, path: Path) -> None:
    """Give a finished file its name: a power cut leaves what was there before, or the whole new one."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_held(file: Path) -> bool:
    """Tell whether a process holds this file's lock; one that is not there is nobody's."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextlib.contextmanager
def hold(folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Lock a folder itself; `wait` is called before another holder is waited for."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A folder for as long as this lasts; whoever finds it locked (`is_held`) leaves it."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as made:
        handle = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(made)
        finally:
            os.close(handle)
