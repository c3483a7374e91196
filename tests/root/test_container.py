"""The container that a tree runs in: its fence, its NICs and its memory, and that nothing is left of it."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from build.agent import files, memory
from build.agent.guest import cgroup_keeper, container_init
from build.agent.guest.container import Container, Nic
from build.agent.guest.qemu import Stopped
from tests import cli, ordinary
from tests.container import converse, host
from tests.images import TINY, Built, link
from tests.waiting import LONG, until

pytestmark = pytest.mark.root


# --- what is left ----------------------------------------------------------------------------------


def processes(is_one: Callable[[Path], bool]) -> list[str]:
    """Command lines of the processes of which something is true."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if is_one(folder):
                found.append(f"{folder.name}: {(folder / 'cmdline').read_text(errors='replace')}")
        except OSError:
            continue
    return found


def having(space: str) -> list[str]:
    """Processes in a network namespace."""
    return processes(lambda folder: str((folder / "ns/net").readlink()) == space)


def keepers(of: int) -> list[str]:
    """Keepers of control groups that a process has started."""
    return processes(
        lambda folder: (
            f"\nPPid:\t{of}\n" in (folder / "status").read_text()
            and "cgroup_keeper" in (folder / "cmdline").read_text()
        )
    )


def containers_below(folder: Path) -> list[Path]:
    """Control groups of containers; groups come and go while they are looked for."""
    found = []
    for above, names, _ in os.walk(folder):
        found += [Path(above, name) for name in names if name.startswith(cgroup_keeper.PREFIX)]
        names[:] = [name for name in names if not name.startswith(cgroup_keeper.PREFIX)]
    return found


def abandoned() -> list[Path]:
    """Control groups of containers that nobody keeps."""
    mounts = Path("/proc/self/mountinfo").read_text()
    folders = [folder for kind in (memory.V1, memory.V2) for _, folder in memory._mounted(mounts, kind)]
    return [path for folder in folders for path in containers_below(folder) if not files.is_held(path)]


def lies_in(location: Path) -> list[str]:
    """Files of a build, but for what its background work makes of a layer."""
    return sorted(str(path) for path in location.rglob("*") if path.name not in ("synced", "content"))


def gone(what: Callable[[], object]) -> None:
    """Wait until nothing of a kind is there."""
    until(lambda: not what(), say=lambda: f"left: {what()}")


@contextmanager
def child(
    built: Built, work: Path, mode: str = "root", prefix: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a container for as long as this lasts."""
    argv = [sys.executable, "-B", "-m", "tests.container"]
    with subprocess.Popen(
        [*prefix, *argv, str(built.location), built.image.name, mode, str(work)],
        cwd=cli.CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def begun(process: subprocess.Popen[str]) -> list[str]:
    """Wait until it is up; its network namespaces, inside and outside."""
    assert process.stdout
    assert select.select([process.stdout], [], [], LONG)[0]
    *pids, state = process.stdout.readline().split()
    assert state == "running"
    return [str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in pids]


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_nothing_is_left_of_a_killed_one(tiny: Built, tmp_path: Path) -> None:
    (tiny.location / "cache/root/.container").mkdir(exist_ok=True)
    before, links = lies_in(tiny.location), sorted(Path("/sys/class/net").iterdir())
    with child(tiny, tmp_path) as process:
        spaces, kept = begun(process), keepers(process.pid)
        assert kept
        assert all(having(space) for space in spaces)
        kill(process)
    gone(lambda: [having(space) for space in spaces if having(space)])
    gone(lambda: set(kept) & set(processes(lambda _folder: True)))
    gone(abandoned)
    assert str(tiny.location) not in Path("/proc/self/mounts").read_text()
    assert lies_in(tiny.location) == before
    assert sorted(Path("/sys/class/net").iterdir()) == links


@pytest.mark.parametrize("seconds", [0.3, 0.5, 0.8, 1.2])
def test_nothing_is_left_of_one_killed_while_it_starts(tiny: Built, tmp_path: Path, seconds: float) -> None:
    with child(tiny, tmp_path) as process:
        time.sleep(seconds)
        kept = keepers(process.pid)
        kill(process)
    mark = str(tiny.location / "cache/root/.container")
    gone(lambda: processes(lambda folder: mark in (folder / "cmdline").read_text(errors="replace")))
    gone(lambda: set(kept) & set(processes(lambda _folder: True)))
    gone(abandoned)


def test_what_a_killed_keeper_left_the_next_one_removes(tiny: Built, tmp_path: Path) -> None:
    with child(tiny, tmp_path) as process:
        spaces = begun(process)
        (kept,) = keepers(process.pid)
        os.kill(int(kept.partition(":")[0]), signal.SIGKILL)
        gone(lambda: [line for line in keepers(process.pid) if line == kept])
        kill(process)
    gone(lambda: [having(space) for space in spaces if having(space)])
    with child(tiny, tmp_path) as process:
        begun(process)
        assert not abandoned()


def test_one_that_ends_by_itself_says_how(tiny: Built, tmp_path: Path) -> None:
    async def off(guest: Container) -> None:
        await guest.settled()
        await guest.output("systemctl poweroff")
        while True:  # commands are ended before the container is
            await guest.output("sleep 1")

    with pytest.raises(Stopped, match=r"^the container powered off$"):
        converse(tiny, tmp_path, off)


def test_an_init_that_cannot_run_is_told_with_its_last_words(tiny: Built, tmp_path: Path) -> None:
    (library,) = [
        path
        for layer in tiny.manifest["layers"]
        for path in (tiny.location / "cache/root" / layer / "tree").glob(
            "usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-*.so"
        )
    ]
    name = "/" + str(library).partition("/tree/")[2]

    async def wait(guest: Container) -> None:
        await guest.settled()

    with pytest.raises(Stopped) as told:
        converse(tiny, tmp_path, wait, files={name: b""})
    assert str(told.value).startswith("the container ended with status 127: /sbin/init: error while loading")
    assert str(told.value).endswith("file too short")
    assert "file too short" in (tmp_path / "console-container.log").read_text()


# --- the fence -------------------------------------------------------------------------------------

FORBIDDEN = {
    "a kernel setting": "value=$(cat /proc/sys/vm/swappiness) && echo $value >/proc/sys/vm/swappiness",
    "what is read-only": "mount -o remount,rw /proc/sys || mount -o remount,bind,rw /proc/sys",
    "the kernel's devices": "mount -o remount,rw /sys || mount -o remount,bind,rw /sys",
    "a second view of the kernel": "mount -t sysfs sysfs /mnt && [ -w /mnt/kernel/profiling ]",
    "a second view of processes": "mount -t proc proc /mnt && [ -w /mnt/sys/vm/swappiness ]",
    "what is covered": "umount /proc/sys || umount /sys/class",
    "a device": "mknod /tmp/disk b 7 0 && head -c 1 /tmp/disk",
    "the host's device nodes": "chmod 666 /dev/null",
    "a module": "insmod /etc/hostname || modprobe dummy",
    "the clock": "date -s now",
    "the kernel's log": "dmesg",
    "the kernel's keys": "perl -e 'exit(syscall(250, 0, -4, 1) < 0)'",
    "a namespace of one's own": "unshare --user true",
    "swap": "truncate -s 1M /tmp/swap && mkswap /tmp/swap && swapon /tmp/swap",
    "a folder outside": '[ "$(stat -c %d:%i .)" != "$(stat -c %d:%i /)" ]',
}
"""What the container's root may not do; each ends with 0 if he could, and does this host no harm then."""
SETTINGS = """
echo 1 >/proc/sys/net/ipv4/ip_forward && echo 7 >/proc/sys/net/ipv4/conf/eth0/tag &&
echo elsewhere >/etc/hostname && hostname -F /etc/hostname && echo DONE
cat /proc/sys/net/ipv4/ip_forward; hostname
"""
"""What he may: all of it is his own."""


def test_its_root_reaches_nothing_of_the_host(tiny: Built, tmp_path: Path) -> None:
    before = host()

    async def try_all(guest: Container) -> tuple[dict[str, str], str, str]:
        await guest.settled()
        tried = {}
        for what, how in FORBIDDEN.items():
            tried[what] = await guest.output(f"({how}) && echo DONE")
            unit = shlex.join(
                ["systemd-run", "--quiet", "--wait", "--pipe", "--working-directory=/", "sh", "-c", how]
            )
            tried[f"{what}, as a unit"] = await guest.output(f"{unit} && echo DONE")
        return tried, await guest.output(SETTINGS), host()

    tried, own, meanwhile = converse(tiny, tmp_path, try_all, [Nic()])
    assert {what: said for what, said in tried.items() if said.endswith("DONE")} == {}
    assert own.split() == ["DONE", "1", "elsewhere"]
    assert ": not found" not in str(tried)  # each is really tried
    assert meanwhile == before
    assert host() == before


def test_units_that_are_left_out_are_passed_over(tiny: Built, tmp_path: Path) -> None:
    assert "systemvm-swap.service" in container_init.LEFT_OUT
    service = b"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n"

    async def start(guest: Container) -> str:
        await guest.settled()
        return await guest.output(
            "systemctl start systemvm-swap; systemctl show -P ActiveState systemvm-swap"
        )

    told = converse(tiny, tmp_path, start, files={"/etc/systemd/system/systemvm-swap.service": service})
    assert told == "inactive"


# --- NICs and memory -------------------------------------------------------------------------------


STATIC = b"[Match]\nMACAddress=02:00:00:00:00:02\n[Network]\nAddress=192.0.2.2/24\n"


def test_nics_are_those_that_were_asked_for(tiny: Built, tmp_path: Path) -> None:
    nics = [Nic("02:00:00:00:00:01"), Nic("02:00:00:00:00:02", ("192.0.2.1/24",))]

    async def look(guest: Container) -> tuple[str, str]:
        await guest.settled()
        await guest.plug(Nic("02:00:00:00:00:03"), 2)
        known = "/sys/class/net/eth[0-9]"
        addresses = await guest.output(f"cat {known}/address; ls -d {known}/device")
        greeting = (
            "for i in {1..99}; do exec 3<>/dev/tcp/192.0.2.2/22 && break; sleep 0.2; done; head -c 8 <&3"
        )
        return addresses, (await guest.run(guest.beside("bash", "-c", greeting))).stdout

    addresses, reached = converse(
        tiny, tmp_path, look, nics, files={"/etc/systemd/network/00.network": STATIC}
    )
    assert addresses.split() == [
        *(f"02:00:00:00:00:0{number}" for number in (1, 2, 3)),
        *(f"/sys/class/net/eth{number}/device" for number in (0, 1)),
    ]
    assert reached == "SSH-2.0-"


def test_all_of_it_has_the_memory_that_was_asked_for(tiny: Built, tmp_path: Path) -> None:
    async def eaten(guest: Container) -> tuple[bool, list[str]]:
        await guest.settled()
        run = "systemd-run --quiet --wait sh -c 'head -c {} /dev/zero | tail >/dev/null'; echo $?"
        return guest.limited, [await guest.output(run.format(f"{size}M")) for size in (64, 400)]

    limited, (little, much) = converse(tiny, tmp_path, eaten)
    assert limited
    assert little == "0"
    assert much.split()[-1] != "0"


# --- hosts and users -------------------------------------------------------------------------------


def test_a_host_without_cgroup2_is_refused(tiny: Built, tmp_path: Path) -> None:
    """As on a kernel without any control group: nothing is mounted, and there is nowhere to mount it."""
    hide = """awk '$3 ~ /^cgroup/ { print $2 }' /proc/mounts | xargs -r -n1 umount -l
    mount -t tmpfs none /sys/fs; exec "$@" """
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "sh"]
    with child(tiny, tmp_path, prefix=prefix) as process:
        _, said = process.communicate(timeout=LONG)
    assert process.returncode == 1
    error, hint = said.splitlines()
    assert error.startswith(
        "error: no control group for a container: cgroup2 is not mounted, and cannot be: "
    )
    assert hint == "  hint: use a kernel with cgroup2; `inv boot` and `inv verify` need none"


@pytest.mark.slow(25, reason="two containers of an ordinary user")
def test_an_ordinary_user_runs_one_in_a_group_of_his_own(tiny_of_user: Built, tmp_path: Path) -> None:
    location, tables = tmp_path / "user", tmp_path / "tables"
    tables.mkdir()
    link(tiny_of_user.location, location)
    flags = (*TINY, "--frozen", "--set", f"location={location}")
    built = Built(location, location / "tiny.img", "")
    with child(built, location, "user", ordinary.prefix(tables, location)) as process:
        _, said = process.communicate(timeout=LONG)
    assert (
        said.splitlines()[-1] == "  hint: run it as root, or in: systemd-run --user --scope -p Delegate=yes"
    )
    with delegated() as group:
        before = [f"echo $$ >{group}/leaf/cgroup.procs"]
        with child(built, location, "user", ordinary.prefix(tables, location, before=before)) as process:
            spaces = begun(process)
            kill(process)
        gone(lambda: [having(space) for space in spaces if having(space)])
        gone(lambda: containers_below(group))
    cli.succeed("clean", "--all", *flags, prefix=ordinary.prefix(tables, location))


@contextmanager
def delegated() -> Iterator[Path]:
    """A control group that is the ordinary user's, as a service manager gives him one."""
    mounts = Path("/proc/self/mountinfo").read_text()
    (_, top) = next(iter(memory._mounted(mounts, memory.V2)))
    group = top / f"test-{os.getpid()}"
    (group / "leaf").mkdir(parents=True)
    for path in (group, *group.rglob("*")):
        os.chown(path, ordinary.UID, ordinary.UID)
    try:
        yield group
    finally:
        gone((group / "leaf/cgroup.procs").read_text)
        cgroup_keeper.remove(group)
