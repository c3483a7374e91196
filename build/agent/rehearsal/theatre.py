"""What all machines of a rehearsal have in common: how one starts, and where its steps are told."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from build import wire
from build.agent.events import Emit
from build.agent.guest import last_words, qemu
from build.agent.guest.media import Media
from build.agent.rehearsal.login import File, Key, Login, free_port
from build.agent.rehearsal.network import Backend, alone
from build.agent.rehearsal.stage import Record, Stage, journal


def model(asked: wire.RehearseRequest, machine: wire.Machine, accel: str, backend: Backend) -> qemu.Machine:
    """Return the machine as QEMU has it; Failure when it cannot be."""
    spec = {"arch": asked.arch, "memory": asked.memory}
    nics = [
        qemu.Nic(backend=backend(number), mac=nic.mac)
        for number, nic in enumerate(machine.nics)
        if not nic.late
    ]
    return replace(qemu.machine(spec, "bios", accel), nics=tuple(nics))


PACE = {"kvm": 1.0, "tcg": 4.0}
"""An emulated machine is slower by about this much, on a busy host."""


class Theatre:
    """What all machines of a rehearsal have in common, and their records."""

    def __init__(
        self,
        asked: wire.RehearseRequest,
        accel: str,
        media: Media,
        key: Key,
        files: Sequence[File],
        emit: Emit,
    ) -> None:
        self.asked = asked
        self.accel = accel
        self._media = media
        self._key = key
        self._files = tuple(files)
        signed = [file for file in files if file.name == "cloud-scripts.tgz"]
        self._signed = Path(f"/proc/self/fd/{signed[0].descriptor}") if signed else None
        self._emit = emit
        self.steps: list[wire.Step] = []
        self.logs: list[str] = []

    @contextlib.asynccontextmanager
    async def stage(
        self,
        machine: wire.Machine,
        backends: Callable[[int], str | None] = lambda _number: None,
        fds: Sequence[int] = (),
    ) -> AsyncIterator[Stage]:
        """Start a machine; `backends` says which cards are connected otherwise than usual."""
        port = free_port()
        usual = alone(machine, port)
        built = model(self.asked, machine, self.accel, lambda number: backends(number) or usual(number))
        work = Path(self.asked.work)
        record = Record(machine.name, self._tell)
        guests: list[qemu.Guest] = []

        def heard(line: str, ended: bool) -> None:
            if guests and (why := last_words.fatal(line, ended)):
                guests[0].fail(why)

        name = f"rehearse-{machine.kind}-{machine.name}"
        self.logs.append(str(work / f"serial-{name}.log"))
        line = machine.line.replace(wire.KEY, self._key.encoded)
        try:
            async with qemu.running(
                built, self._media, self._media.size(), work, name, heard, descriptors=fds, reboots=True
            ) as guest:
                guests.append(guest)
                record.console = guest.serial.last
                record.journal = functools.partial(journal, guest)
                yield Stage(
                    guest=guest,
                    machine=replace(machine, line=line),
                    login=Login(port, self._key.private),
                    files=self._files,
                    signed=self._signed,
                    release=self.asked.release,
                    record=record,
                    pace=PACE[self.accel],
                )
        except qemu.Stopped as stopped:
            record.note("machine", "FAIL", str(stopped))

    def _tell(self, step: wire.Step) -> None:
        self.steps.append(step)
        self._emit("step", **wire.dump(step))
