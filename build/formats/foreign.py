"""What people take for an image and is none that is read here: named for what it is, with the way on.

Signatures from the programs' own sources and from the table of file(1): QEMU's block drivers (qed.c,
parallels.c, qcow.c, bochs.c, cloop.c, dmg.c), Proxmox's vma_spec.txt, cryptsetup's LUKS formats, ECMA-119
(ISO 9660), VMware's SESparse as QEMU's vmdk.c reads it, Android's sparse_format.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from build.formats.lib.findings import Code, Damaged, Finding, Group
from build.formats.lib.format import Format, Kind, Match, unwritten
from build.formats.lib.partitions import BOOT_SIGNATURE
from build.formats.lib.pieces import Disk
from build.formats.lib.places import PLACES
from build.formats.lib.platforms import EVERY_IMPORTER, Affected
from build.formats.lib.reader import BoundedReader

_QEMU = "convert it first: qemu-img convert -O qcow2 FILE NEW.qcow2"
_UNPACK = "unpack it, and give the image in it"
_DOWNLOAD = "the download failed: look at what it says, and fetch the image again"
_END = -512
"""Offset of the last sector."""
_LARGEST_TEXT = 4 << 20
"""Bytes of a text or small program that is taken for an image; a disk may begin as one does."""


@dataclass(frozen=True)
class Foreign:
    """One thing that is no image for us."""

    id: str
    """Of its code."""
    name: str
    called: str
    """With its article, as people say it."""
    way: str
    """What to do with it."""
    signatures: tuple[tuple[int, bytes], ...] = ()
    """Any of them tells it; offsets in bytes."""
    is_it: Callable[[bytes], bool] | None = None
    """Tells it by the first bytes, where no signature does."""


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    """Whether a text begins so, in any case, behind blanks and a byte order mark."""

    def is_it(head: bytes) -> bool:
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        return _is_text(head) and text.startswith(starts)

    return is_it


def _is_text(head: bytes) -> bool:
    if not head or any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head):
        return False
    try:
        head[: len(head) - 3].decode("utf-8")  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True


def _is_program(head: bytes) -> bool:
    return head.startswith(b"MZ") and head[510:512] != BOOT_SIGNATURE


TABLE = (
    Foreign("NOT001", "qed", "a QED image of QEMU", _QEMU, ((0, b"QED\0"),)),
    Foreign("NOT002", "qcow1", "a QCOW image of version 1", _QEMU, ((0, b"QFI\xfb\0\0\0\1"),)),
    Foreign(
        "NOT003",
        "parallels",
        "a disk of Parallels",
        _QEMU,
        ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")),
    ),
    Foreign("NOT004", "bochs", "a disk of Bochs", _QEMU, ((0, b"Bochs Virtual HD Image"),)),
    Foreign("NOT005", "cloop", "a compressed loop image", _QEMU, ((0, b"#!/bin/sh\n#V2.0 Format"),)),
    Foreign("NOT006", "dmg", "a disk image of macOS", _QEMU, ((_END, b"koly"),)),
    Foreign(
        "NOT007",
        "sesparse",
        "a snapshot of a VMware disk (SESparse)",
        "export the machine as OVF, or clone the disk to a whole one (vmkfstools -i)",
        ((0, b"\xbe\xba\xfe\xca\0\0\0\0"),),
    ),
    Foreign(
        "NOT008",
        "vma",
        "a backup of Proxmox VE",
        "extract its disks: vma extract FILE FOLDER",
        ((0, b"VMA\0"),),
    ),
    Foreign(
        "NOT009",
        "luks",
        "an encrypted volume (LUKS)",
        "open it with its key (cryptsetup open) and give what is inside",
        ((0, b"LUKS\xba\xbe"),),
    ),
    Foreign(
        "NOT010",
        "iso",
        "a CD or DVD image (ISO 9660)",
        "install from it in a machine, and give that machine's disk",
        ((32769, b"CD001"), (32769, b"NSR0"), (32769, b"BEA01")),
    ),
    Foreign(
        "NOT011",
        "squashfs",
        "a file system image (SquashFS)",
        "give a whole disk",
        ((0, b"hsqs"), (0, b"sqsh")),
    ),
    Foreign("NOT012", "wim", "a Windows image (WIM)", "apply it to a disk first", ((0, b"MSWIM\0\0\0"),)),
    Foreign(
        "NOT013",
        "android-sparse",
        "a sparse image of Android",
        "expand it first: simg2img FILE NEW.raw",
        ((0, b"\x3a\xff\x26\xed"),),
    ),
    Foreign(
        "NOT014",
        "nvram",
        "a firmware's settings of VMware (NVRAM)",
        "give the machine's disk",
        ((0, b"MRVN"),),
    ),
    Foreign("NOT015", "7z", "a 7z archive", _UNPACK, ((0, b"7z\xbc\xaf\x27\x1c"),)),
    Foreign("NOT016", "rar", "a RAR archive", _UNPACK, ((0, b"Rar!\x1a\x07"),)),
    Foreign("NOT017", "cab", "a cabinet archive", _UNPACK, ((0, b"MSCF\0\0\0\0"),)),
    Foreign(
        "NOT018", "lz4", "a file packed by lz4", _UNPACK, ((0, b"\x04\x22\x4d\x18"), (0, b"\x02\x21\x4c\x18"))
    ),
    Foreign("NOT019", "lzip", "a file packed by lzip", _UNPACK, ((0, b"LZIP\1"),)),
    Foreign("NOT020", "lzop", "a file packed by lzop", _UNPACK, ((0, b"\x89LZO\0\r\n\x1a\n"),)),
    Foreign("NOT021", "lzma", "a file packed as .lzma", _UNPACK, ((0, b"\x5d\0\0\x80\0\xff\xff\xff\xff"),)),
    Foreign("NOT022", "ar", "an ar archive, as a Debian package is", "give an image", ((0, b"!<arch>\n"),)),
    Foreign("NOT023", "rpm", "an RPM package", "give an image", ((0, b"\xed\xab\xee\xdb"),)),
    Foreign("NOT024", "cpio", "a cpio archive", _UNPACK, ((0, b"070701"), (0, b"070702"))),
    Foreign("NOT025", "elf", "a program or kernel (ELF)", "give an image", ((0, b"\x7fELF"),)),
    Foreign("NOT026", "pe", "a program of Windows or an EFI program", "give an image", is_it=_is_program),
    Foreign("NOT027", "pdf", "a PDF document", "give an image", ((0, b"%PDF-"),)),
    Foreign(
        "NOT028",
        "picture",
        "a picture",
        "give a disk image",
        ((0, b"\x89PNG\r\n"), (0, b"\xff\xd8\xff"), (0, b"GIF8")),
    ),
    Foreign(
        "NOT029", "torrent", "a torrent", "fetch what it names", ((0, b"d8:announce"), (0, b"d10:created by"))
    ),
    Foreign(
        "NOT030",
        "git-lfs",
        "a pointer of Git LFS",
        "fetch the file itself: git lfs pull",
        ((0, b"version https://git-lfs"),),
    ),
    Foreign(
        "NOT031",
        "ovf",
        "an OVF descriptor alone",
        "pack it with its disks: tar --format=ustar -cf NEW.ova FILE.ovf DISK.vmdk",
        is_it=lambda head: _is_text(head) and b"<?xml" in head[:64] and b"Envelope" in head,
    ),
    Foreign(
        "NOT032",
        "html",
        "a web page",
        _DOWNLOAD,
        is_it=_begins(b"<!doctype html", b"<html", b"<head", b"<body"),
    ),
    Foreign(
        "NOT033", "xml", "an XML text, as stores answer errors", _DOWNLOAD, is_it=_begins(b"<?xml", b"<error")
    ),
    Foreign(
        "NOT034", "json", "a JSON text, as services answer errors", _DOWNLOAD, is_it=_begins(b"{", b"[{")
    ),
    Foreign("NOT035", "text", "a text, as a checksum file is", "give the image itself", is_it=_is_text),
)
"""The first that fits is it."""


def _has(reader: BoundedReader, head: bytes, offset: int, wanted: bytes) -> bool:
    if 0 <= offset <= len(head) - len(wanted):
        return head.startswith(wanted, offset)
    place = offset if offset >= 0 else reader.size + offset
    return 0 <= place <= reader.size - len(wanted) and reader.read(place, len(wanted)) == wanted


def _recognize(row: Foreign, reader: BoundedReader, head: bytes) -> Match:
    """Whether a file fits a row; of those that fit, the first is it."""
    signed = any(_has(reader, head, offset, wanted) for offset, wanted in row.signatures)
    fits = signed or (row.is_it and reader.size <= _LARGEST_TEXT and row.is_it(head))
    return Match.CERTAIN if fits else Match.NO


def _code(row: Foreign) -> Code:
    refused = tuple(Affected(place.platforms[0]) for place in PLACES.values() if row.name not in place.takes)
    whom = (EVERY_IMPORTER,) if len(refused) == len(PLACES) else refused
    return Code(row.id, "error", f"this is {row.called}, which is not imported as it is", whom, row.way)


def _lint(code: Code, reader: BoundedReader) -> Iterator[Finding]:
    yield Finding(code, "file")


def _read(code: Code, reader: BoundedReader) -> Disk:
    raise Damaged.by(Finding(code, "file"))


def _nothing(size: int) -> None:
    """Nothing is written in these formats."""


def _kind(row: Foreign, code: Code) -> Kind:
    return Kind(
        name=row.name,
        suffix="",
        version=0,
        driver="",
        recognize=partial(_recognize, row),
        write=unwritten,
        read=partial(_read, code),
        lint=partial(_lint, code),
        check_size=_nothing,
    )


GROUP = Group("NOT", "What is no image for us", "as this file's head names them")
CODES = tuple(map(_code, TABLE))
KINDS = tuple(map(_kind, TABLE, CODES))
FORMATS: tuple[Format, ...] = ()
