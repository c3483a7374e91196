"""A network between guests, with an observer on it: no address, no device, nothing of this host's own."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

MAC = bytes.fromhex("02000a010109")
"""The observer's own address on the network."""

EVERYBODY = b"\xff" * 6
LONGEST = 1 << 16


@dataclass
class Network:
    """A hub: what one port sends all others get, and the observer sees it all."""

    ports: list[socket.socket] = field(default_factory=list)
    ends: list[socket.socket] = field(default_factory=list)
    answers: list[tuple[float, str, str]] = field(default_factory=list)
    """Time, address and MAC address of every ARP reply to the observer."""

    def port(self) -> int:
        """Make a port; returns the descriptor of the end that a guest's network card gets."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        ours.setblocking(False)
        self.ports.append(ours)
        asyncio.get_running_loop().add_reader(ours, self._pass_on, ours)
        self.ends.append(theirs)
        return theirs.fileno()

    def _pass_on(self, port: socket.socket) -> None:
        try:
            frame = port.recv(LONGEST)
        except (BlockingIOError, ConnectionError):
            return
        for other in self.ports:
            if other is not port:
                self._send(other, frame)
        if frame[:6] == MAC and frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2":
            self.answers.append((time.monotonic(), socket.inet_ntoa(frame[28:32]), frame[22:28].hex(":")))

    def _send(self, port: socket.socket, frame: bytes) -> None:
        try:
            port.send(frame)
        except (BlockingIOError, ConnectionError):
            return  # as a wire does: a guest that does not listen, or has gone, misses it

    def ask(self, address: str, own: str) -> None:
        """Ask everybody who has an address (RFC 826)."""
        arp = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + MAC + socket.inet_aton(own)
        arp += bytes(6) + socket.inet_aton(address)
        for port in self.ports:
            self._send(port, (EVERYBODY + MAC + b"\x08\x06" + arp).ljust(60, b"\0"))

    async def answer(self, address: str, own: str, mac: str) -> float:
        """Ask until this MAC address says to have the address; returns when it did (time.monotonic())."""
        since = time.monotonic()
        while True:
            self.ask(address, own)
            await asyncio.sleep(0.1)
            for at, what, who in self.answers:
                if at >= since and what == address and who == mac:
                    return at


@asynccontextmanager
async def network() -> AsyncIterator[Network]:
    """A network that ends with its block."""
    made = Network()
    try:
        yield made
    finally:
        for port in made.ports:
            asyncio.get_running_loop().remove_reader(port)
        for end in (*made.ports, *made.ends):
            end.close()
