"""Run the finished tree of a build as a container: its own systemd in namespaces, in seconds.

A container shows what the image's programs do: units, set-up, services, packet filter, SSH. What only a
kernel and a firmware of its own can show it does not: boot loader, drivers, size of memory and disk, swap.

Nothing is left of it, whatever ends this process. Mounts, processes and network interfaces go with the
namespaces' first process, which is tied to us. The control group is removed by a keeper that outlives us
for the moment that this takes (`cgroup_keeper.py`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import shlex
import socket
import struct
import subprocess
import sys
import termios
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from build.agent import process, sandbox, store
from build.agent.events import Failure
from build.agent.guest import cgroup_keeper, container_enter, container_init
from build.agent.guest.qemu import Heard, Serial, Stopped
from build.agent.sandbox import BuildPaths, Tree

Result = TypeVar("Result")
START = 60.0
"""Seconds for the namespaces to be made; it takes a tenth of one."""
NAME = "systemvm"
"""What the container says it is (systemd-detect-virt(1) prints container-other)."""
SIZE = (50, 200)
"""Lines and columns of the console."""
MEMORY = 256
"""MiB."""


@dataclass(frozen=True)
class Nic:
    """A network card of the container, whose cable ends in a network outside where nobody else is."""

    mac: str = ""
    outside: tuple[str, ...] = ()
    """Addresses of the cable's other end, each with a prefix length; from there the container is reached."""


@dataclass(frozen=True)
class Spec:
    """A container as data."""

    place: BuildPaths
    chain: tuple[str, ...]
    """Layers, the lowest first."""
    nics: tuple[Nic, ...] = ()
    """eth0, eth1 ..."""
    memory: int = MEMORY
    """MiB that all its processes may use together, if this host can hold them to it."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Written over the tree, in the layer that is thrown away, before its init begins."""


@dataclass(frozen=True)
class Groups:
    """The control groups of a container: descriptors, and whether its memory is limited."""

    descriptors: tuple[int, ...]
    limited: bool


class Container:
    """A container that runs. Every wait ends with Stopped when it ends."""

    def __init__(self, child: subprocess.Popen[Any], mode: str, console: Serial, limited: bool) -> None:
        self.console = console
        self.limited = limited
        """Whether the kernel holds it to its memory."""
        self.inside = 0
        self.outside = 0
        """Processes of this host that have the namespaces of the container, and of its cables' other ends."""
        self._child = child
        self._mode = mode
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, why: str) -> None:
        """Make every wait end with Stopped; the first reason stands."""
        if not self._stopped.done():
            self._stopped.set_exception(Stopped(why))
            self._stopped.exception()

    async def until(self, work: Awaitable[Result]) -> Result:
        """Wait for something the container does, or raise Stopped."""
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._stopped}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._stopped.done():
                self._stopped.result()
            return await task
        finally:
            task.cancel()

    def command(self, *argv: str) -> list[str]:
        """Return the command line that runs a command in the container, as its root."""
        program = (sys.executable, "-I", "-S", "-B", container_enter.__file__, str(self.inside))
        variables = (f"PATH={process.PATH}", "LC_ALL=C.UTF-8", "HOME=/root")
        return [*program, "env", "-i", *variables, *argv]

    def beside(self, *argv: str) -> list[str]:
        """Return the command line that runs a command of this host at the other ends of the cables."""
        user = ("--user", "--preserve-credentials") if self._mode == "user" else ()
        return ["nsenter", f"--target={self.outside}", *user, "--net", "--", *argv]

    async def run(self, argv: Sequence[str], text: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run a command line of `command` or `beside` to its end; stderr is apart from stdout."""
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *process.tied(argv),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=process.environment(),
            start_new_session=True,
        )
        try:
            out, err = await self.until(child.communicate(text))
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        return subprocess.CompletedProcess(
            list(argv), child.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")
        )

    async def output(self, script: str) -> str:
        """Run a shell script in the container; returns what it prints, stderr included."""
        done = await self.run(self.command("/bin/sh", "-c", f"exec 2>&1\n{script}"))
        return done.stdout.removesuffix("\n")

    async def settled(self) -> str:
        """Wait until no unit is starting any more; returns systemd's own word for its state (`running`)."""
        return await self.output(
            "until [ -S /run/systemd/private ]; do sleep 0.1; done; systemctl is-system-running --wait"
        )

    async def put(self, path: str, content: bytes) -> None:
        """Write a file in the container, in place, as a guest agent does; raises Stopped when it cannot."""
        done = await self.run(self.command("/bin/sh", "-c", 'cat >"$0"', path), content)
        if done.returncode:
            raise Stopped(f"cannot write {path}: {done.stderr.strip()}")

    async def plug(self, nic: Nic, number: int) -> None:
        """Plug a network card in while the container runs. No device counts as being behind it."""
        lines = container_init.link(number, asdict(nic), self.inside)
        done = await self.run(self.beside("ip", "-batch", "-"), "\n".join([*lines, ""]).encode())
        if done.returncode:
            raise Stopped(f"cannot plug eth{number}: {done.stderr.strip()}")

    async def close(self) -> None:
        """End the container, however it is doing."""
        process.stop(self._child)
        self.fail("the container was ended")

    def ended(self) -> None:
        """Tell the waiting ones that it is no more."""
        status = process.finish(self._child)
        why = {128 + 1: "rebooted", 128 + 2: "powered off"}  # reboot(2) in a namespace for processes
        said = why.get(status, f"ended with status {status}")
        last = self.console.last()[-1:]
        self.fail(f"the container {said}" + (f": {last[0]}" if last and status not in why else ""))


def body(spec: Spec, descriptors: Sequence[int]) -> str:
    """Return the shell script that mounts the tree under a throw-away layer and goes on as its container."""
    upper = spec.place.store / ".container"
    quoted = shlex.quote(str(upper))
    tree = Tree(lower=store.view(spec.place, spec.chain).lower, upper=upper / "upper", work=upper / "work")
    program = [sys.executable, "-I", "-S", "-B", container_init.__file__, *map(str, descriptors)]
    return "\n".join(
        [
            "set -eu",
            *sandbox.mountpoint_lines(spec.place),
            f"export ROOT={shlex.quote(str(spec.place.mountpoint))}",
            # It lies in memory: it goes when the container ends.
            f"mount -t tmpfs -o mode=755 tmpfs {quoted}",
            f"mkdir -m 755 {quoted}/upper {quoted}/work",
            *tree.mount(spec.place),
            f"exec {shlex.join(program)}",
        ]
    )


@contextlib.contextmanager
def keeper(place: BuildPaths, memory: int) -> Iterator[Groups]:
    """Have control groups made for a container; at the end, or when this process dies, they are removed.

    Raises Failure where there is no cgroup2, or this user may not make groups.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            arguments = (str(theirs.fileno()), str(memory), place.mode)
            program = [sys.executable, "-I", "-S", "-B", cgroup_keeper.__file__, *arguments]
            child = subprocess.Popen(
                [*sandbox.as_owner(place), *program],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=process.environment(),
                start_new_session=True,
            )
        try:
            message, descriptors, _, _ = socket.recv_fds(ours, 1 << 12, 4)
            try:
                yield _groups(message, descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        finally:
            ours.close()
            child.wait()


def _groups(message: bytes, descriptors: Sequence[int]) -> Groups:
    said = json.loads(message or b'{"error": "its keeper died"}')
    if error := said.get("error"):
        hint = "use a kernel with cgroup2; `inv boot` and `inv verify` need none"
        if os.getuid():
            hint = "run it as root, or in: systemd-run --user --scope -p Delegate=yes"
        raise Failure(f"no control group for a container: {error}", hint)
    return Groups(tuple(descriptors), said["limited"])


@contextlib.asynccontextmanager
async def running(spec: Spec, work: Path, name: str, heard: Heard) -> AsyncIterator[Container]:
    """Start a container; yield it as soon as its init has begun; end it.

    Leaves `console-NAME.log` in `work` and nothing else. `heard` is called with what comes on the console.
    Raises Failure when it cannot be started on this host, and Stopped when its init cannot.
    """
    if not spec.place.overlay:
        raise Failure("a container needs layers that stack", "set LOCATION to a file system with overlayfs")
    store.vouch(spec.place, spec.chain)
    (spec.place.store / ".container").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((work / f"console-{name}.log").open("wb", buffering=0))
        groups = stack.enter_context(keeper(spec.place, spec.memory))
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(line)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        line.setblocking(False)
        terminal, console = os.openpty()
        for descriptor in (terminal, console):  # without ours it would be hung up whenever nobody has it open
            stack.callback(os.close, descriptor)
        fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        with process.nameless(json.dumps(_told(spec, os.ttyname(console))).encode()) as told:
            passed = (told, theirs.fileno(), *groups.descriptors)
            child = process.start(
                [*sandbox.namespaces(spec.place.mode), "bash", "-c", body(spec, passed)],
                stdout=log,
                stderr=log,
                pass_fds=passed,
            )
        theirs.close()
        container = Container(child, spec.place.mode, Serial(log, heard), groups.limited)
        stack.enter_context(_watched(container, child.pid, terminal))
        try:
            await container.until(_begun(container, line, log.name))
            yield container
        finally:
            await container.close()


@contextlib.contextmanager
def _watched(container: Container, pid: int, terminal: int) -> Iterator[None]:
    """Have the loop read the console and notice the end."""
    loop = asyncio.get_running_loop()
    end = os.pidfd_open(pid)
    os.set_blocking(terminal, False)

    def listen() -> bool:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:
            return False
        container.console.feed(data)
        return bool(data)

    def ended() -> None:
        loop.remove_reader(end)
        while listen():  # it may say why
            pass
        container.ended()

    loop.add_reader(terminal, listen)
    loop.add_reader(end, ended)
    try:
        yield
    finally:
        loop.remove_reader(terminal)
        loop.remove_reader(end)
        os.close(end)


def _told(spec: Spec, console: str) -> dict[str, Any]:
    environment = {
        "container": NAME,
        "container_uuid": str(uuid.uuid4()),
        "TERM": "dumb",
        "PATH": process.PATH,
    }
    return {
        "nics": [asdict(nic) for nic in spec.nics],
        "files": {name: base64.b64encode(content).decode() for name, content in spec.files.items()},
        "environment": environment,
        "console": console,
    }


async def _begun(container: Container, line: socket.socket, log: str) -> None:
    """Wait until the init has begun; learns by the senders' credentials which processes these are."""
    async with asyncio.timeout(START):
        while not container.inside:
            text, pid = await _message(line)
            if text == "outside":
                container.outside = pid
            elif text == "inside":
                container.inside = pid
            else:
                last = Path(log).read_text(errors="replace").strip().splitlines()[-1:]
                why = text.removeprefix("error ") or (last[0] if last else "its namespaces were not made")
                raise Failure(f"the container cannot be started: {why}")


async def _message(line: socket.socket) -> tuple[str, int]:
    """Return the next message and its sender's pid; an empty one at the end."""
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(line, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(line)
    data, extra, _, _ = line.recvmsg(1 << 12, socket.CMSG_SPACE(struct.calcsize("3i")))
    pids = [struct.unpack("3i", each)[0] for _, kind, each in extra if kind == socket.SCM_CREDENTIALS]
    return data.decode(errors="replace"), pids[0] if pids else 0
