"""Opens the connection behind -H: addresses as ssh reads them, unknown host keys refused on every hop."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from invoke import Config, Context
from invoke.exceptions import ThreadException

from build.engine import prompt
from build.engine.errors import BuildError, HostError
from build.engine.hosts import address, knownhosts
from build.engine.hosts.address import Address, Destination
from build.engine.hosts.host import Host

HOPS = 8
"""Longest way over jump hosts; a longer one goes in a circle."""
QUICK = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
"""Ciphers that need no second pass over the data for a checksum."""
_agents = threading.Lock()


@contextmanager
def connect(name: str, config: Config) -> Iterator[Context]:
    """Give a context that runs commands on this host: a local one, or an open SSH connection.

    Raises BuildError: out of reach, not let in, or not the host that is known.
    """
    if not name:
        yield Context(config.clone())
        return
    with ExitStack() as stack:
        yield _open(address.read(name), (), config, stack)


def _open(
    destination: Destination,
    jumps: tuple[str, ...],
    config: Config,
    stack: ExitStack,
    hops: int = 0,
    unlocked: Any = None,
) -> Any:
    """Open one hop, the hops before it first; with a key that a passphrase unlocked if nothing else helps."""
    from fabric import Config as SshConfig  # only a remote run pays for the import
    from fabric import Connection
    from paramiko import AuthenticationException, ProxyCommand, SSHException

    if hops > HOPS:
        raise BuildError(
            f"the way to {destination.name!r} goes in a circle", "correct ProxyJump in ~/.ssh/config"
        )
    found = resolve(destination, jumps, config)
    entries = [entry for file in found.known_hosts for entry in _entries(file)]
    options: dict[str, Any] = {
        "key_filename": [str(key) for key in found.keys],
        "look_for_keys": False,
        "pkey": unlocked,
        "transport_factory": _transport(knownhosts.kinds(entries, _names(found))),
    }
    try:
        if found.jumps:
            last = _open(address.read(found.jumps[-1]), found.jumps[:-1], config, stack, hops + 1)
            options["sock"] = last.transport.open_channel(
                "direct-tcpip", (found.host, found.port), ("", 0), timeout=found.timeout
            )
        elif found.proxy:
            options["sock"] = ProxyCommand(f"sh -c {shlex.quote(f'exec {found.proxy}')}")
        connection = Connection(
            found.host,
            found.user,
            found.port,
            config=config.clone(into=SshConfig),  # so cloned, it has read no ssh_config of its own
            gateway=False,
            connect_timeout=found.timeout,
            connect_kwargs=options,
        )
        connection.client.set_missing_host_key_policy(HostKeyPolicy(destination, found, entries, bool(hops)))
        connection.client._agent = _agent(found)  # Paramiko asks the environment's for all of its keys
        stack.callback(connection.client.close)  # Fabric's own close passes over one that was refused
        stack.callback(connection.close)
        connection.open()
    except AuthenticationException as error:
        locked = [key for key in found.keys if _is_locked(key)]
        if unlocked is None and (unlocked := _unlock(locked)):
            return _open(destination, jumps, config, stack, hops, unlocked)
        keys = ", ".join(map(str, found.keys)) or "no key file"
        raise _kind(hops)(
            f"{_what(destination, hops)}: permission denied (publickey) for {found.user} with {keys}, "
            f"keys of the agent ({error})",
            f"unlock {locked[0]}: ssh-add {locked[0]}"
            if locked and not unlocked
            else f"try: ssh {shlex.join(destination.words)} true",
        ) from None
    except (OSError, EOFError, SSHException) as error:
        reason = str(error) or type(error).__name__
        raise _kind(hops)(
            f"cannot reach {_what(destination, hops)}: {reason}",
            f"try: ssh {shlex.join(destination.words)} true",
        ) from None
    return connection


def _is_locked(key: Path) -> bool:
    """Whether only a passphrase opens this private key."""
    from paramiko import PKey

    try:
        PKey.from_path(key)
    except TypeError:  # how `cryptography` says it, of every kind of key
        return True
    except Exception:
        return False
    return False


def _unlock(locked: Iterable[Path]) -> Any:
    """Open the first of these keys whose passphrase somebody knows, each asked for once a run; else None."""
    from paramiko import PKey

    for key in locked:
        if given := prompt.once(f"passphrase of {key} (empty: do without)"):
            try:
                return PKey.from_path(key, given.encode())
            except ValueError:
                raise BuildError(f"that is not the passphrase of {key}", "run it again") from None
    return None


def resolve(destination: Destination, jumps: tuple[str, ...], config: Config) -> Address:
    """Ask ssh how it reads the host; without one here Paramiko reads ~/.ssh/config, without its Include."""
    home = address.home_of(os.getuid())
    if shutil.which("ssh"):
        question = f"{shlex.join(address.question(destination, jumps))} 2>&1"
        answer = Host("", Context(config.clone())).run(question, check=False)
        if "\nhostname " in f"\n{answer}":
            return address.parse(answer, os.environ, home)
        told = (answer.strip().splitlines() or ["ssh -G failed"])[-1]
        if "No user exists for uid" not in told:
            raise BuildError(
                f"ssh cannot read the host {destination.name!r}: {told}", "correct ~/.ssh/config"
            )
    return _reckon(destination, jumps, home)


def _reckon(destination: Destination, jumps: tuple[str, ...], home: Path) -> Address:
    """Read ~/.ssh/config and write what `ssh -G` would print."""
    from paramiko import ConfigParseError, SSHConfig

    try:
        local = getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        raise BuildError(
            f"this machine has no name for its user {os.getuid()}",
            f"give one: LOGNAME={destination.user or 'NAME'} ./inv -H ...",
        ) from None
    file = home / ".ssh" / "config"
    try:
        given = SSHConfig.from_path(str(file)).lookup(destination.name) if file.is_file() else {}
    except ConfigParseError as error:
        raise BuildError(f"{file}: {error}", "correct it, or install an ssh client") from None
    rows = [
        f"hostname {given.get('hostname', destination.name)}",
        f"port {destination.port or given.get('port', address.PORT)}",
        f"user {destination.user or given.get('user', local)}",
        f"proxyjump {','.join(jumps) or given.get('proxyjump', 'none')}",
        f"proxycommand {given.get('proxycommand', 'none') if not jumps else 'none'}",
        f"identitiesonly {given.get('identitiesonly', 'no')}",
        f"identityagent {given.get('identityagent', 'SSH_AUTH_SOCK')}",
        f"hostkeyalias {given.get('hostkeyalias', 'none')}",
        f"connecttimeout {given.get('connecttimeout', 'none')}",
        f"userknownhostsfile {given.get('userknownhostsfile', '~/.ssh/known_hosts ~/.ssh/known_hosts2')}",
        f"globalknownhostsfile {given.get('globalknownhostsfile', '/etc/ssh/ssh_known_hosts')}",
    ]
    keys = given.get("identityfile") or [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
    return address.parse("\n".join([*rows, *(f"identityfile {key}" for key in keys)]), os.environ, home)


def is_cut(error: Exception) -> bool:
    """Whether this is how libraries say that a connection is no more."""
    from paramiko import SSHException

    # An operating system's error has a number; that of Paramiko's closed channel has none.
    closed = type(error) is OSError and error.errno is None
    return closed or isinstance(error, SSHException | EOFError | ThreadException)


class HostKeyPolicy:
    """Decides about every host key: Paramiko is given no known ones of its own, so it always asks."""

    def __init__(
        self, destination: Destination, found: Address, entries: list[knownhosts.Entry], hop: bool
    ) -> None:
        self.destination = destination
        self.found = found
        self.entries = entries
        self.hop = hop

    def missing_host_key(self, _client: Any, _hostname: str, key: Any) -> None:
        """Return if the key is the known one; raise BuildError with the command that fixes it."""
        found, shown = self.found, key.asbytes()
        verdict, lines = knownhosts.judge(self.entries, _names(found), key.get_name(), shown)
        if verdict == "known":
            return
        what = f"the host key of {_what(self.destination, int(self.hop))} ({found.known_as})"
        mark = f"it shows {key.get_name()} {knownhosts.fingerprint(shown)}"
        if verdict == "revoked":
            raise _kind(self.hop)(
                f"{what} is revoked by {lines[0].file} line {lines[0].line}; {mark}", "ask who runs it"
            )
        if verdict == "changed":
            forget = shlex.join(["ssh-keygen", "-f", lines[0].file, "-R", found.known_as])
            raise _kind(self.hop)(
                f"{what} does not match line {lines[0].line} of {lines[0].file}; {mark}",
                f"if it was changed on purpose: {forget}, then make the new one known",
            )
        file = shlex.quote(str(found.known_hosts[0])) if found.known_hosts else "~/.ssh/known_hosts"
        port = ["-p", str(found.port)] if found.port != address.PORT else []
        scan = shlex.join(["ssh-keyscan", *port, "-t", key.get_name().removeprefix("ssh-"), found.host])
        if found.jumps or found.proxy or found.alias:
            # ssh-keyscan goes straight there and writes the address.
            scan = shlex.join(["echo", f"{found.known_as} {key.get_name()} {key.get_base64()}"])
        raise _kind(self.hop)(
            f"{what} was not found in known_hosts; {mark}", f"compare that, then: {scan} >> {file}"
        )


def _names(found: Address) -> list[str]:
    return list(dict.fromkeys([found.known_as, found.alias or found.host]))


def _kind(hops: int) -> type[BuildError]:
    """What names a build host names it for people; a jump host is not the one that was asked for."""
    return BuildError if hops else HostError


def _what(destination: Destination, hops: int) -> str:
    return f"{'jump host' if hops else 'build host'} {destination.name!r}"


def _entries(file: Path) -> list[knownhosts.Entry]:
    try:
        return knownhosts.parse(file.read_text(encoding="utf-8", errors="replace"), str(file))
    except OSError:
        return []


def _transport(kinds: list[str]) -> Any:
    """Make transports that ask for a key of a known type first, and for the quickest cipher."""
    from paramiko import Transport

    def make(sock: Any, **options: Any) -> Any:
        transport = Transport(sock, **options)
        offered = transport.get_security_options()
        wanted = [*(kind for kind in kinds if kind != "ssh-rsa"), "rsa-sha2-512", "rsa-sha2-256"]
        if kinds:
            offered.key_types = sorted(offered.key_types, key=lambda kind: _place(kind, wanted))
        offered.ciphers = sorted(offered.ciphers, key=lambda cipher: _place(cipher, QUICK))
        return transport

    return make


def _place(name: str, order: Any) -> int:
    return list(order).index(name) if name in order else len(order)


def _agent(found: Address) -> Any:
    """Connect to the agent that ssh would ask; of its keys, only the named ones if it is to be so."""
    from paramiko import Agent

    with _agents:  # Paramiko finds the socket in the environment, which all hosts share
        before = os.environ.get("SSH_AUTH_SOCK")
        try:
            if found.agent is not None:
                os.environ["SSH_AUTH_SOCK"] = found.agent
            agent = Agent()
        finally:
            if before is None:
                os.environ.pop("SSH_AUTH_SOCK", None)
            else:
                os.environ["SSH_AUTH_SOCK"] = before
    if found.only_keys:
        named = {text.split()[1] for key in found.keys if len((text := _public(key)).split()) > 1}
        agent._keys = tuple(key for key in agent.get_keys() if key.get_base64() in named)
    return agent


def _public(key: Path) -> str:
    file = key if key.suffix == ".pub" else key.with_name(f"{key.name}.pub")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
