"""Bring an image file home: sparse and compressed on the wire, resumed after a cut, whole or not at all.

The part beside the file carries the start of its SHA-256 in its name and grows in order, so that what is
there of it is right as far as it goes; the next run hashes that and asks for the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from build import wire
from build.agent import files
from build.agent.verbs.send import HEAD
from build.engine.errors import BuildError
from build.engine.hosts.host import Host
from build.engine.hosts.session import BEAT, HEARTBEAT_TIMEOUT

_STEP = 1 << 20
_ZEROS = bytes(_STEP)
_AHEAD = 32
"""Frames that may wait between network and disk."""

Progress = Callable[[int, int], None]


def name(artifact: wire.Sent) -> str:
    """File name, there and here."""
    return os.path.basename(artifact.path)


def _text(artifact: wire.Sent) -> str:
    """The manifest as it lies beside the file, there and here."""
    return json.dumps(artifact.manifest, indent=2, sort_keys=True) + "\n"


def is_here(artifact: wire.Sent, folder: Path) -> bool:
    """Whether an earlier run brought this very file, and nobody has touched it since."""
    try:
        told = (folder / f"{name(artifact)}.json").read_text(encoding="utf-8")
        now = (folder / name(artifact)).stat()
    except OSError:
        return False
    return told == _text(artifact) and (now.st_size, now.st_mtime_ns) == (artifact.size, artifact.mtime_ns)


def fetch(host: Host, artifact: wire.Sent, folder: Path, progress: Progress) -> None:
    """Bring the file and its manifest into `folder`; of one that breaks off the next run has what came."""
    part = folder / f".{name(artifact)}.{artifact.sha256[:16]}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "a+b", buffering=0, opener=files.opener(artifact.private)) as file:
            if artifact.private:  # what an earlier run left may be open
                os.fchmod(file.fileno(), 0o600)
            _claim(file.fileno(), part)
            _drop_others(part, name(artifact))
            _receive(host, artifact, file.fileno(), progress)
            _publish(artifact, part, folder)
    except (ValueError, zlib.error) as error:
        raise BuildError(f"what arrives of {name(artifact)} is broken: {error}", "run it again") from None
    except OSError as error:
        raise BuildError(
            f"cannot write {folder}: {error.strerror or error}", "free some space, or name another: --to DIR"
        ) from None


def _claim(fd: int, part: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BuildError(f"another run is fetching to {part}", "wait for it, or use --to DIR") from None


def _drop_others(part: Path, name: str) -> None:
    """Remove what is left of fetching an earlier file of this name, unless somebody still does."""
    for other in part.parent.glob(f".{name}.????????????????.part"):
        if other != part:
            with contextlib.suppress(OSError), other.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                other.unlink()


def _receive(host: Host, artifact: wire.Sent, fd: int, progress: Progress) -> None:
    """Fill the part, checking as it grows; a part whose whole is wrong is emptied."""
    have = min(os.fstat(fd).st_size, artifact.size)
    digest = hashlib.sha256()
    for offset in range(0, have, _STEP):
        digest.update(os.pread(fd, min(_STEP, have - offset), offset))
    sink = Sink(fd, have, digest)
    with contextlib.closing(_channel(host, artifact.path, have)) as channel:
        for offset, length, data in _frames(channel, host):
            sink.take(offset, length, data)
            progress(offset, artifact.size)
    sink.finish(artifact.size)
    if digest.hexdigest() != artifact.sha256:
        os.ftruncate(fd, 0)
        raise BuildError(
            f"{name(artifact)} arrived with SHA-256 {digest.hexdigest()[:16]}..., "
            f"and {artifact.sha256[:16]}... was built",
            "run it again; if it stays so, build again: the file was changed there",
        )
    os.fsync(fd)


class Sink:
    """Expands, hashes and writes frames, in order, in a thread of its own."""

    def __init__(self, fd: int, offset: int, digest: Any) -> None:
        self.fd, self.offset, self.digest = fd, offset, digest
        self._error: Exception | None = None
        self._queue: queue.Queue[tuple[int, int, bytes] | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def take(self, offset: int, length: int, data: bytes) -> None:
        """Take one frame; raises what writing an earlier one raised."""
        if length:
            self._queue.put((offset, length, data))
        if self._error:
            raise self._error

    def finish(self, size: int) -> None:
        """Wait for all of it, and for the hole at the end."""
        self._queue.put(None)
        self._thread.join()
        if self._error:
            raise self._error
        os.ftruncate(self.fd, size)
        self._zeros(size)

    def _work(self) -> None:
        while (frame := self._queue.get()) is not None:
            if self._error:
                continue
            try:
                self._write(*frame)
            except (OSError, ValueError, zlib.error) as error:
                self._error = error

    def _write(self, offset: int, length: int, data: bytes) -> None:
        plain = zlib.decompress(data, bufsize=length) if len(data) < length else data
        if len(plain) != length or offset < self.offset:
            raise ValueError("the stream is broken")
        self._zeros(offset)
        self.digest.update(plain)
        view = memoryview(plain)
        # A part is opened to append, which pwrite(2) obeys: grown to its place first, it appends there.
        os.ftruncate(self.fd, offset)
        while view:
            view = view[os.write(self.fd, view) :]
        self.offset = offset + length

    def _zeros(self, until: int) -> None:
        while self.offset < until:
            length = min(_STEP, until - self.offset)
            self.digest.update(_ZEROS if length == _STEP else _ZEROS[:length])
            self.offset += length


def _channel(host: Host, path: str, offset: int) -> Any:
    """Start sending there, and beat until the channel is closed."""
    channel = host.pipe(f"exec {host.agent_command('send')}")
    channel.settimeout(HEARTBEAT_TIMEOUT)
    request = json.dumps({"path": path, "offset": offset})
    channel.sendall(f"{host.stdin_preamble}{request}\n".encode())
    threading.Thread(target=_beat, args=(channel,), daemon=True).start()
    return channel


def _beat(channel: Any) -> None:
    with contextlib.suppress(OSError):
        while not channel.closed:
            time.sleep(BEAT)
            channel.sendall(b"\n")


def _frames(channel: Any, host: Host) -> Iterator[tuple[int, int, bytes]]:
    """Read frames until the one of the end; raises BuildError when they break off."""
    try:
        plain = 1
        while plain:
            offset, plain, packed = HEAD.unpack(_exactly(channel, HEAD.size))
            yield offset, plain, _exactly(channel, packed)
    except (OSError, EOFError) as error:
        told = str(error) or f"no byte came for {HEARTBEAT_TIMEOUT:.0f} s"
        raise BuildError(
            f"fetching from {host.name} broke off: {told}", "run it again: it goes on from where it was"
        ) from None


def _exactly(channel: Any, size: int) -> bytes:
    """Read so many bytes; raises EOFError with the last thing that the other side said."""
    chunks = []
    while size:
        chunk = channel.recv(min(size, _STEP))
        if not chunk:
            said = channel.recv_stderr(1 << 16).decode("utf-8", errors="replace").strip().splitlines()
            raise EOFError(said[-1] if said else "the connection was lost")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _publish(artifact: wire.Sent, part: Path, folder: Path) -> None:
    """Name the file when it is whole, then its manifest."""
    manifest = folder / f"{name(artifact)}.json"
    aside = part.with_suffix(".json")
    manifest.unlink(missing_ok=True)
    os.utime(part, ns=(artifact.mtime_ns, artifact.mtime_ns))
    os.replace(part, folder / name(artifact))
    (folder / f"{name(artifact)}.sha256").write_text(
        f"{artifact.sha256}  {name(artifact)}\n", encoding="ascii"
    )
    aside.write_text(_text(artifact), encoding="utf-8")
    os.replace(aside, manifest)


def put(path: Path, text: str) -> None:
    """Write a small file in one go."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise BuildError(
            f"cannot write {path}: {error.strerror or error}", "free some space, or name another: --to DIR"
        ) from None
