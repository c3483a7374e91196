"""Run a QEMU guest: its command line as a pure function; serial line, QMP and guest agent as events.

All channels are socket pairs handed to QEMU as file descriptors: nothing listens, no path can be too
long, and the end of one of them is the end of the guest.

Sources of facts: QEMU's docs/interop/qmp-spec, qga/qapi-schema.json (guest agent commands),
qapi/run-state.json (SHUTDOWN), qapi/char.json (VSERPORT_CHANGE).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL
from typing import Any, BinaryIO, TypeVar

from build.agent import process
from build.agent.events import Failure
from build.agent.guest.media import Media

PROGRAM = "qemu-system-x86_64"
"""Runs i386 guests too."""

AGENT_PORT = "org.qemu.guest_agent.0"
REPORT_PORT = "verify.report"

LINE = 1 << 24
"""Bytes of the longest line that a guest may send."""

OVMF = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
)
"""Code and variable store of the UEFI firmware without Secure Boot, best first (Debian's ovmf package)."""

Result = TypeVar("Result")
Heard = Callable[[str, bool], None]
"""Takes a line of the serial log, and whether it has ended."""


@dataclass(frozen=True)
class Disk:
    """How a disk hangs on the machine: QEMU devices (the last one holds the drive) and the guest's driver."""

    devices: tuple[str, ...]
    driver: str


DISKS: Mapping[str, Disk] = {
    "virtio": Disk(("virtio-blk-pci",), "virtio_blk"),
    "virtio-scsi": Disk(("virtio-scsi-pci,id=controller", "scsi-hd,bus=controller.0"), "virtio_scsi"),
    "ide": Disk(("ide-hd,bus=ide.0",), "ata_piix"),
    "ahci": Disk(("ahci,id=controller", "ide-hd,bus=controller.0"), "ahci"),
    "scsi-lsi": Disk(("lsi53c895a,id=controller", "scsi-hd,bus=controller.0"), "sym53c8xx"),
    "pvscsi": Disk(("pvscsi,id=controller", "scsi-hd,bus=controller.0"), "vmw_pvscsi"),
    "nvme": Disk(("nvme,serial=systemvm",), "nvme"),
}
"""Disk models by name. SeaBIOS boots from all of them; Debian 12's OVMF has no driver for the SCSI
controllers scsi-lsi and pvscsi and says that it finds nothing to boot."""

NICS: Mapping[str, tuple[str, str]] = {
    "virtio": ("virtio-net-pci", "virtio_net"),
    "e1000": ("e1000", "e1000"),
    "e1000e": ("e1000e", "e1000e"),
    "vmxnet3": ("vmxnet3", "vmxnet3"),
    "rtl8139": ("rtl8139", "8139cp"),
    "tulip": ("tulip", "tulip"),
}
"""Network card models by name: QEMU's device, and the guest's driver."""


@dataclass(frozen=True)
class Nic:
    """A network card: its model (a key of NICS), QEMU's backend for it, and its address if it matters."""

    model: str = "virtio"
    backend: str = "user,restrict=on"
    """Argument of -netdev without the id; the default answers DHCP and reaches nothing."""
    mac: str = ""


FIXED_ADDRESSES = [
    "-fw_cfg",
    "name=opt/io.systemd.credentials/sysctl.extra,string=kernel.randomize_va_space=0",
]
"""Has systemd (252 and later) load programs at the same addresses each time (systemd.system-credentials(7)).

The emulator keeps what it translated by virtual address: a program at another address is translated again.
"""


@dataclass(frozen=True)
class Machine:
    """A virtual machine as data."""

    firmware: str = "bios"
    """`bios` or `uefi`."""
    arch: str = "amd64"
    memory: int = 256
    """MiB."""
    accel: str = "tcg"
    """`kvm` or `tcg`."""
    disk: str = "virtio"
    """A key of DISKS."""
    nics: tuple[Nic, ...] = ()


def machine(request: Mapping[str, Any], firmware: str, accel: str) -> Machine:
    """Read the machine out of a request, or raise Failure that names what is not known."""
    model = request.get("machine") or {}
    nic = model.get("nic") or ""
    built = Machine(
        firmware=firmware,
        arch=request.get("arch", "amd64"),
        memory=int(request.get("memory") or 256),
        accel=accel,
        disk=model.get("disk") or "virtio",
        nics=(Nic(nic),) if nic else (),
    )
    _known("firmware", firmware, ("bios", "uefi"))
    _known("arch", built.arch, ("amd64", "i386"))
    _known("disk model", built.disk, DISKS)
    if nic:
        _known("network card", nic, NICS)
    if built.arch == "i386" and firmware == "uefi":
        raise Failure("i386 boots under BIOS only", "ask for firmware bios")
    if built.memory < 64:
        raise Failure(f"{built.memory} MiB of memory are too few to boot", "give at least 64 MiB")
    return built


def _known(what: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        raise Failure(f"unknown {what} {value!r}", f"known: {', '.join(known)}")


def ovmf() -> tuple[str, str]:
    """Return code and variable store of the UEFI firmware on this host."""
    for code, variables in OVMF:
        if Path(code).is_file() and Path(variables).is_file():
            return code, variables
    raise Failure("the UEFI firmware OVMF is missing", "install ovmf")


def need(*programs: str) -> None:
    """Raise Failure when QEMU's programs are not installed."""
    packages = {"qemu-img": "qemu-utils", PROGRAM: "qemu-system-x86"}
    for program in programs:
        if not shutil.which(program, path=process.PATH):
            raise Failure(f"{program} is missing", f"install {packages.get(program, program)}")


def hardware(model: Machine) -> list[str]:
    """Return QEMU's command line for a machine, without its drive and its channels.

    The drive is the block node `disk`. A machine has one virtual CPU, as the smallest offering of a
    cloud has, and a VGA card, since every hypervisor gives one; SeaBIOS also writes to the serial line.
    """
    # QEMU's Q35 has no IDE controller, the older machine boots UEFI as well.
    chipset = "q35" if model.firmware == "uefi" and model.disk != "ide" else "pc"
    argv = [
        PROGRAM,
        "-nodefaults",
        "-no-user-config",
        "-machine",
        f"{chipset},graphics=off",
        "-accel",
        model.accel,
    ]
    argv += ["-cpu", "host" if model.accel == "kvm" else "qemu64", "-smp", "1", "-m", str(model.memory)]
    argv += FIXED_ADDRESSES if model.accel == "tcg" else []
    argv += ["-vga", "std", "-display", "none"]
    if model.firmware == "uefi":
        code, variables = ovmf()
        argv += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"]
        argv += ["-drive", f"if=pflash,unit=1,format=raw,snapshot=on,file={variables}"]
    *controllers, drive = DISKS[model.disk].devices
    for device in (*controllers, f"{drive},drive=disk,bootindex=0"):
        argv += ["-device", device]
    for number, nic in enumerate(model.nics):
        address = f",mac={nic.mac}" if nic.mac else ""
        argv += ["-netdev", f"{nic.backend},id=net{number}"]
        # No boot ROM: the firmware would try the network before it gives up.
        argv += ["-device", f"{NICS[nic.model][0]},netdev=net{number}{address},romfile="]
    return argv


@dataclass
class Serial:
    """What the guest wrote to its serial line: the last lines, and who wants to know of them."""

    log: BinaryIO
    """Unbuffered; holds every byte that was acted upon."""
    heard: Heard
    """Called with every line, and before with the part of it that has come (it may be a prompt)."""
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    _partial: str = ""

    _NOISE = re.compile(
        r"\x1b\[[0-9;?=]*[A-Za-z]|\x1b[()][A-Za-z0-9]|\x1b[a-zA-Z78>=]|[\x00-\x08\x0b-\x1f\x7f]"
    )

    def feed(self, data: bytes) -> None:
        """Log what came and tell its lines, without the escape sequences of terminals."""
        self.log.write(data)
        *lines, self._partial = (self._partial + data.decode(errors="replace").replace("\r", "")).split("\n")
        for line in lines:
            text = self._NOISE.sub("", line).rstrip()
            if text:
                self.recent.append(text)
                self.heard(text, True)
        # A guest that never ends its line must not fill our memory.
        self._partial = self._partial[-4096:]
        if prompt := self._NOISE.sub("", self._partial).rstrip():
            self.heard(prompt, False)

    def last(self) -> list[str]:
        """Return the last lines, at most 20, the unfinished one included."""
        prompt = self._NOISE.sub("", self._partial).rstrip()
        return [*self.recent, *([prompt] if prompt else [])][-20:]


class Stopped(Exception):
    """The guest cannot go on: it died, ended before it was asked to, or QEMU said no."""


class Interrupted(Stopped):
    """A script in the guest was killed before its end, as by a restart of the guest agent."""


class Guest:
    """A guest that runs. Every wait ends with Stopped when the guest does."""

    def __init__(
        self,
        child: Any,
        channels: Mapping[str, Channel],
        report: socket.socket,
        serial: Serial,
        errors: Path,
    ) -> None:
        self.serial = serial
        self.connected = asyncio.Event()
        """Set while the guest agent holds its port open."""
        self._child = child
        self._channels = channels
        self._report = report
        self._report_closed = asyncio.Event()
        self._errors = errors
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._disconnected = asyncio.Event()
        self._off = asyncio.Event()
        self._migrated = asyncio.Event()
        self._restarted = asyncio.Event()
        self._asked_off = False
        self._syncs = 0
        self._tasks = [asyncio.create_task(self._listen_qmp()), asyncio.create_task(self._listen_serial())]

    def fail(self, why: str) -> None:
        """Make every wait end with Stopped; the first reason stands."""
        if not self._stopped.done():
            self._stopped.set_exception(Stopped(why))
            self._stopped.exception()

    async def until(self, work: Awaitable[Result]) -> Result:
        """Wait for something the guest does, or raise Stopped."""
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._stopped}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._stopped.result()
            return await task
        except EOFError:
            await self._stopped
            raise
        finally:
            task.cancel()

    async def command(self, execute: str, **arguments: Any) -> Any:
        """Send one QMP command and return its answer."""
        await self._channels["qmp"].send({"execute": execute, "arguments": arguments})
        reply = await self.until(self._replies.get())
        if "error" in reply:
            raise Stopped(f"QEMU refuses {execute}: {reply['error'].get('desc', '')}")
        return reply.get("return")

    async def ask(self, execute: str, **arguments: Any) -> Any:
        """Call the guest agent once it is there; asks again when the agent is restarted meanwhile."""
        while True:
            await self.until(self.connected.wait())
            self._disconnected.clear()
            lost = asyncio.ensure_future(self._disconnected.wait())
            call = asyncio.ensure_future(self._call(execute, arguments))
            try:
                await self.until(asyncio.wait({lost, call}, return_when=asyncio.FIRST_COMPLETED))
                if call.done():
                    return await call
            finally:
                lost.cancel()
                call.cancel()

    async def tell(self, execute: str, **arguments: Any) -> None:
        """Call the guest agent for a command that has no answer when it works."""
        await self.until(self.connected.wait())
        await self._channels["agent"].send({"execute": execute, "arguments": arguments})

    async def report(self, script: str, last: str = "end") -> AsyncIterator[str]:
        """Run a shell script in the guest; yield the lines it writes to stdout up to the line `last`.

        The lines come over a port of their own, so that their arrival is the event that is waited for
        (guest-exec-status would have to be polled). Raises Interrupted when the script is killed.
        """
        shell = f"exec >/dev/virtio-ports/{REPORT_PORT} || exit 1\n{script}\necho {last}\n"
        environment = [f"PATH={process.PATH}", "LC_ALL=C.UTF-8"]
        self._report_closed.clear()
        await self.ask("guest-exec", path="/bin/sh", arg=["-c", shell], env=environment)
        pending = b""
        while True:
            *lines, pending = (pending + await self._reported()).split(b"\n")
            if len(pending) > LINE:
                raise Stopped("the guest sends a line without an end")
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text == last:
                    await self.until(self._report_closed.wait())
                    return
                yield text

    async def _reported(self) -> bytes:
        """Return what came over the report port; Interrupted when it was closed and holds no more."""
        some = asyncio.ensure_future(self._receive())
        closed = asyncio.ensure_future(self._report_closed.wait())
        try:
            await self.until(asyncio.wait({some, closed}, return_when=asyncio.FIRST_COMPLETED))
            if some.done():
                return some.result()
        finally:
            some.cancel()
            closed.cancel()
        # QEMU handed over all that was written before it told of the end.
        try:
            return self._report.recv(1 << 16)
        except BlockingIOError:
            raise Interrupted("a script in the guest was killed before its end") from None

    async def _receive(self) -> bytes:
        """Wait for data on the report port; at its end, for the guest's."""
        with contextlib.suppress(ConnectionError):
            if data := await asyncio.get_running_loop().sock_recv(self._report, 1 << 16):
                return data
        await self._stopped
        return b""

    async def power_off(self) -> None:
        """Ask the guest to power off, and wait until it has."""
        self._asked_off = True
        await self.tell("guest-shutdown", mode="powerdown")
        await self.until(self._off.wait())

    async def restarted(self) -> None:
        """Wait until the guest has rebooted; only where it may (`reboots`)."""
        await self.until(self._restarted.wait())
        self._restarted.clear()

    async def plug(self, nic: Nic, number: int) -> None:
        """Plug a network card in while the guest runs.

        The machine is one of BIOS: the root bus of the other chipset takes no card.
        """
        kind, *options = nic.backend.split(",")
        pairs = (option.partition("=") for option in options)
        backend = {key: {"on": True, "off": False}.get(value, value) for key, _, value in pairs}
        await self.command("netdev_add", type=kind, id=f"net{number}", **backend)
        device = {"driver": NICS[nic.model][0], "netdev": f"net{number}", "id": f"nic{number}", "romfile": ""}
        await self.command("device_add", **device, **({"mac": nic.mac} if nic.mac else {}))

    async def save(self, memory: Path) -> None:
        """Write the state of the halted machine to a file; with the disk that `running` kept it can go on.

        The guest stands still afterwards.
        """
        await self.command("stop")
        await self._migrate("migrate", f"exec:exec cat >{shlex.quote(str(memory))}")

    async def load(self, memory: Path) -> None:
        """Take over the state of a machine that was saved: the same hardware, and the disk it had."""
        await self._migrate("migrate-incoming", f"exec:exec cat {shlex.quote(str(memory))}")
        # The agent was there already, and of a port that is open QEMU tells nothing.
        self.connected.set()

    async def _migrate(self, command: str, uri: str) -> None:
        events = [{"capability": "events", "state": True}]
        await self.command("migrate-set-capabilities", capabilities=events)
        await self.command(command, uri=uri)
        await self.until(self._migrated.wait())

    async def close(self) -> None:
        """End the guest, however it is doing."""
        process.stop(self._child)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            channel.close()
        self._report.close()

    async def _call(self, execute: str, arguments: Mapping[str, Any]) -> Any:
        channel = self._channels["agent"]
        self._syncs += 1
        # The agent answers this one after a byte 0xFF, which no other answer holds: what an agent
        # that has gone left on the line is passed over.
        await channel.send(
            {"execute": "guest-sync-delimited", "arguments": {"id": self._syncs}}, prefix=b"\xff"
        )
        while True:
            answer = (await channel.line()).rpartition(b"\xff")
            if answer[1] and json.loads(answer[2]).get("return") == self._syncs:
                break
        await channel.send({"execute": execute, "arguments": dict(arguments)})
        reply = json.loads(await channel.line())
        if "error" in reply:
            raise Stopped(f"the guest agent refuses {execute}: {reply['error'].get('desc', '')}")
        return reply.get("return")

    async def _listen_qmp(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                message = json.loads(await self._channels["qmp"].line())
                if "event" in message:
                    self._happened(message["event"], message.get("data") or {})
                elif "QMP" not in message:
                    self._replies.put_nowait(message)
        # The serial line may hold the reason that the end of QEMU only hints at.
        await asyncio.wait({self._tasks[1]})
        status = process.finish(self._child)
        errors = (
            self._errors.read_text(errors="replace").strip().splitlines() if self._errors.exists() else []
        )
        complaint = [line for line in errors if "warning:" not in line][-1:]
        self.fail("QEMU ended" + (f": {complaint[0]}" if complaint else f" with status {status}"))

    def _happened(self, event: str, data: Mapping[str, Any]) -> None:
        if event == "VSERPORT_CHANGE" and data.get("id") == "agent":
            if data.get("open"):
                self.connected.set()
            else:
                self.connected.clear()
                self._disconnected.set()
        elif event == "VSERPORT_CHANGE" and data.get("id") == "report":
            if not data.get("open"):
                self._report_closed.set()
        elif event == "MIGRATION" and data.get("status") == "completed":
            self._migrated.set()
        elif event == "MIGRATION" and data.get("status") == "failed":
            self.fail("QEMU cannot save or load the state of the machine")
        elif event == "RESET" and data.get("guest"):
            self._restarted.set()
        elif event == "SHUTDOWN" and self._asked_off:
            self._off.set()
        elif event == "SHUTDOWN":
            what = {"guest-reset": "the guest rebooted", "guest-shutdown": "the guest powered off"}
            why = what.get(str(data.get("reason")), f"the guest ended ({data.get('reason')})")
            # The serial line may say more; QEMU closes it when it ends.
            self._tasks[1].add_done_callback(lambda _: self.fail(why))
        elif event == "BLOCK_IO_ERROR":
            self.fail(f"disk error: {data.get('reason', data.get('operation'))}")

    async def _listen_serial(self) -> None:
        while data := await self._channels["serial"].chunk():
            self.serial.feed(data)


class Channel:
    """One end of a socket pair whose other end QEMU holds."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        """Wrap our end."""
        return cls(*await asyncio.open_connection(sock=end, limit=LINE))

    async def send(self, message: Mapping[str, Any], prefix: bytes = b"") -> None:
        """Send one JSON message; a closed line is noticed by who reads from it."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(prefix + json.dumps(message).encode() + b"\n")
            await self._writer.drain()

    async def line(self) -> bytes:
        """Return the next line; raises EOFError at the end."""
        try:
            return await self._reader.readuntil(b"\n")
        except ConnectionError as error:
            raise EOFError from error
        except asyncio.LimitOverrunError as error:
            raise Stopped("the guest sends a line without an end") from error

    async def chunk(self) -> bytes:
        """Return what is there, or nothing at the end."""
        try:
            return await self._reader.read(1 << 16)
        except ConnectionError:
            return b""

    def close(self) -> None:
        """Close our end."""
        self._writer.close()


def drive(media: Media, overlay: str, below: Sequence[str] = ()) -> dict[str, Any]:
    """Describe the block node `disk`: an overlay that takes every write, over an image that takes none.

    `below` are overlays of earlier guests between the two, the lowest first. No overlay names a backing
    file of its own, so no path goes through QEMU's own parsing.
    """
    node = media.node()
    for lower in below:
        file = {"driver": "file", "filename": lower, "read-only": True}
        node = {"driver": "qcow2", "read-only": True, "file": file, "backing": node}
    return {
        "node-name": "disk",
        "driver": "qcow2",
        "file": {"driver": "file", "filename": overlay},
        "cache": {"no-flush": True},
        "discard": "unmap",
        "backing": node,
    }


@contextlib.asynccontextmanager
async def running(
    model: Machine,
    media: Media,
    size: int,
    work: Path,
    name: str,
    heard: Heard,
    *,
    below: Sequence[Path] = (),
    memory: Path | None = None,
    keep: Path | None = None,
    descriptors: Sequence[int] = (),
    reboots: bool = False,
) -> AsyncIterator[Guest]:
    """Start a guest whose disk of `size` bytes shows the image; yield it; end it.

    Leaves `serial-NAME.log` in `work` and nothing else, unless `keep` is a path for what was written to
    the disk. The image is opened for reading only. A guest goes on where an earlier one was: from its disk
    (`below`), and from the state that `Guest.save` wrote (`memory`). QEMU gets the descriptors that the
    machine's network cards name. A reboot is the guest's end unless it may (`reboots`).
    """
    need(PROGRAM, "qemu-img")
    with (
        tempfile.TemporaryDirectory(prefix=f".{name}-", dir=work) as scratch,
        (work / f"serial-{name}.log").open("wb", buffering=0) as log,
    ):
        errors = Path(scratch, "stderr")
        overlay = keep or Path(scratch, "overlay.qcow2")
        process.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), str(size)])
        ends = {role: socket.socketpair() for role in ("qmp", "serial", "agent", "report")}
        try:
            theirs = {role: pair[1].fileno() for role, pair in ends.items()}
            argv = [
                *hardware(model),
                "-blockdev",
                json.dumps(drive(media, str(overlay), [*map(str, below)])),
            ]
            argv += [*channels(theirs), *(("-incoming", "defer") if memory else ())]
            argv += [] if reboots else ["-no-reboot"]
            with errors.open("wb") as complaints:
                child = process.start(
                    argv,
                    env={"TMPDIR": scratch},
                    stdout=DEVNULL,
                    stderr=complaints,
                    pass_fds=(*theirs.values(), *media.descriptors, *descriptors),
                )
        finally:
            for _, end in ends.values():
                end.close()
        report = ends.pop("report")[0]
        report.setblocking(False)
        opened = {role: await Channel.open(pair[0]) for role, pair in ends.items()}
        guest = Guest(child, opened, report, Serial(log, heard), errors)
        try:
            await guest.command("qmp_capabilities")
            if memory:
                await guest.load(memory)
            # Frozen until here, so that no event can be missed.
            await guest.command("cont")
            # QEMU holds it open; like this nothing is left of it even if we are killed.
            if not keep:
                overlay.unlink()
            yield guest
        finally:
            await guest.close()


def channels(descriptors: Mapping[str, int]) -> list[str]:
    """Return QEMU's arguments for QMP, serial line, guest agent and report port on these descriptors."""
    return [
        "-S",
        *("-chardev", f"socket,id=qmp,fd={descriptors['qmp']}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=serial,fd={descriptors['serial']}", "-serial", "chardev:serial"),
        *("-chardev", f"socket,id=agentline,fd={descriptors['agent']}"),
        *("-chardev", f"socket,id=reportline,fd={descriptors['report']}"),
        *("-device", "virtio-serial-pci"),
        *("-device", f"virtserialport,id=agent,chardev=agentline,name={AGENT_PORT}"),
        *("-device", f"virtserialport,id=report,chardev=reportline,name={REPORT_PORT}"),
    ]
