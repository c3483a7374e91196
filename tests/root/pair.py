"""Redundant pairs of real keepaliveds: routers and a client in network namespaces of their own.

A router's root is a tmpfs with this host's /usr in it, a copy of /etc, and what the guest's overlay puts
below /opt/cloud and /usr/local; so keepalived finds its scripts where the configuration names them. All
of it lives in namespaces whose first process ends with the test.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.engine.settings import Loaded
from build.verbs import boot_line as params
from tests import guest
from tests.waiting import LONG, until

GATEWAY = "10.1.1.1"
"""The address that follows the primary; the routers' own are those behind it."""
OWN = {"first": "10.1.1.2", "second": "10.1.1.3"}
"""Addresses of the two routers, of which the higher one wins when both are primary."""
PRIVATE = {"10.1.1.2": "02:00:0a:01:01:02", "10.1.1.3": "02:00:0a:01:01:03", "10.1.1.9": "02:00:0a:01:01:09"}
"""MAC addresses by address in the guests' network: two routers and a client."""

ROOT = """
mount -t tmpfs -o mode=755 router "$1"
cd "$1"
mkdir -p dev proc sys usr etc var/log var/lib run tmp opt/cloud/bin ramdisk/rrouter root media mnt
for link in /bin /sbin /lib /lib32 /lib64 /libx32; do [ ! -L "$link" ] || cp -P "$link" .; done
cp -a /etc/. etc
mount --bind /usr usr
mount -t tmpfs -o mode=755 local usr/local
mkdir -p usr/local/sbin usr/local/lib
cp -r "$2/usr/local/." usr/local
cp -r "$2/opt/cloud/." opt/cloud
chmod 755 usr/local/sbin/* opt/cloud/bin/*.py opt/cloud/bin/*.sh
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sys sys
ip link set lo up
exec chroot . /bin/bash -c 'echo ready; read -r'
"""
"""First process of a router: makes its root, then waits for the end of its stdin and reaps meanwhile."""

STAND_INS = {
    "systemctl": "#!/bin/sh\n# No systemd here; what is running is what is active.\n"
    'case "$1" in\n'
    "    is-active) exec pidof -q keepalived ;;\n"
    "    show) echo LoadState=loaded ;;\n"
    '    restart) echo "$*" >>/run/restarts ;;\n'
    "esac\n",
    "journalctl": "#!/bin/sh\n# No journal here; keepalived's own words are in its log.\n"
    "exec cat /var/log/keepalived.log\n",
}


@dataclass
class Node:
    """A machine: its namespaces and its root, by the process that holds them."""

    name: str
    holder: subprocess.Popen[str]
    pid: int
    keepalived: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> Path:
        """Its files, as seen from here."""
        return Path(f"/proc/{self.pid}/root")

    def inside(self, *argv: str, all_: bool = True) -> list[str]:
        """A command line that runs in the node; without `all_` in its network only."""
        spaces = ("--mount", "--net", "--pid", "--uts", "--root", "--wd") if all_ else ("--net",)
        return ["nsenter", f"--target={self.pid}", *spaces, "--", *argv]

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the node."""
        done = subprocess.run(self.inside(*argv), capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{self.name}: {shlex.join(argv)}: {done.stderr}"
        return done

    def ip(self, *words: str) -> Any:
        """Run ip(8) in the node's network; answers what it shows."""
        shown = subprocess.run(
            self.inside("ip", "-json", *words, all_=False), capture_output=True, text=True, check=True
        ).stdout
        return json.loads(shown) if shown.strip() else []

    def addresses(self, device: str) -> set[str]:
        """IPv4 addresses on a device."""
        return {
            info["local"]
            for link in self.ip("-4", "addr", "show", "dev", device)
            for info in link["addr_info"]
        }

    def up(self, device: str) -> bool:
        """Whether a device is switched on."""
        return "UP" in self.ip("link", "show", "dev", device)[0]["flags"]

    def write(self, files: Mapping[str, tuple[int, str]]) -> None:
        """Write files by absolute path with mode and text."""
        for name, (mode, text) in files.items():
            path = self.root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            path.chmod(mode)

    def text(self, name: str) -> str:
        """Text of one of its files; empty when it is not there."""
        path = self.root / name.lstrip("/")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def log(self) -> str:
        """What keepalived said since it was first started."""
        return self.text("/var/log/keepalived.log")

    @property
    def state(self) -> str:
        """The state that the guest has noted for the management server."""
        text = self.text("/etc/cloudstack/cmdline.json")
        try:
            return str(json.loads(text)["config"]["redundant_state"])
        except ValueError:
            return ""  # caught in the midst of being written anew

    def start(self) -> None:
        """Start keepalived as Debian's unit does; an earlier one has ended."""
        if self.keepalived:
            self.keepalived.wait(LONG)
        with (self.root / "var/log/keepalived.log").open("ab") as log:
            line = self.inside("keepalived", "--dont-fork", "--log-console", "--log-detail")
            self.keepalived = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end(self) -> None:
        """End its first process, and with that the kernel ends everything in its namespaces."""
        self.holder.kill()
        self.holder.communicate()
        if self.keepalived:
            self.keepalived.kill()
            self.keepalived.wait(LONG)

    def processes(self) -> list[int]:
        """Every process of keepalived, its parent first."""
        assert self.keepalived
        return [pid for pid in _family(self.keepalived.pid) if _name(pid) == "keepalived"]

    def signal(self, number: signal.Signals) -> float:
        """Send a signal to every process of keepalived at once, SIGTERM to its parent only; answers when."""
        processes = self.processes()
        assert len(processes) >= 2, self.log()
        if number == signal.SIGKILL:
            # A child that outlives its parent by a moment would say farewell.
            self.signal(signal.SIGSTOP)
        for pid in processes if number != signal.SIGTERM else processes[:1]:
            os.kill(pid, number)
        at = time.monotonic()
        if number == signal.SIGKILL and self.keepalived:
            # nsenter stopped itself together with its child, and would not notice the end of it.
            self.keepalived.kill()
        return at


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except FileNotFoundError:
        return ""


# The wire ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advert:
    """A VRRPv2 advertisement as it was on the wire."""

    at: float
    """Seconds of the monotonic clock, by the kernel's own stamp."""
    source: str
    mac: str
    protocol: int
    """51 with an authentication header before VRRP, else 112."""
    priority: int
    interval: int
    """Field `Adver Int` (RFC 3768, 5.3.7)."""
    auth: int
    """Field `Auth Type`: 0 none, 1 a password, 2 a header."""
    secret: bytes
    """Field `Authentication Data`."""
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """Somebody said by ARP who has an address."""

    at: float
    address: str
    mac: str


def read(frame: bytes, at: float) -> Advert | Claim | None:
    """Read an Ethernet frame."""
    mac, kind = frame[6:12].hex(":"), int.from_bytes(frame[12:14], "big")
    if kind == 0x0806:
        return Claim(at, socket.inet_ntoa(frame[28:32]), frame[22:28].hex(":"))
    if kind != 0x0800:
        return None
    packet = frame[14:]
    protocol, source = packet[9], socket.inet_ntoa(packet[12:16])
    body = packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4], "big")]
    following = protocol
    if protocol == 51:  # RFC 4302: length in words of four bytes, less two
        following, body = body[0], body[(body[1] + 2) * 4 :]
    if following != 112:
        return None
    version, _, priority, count, auth, interval = struct.unpack_from("!6B", body)
    assert version == 0x21
    listed = tuple(socket.inet_ntoa(body[8 + 4 * n : 12 + 4 * n]) for n in range(count))
    return Advert(at, source, mac, protocol, priority, interval, auth, body[8 + 4 * count :][:8], listed)


SO_TIMESTAMPNS = 35
"""socket(7), include/uapi/asm-generic/socket.h"""


def socket_in(pid: int, device: str) -> socket.socket:
    """A socket that sees every frame on a device of another network namespace."""
    made: list[socket.socket] = []

    def make() -> None:
        # A thread enters the namespace alone, and the socket stays there when the thread has ended.
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{pid}/ns/net", "rb") as space:
            assert libc.setns(space.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())
        made.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    made[0].bind((device, 0))
    made[0].setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return made[0]


class Wire:
    """What is said on a network, with times."""

    def __init__(self, pid: int, device: str) -> None:
        self.heard: list[Advert | Claim] = []
        self._more = threading.Condition()
        self._socket = socket_in(pid, device)
        self._socket.settimeout(0.5)
        self._ended = False
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended:
            try:
                frame, extra, _, _ = self._socket.recvmsg(2048, 64)
            except TimeoutError:
                continue
            seconds, nanos = struct.unpack("ll", extra[0][2])
            at = time.monotonic() - (time.time() - seconds - nanos / 1e9)
            if said := read(frame, at):
                with self._more:
                    self.heard.append(said)
                    self._more.notify_all()

    def close(self) -> None:
        """Stop listening."""
        self._ended = True
        self._thread.join()
        self._socket.close()

    def adverts(self, source: str, since: float = 0, to: float = float("inf")) -> list[Advert]:
        """Advertisements of a router in a span of time, without those of priority 0, which are farewells."""
        return [
            said
            for said in list(self.heard)
            if isinstance(said, Advert) and said.source == source and since <= said.at <= to and said.priority
        ]

    def advert(self, source: str, since: float, limit: float = LONG) -> Advert:
        """The first advertisement of a router from some time on; waits for it."""
        with self._more:
            came = self._more.wait_for(lambda: self.adverts(source, since), limit)
        assert came, f"{source} says nothing within {limit} s"
        return self.adverts(source, since)[0]

    def claims(self, address: str, since: float = 0) -> list[Claim]:
        """Who said to have an address."""
        return [
            said
            for said in list(self.heard)
            if isinstance(said, Claim) and said.address == address and said.at >= since
        ]


class Changes:
    """Addresses that come to a node and go, with times."""

    def __init__(self, node: Node) -> None:
        self.seen: list[tuple[float, bool, str]] = []
        line = node.inside("ip", "-4", "-oneline", "monitor", "address", all_=False)
        self._child = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self._child.stdout
        for line in self._child.stdout:
            words = line.split()
            address = words[words.index("inet") + 1].partition("/")[0]
            self.seen.append((time.monotonic(), words[0] != "Deleted", address))

    def gone(self, address: str, since: float) -> float | None:
        """When an address first went away, or None."""
        times = (at for at, came, what in list(self.seen) if not came and what == address and at >= since)
        return next(times, None)

    def close(self) -> None:
        """Stop watching."""
        self._child.kill()
        self._child.wait()
        self._thread.join()
        if self._child.stdout:
            self._child.stdout.close()


# Pairs ---------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two routers, a client, and the wire between them."""

    first: Node
    second: Node
    client: Node
    switch: Node
    wire: Wire
    device: str
    """The routers' NIC in the guests' network."""

    @property
    def routers(self) -> tuple[Node, Node]:
        """Both routers."""
        return self.first, self.second

    def other(self, router: Node) -> Node:
        """The peer of a router."""
        return self.second if router is self.first else self.first

    def address(self, router: Node) -> str:
        """A router's own address in the guests' network."""
        return OWN[router.name]

    def holders(self) -> list[str]:
        """Routers that have the gateway's address now."""
        return [node.name for node in self.routers if GATEWAY in node.addresses(self.device)]

    def learned(self) -> str:
        """MAC address that the client has for the gateway."""
        entries = self.client.ip("neigh", "show", GATEWAY, "dev", "eth0")
        return next((str(entry.get("lladdr", "")) for entry in entries), "")

    def settle(self, master: Node, backup: Node) -> None:
        """Start one router, wait until it is master, then the other one, and wait until it listens."""
        began = time.monotonic()
        master.start()
        self.wire.advert(self.address(master), began)
        backup.start()
        until(lambda: "Entering BACKUP STATE" in backup.log(), say=backup.log)
        until(lambda: (master.state, backup.state) == ("PRIMARY", "BACKUP"), say=self.told)
        self.client.run("bash", "-c", f"echo >/dev/udp/{GATEWAY}/9")  # asks who has that address

    def told(self) -> str:
        """Both logs, for a failed test."""
        return "\n".join(
            f"== {node.name}: {node.state}\n{node.log()}\n{node.text('/var/log/cloud.log')}"
            for node in self.routers
        )


def node(stack: ExitStack, name: str, folder: Path) -> Node:
    """Start a machine without a network."""
    place = folder / name
    place.mkdir(parents=True)
    spaces = ["--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--propagation", "private"]
    line = ["unshare", *spaces, "bash", "-euc", ROOT, "bash", str(place), str(guest.ROOTFS)]
    holder = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    made = Node(name, holder, 0)
    stack.callback(made.end)
    assert holder.stdout
    assert holder.stdout.readline() == "ready\n"
    (pid,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    made.pid = int(pid)
    return made


def connect(switch: Node, machine: Node, number: int, bridge: str, address: str, mac: str = "") -> None:
    """Give a machine a NIC on a bridge of the switch."""
    port = f"{machine.name}{number}"
    peer = ["peer", "name", f"eth{number}", *(["address", mac] if mac else []), "netns", str(machine.pid)]
    switch.ip("link", "add", port, "type", "veth", *peer)
    switch.ip("link", "set", port, "master", bridge, "up")
    machine.ip("addr", "add", address, "dev", f"eth{number}")
    machine.ip("link", "set", f"eth{number}", "up")


def files(line: str, own: str, loaded: Loaded) -> dict[str, tuple[int, str]]:
    """What `inv render` shows for this boot line, and what update_config.py writes for a VPC's first tier."""
    written = dict(params.render(line, loaded).files)
    if "type=vpcrouter" in line.split():
        boot_line, redundancy = (params.guest(name) for name in ("boot_line", "redundancy"))
        known = boot_line.Params(boot_line.parse(line))
        tier = {
            "router_guest_ip": own,
            "router_guest_gateway": GATEWAY,
            "router_guest_netmask": "255.255.255.0",
        }
        pair = redundancy.from_guest_networks({"eth2": [tier]}, known, "169.254.1.2")
        made = redundancy.files(pair, guest.TEMPLATE.read_text(), guest.defaults(loaded), known)
        written |= {path: (mode, text) for path, (text, mode) in made.items()}
    return {**written, "/var/cache/cloud/cmdline": (0o600, line)}


def lines(kind: str, interval: str, more: Iterable[str] = ("", "")) -> list[str]:
    """Boot lines of both routers of a pair, from `inv params`; `more` is put behind each."""
    made = []
    for number, extra in zip((2, 3), more, strict=True):
        own = {"guest.ip": f"10.1.1.{number}"} if kind == "router" else {}
        given = {
            params.INTERVAL: interval,
            "name": f"r-{number}-VM",
            "control.ip": f"169.254.1.{number}",
            **own,
        }
        made.append(f"{params.compose(kind, given)} {extra}".strip())
    return made


SYSCTL = ("net.ipv4.ip_nonlocal_bind", "net.ipv4.ip_forward", "net.ipv4.conf.")
"""Settings of the guest that belong to a network namespace; the others are this host's."""


def make(
    stack: ExitStack,
    folder: Path,
    boot_lines: Sequence[str],
    loaded: Sequence[Loaded] | None = None,
) -> Pair:
    """Two routers with their files and a client; no keepalived runs yet."""
    definition = guest.definition()
    both = loaded or (definition, definition)
    plain = "type=router" in boot_lines[0].split()
    networks = ("guests", "control", "public") if plain else ("control", "public", "guests")
    switch, first, second, client = (
        node(stack, name, folder) for name in ("switch", "first", "second", "client")
    )
    for bridge in networks:
        switch.ip("link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
        switch.ip("link", "set", bridge, "up")
    for router, line, defined in zip((first, second), boot_lines, both, strict=True):
        own = OWN[router.name]
        for number, bridge in enumerate(networks):
            where = {"guests": f"{own}/24", "control": f"169.254.1.{own[-1]}/16", "public": "192.0.2.2/24"}
            connect(switch, router, number, bridge, where[bridge], PRIVATE[own] if bridge == "guests" else "")
        router.write(files(line, own, defined))
        router.write({f"/usr/local/sbin/{name}": (0o755, text) for name, text in STAND_INS.items()})
        settings = [line for line in router.text("/etc/sysctl.conf").splitlines() if line.startswith(SYSCTL)]
        router.run("sysctl", "--quiet", "--write", *(line.replace(" ", "") for line in settings))
    connect(switch, client, 0, "guests", "10.1.1.9/24", PRIVATE["10.1.1.9"])
    wire = Wire(client.pid, "eth0")
    stack.callback(wire.close)
    return Pair(first, second, client, switch, wire, f"eth{networks.index('guests')}")
