"""LOCATION/secret: what a host keys its digests and salts with. It never leaves the host."""

from __future__ import annotations

import base64
import fcntl
import hmac
import os
import secrets
from pathlib import Path

from build.agent import files
from build.agent.events import Failure

SIZE = 32
"""Bytes of a secret."""


def key(location: Path, create: bool) -> bytes:
    """The secret of a LOCATION; with `create` it is made where there is none, or half a one.

    Without, it is empty where there is none that we may read. Raises Failure when it cannot be made or read.
    """
    file = location / "secret"
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY)
    try:
        handle = os.open(file, flags, 0o600)
    except OSError as error:
        if not create:
            return b""
        raise Failure(f"cannot use {file}: {error.strerror}", "remove it, or build elsewhere") from None
    with os.fdopen(handle, "rb") as held:
        if create:
            fcntl.flock(held, fcntl.LOCK_EX)
        found = held.read(SIZE)
        if len(found) == SIZE:
            return found
        if not create:
            return b""
        if not os.path.samestat(os.fstat(handle), os.lstat(file)):
            return key(location, create)  # somebody made it while we waited
        made = secrets.token_bytes(SIZE)
        files.write(file, made, 0o600)
        return made


def salt(secret: bytes, name: str) -> str:
    """The salt of an image's password: 96 bits in the alphabet of crypt(5), of HMAC-SHA256 (RFC 2104)."""
    return base64.b64encode(hmac.digest(secret, name.encode(), "sha256"), altchars=b"./").decode()[:16]


def digest(secret: bytes, value: str) -> str:
    """HMAC-SHA256 of a value in hex, so that a layer's key tells nothing about the value."""
    return hmac.digest(secret, value.encode(), "sha256").hex()
