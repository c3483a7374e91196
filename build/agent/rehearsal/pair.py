"""A redundant pair on one network: who is primary, and how long the other needs when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time

from build import wire
from build.agent.guest.hub import Network, network
from build.agent.rehearsal import part
from build.agent.rehearsal.stage import Fault, Record, Stage, soon
from build.agent.rehearsal.theatre import Theatre

SLACK = 20.0
"""Seconds by which an emulated machine may be late."""
SETTLE = 180.0
"""Seconds until one is primary and the other backup."""


async def play(theatre: Theatre, asked: wire.Pair) -> None:
    """Play both machines' starts, one after the other, and a failover."""
    async with network() as net, contextlib.AsyncExitStack() as stack:
        stages = []
        for machine in theatre.asked.machines:
            end = net.port()

            def shared(number: int, end: int = end) -> str | None:
                return None if number else f"dgram,local.type=fd,local.str={end}"

            stage = await stack.enter_async_context(theatre.stage(machine, shared, (end,)))
            await part.start(stage)
            if stage.files and machine.documents:
                await part.send_all(stage)
            await stage.record.step("health after the start", part.check_health(stage))
            stages.append(stage)
        await _fail_over(theatre, asked, net, stages)


async def _fail_over(theatre: Theatre, asked: wire.Pair, net: Network, stages: list[Stage]) -> None:
    record = Record("pair", stages[0].record.tell)
    if not await record.step(
        "one PRIMARY, one BACKUP", soon(stages[0], _settled(stages), SETTLE, "no such pair")
    ):
        for stage in stages:
            await stage.record.step("checkrouter.sh", part.state(stage))
        return
    first, second = stages if await part.state(stages[0]) == "PRIMARY" else reversed(stages)
    whose = f"{first.machine.name} answers for {asked.gateway}"
    await record.step(whose, soon(first, _answers(net, asked, first), 10, "it does not"))
    killed = time.monotonic()
    await first.guest.close()
    bound = asked.bound + (SLACK if theatre.accel == "tcg" else 1)
    whose = f"{first.machine.name} is gone, {second.machine.name} answers"
    await record.step(whose, _took(net, asked, second, killed, bound))
    await second.record.step("checkrouter.sh", soon(second, _primary(second), 30, "it does not say PRIMARY"))
    await second.record.step("health after the failover", part.check_health(second))


async def _settled(stages: list[Stage]) -> str:
    while True:
        told = [await part.state(stage) for stage in stages]
        if sorted(told) == ["BACKUP", "PRIMARY"]:
            return ", ".join(f"{stage.machine.name} {each}" for stage, each in zip(stages, told, strict=True))
        await asyncio.sleep(2)


async def _answers(net: Network, asked: wire.Pair, stage: Stage) -> str:
    await stage.guest.until(net.answer(asked.gateway, asked.observer, stage.machine.nics[0].mac))
    return ""


async def _took(net: Network, asked: wire.Pair, stage: Stage, killed: float, bound: float) -> str:
    work = net.answer(asked.gateway, asked.observer, stage.machine.nics[0].mac)
    try:
        async with asyncio.timeout(bound):
            at = await stage.guest.until(work)
    except TimeoutError:
        raise Fault(f"it does not within {bound:.1f} s") from None
    return f"after {at - killed:.1f} s; {asked.bound:.1f} s are the bound"


async def _primary(stage: Stage) -> str:
    while (told := await part.state(stage)) != "PRIMARY":
        await asyncio.sleep(1)
    return told
