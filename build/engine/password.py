"""The root password's way into the image: hashed here, never on a command line."""

from __future__ import annotations

import base64
import hashlib

from passlib.hash import sha512_crypt

ROUNDS = 50000


def crypt(password: str, name: str) -> str:
    """Hash a password for /etc/shadow (SHA-512 crypt, crypt(5)); empty stays empty and means locked.

    The salt comes from the image's name, so that equal inputs give equal bytes.
    """
    if not password:
        return ""
    salt = base64.b64encode(hashlib.sha256(f"root@{name}".encode()).digest(), altchars=b"./").decode()[:16]
    hashed: str = sha512_crypt.using(salt=salt, rounds=ROUNDS).hash(password)
    return hashed
