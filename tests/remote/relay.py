"""A ProxyCommand that makes a host far away: `relay.py HOST PORT LATE LOG`, LATE in seconds each way.

LOG grows by one byte each time the client speaks after the host has spoken: that many round trips it made.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

CHUNK = 1 << 16


async def relay(host: str, port: int, late: float, log: int) -> None:
    """Relay until either side has ended."""
    loop = asyncio.get_running_loop()
    theirs, to_host = await asyncio.open_connection(host, port)
    ours = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(ours), os.fdopen(0, "rb"))
    answered = True

    async def hand_on(source: asyncio.StreamReader, target: Callable[[bytes], object], client: bool) -> None:
        nonlocal answered
        while data := await source.read(CHUNK):
            if client and answered:
                os.write(log, b".")
            answered = not client
            loop.call_later(late, target, data)
        await asyncio.sleep(2 * late)

    ways = (hand_on(ours, to_host.write, True), hand_on(theirs, to_client, False))
    await asyncio.wait(map(asyncio.ensure_future, ways), return_when=asyncio.FIRST_COMPLETED)


def to_client(data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    with Path(arguments[3]).open("wb", buffering=0) as log:
        asyncio.run(relay(arguments[0], int(arguments[1]), float(arguments[2]), log.fileno()))
