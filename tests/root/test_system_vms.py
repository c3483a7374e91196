"""System VMs of every type: the full image's tree in a container, with the boot lines of a management server.

What only a kernel, a firmware or a disk of its own can show is asked of a booted router in
`tests/boot/test_cloudstack.py`: that 256 MiB are enough, that the root file system grows, and swap.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import tarfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from build.agent.guest.container import Container, Nic, Spec, running
from build.keepalived_render import failover_bound
from build.verbs import boot_line as params
from tests import guest as lines
from tests import standin
from tests.container import (
    IMPATIENT,
    cabled,
    converse,
    copy,
    deliver,
    dhcp,
    facts,
    host,
    logged_in,
    place,
    ssh,
)
from tests.images import Built
from tests.system_vm import (
    ANSWERED_LATER,
    COPIED,
    HASTE,
    QUESTIONS,
    QUESTIONS_OF_HEALTH,
    TYPES,
    authorized,
    boot_args,
    check,
    check_scripts,
)
from tests.waiting import LONG

pytestmark = [pytest.mark.root, pytest.mark.waits]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A management server's key."""
    path = tmp_path_factory.mktemp("key") / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-C", "management", "-f", path], check=True)
    return path


def test_every_type_is_looked_at() -> None:
    assert set(TYPES) == set(lines.LINES)


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_comes_up(system: Built, key: Path, tmp_path: Path, kind: str) -> None:
    expected, line = TYPES[kind], boot_args(kind, key)

    async def conversation(guest: Container) -> tuple[dict[str, str], str]:
        await deliver(guest, line)
        told = await facts(guest, QUESTIONS | (ANSWERED_LATER if kind == "consoleproxy" else {}))
        if expected.port == 22:
            # A user's own machine: the management server's key must not open it.
            _, _, complaint = await ssh(guest, key, expected.own, 22, "true")
            return told, "denied" if "Permission denied" in complaint else complaint
        return told, await logged_in(guest, key, expected.own, "hostname")

    nics, before = cabled(expected.control, expected.addresses[f"eth{expected.control}"]), host()
    check(kind, line, *converse(system, tmp_path, conversation, nics, files=IMPATIENT | HASTE, name=kind))
    assert host() == before


# --- bad parameters, and none ----------------------------------------------------------------------

LEASED = "10.0.2.15/24"
"""What a NIC gets that asks for an address, and where a management server then finds it."""


def test_hostile_parameters_stop_nothing(system: Built, key: Path, tmp_path: Path) -> None:
    """Neither metacharacters nor wrong addresses keep the management server's key from opening the door."""
    hostile = (
        "template=domP name=$(touch${IFS}/run/owned) type=router eth0ip=10.1.1.999 eth0mask=;reboot "
        "eth1ip=169.254.1.256 eth1mask=`reboot` gateway=../../etc/passwd dns1=|reboot dns2=%s%n domain=a;b "
        "redundant_router=1 advert_int=0x7f advert_int=-1 guestgw=& dhcprange=$HOME cidrsize=999 "
        "vmpassword=\x1b[2J mtu=99999999999 nic_macs=a|b|c logrotatefrequency=`id` router_password=}{ =x y "
        "\u20ac=\u20ac"
    )

    async def conversation(guest: Container) -> tuple[dict[str, str], str]:
        async with dhcp(guest, 1, LEASED):
            await deliver(guest, hostile + authorized(key))
            told = await facts(guest, {**QUESTIONS, "owned": "ls /run/owned 2>/dev/null || true"})
            return told, await logged_in(guest, key, LEASED.partition("/")[0], "id -un")

    told, who = converse(system, tmp_path, conversation, cabled(1, LEASED), name="hostile")
    assert who == "root"
    assert (told["state"], told["failed"], told["owned"]) == ("running", "", "")
    assert told["hostname"] == "systemvm"
    for words in ("advert_int='-1'", "eth1ip='169.254.1.256': no IPv4 address", "name='$(touch${IFS}"):
        assert words in told["log"], told["log"]


LATE_TIER = """cd /etc/apache2
again() { systemctl restart apache2 2>/dev/null; systemctl is-active apache2; }
rm -f sites-enabled/*
echo "Listen nowhere" >ports.conf; again
rm ports.conf; again
echo "Listen 127.0.0.1:80" >ports.conf; again
"""
"""Apache is asked for a listener that cannot be, for none, and for one that can."""


@pytest.mark.slow(65, reason="the system VM's own patience")
def test_nothing_comes_and_it_is_reached_all_the_same(system: Built, key: Path, tmp_path: Path) -> None:
    async def conversation(guest: Container) -> tuple[dict[str, str], str, str]:
        async with dhcp(guest, 0, LEASED):
            told = await facts(guest, {name: QUESTIONS[name] for name in ("state", "failed", "sshd", "log")})
            while True:
                _, _, said = await ssh(guest, key, LEASED.partition("/")[0], 3922, "true")
                if "refused" not in said and "closed" not in said:
                    return told, said, await guest.output(LATE_TIER)
                await asyncio.sleep(0.5)

    told, said, apache = converse(system, tmp_path, conversation, cabled(0, LEASED), name="nothing")
    assert (told["state"], told["failed"]) == ("running", "")
    assert "no boot line came from kvm" in told["log"]
    assert "type: default" in told["log"]
    assert "0.0.0.0:3922" in told["sshd"]
    assert "Permission denied (publickey)" in said  # sshd answers; nobody has told it a key
    assert apache.split() == ["failed", "inactive", "active"]


# --- scripts of a management server ----------------------------------------------------------------

Login = Callable[[Path], Awaitable[None]]
"""Copies a file to where a host copies scripts."""


async def whole(guest: Container, send: Login, vms: Path) -> None:
    for name in COPIED:
        await send(vms / name)


async def late_and_by_halves(guest: Container, send: Login, vms: Path) -> None:
    """A host that is slow: half an archive for a while, then the rest."""
    part = vms / "half" / "cloud-scripts.tgz"
    part.parent.mkdir()
    data = (vms / "cloud-scripts.tgz").read_bytes()
    part.write_bytes(data[: len(data) // 2])
    await send(part)
    await asyncio.sleep(10)
    assert await guest.output("systemctl is-active cloud-early-config; ls /opt/cloud/bin/patched.sh") == (
        "activating\nls: cannot access '/opt/cloud/bin/patched.sh': No such file or directory"
    )
    await whole(guest, send, vms)


async def broken_first(guest: Container, send: Login, vms: Path) -> None:
    """What leads out of the tree is not unpacked; SSH stays up, and a good archive is taken."""
    bad = vms / "bad" / "cloud-scripts.tgz"
    bad.parent.mkdir()
    with tarfile.open(bad, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../../run/owned"))
    await send(bad)
    while "is refused: '../../run/owned' leads out" not in await guest.output("cat /var/log/cloud.log"):
        await asyncio.sleep(1)
    assert "No such file" in await guest.output("ls /run/owned")
    await whole(guest, send, vms)


Delivery = Callable[[Container, Login, Path], Awaitable[None]]


@pytest.mark.parametrize(
    ("kind", "delivered"),
    [("vpcrouter", late_and_by_halves), ("consoleproxy", broken_first), ("secstorage", whole)],
)
def test_scripts_of_a_management_server_go_on_in_the_same_boot(
    system: Built, key: Path, tmp_path: Path, kind: str, delivered: Delivery
) -> None:
    """They are copied once sshd answers, as a KVM host does, and what is theirs runs from there."""
    vms, expected = standin.served(tmp_path / "vms", 1 << 20).parent, TYPES[kind]

    async def conversation(guest: Container) -> dict[str, str]:
        await deliver(guest, boot_args(kind, key))
        await logged_in(guest, key, expected.own, "true")
        await delivered(guest, lambda file: copy(guest, key, expected.own, file), vms)
        return await facts(guest, QUESTIONS_OF_HEALTH)

    nics = cabled(expected.control, expected.addresses[f"eth{expected.control}"])
    check_scripts(kind, converse(system, tmp_path, conversation, nics, files={}, name=kind), vms)


# --- a redundant pair ------------------------------------------------------------------------------

GATEWAY, CLIENT = "10.1.1.1", "10.1.1.9/24"
INTERVAL = 2
MACS = {"PRIMARY": "02:00:0a:01:01:02", "BACKUP": "02:00:0a:01:01:03"}


async def join(survivor: Container, other: Container) -> None:
    """Make one network of the first NICs of two containers, with a client in it; it ends with the first."""
    bridge = ("link add guests type bridge", "link set out0 master guests", "link set guests up")
    cable = f"link add first type veth peer name second netns {other.outside}"
    await beside(
        survivor, *bridge, cable, "link set first up master guests", f"address add {CLIENT} dev guests"
    )
    await beside(other, *bridge, "link set second up master guests")


async def beside(guest: Container, *lines: str) -> None:
    done = await guest.run(guest.beside("ip", "-batch", "-"), "\n".join([*lines, ""]).encode())
    assert done.returncode == 0, done.stderr


async def has_gateway(survivor: Container, mac: str) -> float:
    """Wait until the client finds the gateway at this address; returns when (monotonic seconds)."""
    ask = f"ip neigh flush dev guests; echo >/dev/udp/{GATEWAY}/9; sleep 0.1; ip neigh show {GATEWAY}"
    while mac not in (await survivor.run(survivor.beside("bash", "-c", ask))).stdout:
        await asyncio.sleep(0.05)
    return time.monotonic()


async def state(guest: Container) -> str:
    return await guest.output("/opt/cloud/bin/checkrouter.sh")


@pytest.mark.slow(25, reason="times of the protocol")
def test_a_redundant_pair_fails_over(system: Built, tmp_path: Path) -> None:
    """Both by the lines that `inv params` composes; one is killed, the other has the gateway in time.

    What conntrackd tells the other one belongs to a kernel of one's own: tests/boot/test_cloudstack.py.
    """

    def composed(wanted: str) -> str:
        number = MACS[wanted][-1]
        own = {"name": f"r-{number}-VM", "guest.ip": f"10.1.1.{number}", "control.ip": f"169.254.1.{number}"}
        return params.compose("router", {params.INTERVAL: str(INTERVAL), "state": wanted, **own})

    def started(wanted: str) -> AbstractAsyncContextManager[Container]:
        nics = (Nic(mac=MACS[wanted]), Nic(), Nic())
        spec = Spec(place(system), tuple(system.manifest["layers"]), nics, files=IMPATIENT)
        return running(spec, tmp_path, wanted, lambda _line, _ended: None)

    async def joined(guest: Container, wanted: str) -> None:
        await deliver(guest, composed(wanted))
        assert (await facts(guest, {"state": QUESTIONS["state"]}))["state"] == "running"
        assert await guest.output("systemctl is-active keepalived") == "active"

    async def story() -> float:
        async with asyncio.timeout(LONG), started("BACKUP") as second, started("PRIMARY") as first:
            await join(second, first)
            await joined(first, "PRIMARY")
            await has_gateway(second, MACS["PRIMARY"])
            await joined(second, "BACKUP")
            assert (await state(first), await state(second)) == ("Status: PRIMARY", "Status: BACKUP")
            merged = json.loads(await second.output("cat /etc/cloudstack/cmdline.json"))
            assert merged["config"]["redundant_state"] == "BACKUP"
            assert " state DOWN " in await second.output("ip -o link show dev eth2")
            killed = time.monotonic()
            await first.close()
            took = await has_gateway(second, MACS["BACKUP"]) - killed
            noted = "until grep -q PRIMARY /etc/cloudstack/cmdline.json; do sleep 0.5; done"
            await second.output(noted)
            assert await state(second) == "Status: PRIMARY"
            return took

    took = asyncio.run(story())
    print(f"interval {INTERVAL}: the other router answered after {took:.2f} s")
    # A busy machine is late, but never early.
    assert 2 * INTERVAL <= took <= failover_bound(INTERVAL, 100) + 20
