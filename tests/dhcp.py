"""Give everybody who asks on a device the same address: `dhcp.py DEVICE ADDRESS/PREFIX`.

Formats and numbers are those of RFC 2131 and RFC 2132.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys

HEAD = struct.Struct("!BBBBIHH4s4s4s4s16s192x4s")
COOKIE = bytes([99, 130, 83, 99])
KIND, MASK, LEASE, SERVER, END = 53, 1, 51, 54, 255
DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
SECONDS = 3600


def options(text: bytes) -> dict[int, bytes]:
    """Options of a message by their numbers."""
    found: dict[int, bytes] = {}
    while text and text[0] != END:
        if text[0]:
            found[text[0]] = text[2 : 2 + text[1]]
        text = text[2 + text[1] :] if text[0] else text[1:]
    return found


def reply(message: bytes, given: ipaddress.IPv4Interface) -> bytes:
    """What a message is answered by; empty when it asks for nothing."""
    if len(message) < HEAD.size:
        return b""
    _, kind, length, _, transaction, _, flags, *_, hardware, cookie = HEAD.unpack_from(message)
    asked = options(message[HEAD.size :]).get(KIND, b"")
    answer = {DISCOVER: OFFER, REQUEST: ACK}.get(asked[0] if asked else 0)
    if cookie != COOKIE or answer is None:
        return b""
    own, none = given.network[1].packed, bytes(4)
    head = HEAD.pack(
        2, kind, length, 0, transaction, 0, flags, none, given.ip.packed, own, none, hardware, COOKIE
    )
    said = {
        KIND: bytes([answer]),
        SERVER: own,
        LEASE: SECONDS.to_bytes(4, "big"),
        MASK: given.netmask.packed,
    }
    return head + b"".join(bytes([number, len(data)]) + data for number, data in said.items()) + bytes([END])


def main(device: str, address: str) -> None:
    """Answer until somebody ends it."""
    given = ipaddress.IPv4Interface(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        line.bind(("", 67))
        while True:
            if answer := reply(line.recv(1 << 12), given):
                line.sendto(answer, ("255.255.255.255", 68))


if __name__ == "__main__":
    main(*sys.argv[1:])
