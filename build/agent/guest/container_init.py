"""Start a tree's own init in a container: the part that runs in the container's outer namespaces.

Usage: container_init.py SPEC LINE GROUP...   (descriptors; the tree is mounted at $ROOT)

SPEC is a file with a JSON object: `nics` (objects with `mac` and `outside`, the addresses of the other
end), `files` (base64 by absolute path), `environment`, `console` (a terminal of this host). LINE is a
socket on which this program says `outside` and the init, just before it begins, `inside`, each from the
process whose namespaces these are; or `error` and a text. GROUPs are folders of control groups.

Three rings of namespaces, each the prison of the next one:

    outer    of whoever started us: the host's files, a network of its own with the other ends of the NICs
    middle   a user namespace that maps the same ids, and owns processes, network, names, IPC, control groups
    inner    a mount namespace that the middle one owns; its mounts come from the outer one, so the kernel
             has locked them: what is read-only in there stays so, and nothing can be uncovered

The container's root is root in the middle one alone: it cannot load a module, make a device node, mount the
host's file systems, set a clock or write to kernel settings that are not of its own network. It keeps the
host's user ids, as the layers have them; hence the locks, since a file of the host's root would be its own.

Sources: user_namespaces(7), mount_namespaces(7), cgroup_namespaces(7), https://systemd.io/CONTAINER_INTERFACE.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from build.agent import enter
from build.agent.enter import BIND, NODEV, NOEXEC, NOSUID, PRIVATE, RDONLY, REC, REMOUNT, call, mount

NEWCGROUP = 0x02000000
OWNED = enter.NEWPID | enter.NEWNET | enter.NEWUTS | enter.NEWIPC | NEWCGROUP
JOINED = ("pid", "net", "ipc", "cgroup")
"""Namespaces of the init in which file systems are mounted for it."""
HARMLESS = NOSUID | NODEV | NOEXEC
GIVEN_UP = {
    "SYS_MODULE": 16,
    "SYS_RAWIO": 17,
    "SYS_TIME": 25,
    "AUDIT_CONTROL": 30,
    "MAC_OVERRIDE": 32,
    "MAC_ADMIN": 33,
    "SYSLOG": 34,
    "WAKE_ALARM": 35,
    "BLOCK_SUSPEND": 36,
    "AUDIT_READ": 37,
}
"""Capabilities that mean nothing in a user namespace. Units ask for them to know whether they can work."""
LAST_CAPABILITY = 63
LEFT_OUT = {
    "systemvm-swap.service": "swap is the kernel's, and the kernel is the host's",
    "dev-hugepages.mount": "huge pages are the kernel's own",
    "sys-fs-fuse-connections.mount": "the same for what FUSE shows of all its mounts",
    "run-rpc_pipefs.mount": "NFS is the kernel's, which may have none and would load it as a module",
    "proc-fs-nfsd.mount": "the same for its server",
    "conntrackd.service": "it wants larger buffers for its sockets than the host's root alone may give",
}
"""Units of an image that cannot run in a container, and why; systemd passes them over.

Others know by themselves: qemu-guest-agent finds no device, and what loads modules or sets the clock no
capability.
"""
PASSED_OVER = "[Unit]\nConditionVirtualization=!container\n"
KVM = {
    "virtio-ports/vport0p1/name": "org.qemu.guest_agent.0\n",
    "dmi/id/sys_vendor": "Apache Software Foundation\n",
    "dmi/id/product_name": "CloudStack KVM Hypervisor\n",
}
"""What the container finds below /sys/class in place of the host's: a machine as CloudStack's KVM agent
defines it (LibvirtVMDef: sysinfo of the domain, and the guest agent's channel)."""


def main(descriptors: Sequence[int]) -> int:
    """Start the container and wait for its end; returns its status, 128 and the signal's number if killed."""
    spec_file, line_end, *groups = descriptors
    line = socket.socket(fileno=line_end)
    try:
        spec = json.loads(Path(f"/proc/self/fd/{spec_file}").read_text(encoding="utf-8"))
        init = _start(spec, line, groups)
    except (OSError, subprocess.CalledProcessError) as error:
        _complain(line, error)
        return 1
    line.close()
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == init:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _complain(line: socket.socket, error: Exception) -> None:
    said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
    with contextlib.suppress(OSError):
        line.send(f"error {said or traceback.format_exc()}".encode())


def _start(spec: Mapping[str, Any], line: socket.socket, groups: Sequence[int]) -> int:
    root = os.environ["ROOT"]
    call("unshare", enter.NEWNET)
    line.send(b"outside")
    release, go = os.pipe()
    init = _fork_init(groups, lambda: _become_init(root, spec["environment"], line, (release, go)))
    os.close(release)
    connect(init, spec["nics"])
    _in_child(lambda: _mount_in_namespaces(init, root, spec))
    os.write(go, b"g")
    os.close(go)
    return init


def _in_child(work: Callable[[], None]) -> None:
    """Do something in a child, whose namespaces and root are not ours afterwards; raises OSError."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
        except OSError as error:
            os.write(write, f"{error.errno} {error}".encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    if said:
        number, _, text = said.partition(" ")
        raise OSError(int(number), text)


# Namespaces ---------------------------------------------------------------------------------------


def identity(map_text: str) -> str:
    """Return the map (user_namespaces(7)) that gives a child of this namespace the ids that we have."""
    rows = [line.split() for line in map_text.splitlines()]
    return "".join(f"{inside} {inside} {count}\n" for inside, _, count in rows)


def _fork_init(groups: Sequence[int], become: Callable[[], NoReturn]) -> int:
    """Fork the first process of the middle namespaces, by way of one that makes them; returns its pid."""
    answers, say = os.pipe()
    heard, answer = os.pipe()
    child = os.fork()
    if not child:
        try:
            for group in groups:
                Path(f"/proc/self/fd/{group}/cgroup.procs").write_text("0", encoding="ascii")
            call("unshare", enter.NEWUSER)
            os.write(say, b"0\n")
            os.read(heard, 1)
            call("unshare", OWNED)
            init = os.fork()
            if not init:
                for descriptor in (answers, say, heard, answer, *groups):
                    os.close(descriptor)
                become()
            os.write(say, f"{init}\n".encode())
        except OSError as error:
            os.write(say, f"{error.errno} {error}\n".encode())
        os._exit(0)
    for descriptor in (say, heard):
        os.close(descriptor)
    with os.fdopen(answers, encoding="utf-8", errors="replace") as stream:
        said = stream.readline()
        if said == "0\n":
            for kind in ("uid_map", "gid_map"):
                text = identity(Path("/proc/self", kind).read_text(encoding="ascii"))
                Path(f"/proc/{child}/{kind}").write_text(text, encoding="ascii")
            os.write(answer, b"g")
            said = stream.readline()
    os.close(answer)
    number, _, text = said.strip().partition(" ")
    if text or not number:
        raise OSError(int(number or 0), text or "the container's namespaces were not made")
    return int(number)


def connect(init: int, nics: Sequence[Mapping[str, Any]]) -> None:
    """Make the NICs: eth0, eth1 ... in the container's network; out0, out1 ... in ours."""
    lines = ["link set lo up"]
    for number, nic in enumerate(nics):
        lines += link(number, nic, init)
    subprocess.run(
        ["ip", "-batch", "-"],
        input="".join(f"{line}\n" for line in lines),
        text=True,
        capture_output=True,
        check=True,
    )


def link(number: int, nic: Mapping[str, Any], init: int) -> list[str]:
    """Return lines for `ip -batch` that make one NIC; its other end gets addresses with a prefix length."""
    address = f" address {nic['mac']}" if nic["mac"] else ""
    outside = f"out{number}"
    return [
        f"link add name {outside} type veth peer name eth{number}{address} netns {init}",
        *(f"address add {each} dev {outside}" for each in nic["outside"]),
        f"link set {outside} up",
    ]


# File systems -------------------------------------------------------------------------------------


def _mount_in_namespaces(init: int, root: str, spec: Mapping[str, Any]) -> None:
    """Mount in the tree what belongs to the init's namespaces, from outside of its mount namespace."""
    for kind in JOINED:
        call("setns", os.open(f"/proc/{init}/ns/{kind}", os.O_RDONLY), 0)
    old = os.open("/", os.O_PATH)
    # Links of the tree lead no further than its own root.
    os.chroot(root)
    os.fchdir(old)
    # A process is of a namespace for processes only when it was forked in there.
    _in_child(lambda: furnish(spec))


def furnish(spec: Mapping[str, Any]) -> None:
    """Mount in the tree, `/`, what its init expects; `.` is the host's root."""
    mount("proc", "/proc", "proc", HARMLESS)
    _lock_proc()
    mount("sysfs", "/sys", "sysfs", HARMLESS | RDONLY)
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", HARMLESS)
    mount("tmpfs", "/run", "tmpfs", NOSUID | NODEV, "mode=755")
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=1777")
    _devices(spec["console"])
    _machine(len(spec["nics"]))
    for unit in LEFT_OUT:
        # Above /etc in systemd's order (systemd.unit(5)), where the image has units of its own.
        write(f"/run/systemd/system.control/{unit}.d/container.conf", PASSED_OVER.encode())
    write("/etc/fstab", b"# The image's own names its disk, and a container has none.\n")
    for name, content in spec["files"].items():
        write(name, base64.b64decode(content))


def write(name: str, content: bytes) -> None:
    """Write a file of the container in place of one that is there."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _lock_proc() -> None:
    """Leave of /proc nothing writable but processes and settings of the network."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() or entry.is_symlink():
            continue
        if entry.is_dir() or entry.stat(follow_symlinks=False).st_mode & 0o222:
            _read_only(entry.path)
    network = "/proc/sys/net"
    mount(network, network, flags=BIND)
    mount("", network, flags=REMOUNT | BIND | HARMLESS)


def _read_only(path: str) -> None:
    mount(path, path, flags=BIND)
    mount("", path, flags=REMOUNT | BIND | RDONLY | HARMLESS)


def _devices(console: str) -> None:
    mount("tmpfs", "/dev", "tmpfs", NOSUID | NOEXEC, "mode=755")
    for node in enter.NODES:
        os.mknod(f"/dev/{node}")
        mount(f"dev/{node}", f"/dev/{node}", flags=BIND)
        # The host's own, whose mode and owner are not for the container; it can be written to all the same.
        mount("", f"/dev/{node}", flags=REMOUNT | BIND | RDONLY | NOSUID | NOEXEC)
    for name, target in enter.LINKS.items():
        os.symlink(target, f"/dev/{name}")
    for name, kind, options in (
        ("pts", "devpts", "newinstance,ptmxmode=0666,mode=620,gid=5"),
        ("shm", "tmpfs", "mode=1777"),
        ("mqueue", "mqueue", ""),
    ):
        os.mkdir(f"/dev/{name}")
        mount(kind, f"/dev/{name}", kind, NOSUID | NOEXEC | (0 if name == "pts" else NODEV), options)
    os.mknod("/dev/console")
    mount(console.lstrip("/"), "/dev/console", flags=BIND)


def _machine(nics: int) -> None:
    """Cover what /sys tells of the host's own machine by that of a guest of KVM."""
    for name, text in KVM.items():
        write(f"/run/host/class/{name}", text.encode())
    _cover("/run/host/class", "/sys/class")
    for number in range(nics):
        # The guest knows a NIC by the device behind it.
        os.makedirs(f"/run/host/eth{number}/device")
        _cover(f"/run/host/eth{number}", f"/sys/devices/virtual/net/eth{number}")
    if os.path.isdir("/sys/hypervisor"):
        mount("tmpfs", "/sys/hypervisor", "tmpfs", HARMLESS | RDONLY)


def _cover(above: str, folder: str) -> None:
    mount("overlay", folder, "overlay", HARMLESS | RDONLY, f"lowerdir={above}:{folder}")


# Init ---------------------------------------------------------------------------------------------


def _become_init(
    root: str, environment: Mapping[str, str], line: socket.socket, gate: tuple[int, int]
) -> NoReturn:
    try:
        release, go = gate
        os.close(go)
        if not os.read(release, 1):
            os._exit(1)
        sys.path.clear()  # what were imported in the tree would be the tree's
        _enter(root)
        os.setsid()
        console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
        give_up()
        line.send(b"inside")
        for descriptor in (0, 1, 2):
            os.dup2(console, descriptor)
        enter.close_descriptors(())
        os.execve("/sbin/init", ["/sbin/init"], dict(environment))
    except OSError as error:
        with contextlib.suppress(OSError):
            line.send(f"error /sbin/init: {error}".encode())
    os._exit(1)


def give_up() -> None:
    """Give up, for good, what no process of a container may have."""
    enter.refuse_calls()
    enter.drop(frozenset(range(LAST_CAPABILITY)) - frozenset(GIVEN_UP.values()))
    os.umask(0o022)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and so would the command
        signal.signal(number, signal.SIG_DFL)


def _enter(root: str) -> None:
    """Make the tree, with all that is mounted in it, the root of a mount namespace of our own."""
    call("unshare", enter.NEWNS)
    mount("", "/", flags=REC | PRIVATE)
    # Mounts of the namespace above are locked where they are; their copy's top is not.
    mount(root, root, flags=BIND | REC)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", enter.DETACH)
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
