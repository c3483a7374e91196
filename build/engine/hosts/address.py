"""What `-H HOST` means: the address, user, keys and hops that `ssh` itself would take.

`ssh -G HOST` prints them, with Include and Match followed (ssh(1), ssh_config(5)); this module writes its
command line and reads its answer. Pure: the engine runs the command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build.engine.errors import BuildError

PORT = 22


@dataclass(frozen=True)
class Destination:
    """A host as it is written behind -H or ProxyJump, [user@]name[:port]; no user, and port 0, are open."""

    name: str
    user: str = ""
    port: int = 0

    @property
    def words(self) -> list[str]:
        """Arguments that mean it to ssh(1) and to ssh-keyscan's kin."""
        user = ["-l", self.user] if self.user else []
        return [*user, *(["-p", str(self.port)] if self.port else []), self.name]


@dataclass(frozen=True)
class Address:
    """Where to connect, as whom, with what, and past whom."""

    host: str
    port: int
    user: str
    keys: tuple[Path, ...] = ()
    """Private key files that exist."""
    only_keys: bool = False
    """Of the agent's keys take only those of `keys` (IdentitiesOnly)."""
    agent: str | None = None
    """Socket of the agent; None is the environment's, empty is none."""
    jumps: tuple[str, ...] = ()
    """Hops on the way, the nearest first."""
    proxy: str = ""
    """Command whose stdin and stdout are the connection."""
    known_hosts: tuple[Path, ...] = ()
    """Files of known keys, the user's first; the first is where a new key belongs."""
    alias: str = ""
    """Name under which the key is known, if not the address (HostKeyAlias)."""
    timeout: int = 20
    """Seconds for the connection to open."""

    @property
    def known_as(self) -> str:
        """How known_hosts names it (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
        return self.alias or (self.host if self.port == PORT else f"[{self.host}]:{self.port}")


def read(text: str) -> Destination:
    """Read [ssh://][user@]name[:port]; an IPv6 address with a port stands in brackets. Raises BuildError."""
    user, _, rest = text.removeprefix("ssh://").rstrip("/").rpartition("@")
    name, port = rest, ""
    if found := re.fullmatch(r"\[([^]]+)\](?::(\d+))?", rest):
        name, port = found[1], found[2] or ""
    elif rest.count(":") == 1:
        name, _, port = rest.partition(":")
    valid = name and not name.startswith("-") and not user.startswith("-") and not re.search(r"\s", text)
    if not valid or (port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise BuildError(f"{text!r} is no host", "write -H [USER@]HOST[:PORT]")
    return Destination(name, user, int(port or 0))


def question(destination: Destination, jumps: Sequence[str] = ()) -> list[str]:
    """The command that tells how ssh reads a host; `jumps` are the hops before it, if it is one itself."""
    return ["ssh", "-G", "-T", *(["-J", ",".join(jumps)] if jumps else []), *destination.words]


def parse(answer: str, environ: Mapping[str, str], home: Path) -> Address:
    """Read what `ssh -G` printed; `home` is what ~ means."""
    values: dict[str, list[str]] = {}
    for line in answer.splitlines():
        key, _, value = line.partition(" ")
        values.setdefault(key.lower(), []).append(value.strip())

    def one(key: str, default: str = "") -> str:
        value = values.get(key, [default])[0]
        return "" if value.lower() == "none" else value

    host, port, user = one("hostname"), int(one("port", str(PORT))), one("user")
    tokens = {"%": "%", "h": host, "n": host, "p": str(port), "r": user, "u": user, "d": str(home)}
    keys = [_path(expand(value, tokens), home) for value in values.get("identityfile", ())]
    known = " ".join((one("userknownhostsfile"), one("globalknownhostsfile"))).split()
    agent = one("identityagent", "SSH_AUTH_SOCK")
    timeout = one("connecttimeout")
    return Address(
        host,
        port,
        user,
        tuple(dict.fromkeys(key for key in keys if key.is_file())),
        one("identitiesonly") == "yes",
        None if agent == "SSH_AUTH_SOCK" else _socket(expand(agent, tokens), environ, home),
        tuple(hop for hop in one("proxyjump").split(",") if hop),
        expand(one("proxycommand"), tokens),
        tuple(_path(expand(name, tokens), home) for name in known),
        one("hostkeyalias"),
        int(timeout) if timeout.isdigit() and int(timeout) else 20,
    )


def expand(text: str, tokens: Mapping[str, str]) -> str:
    """Fill in ssh_config's percent tokens; one that is not known stays as it is."""
    return re.sub("%(.)", lambda found: tokens.get(found[1], found[0]), text)


def _path(text: str, home: Path) -> Path:
    return home / text[2:] if text.startswith("~/") else Path(text)


def _socket(text: str, environ: Mapping[str, str], home: Path) -> str:
    if text.startswith("$"):
        return environ.get(text[1:].strip("{}"), "")
    return str(_path(text, home)) if text else ""


def home_of(uid: int) -> Path:
    """The home that ssh(1) uses, which is the user database's; $HOME where that knows nothing."""
    import pwd

    try:
        return Path(pwd.getpwuid(uid).pw_dir)
    except KeyError:
        return Path(os.environ.get("HOME", "/"))
