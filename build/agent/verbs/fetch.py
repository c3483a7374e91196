"""Verb: bring the packages of a set into the shared cache, each checked against its SHA-256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from http import HTTPStatus
from pathlib import Path
from typing import Any

from build import debian, wire
from build.agent import store
from build.agent.debian import web
from build.agent.debian.web import Limit, Source
from build.agent.events import Emit, Failure

WORKERS = 6
"""Connections at a time: enough to fill a line, few enough for a mirror."""
ROOTS = Path(store.ROOT_LOCATION) / "debs"
"""Where root keeps packages by default; an ordinary user's build takes what is there from there."""
MIB = 1 << 20
OUT_OF_RANGE = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


class Gone(Failure):
    """The mirror does not have a package."""


class Meter:
    """Bytes that have come in, told at most ten times a second."""

    def __init__(self, total: int, emit: Emit) -> None:
        self._total, self._emit = total, emit
        self._done, self._told = 0, 0.0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def add(self, count: int) -> None:
        """Count bytes; a negative count takes back what has to come again."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._told < 0.1 and self._done < self._total:
                return
            self._told = now
            self._emit("progress", label="packages", done=self._done, total=self._total)


def run(request: wire.Fetch, emit: Emit) -> wire.Fetched:
    """Download what is missing from `debs` and answer where each package lies.

    Raises Failure for a file that is not what was signed, for
    a mirror that does not answer, and for a full disk; what has come by then stays and is not fetched again.
    """
    try:
        return _fetched(request, emit)
    finally:
        web.hang_up()


def _fetched(request: wire.Fetch, emit: Emit) -> wire.Fetched:
    folder = Path(request.debs)
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(request.apt_proxy)
    packages = request.packages
    with ThreadPoolExecutor(WORKERS) as pool:
        present = list(pool.map(lambda package: _have(package, folder), packages))
        missing = [package for package, there in zip(packages, present, strict=True) if not there]
        total = sum(package["size"] for package in missing)
        if missing and request.offline:
            raise _incomplete(missing, folder)
        _room(folder, missing)
        meter = Meter(total, emit)
        # Large ones first, so that none of them is left to come alone at the end.
        ordered = sorted(missing, key=lambda package: -package["size"])
        tasks = [pool.submit(_bring, package, folder, source, meter, request.lock) for package in ordered]
        wait(tasks, return_when=FIRST_EXCEPTION)
        meter.stopped.set()
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                pool.shutdown(cancel_futures=True)
                raise error
            task.cancel()
    return wire.Fetched(tuple(str(folder / filename(package)) for package in packages), total)


def _silent(kind: str, **fields: Any) -> None:
    """Tell nobody."""


def one(package: Mapping[str, Any], folder: Path, proxy: str) -> Path:
    """Bring one package, where it is not there; raises Failure as `run` does."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _have(package, folder):
        _bring(package, folder, Source(proxy), Meter(package["size"], _silent))
    return folder / filename(package)


def _incomplete(missing: Sequence[Mapping[str, Any]], folder: Path) -> Failure:
    damaged = {package["name"] for package in missing if (folder / filename(package)).exists()}
    names = [f"{p['name']} {p['version']}{' (damaged)' if p['name'] in damaged else ''}" for p in missing]
    shown = ", ".join([*names[:5], *([f"and {len(names) - 5} more"] if names[5:] else [])])
    return Failure(
        f"{len(missing)} packages are not in {folder}: {shown}",
        "run where there is a network: inv fetch; and copy that folder here",
    )


def _have(package: Mapping[str, Any], folder: Path) -> bool:
    """Whether a package is in the cache, or can be copied to it from root's."""
    return is_whole(folder / filename(package), package) or _borrow(package, folder)


def _borrow(package: Mapping[str, Any], folder: Path) -> bool:
    """Copy a package from where root's builds keep theirs, unless the copy turns out to be another's."""
    part = _part(folder, package)
    if folder == ROOTS or not is_whole(ROOTS / filename(package), package):
        return False
    with contextlib.suppress(OSError):
        shutil.copyfile(ROOTS / filename(package), part)
        if is_whole(part, package):
            _publish(package, part, folder)
            return True
    part.unlink(missing_ok=True)
    return False


def filename(package: Mapping[str, Any]) -> str:
    """Name of the .deb in the cache, as apt writes it."""
    return debian.deb(package["name"], package["version"], package["arch"])


def is_whole(path: Path, package: Mapping[str, Any]) -> bool:
    """Tell whether the cache has this very package."""
    try:
        if path.stat().st_size != package["size"]:
            return False
        with path.open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == package["sha256"])
    except (FileNotFoundError, PermissionError):
        return False


def _room(folder: Path, missing: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to start what cannot end."""
    started = sum(_size(_part(folder, package)) for package in missing)
    needed = sum(package["size"] for package in missing) - started
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _full(folder, needed, free)


def _full(folder: Path, needed: int, free: int) -> Failure:
    return Failure(
        f"no space for the packages in {folder}: {-(-needed // MIB)} MiB needed, {free // MIB} MiB free",
        "free some space, or set LOCATION to a larger disk",
    )


def _part(folder: Path, package: Mapping[str, Any]) -> Path:
    return folder / f".{package['sha256']}.part"


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _bring(package: Mapping[str, Any], folder: Path, source: Source, meter: Meter, lock: str = "") -> None:
    """Download one package from where an earlier attempt stopped, and give it its name when it is right."""
    part = _part(folder, package)
    try:
        for pause in (*web.PAUSES, None):
            try:
                digest = _receive(package, part, source, meter)
                break
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, web.TooMuch) or getattr(error, "status", None) == OUT_OF_RANGE:
                    # What has come is no part of that file.
                    part.unlink()
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise _full(folder, package["size"], shutil.disk_usage(folder).free) from error
                if pause is None or not web.is_passing(error):
                    raise web.failure(package["url"], source, error) from error
                if meter.stopped.wait(pause):
                    return
    except web.Absent:
        raise _absent(package, lock) from None
    if digest is None:
        return
    if digest != package["sha256"]:
        part.unlink()
        if lock:
            raise Failure(
                f"{package['url']} is not what {lock} names: it was changed at the same version",
                f"find out why; then: inv lock --update {package['name']}, or take a snapshot mirror",
            )
        raise Failure(
            f"{package['url']} is not what was signed: its SHA-256 differs",
            "try again, or use another mirror or proxy: this one hands out a wrong file",
        )
    _publish(package, part, folder)


def _absent(package: Mapping[str, Any], lock: str) -> Gone:
    if lock:
        return Gone(
            f"{package['name']} {package['version']} of {lock} is gone: {package['url']} is not there",
            "a snapshot mirror of that day has it (setting snapshot); or run: inv lock --update "
            + package["name"],
        )
    return Gone(
        f"{package['url']} is not there",
        "try again: the mirror has moved on (with --frozen: use a mirror that keeps old packages)",
    )


def _publish(package: Mapping[str, Any], part: Path, folder: Path) -> None:
    part.chmod(0o644)
    part.rename(folder / filename(package))


def _receive(package: Mapping[str, Any], part: Path, source: Source, meter: Meter) -> str | None:
    """Append what is missing to the part; answers the digest of the whole, None when told to stop."""
    digest = hashlib.sha256()
    with part.open("a+b") as file:
        size: int = package["size"]
        have = file.seek(0, os.SEEK_END)
        if have > size:
            have = file.truncate(0)
        meter.add(have)
        counted = have
        try:
            headers = {"Range": f"bytes={have}-"} if have else {}
            if have < size:
                with web.opened(package["url"], source, Limit.of(size), headers) as answer:
                    if answer.offset != have:
                        # A server without ranges starts over.
                        file.truncate(0)
                        meter.add(-have)
                        counted = 0
                    while chunk := answer.body.read(web.CHUNK):
                        if meter.stopped.is_set():
                            return None
                        file.write(chunk)
                        counted += len(chunk)
                        meter.add(len(chunk))
                if counted < size and "content-length" not in answer.headers:
                    raise http.client.IncompleteRead(b"", size - counted)
            file.flush()
            file.seek(0)
            while chunk := file.read(MIB):
                digest.update(chunk)
        except BaseException:
            meter.add(-counted)
            raise
    return digest.hexdigest()
