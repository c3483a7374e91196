"""Tell about a finished disk: SHA-256, bytes allocated, and all that was planned.

Usage: digest.py PLAN.json IMAGE MANIFEST.json

Prints progress, `LABEL<TAB>DONE<TAB>TOTAL` a line, in bytes. Holes are not read. Meanwhile the kernel brings
the image to the disk: whoever gives it its name next need not wait for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator

CHUNK = 1 << 20
ZEROS = bytes(CHUNK)


def pieces(handle: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """Cut a file into chunks: start, end, and whether there is data."""
    position = 0
    while position < size:
        try:
            data = os.lseek(handle, position, os.SEEK_DATA)
        except OSError:
            data = size
        hole = os.lseek(handle, data, os.SEEK_HOLE) if data < size else size
        for start, end, full in ((position, data, False), (data, hole, True)):
            for chunk in range(start, end, CHUNK):
                yield chunk, min(chunk + CHUNK, end), full
        position = hole


def sha256(path: str, size: int) -> str:
    """Digest of a file, with a line of progress every 64 MiB."""
    digest = hashlib.sha256()
    told = 0
    handle = os.open(path, os.O_RDONLY)
    flush = threading.Thread(target=os.fsync, args=(handle,))
    flush.start()
    try:
        for start, end, full in pieces(handle, size):
            digest.update(os.pread(handle, end - start, start) if full else memoryview(ZEROS)[: end - start])
            if end - told >= 64 * CHUNK or end == size:
                told = end
                print("checksum", end, size, sep="\t", flush=True)
    finally:
        flush.join()
        os.close(handle)
    return digest.hexdigest()


def main(plan_path: str, image: str, manifest: str) -> None:
    """Write the manifest of an image."""
    with open(plan_path, encoding="utf-8") as file:
        plan = json.load(file)
    told = {"sha256": sha256(image, plan["size"]), "allocated": os.stat(image).st_blocks * 512}
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump({**plan, **told}, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads the progress was killed: so are we
    main(*sys.argv[1:])
