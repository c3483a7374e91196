"""What a format says of itself: one row of facts, for the client's commands and for the build host's work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, BinaryIO

from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Finding
from build.formats.lib.inner import Inner
from build.formats.lib.pieces import Disk
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import Writer

Options = Mapping[str, Any]
"""Plain values, as they come over the wire."""
HEAD = 1024
"""Bytes at the beginning of a file by which formats recognize it."""


class Match(IntEnum):
    """How sure a format is that a file is its own; the surest takes it."""

    NO = 0
    FALLBACK = 1
    """It takes whatever nobody else knows."""
    LIKELY = 2
    CERTAIN = 3


@dataclass(frozen=True)
class Target:
    """Where a writer writes and what it may put in."""

    file: BinaryIO
    size: int
    """Virtual size in bytes."""
    name: str
    """File name without outer compression."""
    epoch: int
    """Seconds since 1970 that stand in for every time of day."""


def nothing(settings: Options, compress: str) -> dict[str, Any]:
    """Options of a writer that has none."""
    return {}


def unwritten(target: Target, options: Options) -> Writer:
    """The writer of a kind that is only read."""
    raise Unsupported(
        f"{target.name}: files of this kind are read here, not written", "choose another format"
    )


def alone(reader: BoundedReader) -> tuple[Inner, ...]:
    """Disk images inside of a file that is one itself: none."""
    return ()


def silent(size: int) -> str:
    """Nothing to note."""
    return ""


@dataclass(frozen=True)
class Kind:
    """How the bytes of a file are made and read; several formats may share one kind."""

    name: str
    suffix: str
    """End of the file's name, without the dot; empty: any."""
    version: int
    """Counts up when the writer's bytes change; recorded in manifests."""
    driver: str
    """QEMU's block driver (QEMU, qapi/block-core.json, BlockdevDriver)."""
    recognize: Callable[[BoundedReader, bytes], Match]
    """Asked with the file and its first HEAD bytes, which may be fewer."""
    write: Callable[[Target, Options], Writer]
    """Raises Unsupported for options that it does not know."""
    read: Callable[[BoundedReader], Disk]
    """Raises Damaged."""
    lint: Callable[[BoundedReader], Iterator[Finding]]
    check_size: Callable[[int], None]
    """Raises Unsupported for a disk of that many bytes."""
    options: Callable[[Options, str], dict[str, Any]] = nothing
    """The writer's options from the image definition's `convert` and the outer compression of the file."""
    inner: Callable[[BoundedReader], tuple[Inner, ...]] = alone
    """Of an archive: the disk images in it, in order; raises Damaged."""


@dataclass(frozen=True)
class Machine:
    """What a hypervisor shows of a disk and a network card, as far as QEMU has it."""

    disk: str
    """A key of DISKS in the agent's QEMU module."""
    nic: str
    """A key of its NICS."""
    firmware: tuple[str, ...] = ("bios",)


@dataclass(frozen=True)
class Template:
    """What CloudStack calls a system VM template of this format."""

    hypervisor: str
    """As registerTemplate has it (Hypervisor.HypervisorType)."""
    format: str
    """As registerTemplate has it (SystemVmTemplateRegistration.hypervisorImageFormat)."""
    suffix: str
    """End of the file's name (tools/appliance/build.sh, templateConfig.sh)."""
    guest_os: str
    """Display name of the guest system (templateConfig.sh)."""
    sections: tuple[str, ...]
    """Sections of metadata.ini that name it (templateConfig.sh)."""


DEBIAN = "Debian GNU/Linux 12 (64-bit)"
OTHER = "Other Linux (64-bit)"


@dataclass(frozen=True)
class Format:
    """One format that an operator asks for by its name."""

    name: str
    """`vhd` of `inv convert.vhd`."""
    help: str
    """Finishes the sentence `Convert to ...`."""
    kind: Kind
    file: str
    """File name when the image definition has none; `{imagename}` is filled in."""
    machine: Machine
    """On which `verify` boots it."""
    efi: Machine | None = None
    """The same when the OVF settings ask for the firmware efi."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the kind's writer is told besides."""
    descriptor: str = ""
    """Template of a text that the client renders for the writer's option `ovf`."""
    cloudstack: Template | None = None
    """None: CloudStack has no templates of this format."""
    write: Callable[[Target, Options], Writer] | None = None
    """Its own way to write files of the kind; None: the kind's."""
    check_size: Callable[[int], None] | None = None
    """What it takes itself, with a `write` of its own; raises Unsupported."""
    note: Callable[[int], str] = silent
    """What is worth knowing of a disk of so many bytes in this format, in one line; empty: nothing."""
    rounded: Callable[[int], int] = int
    """Virtual size of the file that is made of a disk of so many bytes; what is more is zeros."""
    family: str = ""
    """Verb that makes all of several formats, as `inv convert.vagrant`; empty: none but its own."""


def level(options: Options, usual: int) -> int:
    """A compression level from 1 to 9; raises Unsupported for another."""
    wanted = int(options.get("level", usual))
    if not 1 <= wanted <= 9:
        raise Unsupported(f"compression level {wanted} is not from 1 to 9", "choose another level")
    return wanted
