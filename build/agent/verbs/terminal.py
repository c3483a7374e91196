"""Verb: hand a request to a program that takes over the terminal, and lend it this session's life.

The program comes over a login of its own, without beats. It connects to a socket of the session's agent,
reads its request there and holds the connection: its end is the end of the session, and so of the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import threading
from typing import Any

from build import wire
from build.agent.events import Emit, Failure

_lent: list[socket.socket] = []
"""Ends of connections; the kernel closes them with this process, whatever ends it."""


def run(request: wire.Terminal, emit: Emit) -> wire.Lent:
    """Open the socket by which a program of the same user gets the request."""
    token = secrets.token_hex(16)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(_name(token))
    server.listen()
    threading.Thread(target=_hand_out, args=(server, request.request), daemon=True).start()
    return wire.Lent(token)


def claim(token: str) -> tuple[dict[str, Any], socket.socket]:
    """Get the request and the connection that ends with the session; raises Failure when it has ended."""
    session = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        session.connect(_name(token))
        with session.makefile("rb") as lines:
            return json.loads(lines.readline()), session
    except (OSError, ValueError) as error:
        raise Failure("the session that asked for this has ended", "run it again") from error


def _name(token: str) -> str:
    """An abstract name (unix(7)): no file is made that could be left over."""
    return f"\0systemvm-{token}"


def _hand_out(server: socket.socket, request: dict[str, Any]) -> None:
    """Serve the first caller who is this very user: anybody may knock on an abstract name."""
    with server:
        while True:
            caller, _ = server.accept()
            told = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", told)[1] != os.getuid():
                caller.close()
                continue
            _lent.append(caller)
            with contextlib.suppress(OSError):
                caller.sendall(json.dumps(request).encode() + b"\n")
            return
