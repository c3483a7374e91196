"""VMDK: the stream that ESXi walks from the first grain to the end mark."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from build.agent.events import Failure
from build.formats import vmdk
from build.formats.lib.findings import Code
from tests.disks import MIB, ask, errors, lint, make, one, patch, usual


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A streamOptimized VMDK of the usual disk."""
    return one(usual(tmp_path / "disk.img"), tmp_path, "vmdk")


def walk(raw: bytes) -> list[tuple[str, int, int]]:
    """Follow the stream without any of our code: (kind, file offset, guest sector or marker count)."""
    seen, offset = [], 128 * 512
    while True:
        count, length, kind = struct.unpack_from("<QII", raw, offset)
        if length:
            data = zlib.decompress(raw[offset + 12 : offset + 12 + length])
            assert len(data) <= 65536
            seen.append(("grain", offset, count))
            offset += -(-(12 + length) // 512) * 512
            continue
        seen.append((("end", "table", "directory", "footer")[kind], offset, count))
        if kind == 0:
            assert offset + 512 == len(raw)
            return seen
        offset += 512 + count * 512


def test_the_stream_is_what_esxi_expects(file: Path) -> None:
    raw = file.read_bytes()
    head = struct.unpack("<4sIIQQQQIQQQB4sH", raw[:79])
    assert head == (b"KDMV", 3, 0x30001, 98304, 128, 1, 20, 512, 0, 2**64 - 1, 128, 0, b"\n \r\n", 1)
    seen = walk(raw)
    grains = [sector for kind, _, sector in seen if kind == "grain"]
    assert grains == sorted(grains)
    assert [kind for kind, _, _ in seen if kind != "grain"] == [
        "table",
        "table",
        "directory",
        "footer",
        "end",
    ]
    directory_at = next(offset for kind, offset, _ in seen if kind == "directory") + 512
    footer = raw[-1024:-512]
    assert footer[:56] == raw[:56]
    assert struct.unpack_from("<Q", footer, 56)[0] * 512 == directory_at
    tables = struct.unpack_from("<2I", raw, directory_at)
    named = {
        group * 512 + row: sector
        for group, table in enumerate(tables)
        for row, sector in enumerate(struct.unpack_from("<512I", raw, table * 512))
        if sector
    }
    assert named == {sector // 128: offset // 512 for kind, offset, sector in seen if kind == "grain"}


def test_descriptor(file: Path) -> None:
    text = file.read_bytes()[512 : 512 * 21].rstrip(b"\0").decode()
    lines = text.splitlines()
    assert lines[:2] == ["# Disk DescriptorFile", "version=1"]
    assert 'createType="streamOptimized"' in lines
    assert 'RW 98304 SPARSE "vmdk.vmdk"' in lines
    assert 'ddb.adapterType = "lsilogic"' in lines
    content_id = next(line for line in lines if line.startswith("CID=")).removeprefix("CID=")
    assert next(line for line in lines if "longContentID" in line).endswith(f'{content_id}"')


def first_grain(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    return 128 * 512, struct.unpack_from("<I", raw, 128 * 512 + 8)[0]


def flip(path: Path) -> None:
    offset, length = first_grain(path)
    raw = path.read_bytes()
    patch(path, offset + 12 + length // 2, bytes([raw[offset + 12 + length // 2] ^ 0x55]))


def truncate(length: int) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - length)

    return apply


def append(content: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(path.read_bytes() + content)

    return apply


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(flip, vmdk.BROKEN_GRAIN, id="flipped byte in a grain"),
        pytest.param(
            lambda path: patch(path, 65536, struct.pack("<Q", 128)), vmdk.LOST_GRAIN, id="wrong address"
        ),
        pytest.param(
            lambda path: patch(path, 65536, struct.pack("<Q", 7)), vmdk.FOREIGN_GRAIN, id="odd address"
        ),
        pytest.param(
            lambda path: patch(path, 65536 + 8, b"\xff\xff\xff\x7f"), vmdk.LONG_GRAIN, id="length lies"
        ),
        pytest.param(lambda path: patch(path, 4, b"\1"), vmdk.OLD_VERSION, id="version 1"),
        pytest.param(lambda path: patch(path, -1024 + 4, b"\2"), vmdk.OTHER_FOOTER, id="footer differs"),
        pytest.param(lambda path: patch(path, 73, b"\r\n"), vmdk.LINE_ENDS, id="newlines"),
        pytest.param(truncate(512), vmdk.NO_FOOTER, id="no end mark"),
        pytest.param(truncate(65536), vmdk.NO_FOOTER, id="cut off"),
        pytest.param(append(bytes(512)), vmdk.NO_FOOTER, id="bytes after the end"),
        pytest.param(
            lambda path: patch(path, 12, struct.pack("<Q", 98304 + 128)),
            vmdk.OTHER_EXTENTS,
            id="capacity lies",
        ),
        pytest.param(lambda path: patch(path, 0, b"COWD"), vmdk.COWD, id="old extent"),
        pytest.param(
            lambda path: path.write_text("# Disk DescriptorFile\n") and None,
            vmdk.DESCRIPTOR_ALONE,
            id="descriptor",
        ),
    ],
)
def test_the_linter_sees(change: Callable[[Path], None], says: Code, file: Path) -> None:
    change(file)
    assert says in errors(file, "vmdk"), errors(file, "vmdk")


def test_a_grain_that_no_table_names(file: Path) -> None:
    raw = file.read_bytes()
    _, offset, _ = next(row for row in walk(raw) if row[0] == "table")
    table = list(struct.unpack_from("<512I", raw, offset + 512))
    table[table.index(next(sector for sector in table if sector))] = 0
    patch(file, offset + 512, struct.pack("<512I", *table))
    assert vmdk.LOST_GRAIN in errors(file, "vmdk")


@pytest.mark.parametrize(("adapter", "written"), [("ide", "ide"), ("pvscsi", "lsilogic")])
def test_adapters(adapter: str, written: str, tmp_path: Path) -> None:
    from tests.disks import ask, spec

    disk = make(tmp_path / "disk.img", 2 * MIB, [(0, 100, "text")])
    ask(disk, tmp_path, [{**spec("vmdk"), "options": {"adapter": adapter}}])
    assert f'ddb.adapterType = "{written}"'.encode() in (tmp_path / "vmdk.vmdk").read_bytes()
    warned = any(finding.code == vmdk.IDE for finding in lint(tmp_path / "vmdk.vmdk", "vmdk"))
    assert warned == (adapter == "ide")


def test_a_disk_that_needs_its_parent_is_not_converted(file: Path, tmp_path: Path) -> None:
    """What its parent holds would read as zeros."""
    patch(file, file.read_bytes().index(b"parentCID=ffffffff") + 10, b"12345678")
    with pytest.raises(Failure) as failure:
        ask(file, tmp_path / "out", [{"name": "raw", "kind": "raw", "file": "x.raw"}], foreign=True)
    assert failure.value.details["code"] == vmdk.NEEDS_PARENT.id
