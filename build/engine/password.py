"""The root password's way into the image: hashed here, never on a command line."""

from __future__ import annotations

import re

from passlib.hash import sha512_crypt

ROUNDS = 50000

_CHARACTER = "[./0-9A-Za-z]"
HASH = re.compile(
    "|".join(
        (
            rf"\$g?y\${_CHARACTER}+\${_CHARACTER}{{,86}}\${_CHARACTER}{{43}}",
            rf"\$7\${_CHARACTER}{{11,97}}\${_CHARACTER}{{43}}",
            rf"\$2[aby]\$[0-9]{{2}}\${_CHARACTER}{{53}}",
            rf"\$6\$(rounds=[1-9][0-9]+\$)?{_CHARACTER}{{1,16}}\${_CHARACTER}{{86}}",
        )
    )
)
"""Hashes as crypt(5) writes them, of the methods that Debian's libxcrypt does not call legacy."""


def crypt(password: str, salt: str) -> str:
    """Hash a password for /etc/shadow (SHA-512 crypt, crypt(5)); `salt` is of that alphabet, 16 at most."""
    hashed: str = sha512_crypt.using(salt=salt, rounds=ROUNDS).hash(password)
    return hashed


def check_hash(text: str) -> None:
    """Raise ValueError, which does not show it, for what is no hash that an image can have."""
    if not HASH.fullmatch(text):
        raise ValueError("not a whole hash of crypt(5) with $y$, $gy$, $7$, $2b$ or $6$; mind a shell's $")
