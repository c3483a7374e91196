"""Every format this project knows: how it is written, read, checked and recognized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from build.agent.events import Failure
from build.formats import ova, qcow2, raw, vhd, vhdx, vmdk
from build.formats.codec import Deflate, Zlib, Zstandard
from build.formats.extent import Extent
from build.formats.findings import Finding
from build.formats.pieces import Disk
from build.formats.writer import Writer

Options = Mapping[str, Any]


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


@dataclass(frozen=True)
class Kind:
    """One format: `write` opens a writer, `read` a reader, `lint` checks a file."""

    write: Callable[[Target, Options], Writer]
    read: Callable[[Extent], Disk]
    lint: Callable[[Extent], Iterator[Finding]]
    check_size: Callable[[int], None]
    version: int
    """Counts up when a writer's bytes change; recorded in manifests."""


def _level(options: Options, usual: int) -> int:
    level = int(options.get("level", usual))
    if not 1 <= level <= 9:
        raise Failure(f"compression level {level} is not from 1 to 9", "choose another level")
    return level


def _vhd(target: Target, options: Options) -> Writer:
    return vhd.VhdWriter(target.file, target.size, options.get("creator", "xen"))


def _vhdx(target: Target, options: Options) -> Writer:
    return vhdx.VhdxWriter(target.file, target.size)


def _qcow2(target: Target, options: Options) -> Writer:
    compression = options.get("compression", "deflate")
    codecs: dict[str, Deflate | Zstandard | None] = {
        "deflate": Deflate(12, _level(options, qcow2.DEFLATE.level)),
        "zstd": Zstandard(),
        "none": None,
    }
    if compression not in codecs:
        raise Failure(f"unknown QCOW2 compression {compression!r}", f"use one of {', '.join(codecs)}")
    version = int(options.get("version", 2))
    if version not in (2, 3):
        raise Failure(
            f"QCOW2 version {version} is not 2 or 3", "set 2 for every KVM host, 3 for QEMU 1.1 and later"
        )
    return qcow2.Qcow2Writer(target.file, target.size, version, codecs[compression])


def _vmdk_codec(options: Options) -> Zlib:
    return Zlib(_level(options, vmdk.CODEC.level))


def _vmdk(target: Target, options: Options) -> Writer:
    adapter = options.get("adapter", "lsilogic")
    return vmdk.VmdkWriter(target.file, target.size, target.name, adapter, _vmdk_codec(options))


def _ova(target: Target, options: Options) -> Writer:
    base, adapter = target.name.removesuffix(".ova"), options.get("adapter", "lsilogic")
    return ova.OvaWriter(
        target.file, target.size, base, options["ovf"], target.epoch, _vmdk_codec(options), adapter
    )


def _raw(target: Target, options: Options) -> Writer:
    return raw.RawWriter(target.file, target.size)


def _any_size(size: int) -> None:
    if not size:
        raise Failure("the raw disk is empty", "build it again: inv build")


KINDS: Mapping[str, Kind] = {
    "vhd": Kind(_vhd, vhd.VhdDisk, vhd.lint, vhd.check_size, 1),
    "vhdx": Kind(_vhdx, vhdx.VhdxDisk, vhdx.lint, vhdx.check_size, 1),
    "qcow2": Kind(_qcow2, qcow2.Qcow2Disk, qcow2.lint, qcow2.check_size, 1),
    "vmdk": Kind(_vmdk, vmdk.VmdkDisk, vmdk.lint, vmdk.check_size, 1),
    "ova": Kind(_ova, ova.OvaDisk, ova.lint, vmdk.check_size, 1),
    "raw": Kind(_raw, raw.RawDisk, raw.lint, _any_size, 1),
}


def recognize(extent: Extent) -> str:
    """Name of the format that a file's head (or, for a fixed VHD, its end) tells; `raw` when none does."""
    head = extent.read(0, min(extent.size, 1024))
    if head.startswith(b"QFI\xfb"):
        return "qcow2"
    if head.startswith(b"vhdxfile"):
        return "vhdx"
    if head.startswith((b"KDMV", b"COWD", b"# Disk Descriptor", b"# disk descriptor")):
        return "vmdk"
    if head.startswith(b"conectix"):
        return "vhd"
    if head[257:262] == b"ustar" or _is_tar(head):
        return "ova"
    end = extent.read(extent.size - 512, 512) if extent.size >= 512 else b""
    return "vhd" if end.startswith(b"conectix") or end[1:].startswith(b"conectix") else "raw"


def _is_tar(head: bytes) -> bool:
    """An old tar header has no magic; its checksum tells."""
    try:
        stored = int(head[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False
    return len(head) >= 512 and stored == sum(head[:148]) + 8 * 32 + sum(head[156:512])
