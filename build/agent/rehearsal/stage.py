"""A machine on the stage: the way in, what is asked inside, and the record of each step."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from build import wire
from build.agent.guest import qemu
from build.agent.rehearsal.login import File, Login

ATTEMPTS = 5
"""How often something is asked inside when the guest agent is restarted in the midst."""


class Fault(Exception):
    """A step did not go as a management server needs it."""


class Over(Exception):
    """Nothing that follows can go well; the reason is in the record."""


async def silent(seconds: float) -> Sequence[str]:
    """A journal that tells nothing."""
    return ()


@dataclass
class Record:
    """The steps of one machine, told as they end."""

    machine: str
    tell: Callable[[wire.Step], None]
    console: Callable[[], Sequence[str]] = lambda: ()
    journal: Callable[[float], Awaitable[Sequence[str]]] = silent
    """Lines of the machine's own journal of the last so many seconds."""
    steps: list[wire.Step] = field(default_factory=list)
    _told: list[str] = field(default_factory=list)

    async def step(self, name: str, work: Awaitable[str], essential: bool = False) -> bool:
        """Do a step that returns what was seen, and note it; say whether it went well.

        Raises Over when the machine is lost, or the step was essential and failed.
        """
        started = time.monotonic()
        try:
            state, says, lost = "ok", await work, False
        except Fault as fault:
            state, says, lost = "FAIL", str(fault), essential
        except qemu.Stopped as stopped:
            state, says, lost = "FAIL", str(stopped), not isinstance(stopped, qemu.Interrupted)
        seconds = time.monotonic() - started
        self.note(name, state, says, seconds, await self.journal(seconds) if state == "FAIL" else ())
        if lost:
            raise Over
        return state == "ok"

    def note(
        self, name: str, state: str, says: str, seconds: float = 0.0, journal: Sequence[str] = ()
    ) -> None:
        """Note a step that has ended."""
        tail = (*self._news(), *journal) if state == "FAIL" else ()
        step = wire.Step(self.machine, name, state, round(seconds, 1), says, tail)
        self.steps.append(step)
        self.tell(step)

    def _news(self) -> Sequence[str]:
        """Last lines of the console, unless an earlier failure told the very same."""
        lines, self._told = self._told, list(self.console())
        return () if lines == self._told else self._told


@dataclass(frozen=True)
class Stage:
    """A machine that runs, and what the host has for it."""

    guest: qemu.Guest
    machine: wire.Machine
    login: Login
    files: tuple[File, ...]
    """Those that are copied, in the host's order; none: nothing is."""
    signed: Path | None
    """The archive whose checksum the machine has to tell."""
    release: str
    record: Record
    pace: float = 1.0
    """By how much a machine may be slower than a host expects."""


async def inside(guest: qemu.Guest, command: str) -> str:
    """Run a shell command through the guest agent, again if a restart ends it; returns what it prints."""
    for attempt in range(ATTEMPTS):
        try:
            return "\n".join([line async for line in guest.report(f"{{ {command}\n}} 2>&1")])
        except qemu.Interrupted:
            if attempt == ATTEMPTS - 1:
                raise
            await asyncio.sleep(1)
    raise AssertionError


async def journal(guest: qemu.Guest, seconds: float) -> Sequence[str]:
    """Return the last lines of the machine's journal of so many seconds; none when it does not answer."""
    command = f"journalctl --since -{seconds + 5:.0f}s --lines 25 --output short-monotonic --no-pager"
    try:
        async with asyncio.timeout(60):
            return (await inside(guest, command)).splitlines()
    except (TimeoutError, qemu.Stopped):
        return ()


async def answers(guest: qemu.Guest, commands: Mapping[str, str]) -> dict[str, str]:
    """Run several commands inside; returns what each prints, by its name."""
    lines = [
        f"printf '%s ' {number}; {{ sh -c {shlex.quote(command)} 2>&1; }} | base64 -w0; echo"
        for number, command in enumerate(commands.values())
    ]
    told: dict[int, str] = {}
    for line in (await inside(guest, "\n".join(lines))).splitlines():
        number, _, encoded = line.partition(" ")
        if re.fullmatch("[0-9]{1,9}", number):
            try:
                told[int(number)] = base64.b64decode(encoded).decode(errors="replace").strip()
            except binascii.Error:
                continue
    return {name: told.get(number, "") for number, name in enumerate(commands)}


async def soon(stage: Stage, work: Awaitable[str], seconds: float, what: str) -> str:
    """Wait for something for some seconds of a quick machine; what is not there by then is a Fault."""
    limit = stage.pace * seconds
    try:
        async with asyncio.timeout(limit):
            return await work
    except TimeoutError:
        raise Fault(f"{what} within {limit:.0f} s") from None
