"""A built image's tree as a container, for tests, and a management server's ways into it."""

from __future__ import annotations

import asyncio
import ipaddress
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from build.agent import process
from build.agent.events import Failure
from build.agent.guest import container
from build.agent.guest.container import Container, Nic
from build.agent.sandbox import BuildPaths
from tests import dhcp as server
from tests.images import Built
from tests.system_vm import CMDLINE, answers, script
from tests.waiting import LONG

Result = TypeVar("Result")
NICS = 4
"""As many as the largest type has."""
IMPATIENT = {
    "/run/systemd/system/cloud-early-config.service.d/zz-test.conf": b"[Service]\n"
    b"Environment=SYSTEMVM_SCRIPTS_WAIT=1\n"
}
"""Where nobody brings scripts they are waited for one second."""
SSH = (
    *("-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
    *("-o", "ConnectTimeout=60", "-o", "BatchMode=yes"),
)


def place(built: Built, mode: str = "root") -> BuildPaths:
    """Where the layers of a build lie."""
    return BuildPaths(built.location, Path("/mnt/systemvm"), mode, True)


def cabled(number: int, address: str) -> tuple[Nic, ...]:
    """NICs of which one leads to a management server: its own end has the first address of the network."""
    network = ipaddress.ip_interface(address).network
    end = f"{network[1]}/{network.prefixlen}"
    return tuple(Nic(outside=(end,) if index == number else ()) for index in range(NICS))


def converse(
    built: Built,
    work: Path,
    conversation: Callable[[Container], Awaitable[Result]],
    nics: Sequence[Nic] = (),
    *,
    files: Mapping[str, bytes] = IMPATIENT,
    name: str = "container",
) -> Result:
    """Run a container, talk to it, end it; fails when its init ends or it takes too long."""
    layers = tuple(built.manifest["layers"])
    spec = container.Spec(place(built), layers, tuple(nics), files=files)

    async def talk() -> Result:
        async with (
            asyncio.timeout(LONG),
            container.running(spec, work, name, lambda _line, _ended: None) as guest,
        ):
            told = await conversation(guest)
            print(f"{name}: {await seconds(guest):.1f} s of processor time")
            return told

    return asyncio.run(talk())


async def seconds(guest: Container) -> float:
    """Processor time that the container has used."""
    text = await guest.output("cat /sys/fs/cgroup/cpu.stat")
    return int(text.split()[1]) / 1e6


async def deliver(guest: Container, line: str) -> None:
    """Write the boot line where a KVM host's guest agent writes it."""
    await guest.put(CMDLINE, f"{line}\n".encode())


async def facts(guest: Container, questions: Mapping[str, str]) -> dict[str, str]:
    """Answers of several commands by their names."""
    return answers(await guest.output(script(questions)))


async def ssh(guest: Container, key: Path, address: str, port: int, command: str) -> tuple[int, str, str]:
    """Log in as a management server does; returns status, output and complaints."""
    argv = ["ssh", *SSH, "-p", str(port), "-i", str(key), f"root@{address}", command]
    done = await guest.run(guest.beside(*argv))
    return done.returncode, done.stdout.strip(), done.stderr


async def logged_in(guest: Container, key: Path, address: str, command: str) -> str:
    """What a command prints over SSH; sshd may just be about to start."""
    while True:
        status, out, err = await ssh(guest, key, address, 3922, command)
        if status != 255 or "denied" in err:
            assert status == 0, err
            return out
        await asyncio.sleep(0.5)


async def copy(
    guest: Container, key: Path, address: str, *files: Path, to: str = "/var/cache/cloud/"
) -> None:
    """Copy files as a host does: by the old protocol of scp, with their times and modes."""
    argv = [
        "scp",
        "-O",
        "-p",
        "-q",
        *SSH,
        "-P",
        "3922",
        "-i",
        str(key),
        *map(str, files),
        f"root@{address}:{to}",
    ]
    done = await guest.run(guest.beside(*argv))
    assert done.returncode == 0, done.stderr


@asynccontextmanager
async def dhcp(guest: Container, number: int, address: str) -> AsyncIterator[None]:
    """Let a NIC be given an address (with its prefix length) when it asks for one."""
    argv = guest.beside(sys.executable, "-I", "-S", "-B", server.__file__, f"out{number}", address)
    child = await asyncio.create_subprocess_exec(*process.tied(argv))
    try:
        yield
    finally:
        child.kill()
        await child.wait()


HOST = """
ip -br link; ip -br addr; nft list ruleset; hostname
grep -rs . /proc/sys/kernel/panic /proc/sys/kernel/printk /proc/sys/kernel/sysrq /proc/sys/vm/swappiness \\
    /proc/sys/vm/panic_on_oom /proc/sys/vm/vfs_cache_pressure /proc/sys/vm/min_free_kbytes \\
    /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/all /proc/sys/net/ipv6/conf/all
stat -c '%n %a %u %g' /dev/null /dev/tty /dev/urandom
cat /proc/swaps
"""


def host() -> str:
    """What of this host a container must not change."""
    return subprocess.run(["sh", "-c", HOST], capture_output=True, text=True, check=False).stdout


def main(location: str, image: str, mode: str, work: str) -> None:
    """Run a container until stdin ends; tells the processes inside and outside, and whether it is running."""
    built = Built(Path(location), Path(location, image), "")
    spec = container.Spec(place(built, mode), tuple(built.manifest["layers"]), (Nic(),))

    async def stay() -> None:
        async with container.running(spec, Path(work), "child", lambda _line, _ended: None) as guest:
            state = await guest.settled()
            await guest.plug(Nic(), 1)  # from outside, which a user may, too
            print(guest.inside, guest.outside, state, flush=True)
            await asyncio.to_thread(sys.stdin.read)

    try:
        asyncio.run(stay())
    except Failure as failure:
        sys.exit(f"error: {failure.message}\n  hint: {failure.hint}")


if __name__ == "__main__":
    main(*sys.argv[1:])
