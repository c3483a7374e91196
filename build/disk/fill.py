"""Copy the content of files to their places in a disk, take its digest in the same pass, and tell about it.

Usage: fill.py PLAN.json IMAGE COPIES.json ROOT MANIFEST.json

COPIES.json is what ext4.py found missing, ROOT the top of the tree. The manifest gets SHA-256, bytes
allocated and all that was planned.

Prints progress, `LABEL<TAB>DONE<TAB>TOTAL` a line, in bytes. Holes are not read. Meanwhile the kernel brings
the image to the disk: whoever gives it its name next need not wait for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterable

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build.disk.tree import BLOCK, Copy

CHUNK = 1 << 20
ZEROS = memoryview(bytes(CHUNK))
AHEAD = 16
"""Chunks that may wait for their digest."""
Part = tuple[memoryview, bytearray | None]
"""What an image holds, and the buffer it lies in, if it is one to give back."""


class Digest(threading.Thread):
    """SHA-256 of what it is given, taken beside whoever gives it, with a line of progress every 64 MiB."""

    def __init__(self, size: int) -> None:
        super().__init__(daemon=True)
        self.size = size
        self.sum = hashlib.sha256()
        self.given: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self.buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(AHEAD):
            self.buffers.put(bytearray(CHUNK))

    def run(self) -> None:
        """Work until there is no more."""
        done = told = 0
        while (part := self.given.get()) is not None:
            data, buffer = part
            self.sum.update(data)
            done += len(data)
            if buffer is not None:
                self.buffers.put(buffer)
            if done - told >= 64 * CHUNK or done == self.size:
                told = done
                print("disk", done, self.size, sep="\t", flush=True)

    def end(self) -> str:
        """The digest, once all is in it."""
        self.given.put(None)
        self.join()
        return self.sum.hexdigest()


class Fill:
    """Completes an image from its start to its end; all that it then holds goes into the digest."""

    def __init__(self, handle: int, digest: Digest) -> None:
        self.handle, self.digest = handle, digest
        self.start = self.length = 0
        self.buffer = digest.buffers.get()

    def copy(self, copies: Iterable[Copy], root: str, size: int) -> None:
        """Copy files to their places, and tell of what lies between."""
        for place, length, path, begin in copies:
            if place != self.start + self.length:
                self.write()
                self.keep(place)
            handle = os.open(f"{root}/{path}", os.O_RDONLY | os.O_NOFOLLOW)
            try:
                self.take(handle, begin, length)
            except EOFError:
                sys.exit(f"{path} has changed while it was copied")
            finally:
                os.close(handle)
            self.pad()
        self.write()
        self.keep(size)

    def take(self, handle: int, position: int, length: int) -> None:
        """Copy part of a file; raises EOFError where it is shorter than it was."""
        while length:
            count = os.preadv(handle, [self.room()[:length]], position)
            if not count:
                raise EOFError
            self.length, position, length = self.length + count, position + count, length - count

    def pad(self) -> None:
        """Fill the last block up."""
        if rest := -self.length % BLOCK:
            self.room()[:rest] = ZEROS[:rest]
            self.length += rest

    def room(self) -> memoryview:
        """What is free of the buffer."""
        if self.length == CHUNK:
            self.write()
        return memoryview(self.buffer)[self.length :]

    def write(self) -> None:
        """Write the buffer where it belongs, and pass it on."""
        done = 0
        while done < self.length:  # a disk that is nearly full takes a part of it
            done += os.pwrite(self.handle, memoryview(self.buffer)[done : self.length], self.start + done)
        self.pass_on()

    def pass_on(self) -> None:
        """Give the buffer to the digest, and go on behind it with another."""
        if self.length:
            self.digest.given.put((memoryview(self.buffer)[: self.length], self.buffer))
            self.buffer = self.digest.buffers.get()
        self.start, self.length = self.start + self.length, 0

    def keep(self, end: int) -> None:
        """Leave the image as it is up to a byte; holes are not read."""
        while self.start < end:
            try:
                data = min(os.lseek(self.handle, self.start, os.SEEK_DATA), end)
            except OSError:
                data = end
            hole = min(os.lseek(self.handle, data, os.SEEK_HOLE), end) if data < end else end
            for place in range(self.start, data, CHUNK):
                self.digest.given.put((ZEROS[: data - place], None))
            self.start = data
            while self.start < hole:
                self.take(self.handle, self.start, min(CHUNK, hole - self.start))
                self.pass_on()


def flush(handle: int, over: threading.Event) -> None:
    """Bring to the disk what is written, again and again, and all of it once nothing more comes."""
    while not over.wait(0.2):
        os.fdatasync(handle)
    os.fsync(handle)


def main(plan_path: str, image: str, copies_path: str, root: str, manifest: str) -> None:
    """Complete an image and write its manifest."""
    with open(plan_path, encoding="utf-8") as file:
        plan = json.load(file)
    with open(copies_path, encoding="utf-8") as file:
        copies = json.load(file)
    handle = os.open(image, os.O_RDWR)
    over = threading.Event()
    flusher = threading.Thread(target=flush, args=(handle, over))
    flusher.start()
    digest = Digest(plan["size"])
    digest.start()
    try:
        Fill(handle, digest).copy(copies, root, plan["size"])
        sha256 = digest.end()
    finally:
        over.set()
        flusher.join()
        os.close(handle)
    told = {"sha256": sha256, "allocated": os.stat(image).st_blocks * 512}
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump({**plan, **told}, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads the progress was killed: so are we
    main(*sys.argv[1:])
