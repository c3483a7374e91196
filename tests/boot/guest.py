"""Guests for tests: disks of one sector that do one thing, and a system to talk to through its agent."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from build.agent.guest import last_words, media, qemu
from build.agent.verbs import verify
from tests.waiting import LONG

Result = TypeVar("Result")
LIMIT = 2 * LONG
"""Seconds for a conversation; an emulated system is up after some 30."""

SMALL = qemu.Machine()
"""BIOS, 256 MiB, a virtio disk, no network."""

HALT = bytes.fromhex("f4 eb fd")  # hlt; jmp -1
RESET = bytes.fromhex("b0 fe e6 64 f4 eb fd")  # mov al, 0xfe; out 0x64, al: the keyboard controller's reset
WRITE = bytes.fromhex(
    "b8 01 03 bb 00 7c b9 02 00 30 f6 cd 13 fa"
)  # int 13h, AH 3: this sector to the next one


def sector(says: str = "", first: bytes = b"", last: bytes = HALT) -> bytes:
    """Return a boot sector that runs `first`, writes a text to the serial line, and runs `last`."""
    # cli; xor ax, ax; mov ds, ax; mov es, ax. With interrupts on, SeaBIOS would go on writing in between.
    start = bytes.fromhex("fa 31 c0 8e d8 8e c0") + first
    text = 0x7C00 + len(start) + 14 + len(last)
    # mov si, text; mov dx, 0x3f8; lodsb; test al, al; jz +3; out dx, al; jmp -8
    spell = b"\xbe" + text.to_bytes(2, "little") + bytes.fromhex("ba f8 03 ac 84 c0 74 03 ee eb f8")
    return (start + spell + last + says.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"


def disk(path: Path, content: bytes = b"", size: int = 1 << 20) -> Path:
    """Write a raw disk that begins with some content."""
    path.write_bytes(content)
    with path.open("r+b") as stream:
        stream.truncate(size)
    return path


def converse(
    image: Path,
    work: Path,
    conversation: Callable[[qemu.Guest], Awaitable[Result]],
    machine: qemu.Machine = SMALL,
    *,
    image_format: str = "raw",
    name: str = "guest",
    limit: float = LIMIT,
    size: int = 0,
    **more: Any,
) -> Result:
    """Boot an image without altering it, talk to it, end it; fails when it dies or takes too long."""

    async def boot() -> Result:
        async with (
            asyncio.timeout(limit),
            running(image, work, machine, image_format=image_format, name=name, size=size, **more) as guest,
        ):
            return await conversation(guest)

    return asyncio.run(boot())


@asynccontextmanager
async def running(
    image: Path,
    work: Path,
    machine: qemu.Machine = SMALL,
    *,
    image_format: str = "raw",
    name: str = "guest",
    size: int = 0,
    **more: Any,
) -> AsyncIterator[qemu.Guest]:
    """A guest with a disk of `size` bytes (default: the image's own); it fails when its kernel does."""
    guests: list[qemu.Guest] = []

    def heard(line: str, ended: bool) -> None:
        if guests and (why := last_words.fatal(line, ended)):
            guests[0].fail(why)

    with media.opened(str(image), image_format, work, lambda kind, **fields: None) as source:
        seen = size or source.size()
        async with qemu.running(machine, source, seen, work, name, heard, **more) as guest:
            guests.append(guest)
            yield guest


async def output(guest: qemu.Guest, command: str) -> str:
    """Run a shell command in the guest and return what it prints, stderr included."""
    return "\n".join([line async for line in guest.report(f"{{ {command}\n}} 2>&1")])


async def persistent(guest: qemu.Guest, command: str) -> str:
    """The same for a command that may be run again, when a restart of the agent ends it."""
    for _ in range(verify.ATTEMPTS - 1):
        with suppress(qemu.Interrupted):
            return await output(guest, command)
    return await output(guest, command)


async def put(guest: qemu.Guest, path: str, content: bytes) -> None:
    """Write a file in the guest through its agent, as CloudStack's KVM agent does."""
    handle = await guest.ask("guest-file-open", path=path, mode="w+")
    encoded = base64.b64encode(content).decode()
    written: dict[str, Any] = await guest.ask("guest-file-write", **{"handle": handle, "buf-b64": encoded})
    assert written["count"] == len(content)
    await guest.ask("guest-file-close", handle=handle)
