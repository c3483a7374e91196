"""Verb: turn the raw disk into every asked format in one reading, prove each file, then give it its name.

The disk is read front to back, holes skipped. Worker threads compress the units of each piece once for
every codec in use; this thread hands pieces to the writers in order, so that the number of threads
changes no byte. Then every finished file is read back by our own readers: each piece's SHA-256 must be
the raw disk's. Only then is a file renamed from its part.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from build import formats, wire
from build.agent import cloudstack, files, image, pace, store, sums
from build.agent.events import Emit, Failure
from build.formats import KINDS, raw
from build.formats.lib import outer, partitions, pieces
from build.formats.lib.codec import Codec, Deflate, Zlib
from build.formats.lib.findings import Damaged
from build.formats.lib.format import Target
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import Laid, Units, Writer

_SLICE = 1 << 20
_SPAN = 32
"""Pieces that are read back in one go by one thread."""


@dataclass
class Output:
    """One asked file on its way from part to name."""

    spec: dict[str, Any]
    folder: Path
    private: bool = False
    inner: BinaryIO | None = None
    writer: Writer | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Final file name."""
        return str(self.spec["file"])

    @property
    def compress(self) -> str:
        """Outer compression, empty for none."""
        return str(self.spec.get("compress") or "")

    @property
    def inner_name(self) -> str:
        """Name of the disk file without its outer compression."""
        return self.name.removesuffix(f".{self.compress}") if self.compress else self.name

    @property
    def part(self) -> Path:
        """Where the file grows until it is proven."""
        return self.folder / f".{self.name}.part"

    @property
    def inner_part(self) -> Path:
        """Where the disk file grows: the part itself unless it will be compressed."""
        return self.folder / f".{self.name}.inner.part" if self.compress else self.part

    def open(self, part: Path) -> BinaryIO:
        """Make a part, which must not be there."""
        return open(part, "x+b", buffering=1 << 18, opener=files.opener(self.private))


def run(request: wire.Convert, emit: Emit) -> wire.Converted:
    """Write them, prove them, name them. Raises Failure; then no asked name has changed."""
    started = time.monotonic()
    place = Path(request.location) if request.location else None
    path, outputs = Path(request.image), _outputs(request)
    with contextlib.ExitStack() as stack:
        if place:
            store.lock(place, emit, "convert")
        fd = stack.enter_context(_opened(path, request))
        status = os.fstat(fd)
        source = {"size": BoundedReader.whole(fd).size, "mtime_ns": status.st_mtime_ns}
        for output in outputs:
            output.private = request.private or files.is_private(status)
        wanted = [output for output in outputs if request.force or not _known(output, request, source)]
        if wanted:
            what = " ".join(sorted(output.spec["name"] for output in wanted))
            with pace.work(place, "convert", emit, what) as follow:
                disk = stack.enter_context(_disk(fd, path, request, follow))
                for output in wanted:
                    formats.check_size(output.spec["name"], output.spec["kind"], disk.size)
                _convert(fd, disk, wanted, request, source, follow, started)
        beside = _write_beside(outputs[0].folder, request, source)
    return wire.Converted(
        files=tuple(output.result for output in outputs),
        folder=request.outdir,
        beside=beside,
        virtual_size=outputs[0].result["virtual_size"],
        guest_sha256=outputs[0].result["guest_sha256"],
        private=outputs[0].private,
        notes=tuple(_notes(outputs)),
        seconds=round(time.monotonic() - started, 3),
    )


def _notes(outputs: list[Output]) -> Iterator[str]:
    for output in outputs:
        if text := formats.note(output.spec["name"], output.result["virtual_size"]):
            yield f"{output.name}: {text}"


@contextlib.contextmanager
def _opened(path: Path, request: wire.Convert) -> Iterator[int]:
    """A descriptor of the file to convert."""
    if request.foreign:
        with image.opened_file(path) as fd:
            yield fd
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Failure(f"there is no raw disk {path}", "make it first: inv build") from None
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _disk(fd: int, path: Path, request: wire.Convert, emit: Emit) -> Iterator[pieces.Disk]:
    """What a guest would see of the file: a raw disk of ours, or whatever a foreign file holds."""
    try:
        if not request.foreign:
            ours = raw.RawDisk(BoundedReader.whole(fd))
            partitions.refuse(ours)
            yield ours
            return
        with image.opened(fd, path.name, emit, work=request.outdir, disk=request.disk) as found:
            emit("note", text=f"{path.name}: {found.described}")
            _refuse_loss(found)
            disk = found.kind.read(found.reader)
            partitions.refuse(disk)
            yield disk
    except Damaged as damage:
        raise image.unreadable(path.name, damage) from None


def _refuse_loss(found: image.Image) -> None:
    """Raise Damaged for what a conversion would carry on as if it were right."""
    for finding in found.losses():
        raise Damaged.by(finding)


def _outputs(request: wire.Convert) -> list[Output]:
    folder = Path(request.outdir)
    outputs = [Output(dict(spec), folder) for spec in request.formats]
    if not outputs:
        raise Failure("no format is asked for", f"name one of {', '.join(KINDS)}")
    for output in outputs:
        kind = output.spec.setdefault("kind", output.spec["name"])
        if kind not in KINDS:
            raise Failure(f"unknown format {kind!r}", f"use one of {', '.join(KINDS)}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,200}", output.name):
            raise Failure(
                f"{output.name!r} is no name for an image file", "use letters, digits, dots and dashes"
            )
        if output.compress and (
            output.compress not in outer.KINDS or not output.name.endswith(f".{output.compress}")
        ):
            raise Failure(
                f"{output.name} cannot be compressed as {output.compress!r}",
                f"end the name with one of {', '.join(outer.KINDS)}",
            )
        if (
            output.name == Path(request.image).name
            and folder.resolve() == Path(request.image).parent.resolve()
        ):
            hint = "write elsewhere: --to FOLDER" if request.foreign else "give the artifact another name"
            raise Failure(f"{output.name} is the file to convert itself", hint)
    if len({output.name for output in outputs}) < len(outputs):
        raise Failure("two formats have the same file name", "give each its own name in the image definition")
    return outputs


def _key(output: Output, request: wire.Convert, source: dict[str, int]) -> str:
    """Hash of all that decides the file: disk, settings, who may read it, our code and the compressor."""
    told = [
        output.spec,
        output.private,
        request.identity,
        request.epoch,
        source,
        _code(),
        Deflate(12).maker,
        Zlib().maker,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _code() -> str:
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted((Path(__file__).parents[2] / "formats").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _known(output: Output, request: wire.Convert, source: dict[str, int]) -> bool:
    """Whether the file is there already, made from this disk in this way and untouched since."""
    try:
        manifest = json.loads((output.folder / f"{output.name}.json").read_text(encoding="utf-8"))
        now = (output.folder / output.name).stat()
        same = manifest["key"] == _key(output, request, source)
        same = same and manifest["stamp"] == {"size": now.st_size, "mtime_ns": now.st_mtime_ns}
        output.result = {**manifest["artifact"], "state": "cached"}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(same)


def _convert(
    fd: int,
    disk: pieces.Disk,
    outputs: list[Output],
    request: wire.Convert,
    source: dict[str, int],
    emit: Emit,
    started: float,
) -> None:
    folder = outputs[0].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.hold(folder, lambda: emit("note", text=f"waiting: another conversion into {folder}")):
            try:
                _make(fd, disk, outputs, request, source, emit, started)
            finally:
                _remove_parts(outputs)
    except Damaged as damage:
        raise image.unreadable(request.image, damage) from None
    except OSError as error:
        raise _explain(error, folder) from error


def _make(
    fd: int,
    disk: pieces.Disk,
    outputs: list[Output],
    request: wire.Convert,
    source: dict[str, int],
    emit: Emit,
    started: float,
) -> None:
    threads = request.threads or len(os.sched_getaffinity(0))
    _remove_parts(outputs)
    with ThreadPoolExecutor(threads) as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for output in outputs:
            output.inner = stack.enter_context(output.open(output.inner_part))
            target = Target(output.inner, disk.size, output.inner_name, request.epoch)
            write = formats.writer(output.spec["name"], output.spec["kind"])
            output.writer = write(target, output.spec.get("options") or {})
        content = _write(disk, outputs, pool, threads, emit)
        if {"size": BoundedReader.whole(fd).size, "mtime_ns": os.fstat(fd).st_mtime_ns} != source:
            raise Failure(
                f"{Path(request.image).name} was changed while it was read",
                "run it again when nothing writes to it",
            )
        for output in outputs:
            assert output.writer is not None
            assert output.inner is not None
            output.writer.close(f"{request.identity} {content.sha256}")
            output.inner.flush()
        _prove(outputs, content, pool, emit)
        known: Known = {}
        for output in outputs:
            if output.compress:
                packed = stack.enter_context(output.open(output.part))
                _compress(output, packed, known, pool, threads, request.epoch, emit)
        for output in outputs:
            _describe(output, content, request, source, time.monotonic() - started)
    _publish(outputs)


def _explain(error: OSError, folder: Path) -> Failure:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize >> 20
        return Failure(
            f"no space left in {folder} ({free} MiB free now)",
            "free some space there, or write elsewhere (LOCATION, or --to with --from)",
        )
    return Failure(f"{error.strerror or error}: {error.filename or folder}")


def _remove_parts(outputs: list[Output]) -> None:
    for output in outputs:
        for path in (output.part, output.inner_part, _aside(output)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()


@dataclass
class Content:
    """What the raw disk held when it was read: SHA-256 of each piece (zeros for a zero piece) and of all."""

    size: int
    digests: bytearray
    whole: Any = field(default_factory=hashlib.sha256)

    @property
    def sha256(self) -> str:
        """SHA-256 of it all, in hex."""
        return str(self.whole.hexdigest())

    def sha256_with(self, zeros: int) -> str:
        """The same with so many bytes of zeros behind it."""
        whole = self.whole.copy()
        for start in range(0, zeros, pieces.PIECE):
            whole.update(pieces.ZERO_PIECE[: min(pieces.PIECE, zeros - start)])
        return str(whole.hexdigest())

    def digest(self, index: int) -> bytes:
        """SHA-256 of a piece; 32 zero bytes for a piece of zeros."""
        return bytes(self.digests[32 * index : 32 * index + 32])


def _write(
    disk: pieces.Disk, outputs: list[Output], pool: ThreadPoolExecutor, threads: int, emit: Emit
) -> Content:
    """Read the disk once and feed every writer."""
    writers = [output.writer for output in outputs if output.writer is not None]
    size = disk.size
    codecs: list[Codec] = list(dict.fromkeys(writer.codec for writer in writers if writer.codec is not None))
    content = Content(size, bytearray(32 * pieces.count(size)))
    progress = pace.Progress("convert", size, emit)

    def work(data: bytes) -> tuple[bytes, Units]:
        units = pieces.units(data) if codecs else []
        packed = {one: [None if unit is None else one.compress(unit) for unit in units] for one in codecs}
        return hashlib.sha256(data).digest(), packed

    def hash_run(run: pieces.Run) -> None:
        for index in range(run.index, run.index + run.count):
            length = pieces.length(index, size)
            content.whole.update(pieces.ZERO_PIECE[:length] if run.data is None else run.data)
            progress.add(length)

    def finish(run: pieces.Run, hashed: Future[None], made: Future[tuple[bytes, Units]] | None) -> None:
        if made is not None and run.data is not None:
            digest, packed = made.result()
            content.digests[32 * run.index : 32 * run.index + 32] = digest
            for writer in writers:
                writer.add(run.index, run.data, packed)
        hashed.result()

    pending: deque[tuple[pieces.Run, Future[None], Future[tuple[bytes, Units]] | None]] = deque()
    with ThreadPoolExecutor(1) as in_order:
        try:
            for run in pieces.scan(disk):
                pending.append(
                    (run, in_order.submit(hash_run, run), pool.submit(work, run.data) if run.data else None)
                )
                if len(pending) > 2 * threads + 2:
                    finish(*pending.popleft())
            while pending:
                finish(*pending.popleft())
        finally:
            in_order.shutdown(wait=True, cancel_futures=True)
    return content


def _prove(outputs: list[Output], content: Content, pool: ThreadPoolExecutor, emit: Emit) -> None:
    """Read every disk file back, compare each piece, lint the tables, hash the file, bring it to the disk."""
    readers = [BoundedReader.whole(output.inner.fileno()) for output in outputs if output.inner is not None]
    hashed = sum(reader.size for output, reader in zip(outputs, readers, strict=True) if not output.compress)
    guests = sum(formats.rounded(output.spec["name"], content.size) for output in outputs)
    progress = pace.Progress("verify", guests + hashed, emit)
    tasks: list[Future[None]] = []
    with ThreadPoolExecutor(1) as slow:
        tasks.extend(
            slow.submit(os.fsync, reader.fd)
            for output, reader in zip(outputs, readers, strict=True)
            if not output.compress
        )
        for output, reader in zip(outputs, readers, strict=True):
            if not output.compress:
                tasks.append(pool.submit(_hash, output, reader, progress))
        for output, reader in zip(outputs, readers, strict=True):
            disk = _read(output, reader)
            if disk.size != formats.rounded(output.spec["name"], content.size):
                raise _mismatch(output, 0)
            total = pieces.count(disk.size)
            tasks.extend(
                pool.submit(_compare, output, disk, content, range(low, min(low + _SPAN, total)), progress)
                for low in range(0, total, _SPAN)
            )
        _wait_for(tasks)


def _wait_for(tasks: list[Future[None]]) -> None:
    """Wait until all are done; the first that fails ends those that have not begun."""
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _read(output: Output, reader: BoundedReader) -> pieces.Disk:
    try:
        return KINDS[output.spec["kind"]].read(reader)
    except Damaged as damage:
        raise Failure(f"{output.name}: read back, {damage}", "this is a defect: report it") from None


def _compare(
    output: Output, disk: pieces.Disk, content: Content, indexes: range, progress: pace.Progress
) -> None:
    for index in indexes:
        try:
            data = disk.piece(index)
        except Damaged as damage:
            raise Failure(
                f"{output.name}: read back, {damage}", "check this host's memory and disk, then run again"
            ) from None
        if not _is_same(data, index, content):
            raise _mismatch(output, index * pieces.PIECE)
        progress.add(pieces.length(index, disk.size))


def _is_same(data: bytes | None, index: int, content: Content) -> bool:
    """Whether a piece is the raw disk's; what lies behind that disk's end must be zeros."""
    if data is None or pieces.is_zero(data):
        return index >= pieces.count(content.size) or content.digest(index) == bytes(32)
    own = max(pieces.length(index, content.size), 0)
    return pieces.is_zero(data[own:]) and hashlib.sha256(data[:own]).digest() == content.digest(index)


def _mismatch(output: Output, offset: int) -> Failure:
    return Failure(
        f"{output.name}: read back, the content differs from the raw disk at byte {offset:#x} or soon after",
        "check this host's memory and disk, then run again",
    )


def _hash(output: Output, reader: BoundedReader, progress: pace.Progress | None = None) -> None:
    """Hash a file as it lies on the disk, all sums in one reading."""
    digests = {name: hashlib.new(name) for name in sums.SUMS.values()}
    window = memoryview(bytearray(_SLICE))
    offset = 0
    while length := os.preadv(reader.fd, [window], offset):
        offset += length
        for digest in digests.values():
            digest.update(window[:length])
        if progress:
            progress.add(length)
    output.result.update({name: digest.hexdigest() for name, digest in digests.items()})


Known = dict[tuple[int, int], outer.Origin]
"""Parts of the disk that are compressed already, with their streams."""


def _compress(
    output: Output,
    packed: BinaryIO,
    known: Known,
    pool: ThreadPoolExecutor,
    threads: int,
    epoch: int,
    emit: Emit,
) -> None:
    """Compress a proven disk file, and prove the result chunk by chunk against it."""
    assert output.inner is not None
    source = BoundedReader.whole(output.inner.fileno())
    packing = pace.Progress(f"compress {output.compress}", source.size, emit)
    layout = output.writer.layout if isinstance(output.writer, Laid) else ()
    told = outer.compress(
        output.compress,
        source,
        packed,
        output.inner_name,
        epoch,
        pool,
        2 * threads + 2,
        packing.add,
        layout,
        known if output.compress == "bz2" else None,
    )
    packed.flush()
    made = BoundedReader.whole(packed.fileno())
    checking = pace.Progress(f"verify {output.compress}", source.size, emit)
    count = len(told.chunks)
    tasks = [pool.submit(os.fsync, packed.fileno()), pool.submit(_hash, output, made)]
    tasks += [
        pool.submit(_compare_chunks, output, source, made, told, range(low, min(low + 16, count)), checking)
        for low in range(0, count, 16)
    ]
    _wait_for(tasks)
    if output.compress == "bz2":
        for number, chunk in enumerate(told.chunks):
            if chunk.key and number not in told.origins:
                place, end = told.places[number], told.places[number + 1]
                known[chunk.key] = outer.Origin(source, chunk, made, place, end - place)
    output.inner_part.unlink()


def _compare_chunks(
    output: Output,
    source: BoundedReader,
    made: BoundedReader,
    told: outer.Packed,
    numbers: range,
    progress: pace.Progress,
) -> None:
    for number in numbers:
        chunk, place = told.chunks[number], told.places[number]
        packed = made.read(place, told.places[number + 1] - place)
        content = source.read(chunk.offset, chunk.length)
        try:
            if origin := told.origins.get(number):  # whose stream was expanded and compared
                same = packed == origin.packed() and content == origin.content()
            else:
                same = outer.unpack(output.compress, packed, chunk.length) == content
        except ValueError:
            same = False
        if not same:
            raise _mismatch(output, chunk.offset)
        progress.add(chunk.length)


def _describe(
    output: Output, content: Content, request: wire.Convert, source: dict[str, int], seconds: float
) -> None:
    """Gather the manifest of a file: what it is, what it was made from and with what."""
    kind = str(output.spec["kind"])
    status = output.part.stat()
    makers = _makers(output)
    size = formats.rounded(output.spec["name"], content.size)
    output.result = {
        "file": output.name,
        "format": output.spec["name"],
        "state": "built",
        "virtual_size": size,
        "size": status.st_size,
        "allocated": status.st_blocks * 512,
        "guest_sha256": content.sha256_with(size - content.size),
        **{name: output.result[name] for name in sums.SUMS.values()},
        "seconds": round(seconds, 3),
        "writer": f"{kind} {KINDS[kind].version}",
        "compressor": ", ".join(makers),
        "reproducible": not any("zstd" in maker for maker in makers),
    }
    if register := output.spec.get("register"):
        checksum = "{SHA-512}" + output.result["sha512"]
        output.result["register"] = {**register, "checksum": checksum}
    manifest = {
        "artifact": output.result,
        "settings": {"format": output.spec, "identity": request.identity, "epoch": request.epoch},
        "about": request.about,
        "source": source,
        "key": _key(output, request, source),
        "stamp": {"size": status.st_size, "mtime_ns": status.st_mtime_ns},
    }
    _write_whole(_aside(output), json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def _makers(output: Output) -> list[str]:
    """Libraries and versions that decide the file's bytes."""
    inner = output.writer.codec if output.writer else None
    return ([inner.maker] if inner else []) + ([outer.maker(output.compress)] if output.compress else [])


def _aside(output: Output) -> Path:
    return output.folder / f".{output.name}.json.part"


def _write_whole(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(outputs: list[Output]) -> None:
    """Give every file its name. Sums of a file that is being replaced go first: a missing line is no lie."""
    folder = outputs[0].folder
    names = {output.name for output in outputs}
    for path in cloudstack.naming(folder, names):
        path.unlink()
    kept = {name: sums.kept(folder, name, names) for name in sums.SUMS}
    for name, lines in kept.items():
        sums.write(folder, name, lines)
    for output in outputs:
        (folder / f"{output.name}.json").unlink(missing_ok=True)
        os.replace(output.part, folder / output.name)
        os.replace(_aside(output), folder / f"{output.name}.json")
    for name, algorithm in sums.SUMS.items():
        added = {output.name: output.result[algorithm] for output in outputs}
        sums.write(folder, name, {**kept[name], **added})
    files.sync(folder)


def _write_beside(folder: Path, request: wire.Convert, source: dict[str, int]) -> dict[str, str]:
    """Write what CloudStack wants beside the files; answers all of it."""
    spec = request.cloudstack
    texts = cloudstack.texts(folder, spec, source) if spec else {}
    try:
        for name, text in texts.items():
            sums.replace(folder / name, text)
        if texts:
            files.sync(folder)
    except OSError as error:
        raise _explain(error, folder) from error
    return texts
