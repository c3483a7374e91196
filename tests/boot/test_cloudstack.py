"""A system VM as a cloud starts it, booted: what only a machine of its own can show, and a pair.

The full image is booted once, up to where it waits for its parameters; every test goes on from there. In
every run a router is rehearsed from its start to its reboot (`test_rehearsal.py`), and every type, bad
parameters and none, scripts that come later and a pair are asked of the image's tree in containers, which
takes a fortieth of the time (`tests/root/test_system_vms.py`).
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
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
from tests.system_vm import (
    CMDLINE,
    COPIED,
    DONE,
    QUESTIONS,
    QUESTIONS_OF_HEALTH,
    TYPES,
    answers,
    authorized,
    boot_args,
    check,
    check_scripts,
    script,
)
from tests.waiting import LONG

pytestmark = pytest.mark.boot

Result = TypeVar("Result")
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
PATIENCE = 2 * LONG
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


async def facts(guest: qemu.Guest, questions: Mapping[str, str]) -> dict[str, str]:
    """Answers of several commands by their names."""
    return answers(await persistent(guest, script(questions)))


# --- a router ------------------------------------------------------------------------------------


def test_what_talks_to_a_desktop_is_not_in_the_image(system: Built) -> None:
    names = {package["name"] for package in system.manifest["packages"]}
    assert {"lsb-release", "containerd", "runc"} <= names
    assert not {"packagekit", "polkitd", "policykit-1", "software-properties-common"} & names


KERNEL = {
    "killed": "journalctl --dmesg --output cat --no-pager | grep 'Killed process' || true",
    "memory": "awk '/MemTotal/ { print $2 }' /proc/meminfo",
    "root": "df --output=size -k / | tail -n 1",
    "swaps": "cat /proc/swaps",
}
"""What only a kernel and a disk of its own can show."""


@pytest.mark.soak(220)
def test_a_router_comes_up_in_256_mib(waiting: Waiting, key: Path, tmp_path: Path) -> None:
    expected, line, port = TYPES["router"], boot_args("router", key), free_port()

    async def conversation(guest: qemu.Guest) -> tuple[dict[str, str], str]:
        await deliver(guest, line)
        return await facts(guest, {**QUESTIONS, **KERNEL}), await logged_in(port, key, "hostname")

    machine = plugged(expected.control, forwarded(port, expected.own))
    told, answered = go_on(waiting, tmp_path, conversation, machine)
    assert told["killed"] == "", told["log"]
    check("router", line, told, answered)
    assert int(told["memory"]) < 256 << 10
    assert "/swapfile" in told["swaps"]
    # Grown: the image's own root file system would be smaller than the image.
    assert int(told["root"]) << 10 > waiting.size - LARGER


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


# --- scripts of a management server ----------------------------------------------------------------


async def copy(port: int, key: Path, *files: Path, to: str = "/var/cache/cloud/") -> None:
    """Copy files as a host does: by the old protocol of scp, with their times and modes."""
    options = ("-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-q")
    argv = ["scp", "-O", "-p", *options, "-P", str(port), "-i", str(key), *map(str, files)]
    child = await asyncio.create_subprocess_exec(*argv, f"root@127.0.0.1:{to}")
    assert await child.wait() == 0


@pytest.mark.soak(220)
def test_scripts_of_a_management_server_go_on_in_the_same_boot(
    waiting: Waiting, key: Path, tmp_path: Path
) -> None:
    """An archive of 100 MiB beside them, on a machine of 256; other types are asked in containers."""
    vms, expected, port = standin.served(tmp_path / "vms", 100 << 20).parent, TYPES["router"], free_port()
    line = boot_args("router", key)

    async def conversation(guest: qemu.Guest) -> dict[str, str]:
        await persistent(guest, PATIENT)
        await deliver(guest, line)
        await logged_in(port, key, "true")
        await copy(port, key, *(vms / name for name in COPIED))
        return await facts(guest, QUESTIONS_OF_HEALTH | KERNEL)

    told = go_on(waiting, tmp_path, conversation, plugged(expected.control, forwarded(port, expected.own)))
    assert told["killed"] == "", told["log"]
    check_scripts("router", told, vms)
    assert "/swapfile" in told["swaps"]


# --- a redundant pair ------------------------------------------------------------------------------

GATEWAY = "10.1.1.1"
INTERVAL = 2


@pytest.mark.soak(220)
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
        async with asyncio.timeout(PATIENCE), plugged_in(net, "first") as first:
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
