"""What is no image: named for what it is, with the way on, and never taken for a raw disk."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.verbs import inspect
from build.formats import FORMATS, foreign
from build.formats.lib import names
from build.formats.lib.findings import Code
from tests.disks import MIB, usual

SAMPLES = {
    "qed": b"QED\0" + struct.pack("<III", 65536, 4, 1),
    "qcow1": b"QFI\xfb\0\0\0\1",
    "parallels": b"WithouFreSpacExt" + bytes(48),
    "sesparse": struct.pack("<QQ", 0xCAFEBABE, 0x200000001),
    "vma": b"VMA\0\0\0\0\1",
    "luks": b"LUKS\xba\xbe\0\2",
    "iso": bytes(32768) + b"\1CD001\1",
    "squashfs": b"hsqs",
    "7z": b"7z\xbc\xaf\x27\x1c\0\4",
    "ar": b"!<arch>\ndebian-binary",
    "elf": b"\x7fELF\2\1\1",
    "pdf": b"%PDF-1.7",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "ovf": b'<?xml version="1.0"?>\n<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1">',
    "html": b"\n\n<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "xml": b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>',
    "json": b'{"error": "not found"}',
    "text": b"0123456789abcdef  systemvm.qcow2\n",
}


def look(path: Path, **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = wire.dump(
        inspect.run(wire.Inspect(str(path), **more), lambda kind, **fields: None)
    )
    return told


def errors(told: dict[str, Any]) -> list[str]:
    return [finding["code"] for finding in told["findings"] if finding["severity"] == "error"]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("suffix", ["img", "vhd", "qcow2"])
def test_it_is_named_with_one_error(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    text = name in ("git-lfs", "ovf", "html", "xml", "json", "text")
    path.write_bytes(SAMPLES[name] if text else SAMPLES[name].ljust(2 * MIB, b"\0"))
    told = look(path, content=True)
    row = next(row for row in foreign.TABLE if row.name == name)
    assert told["format"] == name
    assert errors(told) == [row.id]


def test_one_that_is_told_by_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.dmg"
    path.write_bytes(bytes(MIB) + b"koly".ljust(512, b"\0"))
    assert look(path)["format"] == "dmg"


def test_a_disk_is_none_of_them(tmp_path: Path) -> None:
    """Also one that begins as a program or a text does, as a boot sector may."""
    path = usual(tmp_path / "disk.img", 16 * MIB)
    assert look(path)["format"] == "raw"
    with open(path, "r+b") as file:
        file.write(b"MZ program loader")
    assert look(path)["format"] == "raw"
    path.write_bytes(b"plain text\n" * 1000 + bytes(8 * MIB))
    assert look(path)["format"] == "raw"
    for seed in range(50):
        path.write_bytes(bytes([seed]) * 446 + bytes(64) + b"\x55\xaa" + bytes(MIB))
        assert look(path)["format"] == "raw"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x.vhd", names.NO_FOOTER),
        ("x.VHDX", names.NOT_AS_NAMED),
        ("x.qcow2", names.NOT_AS_NAMED),
        ("x.vdi", names.NOT_AS_NAMED),
        ("x.ova", names.NOT_AS_NAMED),
        ("x-flat.vmdk", names.BARE_EXTENT),
    ],
)
def test_a_raw_disk_under_the_name_of_a_format(name: str, says: Code, tmp_path: Path) -> None:
    path = usual(tmp_path / name, 16 * MIB)
    assert errors(look(path)) == [says.id]


@pytest.mark.parametrize("name", ["x.img", "x.raw", "x", "x.bin", "x.dd"])
def test_names_that_claim_nothing(name: str, tmp_path: Path) -> None:
    assert look(usual(tmp_path / name, 16 * MIB))["findings"] == []


def test_every_row_tells_its_way_on() -> None:
    names = [row.name for row in foreign.TABLE]
    assert len(set(names)) == len(names)
    assert not {*names} & {*FORMATS}
    for row in foreign.TABLE:
        assert row.way
        assert row.called.split()[0] in ("a", "an")
        assert bool(row.signatures) != bool(row.is_it)
