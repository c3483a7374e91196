"""Verb: play a management server's part against an image. The image is never written to.

Request and result: build.wire.RehearseRequest and RehearseResult.

Events: `open` when the files are, `step` with a Step as soon as it has ended. What goes wrong is a step whose
state is FAIL; a Failure is what keeps a rehearsal from beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from build import wire
from build.agent import process
from build.agent.events import Emit, Failure
from build.agent.guest import kvm, qemu
from build.agent.guest.media import opened
from build.agent.rehearsal import pair, part
from build.agent.rehearsal.login import File, key_pair
from build.agent.rehearsal.network import alone
from build.agent.rehearsal.stage import Over, Stage
from build.agent.rehearsal.theatre import Theatre, model

NAMES = ("agent.zip", "cloud-scripts.tgz", "patch-sysvms.sh")
"""Files of a management server, in the order in which its hosts copy them."""


def run(request: wire.RehearseRequest, emit: Emit) -> wire.RehearseResult:
    """Play every machine, or the pair."""
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(_files(request))
        emit("open")
        qemu.need(qemu.PROGRAM, "qemu-img")
        for program in ("ssh", "ssh-keygen"):
            if not shutil.which(program, path=process.PATH):
                raise Failure(f"{program} is missing", "install openssh-client")
        accel = request.accel or kvm.accelerator()
        for machine in request.machines:
            model(request, machine, accel, alone(machine, 0))
        Path(request.work).mkdir(exist_ok=True)
        media = stack.enter_context(opened(request.image, "raw", Path(request.work), emit))
        key = stack.enter_context(key_pair(Path(request.work)))
        theatre = Theatre(request, accel, media, key, files, emit)
        return asyncio.run(_play(theatre))


@contextlib.contextmanager
def _files(asked: wire.RehearseRequest) -> Iterator[tuple[File, ...]]:
    """Open the files that are copied. What was only passed to this host has no name any more then."""
    if asked.scripts is None:
        yield ()
        return
    given = dict(zip(NAMES, (asked.scripts.agent, asked.scripts.scripts, asked.scripts.patch), strict=True))
    with contextlib.ExitStack() as stack:
        try:
            streams = {name: stack.enter_context(open(path, "rb")) for name, path in given.items()}
        except OSError as error:
            raise Failure(f"{error.filename}: {error.strerror}", "name a file that is there") from None
        finally:
            if asked.scripts.passing:
                shutil.rmtree(asked.scripts.passing, ignore_errors=True)
        yield tuple(File(name, stream.fileno()) for name, stream in streams.items())


async def _play(theatre: Theatre) -> wire.RehearseResult:
    """Play all that was asked for."""
    asked = theatre.asked
    with contextlib.suppress(Over):
        if asked.pair:
            await pair.play(theatre, asked.pair)
    for machine in () if asked.pair else asked.machines:
        with contextlib.suppress(Over):
            async with theatre.stage(machine) as stage:
                await _alone(stage)
    return wire.RehearseResult(theatre.accel, tuple(theatre.steps), tuple(theatre.logs))


async def _alone(stage: Stage) -> None:
    """Play one machine from its first start to its reboot."""
    record, machine = stage.record, stage.machine
    await part.start(stage)
    await part.look(stage, machine.checks)
    await record.step("health after the start", part.check_health(stage))
    if machine.port != 3922:
        return
    if machine.documents:
        await part.plug(stage)
        applied = await part.send_all(stage) and bool(stage.files)
        if applied:
            await part.look(stage, machine.effects)
        # One shows the way; each is of use only when something is wrong: it takes as long as all at once.
        await part.send_each(stage, machine.documents[-1:] if applied else machine.documents)
        if stage.files and not applied:
            await part.look(stage, machine.effects)
        await record.step("health with all documents", part.check_health(stage))
    if machine.answers_state:
        await record.step("checkrouter.sh", part.state(stage))
    if stage.files:
        await record.step("live patch", part.live_patch(stage))
        await record.step("health after the live patch", part.check_health(stage))
    else:
        record.note("live patch", "-", "no --scripts")
    if await record.step("reboot", part.reboot(stage)):
        await record.step("health after the reboot", part.check_health(stage))
