"""System VMs as a cloud starts them: every type, bad parameters, none, scripts that came later, a pair.

The full image is booted once, up to where it waits for its parameters; every test goes on from there.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import re
import socket
import subprocess
import tarfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from build.agent.guest import qemu
from build.agent.guest.hub import Network, network
from build.keepalived_render import failover_bound
from build.verbs import boot_line as params
from tests import guest as lines
from tests import standin
from tests.boot.guest import converse, output, persistent, put, running
from tests.images import Built, shared

pytestmark = pytest.mark.boot

Result = TypeVar("Result")
CMDLINE = "/var/cache/cloud/cmdline"
UNPLUGGED = tuple(qemu.Nic(backend=f"hubport,hubid={number}") for number in range(4))
MACHINE = qemu.Machine(memory=256, nics=UNPLUGGED)
"""As small as a router may be, with as many NICs as the largest type has."""
LARGER = 256 << 20
"""Bytes by which a disk is larger than the image."""
ANEW = """
told() { journalctl -u systemvm-receive -o cat | grep -c '^hypervisor: '; }
anew() {
    before=$(told)
    systemctl restart --no-block systemvm-receive
    until [ "$(told)" -gt "$before" ]; do sleep 0.2; done
}
mkdir -p /run/systemd/system/cloud-early-config.service.d
printf '[Service]\\nEnvironment=SYSTEMVM_SCRIPTS_WAIT=1\\n' \
    >/run/systemd/system/cloud-early-config.service.d/zz-test.conf
systemctl daemon-reload
anew
while [ "$(systemctl list-jobs --no-legend | grep -c running)" -gt 1 ]; do
    sleep 0.5
    [ $(($(cut -d. -f1 /proc/uptime) - ${began:-0})) -lt 20 ] || { anew; began=$(cut -d. -f1 /proc/uptime); }
done
anew
"""
"""Waits until everything is started that does not wait for the parameters. The guest's patience begins anew
meanwhile: a busy machine would use it up. Scripts are waited for one second only."""
PATIENT = "rm /run/systemd/system/cloud-early-config.service.d/zz-test.conf; systemctl daemon-reload"
"""Gives back the real time for which scripts are waited for; elsewhere nobody brings any."""
DONE = "until [ -e /var/cache/cloud/boot_up_done ]; do sleep 0.2; done; systemctl is-system-running --wait"
PATIENCE = 400.0
"""Seconds for anything that is waited for; an emulated guest on a busy machine is slow."""


@dataclass(frozen=True)
class Waiting:
    """The full system, where it waits for its parameters."""

    image: Path
    size: int
    disk: Path
    memory: Path


@pytest.fixture(scope="session")
def waiting(system: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    size = system.image.stat().st_size + LARGER

    def boot(place: Path) -> None:
        async def save(guest: qemu.Guest) -> None:
            await persistent(guest, ANEW)
            await guest.save(place / "memory")

        converse(system.image, place, save, MACHINE, size=size, keep=place / "disk")

    with shared(tmp_path_factory, "waiting", boot) as place:
        yield Waiting(system.image, size, place / "disk", place / "memory")


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A management server's key."""
    path = tmp_path_factory.mktemp("key") / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-C", "management", "-f", path], check=True)
    return path


def authorized(key: Path) -> str:
    """The parameter that brings it; a parser that cuts at a second `=` loses the end."""
    return f" authorized_key={base64.b64encode(key.with_suffix('.pub').read_bytes()).decode()}"


def free_port() -> int:
    """A port of 127.0.0.1 for the guest's sshd."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plugged(number: int, backend: str) -> qemu.Machine:
    """The machine with one NIC connected."""
    return replace(
        MACHINE,
        nics=tuple(
            replace(nic, backend=backend) if index == number else nic for index, nic in enumerate(UNPLUGGED)
        ),
    )


def forwarded(port: int, address: str = "", to: int = 3922) -> str:
    """A network of QEMU's own that lets us in to one port of the guest, to any address it hands out."""
    first = ".".join(address.split(".")[: 2 if address.startswith("169.254.") else 3])
    net = f",net={first}.0.0/16" if first.count(".") == 1 else f",net={first}.0/24" if first else ""
    return f"user,restrict=on{net},hostfwd=tcp:127.0.0.1:{port}-{address}:{to}"


def go_on(
    waiting: Waiting,
    work: Path,
    conversation: Callable[[qemu.Guest], Awaitable[Result]],
    machine: qemu.Machine = MACHINE,
    keep: Path | None = None,
) -> Result:
    """Talk to a guest that waits for its parameters."""
    return converse(
        waiting.image,
        work,
        conversation,
        machine,
        size=waiting.size,
        below=(waiting.disk,),
        memory=waiting.memory,
        keep=keep,
        limit=PATIENCE,
    )


async def deliver(guest: qemu.Guest, line: str) -> None:
    """Send the boot line as CloudStack's KVM agent does."""
    await guest.ask("guest-ping")
    assert await guest.ask("guest-sync", id=2718) == 2718
    await put(guest, CMDLINE, f"{line}\n".encode())


async def ssh(port: int, key: Path, *command: str, user: str = "root") -> subprocess.CompletedProcess[str]:
    """Log in as a management server does."""
    options = (
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "ConnectTimeout=60",
        "BatchMode=yes",
    )
    words = [word for option in options for word in ("-o", option)]
    argv = ["ssh", "-F", "none", "-p", str(port), "-i", str(key), *words, f"{user}@127.0.0.1", *command]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    told, complaints = await child.communicate()
    return subprocess.CompletedProcess(argv, child.returncode or 0, told.decode(), complaints.decode())


async def logged_in(port: int, key: Path, command: str) -> str:
    """What a command prints over SSH; sshd may just be about to start."""
    while (done := await ssh(port, key, command)).returncode == 255 and "denied" not in done.stderr:
        await asyncio.sleep(0.5)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def facts(guest: qemu.Guest, questions: dict[str, str]) -> dict[str, str]:
    """Answers of several commands by their names."""
    asked = "\n".join(f"echo @@{name}; {{ {command}; }}" for name, command in questions.items())
    told = await persistent(guest, asked)
    parts = re.split(r"(?m)^@@(\w+)$", told)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


QUESTIONS = {
    "state": DONE,
    "failed": "systemctl list-units --failed --plain --no-legend --no-pager",
    "killed": "journalctl --dmesg --output cat --no-pager | grep 'Killed process' || true",
    "hostname": "hostname",
    "addresses": "ip -4 -o addr show | awk '{ print $2, $4 }'",
    "routes": "ip -4 route show",
    "links": "ip -o link show",
    "sshd": "ss -Hltnp | awk '/sshd/ { print $4 }'",
    "filter": "iptables -S",
    "forward": "cat /proc/sys/net/ipv4/ip_forward",
    "resolvers": "cat /etc/resolv.conf",
    "active": "systemctl list-units --type=service --state=active --plain --no-legend | awk '{ print $1 }'",
    "merged": "cat /etc/cloudstack/cmdline.json",
    "given": "cat /var/cache/cloud/cmd_line.json 2>/dev/null || "
    "zcat /var/cache/cloud/processed/cmd_line.json.gz",
    "lists": "cat /var/cache/cloud/enabled_svcs; echo --; cat /var/cache/cloud/disabled_svcs",
    "version": "/opt/cloud/bin/get_template_version.sh",
    "root": "df --output=size -k / | tail -n 1",
    "log": "cat /var/log/cloud.log",
    "memory": "awk '/MemTotal/ { print $2 }' /proc/meminfo",
    "mode": "stat -c %a /var/cache/cloud/cmdline",
    "swaps": "cat /proc/swaps",
    "web": "own=$(hostname -I | cut -d' ' -f1); curl -s -i -m 20 http://$own/; "
    "for asked in '-X GET http://'$own/cgi-bin/ '-X TRACE http://'$own/; do "
    "curl -s -m 20 -o /dev/null -w '%{http_code}\\n' $asked; done",
}


# --- every type ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What the contract says of a type, on KVM."""

    addresses: dict[str, str]
    control: int
    """Number of the NIC where sshd listens."""
    runs: tuple[str, ...] = ()
    rests: tuple[str, ...] = ()
    forwards: bool = False
    route: str = ""
    """Beginning of the line of its default route."""
    resolver: str = ""
    port: int = 3922
    lets_in: tuple[str, ...] = ()
    """Rules of the packet filter besides that of sshd."""
    merged: bool = True
    """Whether the boot line is merged into CloudStack's documents."""


ROUTER = params.compose("router", {"redundant": "false"})
TYPES = {
    "router": Expected(
        {"eth0": "10.1.1.2/24", "eth1": "169.254.1.2/16", "eth2": "192.0.2.2/24"},
        1,
        ("haproxy", "apache2", "dnsmasq"),
        ("keepalived", "conntrackd"),
        True,
        "default via 192.0.2.1 dev eth2",
        "192.0.2.53",
        lets_in=(
            "-A INPUT -d 224.0.0.18/32 -j ACCEPT",
            "-A INPUT -d 225.0.0.50/32 -j ACCEPT",
            "-A INPUT -s 10.1.1.0/24 -i eth0 -p udp -m udp --dport 53 -j ACCEPT",
        ),
    ),
    "vpcrouter": Expected(
        {"eth0": "169.254.1.2/16"},
        0,
        ("haproxy", "apache2"),
        ("dnsmasq", "keepalived", "conntrackd"),  # no pair before the first tier
        True,
        lets_in=("-A INPUT -d 224.0.0.18/32 -j ACCEPT",),
    ),
    "dhcpsrvr": Expected(
        {"eth0": "10.2.0.10/16", "eth1": "169.254.3.4/16"},
        1,
        ("dnsmasq", "apache2"),
        ("haproxy", "keepalived"),
        route="default via 10.2.0.1 dev eth0",
    ),
    "elbvm": Expected(
        {"eth0": "203.0.113.20/24", "eth1": "169.254.7.7/16"},
        1,
        ("haproxy",),
        ("dnsmasq",),
        route="default via 203.0.113.1 dev eth0",
        merged=False,
    ),
    "ilbvm": Expected(
        {"eth0": "10.1.1.9/24", "eth1": "169.254.7.8/16"},
        1,
        ("haproxy",),
        ("dnsmasq",),
        route="default via 10.1.1.1 dev eth0",
        merged=False,
    ),
    "consoleproxy": Expected(
        {"eth0": "169.254.9.9/16", "eth1": "172.16.5.6/24", "eth2": "203.0.113.7/24"},
        0,
        rests=("haproxy", "apache2", "dnsmasq"),
        route="default via 203.0.113.1 dev eth2",
        resolver="192.0.2.53",
        lets_in=("-A INPUT -i eth1 -p tcp -m state --state NEW -m tcp --dport 8001 -j ACCEPT",),
        merged=False,
    ),
    "secstorage": Expected(
        {
            "eth0": "169.254.9.8/16",
            "eth1": "172.16.5.7/24",
            "eth2": "203.0.113.8/24",
            "eth3": "10.9.0.8/24",
        },
        0,
        ("apache2",),
        ("haproxy", "dnsmasq", "keepalived"),
        route="default via 203.0.113.1 dev eth2",
        merged=False,
    ),
    "sharedfsvm": Expected(
        {"eth0": "10.1.1.8/24"}, 0, route="default via 10.1.1.1 dev eth0", port=22, merged=False
    ),
    "cksnode": Expected(
        {"eth0": "10.1.1.7/24"}, 0, route="default via 10.1.1.1 dev eth0", port=22, merged=False
    ),
}
HASTE = b"datasource: {CloudStack: {max_wait: 2, timeout: 1}}\n"
"""cloud-init would wait two minutes for a cloud that is not there."""


def test_what_talks_to_a_desktop_is_not_in_the_image(system: Built) -> None:
    names = {package["name"] for package in system.manifest["packages"]}
    assert {"lsb-release", "containerd", "runc"} <= names
    assert not {"packagekit", "polkitd", "policykit-1", "software-properties-common"} & names


def test_every_type_is_looked_at() -> None:
    assert set(TYPES) == set(lines.LINES)


USER_DATA = base64.b64encode(
    gzip.compress(b"#!/bin/sh\necho $(id -un) $(hostname) >/run/user-data\n", mtime=0)
).decode()
"""As CloudStack 4.22 sends it to system VMs whose offering has user data."""
RARE = {"dhcpsrvr", "elbvm", "ilbvm", "sharedfsvm"}
"""Types whose set-up differs little from that of another, which every run looks at."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.soak(400)] if kind in RARE else []) for kind in TYPES]
)
def test_a_type_comes_up_in_256_mib(waiting: Waiting, key: Path, tmp_path: Path, kind: str) -> None:
    expected = TYPES[kind]
    line = (ROUTER if kind == "router" else lines.LINES[kind]) + authorized(key)
    line += f" userdata={USER_DATA}" if kind == "consoleproxy" else ""
    port, own = free_port(), expected.addresses[f"eth{expected.control}"].partition("/")[0]

    async def conversation(guest: qemu.Guest) -> tuple[dict[str, str], str]:
        if expected.port == 22:
            await put(guest, "/etc/cloud/cloud.cfg.d/99-test.cfg", HASTE)
        await deliver(guest, line)
        told = await facts(guest, QUESTIONS)
        if kind == "consoleproxy":
            told["user data"] = await output(guest, "cloud-init status --wait >/dev/null; cat /run/user-data")
        if expected.port == 22:
            # A user's own machine: the management server's key must not open it.
            done = await ssh(port, key, "true")
            return told, "denied" if "Permission denied" in done.stderr else done.stderr
        return told, await logged_in(port, key, "hostname")

    machine = plugged(expected.control, forwarded(port, own, expected.port))
    told, answered = go_on(waiting, tmp_path, conversation, machine)
    name = next(word[5:] for word in line.split() if word.startswith("name="))
    assert (told["state"], told["failed"], told["killed"]) == ("running", "", ""), told["log"]
    assert int(told["memory"]) < 256 << 10
    assert told["hostname"] == name
    assert answered == ("denied" if expected.port == 22 else name)
    assert dict(row.split() for row in told["addresses"].splitlines()) == {
        "lo": "127.0.0.1/8",
        **expected.addresses,
    }
    routes = [row for row in told["routes"].splitlines() if row.startswith("default")]
    assert [row[: len(expected.route)] for row in routes] == ([expected.route] if expected.route else [])
    assert (
        not expected.resolver
        or told["resolvers"].split()[-1] == expected.resolver
        or (expected.resolver in told["resolvers"])
    )
    listens = {f"{own}:3922"} if expected.port == 3922 else {"0.0.0.0:22", "[::]:22"}
    assert set(told["sshd"].split()) <= listens
    assert told["sshd"]
    assert told["forward"] == str(int(expected.forwards))
    if expected.port == 3922:
        rule = f"-A INPUT -i eth{expected.control} -p tcp -m state --state NEW -m tcp --dport 3922 -j ACCEPT"
        rows = told["filter"].splitlines()
        assert {"-P INPUT DROP", "-P FORWARD DROP", "-P OUTPUT ACCEPT", rule, *expected.lets_in} <= set(rows)
        assert [row for row in rows if "3922" in row] == [rule]
    active = set(told["active"].replace(".service", "").split())
    assert set(expected.runs) <= active
    assert not active & set(expected.rests)
    if kind == "router":
        *page, cgi, trace = told["web"].splitlines()
        assert "Server: Apache" in page
        assert "Debian" not in told["web"]
        assert (cgi, trace) == ("404", "405")
    assert kind != "consoleproxy" or told["user data"].split() == ["root", name]
    assert told["mode"] == "600"
    assert ("/swapfile" in told["swaps"]) == (expected.port == 3922)
    given, raw = json.loads(told["given"]), params.guest("boot_line").parse(line)
    assert given == {"type": "cmdline", "cmd_line": raw}
    merged = json.loads(told["merged"])
    assert merged["id"] == "cmdline"
    assert merged["config"]["redundant_router"] == ("true" if kind == "vpcrouter" else "false")
    assert re.fullmatch(r"Cloudstack Release 4\.22\.0 [^&]+&[0-9a-f]{128}", told["version"])
    # Grown: the image's own root file system would be smaller than the image.
    assert int(told["root"]) << 10 > waiting.size - LARGER


# --- bad parameters, and none ----------------------------------------------------------------------


def test_hostile_parameters_stop_nothing(waiting: Waiting, key: Path, tmp_path: Path) -> None:
    """Neither metacharacters nor wrong addresses keep the management server's key from opening the door."""
    hostile = (
        "template=domP name=$(touch${IFS}/run/owned) type=router eth0ip=10.1.1.999 eth0mask=;reboot "
        "eth1ip=169.254.1.256 eth1mask=`reboot` gateway=../../etc/passwd dns1=|reboot dns2=%s%n domain=a;b "
        "redundant_router=1 advert_int=0x7f advert_int=-1 guestgw=& dhcprange=$HOME cidrsize=999 "
        "vmpassword=\x1b[2J mtu=99999999999 nic_macs=a|b|c logrotatefrequency=`id` router_password=}{ =x y "
        "\u20ac=\u20ac"
    )
    port = free_port()

    async def conversation(guest: qemu.Guest) -> tuple[dict[str, str], str]:
        await deliver(guest, hostile + authorized(key))
        told = await facts(guest, {**QUESTIONS, "owned": "ls /run/owned 2>/dev/null || true"})
        return told, await logged_in(port, key, "id -un")

    told, who = go_on(waiting, tmp_path, conversation, plugged(1, forwarded(port)))
    assert who == "root"
    assert (told["state"], told["failed"], told["owned"]) == ("running", "", "")
    assert told["hostname"] == "systemvm"
    for words in ("advert_int='-1'", "eth1ip='169.254.1.256': no IPv4 address", "name='$(touch${IFS}"):
        assert words in told["log"], told["log"]


@pytest.mark.soak(500)
def test_no_scripts_come_and_our_own_set_up_goes_on(waiting: Waiting, key: Path, tmp_path: Path) -> None:
    """The one test that waits for as long as a real one does."""

    async def conversation(guest: qemu.Guest) -> tuple[dict[str, str], float]:
        await persistent(guest, PATIENT)
        await deliver(guest, lines.LINES["ilbvm"] + authorized(key))
        told = await facts(guest, {name: QUESTIONS[name] for name in ("state", "failed", "log", "active")})
        took = "systemctl show -P %s cloud-early-config"
        stamps = [took % f"{end}TimestampMonotonic" for end in ("InactiveExit", "ActiveEnter")]
        since, until = [int(await output(guest, stamp)) for stamp in stamps]
        return told, (until - since) / 1e6

    told, seconds = go_on(waiting, tmp_path, conversation)
    assert (told["state"], told["failed"]) == ("running", "")
    assert 120 <= seconds < 240
    assert "waiting for /var/cache/cloud/cloud-scripts.tgz, 120 s at most" in told["log"]
    assert "no scripts of a management server came within 120 s" in told["log"]
    assert "haproxy.service" in told["active"]


LATE_TIER = """cd /etc/apache2
again() { systemctl restart apache2 2>/dev/null; systemctl is-active apache2; }
rm -f sites-enabled/*
echo "Listen nowhere" >ports.conf; again
rm ports.conf; again
echo "Listen 127.0.0.1:80" >ports.conf; again
"""
"""Apache is asked for a listener that cannot be, for none, and for one that can."""


def test_nothing_comes_and_it_is_reached_all_the_same(waiting: Waiting, key: Path, tmp_path: Path) -> None:
    port = free_port()

    async def conversation(guest: qemu.Guest) -> tuple[dict[str, str], str, str]:
        told = await facts(guest, {name: QUESTIONS[name] for name in ("state", "failed", "sshd", "log")})
        while "refused" in (done := await ssh(port, key, "true")).stderr or "closed" in done.stderr:
            await asyncio.sleep(0.5)
        return told, done.stderr, await output(guest, LATE_TIER)

    told, said, apache = go_on(waiting, tmp_path, conversation, plugged(0, forwarded(port)))
    assert (told["state"], told["failed"]) == ("running", "")
    assert "no boot line came from kvm" in told["log"]
    assert "type: default" in told["log"]
    assert "0.0.0.0:3922" in told["sshd"]
    assert "Permission denied (publickey)" in said  # sshd answers; nobody has told it a key
    assert apache.split() == ["failed", "inactive", "active"]


# --- scripts of a management server ----------------------------------------------------------------

QUESTIONS_OF_HEALTH = {
    "state": "/opt/cloud/bin/get_template_version.sh >/dev/null; " + DONE,
    "failed": QUESTIONS["failed"],
    "rotated": "logrotate -f /etc/logrotate.conf 2>&1 && echo rotated",
    "open": "ls -l /proc/[0-9]*/fd 2>/dev/null | grep '/var/log/.*(deleted)' || true",
    "killed": QUESTIONS["killed"],
    "theirs": "cat /var/log/theirs.log",
    "version": QUESTIONS["version"],
    "filter": QUESTIONS["filter"],
    "units": "systemctl show -P Description cloud-early-config cloud-postinit",
    "log": QUESTIONS["log"],
    "left": "ls -A /var/cache/cloud /usr/share/cloud /usr/local/cloud/systemvm 2>/dev/null",
    "active": QUESTIONS["active"],
    "mode": "stat -c %a /var/cache/cloud/cmdline",
    "swap": "cat /proc/swaps",
}


async def copy(port: int, key: Path, *files: Path, to: str = "/var/cache/cloud/") -> None:
    """Copy files as a host does: by the old protocol of scp, with their times and modes."""
    options = ("-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-q")
    argv = ["scp", "-O", "-p", *options, "-P", str(port), "-i", str(key), *map(str, files)]
    child = await asyncio.create_subprocess_exec(*argv, f"root@127.0.0.1:{to}")
    assert await child.wait() == 0


async def whole(guest: qemu.Guest, port: int, key: Path, vms: Path) -> None:
    await copy(port, key, *(vms / name for name in ("agent.zip", "cloud-scripts.tgz", "patch-sysvms.sh")))


async def late_and_by_halves(guest: qemu.Guest, port: int, key: Path, vms: Path) -> None:
    """A host that is slow: half an archive for a while, then the rest."""
    part = vms / "half" / "cloud-scripts.tgz"
    part.parent.mkdir()
    data = (vms / "cloud-scripts.tgz").read_bytes()
    part.write_bytes(data[: len(data) // 2])
    await copy(port, key, part)
    await asyncio.sleep(10)
    assert await output(guest, "systemctl is-active cloud-early-config; ls /opt/cloud/bin/patched.sh") == (
        "activating\nls: cannot access '/opt/cloud/bin/patched.sh': No such file or directory"
    )
    await whole(guest, port, key, vms)


async def broken_first(guest: qemu.Guest, port: int, key: Path, vms: Path) -> None:
    """What leads out of the tree is not unpacked; SSH stays up, and a good archive is taken."""
    bad = vms / "bad" / "cloud-scripts.tgz"
    bad.parent.mkdir()
    with tarfile.open(bad, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../run/owned"))
    await copy(port, key, bad)
    while "is refused: '../../run/owned' leads out" not in await output(guest, "cat /var/log/cloud.log"):
        await asyncio.sleep(1)
    assert "No such file" in await output(guest, "ls /run/owned")
    await whole(guest, port, key, vms)


Delivery = Callable[[qemu.Guest, int, Path, Path], Awaitable[None]]


@pytest.mark.parametrize(
    ("kind", "delivered", "size"),
    [
        ("router", whole, 100 << 20),
        ("vpcrouter", late_and_by_halves, 1 << 10),
        ("consoleproxy", broken_first, 1 << 20),
        pytest.param("secstorage", whole, 1 << 20, marks=pytest.mark.soak(400)),
    ],
)
def test_scripts_of_a_management_server_go_on_in_the_same_boot(
    waiting: Waiting, key: Path, tmp_path: Path, kind: str, delivered: Delivery, size: int
) -> None:
    """They are copied once sshd answers, as a KVM host does, and what is theirs runs from there."""
    vms, expected, port = standin.served(tmp_path / "vms", size).parent, TYPES[kind], free_port()
    line = (ROUTER if kind == "router" else lines.LINES[kind]) + authorized(key)

    async def conversation(guest: qemu.Guest) -> dict[str, str]:
        await persistent(guest, PATIENT)
        await deliver(guest, line)
        await logged_in(port, key, "true")
        await delivered(guest, port, key, vms)
        return await facts(guest, QUESTIONS_OF_HEALTH)

    own = expected.addresses[f"eth{expected.control}"].partition("/")[0]
    told = go_on(waiting, tmp_path, conversation, plugged(expected.control, forwarded(port, own)))
    assert (told["state"], told["failed"], told["killed"]) == ("running", "", ""), told["log"]
    assert (told["rotated"].splitlines()[-1], told["open"]) == ("rotated", "")
    assert told["units"].split() == ["theirs", "theirs"]
    ran = told["theirs"].splitlines()
    assert ran[:2] == ["theirs setup/bootstrap.sh", "theirs setup/postinit.sh"]
    assert not {"theirs setup/init.sh", "theirs setup/cloud-early-config"} & set(ran)
    assert "--comment theirs" in told["filter"]
    assert f"-i eth{expected.control} " in next(row for row in told["filter"].splitlines() if "3922" in row)
    signature = hashlib.sha512((vms / "cloud-scripts.tgz").read_bytes()).hexdigest()
    assert told["version"].endswith(f"&{signature}")
    assert "agent.zip" not in told["left"]
    agent = kind in ("consoleproxy", "secstorage")
    assert ("lib" in told["left"].split(), "cloud.service" in told["active"].split()) == (agent, agent)
    assert told["mode"] == "600"
    assert "/swapfile" in told["swap"]


# --- a redundant pair ------------------------------------------------------------------------------

GATEWAY = "10.1.1.1"
INTERVAL = 2


def test_a_pair_on_one_network_fails_over(waiting: Waiting, tmp_path: Path) -> None:
    """Two guests with the lines that `inv params` composes; one is killed, the other has the gateway."""
    macs = ["02:00:0a:01:01:02", "02:00:0a:01:01:03"]
    composed = [
        params.compose(
            "router",
            {
                params.INTERVAL: str(INTERVAL),
                "name": f"r-{number}-VM",
                "guest.ip": f"10.1.1.{number}",
                "control.ip": f"169.254.1.{number}",
                "state": wanted,
            },
        )
        for number, wanted in ((2, "PRIMARY"), (3, "BACKUP"))
    ]

    async def joined(guest: qemu.Guest, number: int) -> None:
        # Both go on from the same machine; a cloud would have given each an address of its own.
        await persistent(guest, f"ip link set dev eth0 address {macs[number]}")
        await deliver(guest, composed[number])
        assert (await persistent(guest, DONE)).splitlines()[-1] == "running"
        assert await output(guest, "systemctl is-active keepalived conntrackd") == "active\nactive"

    async def told(net: Network) -> None:
        async with asyncio.timeout(2 * PATIENCE), plugged_in(net, "first") as first:
            await joined(first, 0)
            await net.answer(GATEWAY, "10.1.1.9", macs[0])
            async with plugged_in(net, "second") as second:
                await joined(second, 1)
                assert await state(first) == "Status: PRIMARY"
                assert await state(second) == "Status: BACKUP"
                merged = json.loads(await output(second, "cat /etc/cloudstack/cmdline.json"))
                assert merged["config"]["redundant_state"] == "BACKUP"
                assert " state DOWN " in await output(second, "ip -o link show dev eth2")
                killed = time.monotonic()
                await first.close()
                took = await net.answer(GATEWAY, "10.1.1.9", macs[1]) - killed
                print(f"interval {INTERVAL}: the other guest answered after {took:.2f} s")
                # An emulated guest is some seconds late, but never early.
                assert 2 * INTERVAL <= took <= failover_bound(INTERVAL, 100) + 20
                await persistent(
                    second, "until grep -q PRIMARY /etc/cloudstack/cmdline.json; do sleep 0.5; done"
                )
                assert await state(second) == "Status: PRIMARY"

    def plugged_in(net: Network, name: str) -> AbstractAsyncContextManager[qemu.Guest]:
        end = net.port()
        return running(
            waiting.image,
            tmp_path,
            plugged(0, f"dgram,local.type=fd,local.str={end}"),
            name=name,
            size=waiting.size,
            below=(waiting.disk,),
            memory=waiting.memory,
            descriptors=(end,),
        )

    async def main() -> None:
        async with network() as net:
            await told(net)

    asyncio.run(main())


async def state(guest: qemu.Guest) -> str:
    return await output(guest, "/opt/cloud/bin/checkrouter.sh")
