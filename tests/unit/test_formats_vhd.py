"""VHD, byte by byte: what XenServer's checker demands, and that our linter sees every breach of it."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from build.formats import vhd as checks
from build.formats.lib import vhd
from build.formats.lib.findings import Code
from build.formats.lib.platforms import XENSERVER
from tests.disks import MIB, ask, errors, lint, make, one, patch, spec, usual

SIZE = 304 * MIB


@pytest.fixture
def xen(tmp_path: Path) -> Path:
    """A VHD for XenServer with data in the first MiBs and in the last 4 KiB."""
    disk = make(tmp_path / "disk.img", SIZE, [(0, 5 * MIB, "text"), (SIZE - 4096, 4096, "noise")])
    return one(disk, tmp_path, "vhd")


def summed(block: bytes, field: int) -> int:
    return ~sum(block[:field] + block[field + 4 :]) & 0xFFFFFFFF


def test_every_field_that_xenserver_looks_at(xen: Path) -> None:
    file = xen.read_bytes()
    footer, header = file[-512:], file[512:1536]
    assert file[:512] == footer
    assert footer[:8] == b"conectix"
    assert struct.unpack(">IIQ", footer[8:24]) == (2, 0x00010000, 512)
    assert struct.unpack(">I", footer[24:28])[0] == 315_619_200, "2010-01-01 in seconds since 2000"
    assert footer[28:40] == b"tap\0\x00\x01\x00\x03\0\0\0\0"
    assert struct.unpack(">QQ", footer[40:56]) == (SIZE, SIZE)
    assert struct.unpack(">HBBI", footer[56:64]) == (*vhd.geometry(SIZE), 3)
    assert struct.unpack(">I", footer[64:68])[0] == summed(footer, 64)
    assert any(footer[68:84])
    assert not any(footer[84:])
    assert header[:8] == b"cxsparse"
    assert struct.unpack(">QQIII", header[8:36]) == (2**64 - 1, 1536, 0x00010000, 152, 2 * MIB)
    assert struct.unpack(">I", header[36:40])[0] == summed(header, 36)
    assert not any(header[40:])


def test_blocks_table_and_batmap(xen: Path) -> None:
    file = xen.read_bytes()
    table = struct.unpack(">152I", file[1536 : 1536 + 608])
    allocated = [block for block, sector in enumerate(table) if sector != 0xFFFFFFFF]
    assert allocated == [0, 1, 2, 151]
    for block in allocated:
        assert table[block] % 8 == 7, "the data, one sector later, starts on 4 KiB"
        assert file[table[block] * 512 :][:512] == b"\xff" * 512
    last = (table[151] + 1) * 512
    assert len(file) == last + 2 * MIB + 512
    batmap = file[1536 + 1024 :]
    assert struct.unpack(">8sQII", batmap[:24]) == (b"tdbatmap", 3072, 1, 0x00010002)
    bits = batmap[512:1024]
    assert [block for block in range(4096) if bits[block >> 3] & 0x80 >> (block & 7)] == allocated
    assert struct.unpack(">I", batmap[24:28])[0] == ~sum(bits) & 0xFFFFFFFF


def test_hyperv_has_no_batmap_and_its_own_creator(tmp_path: Path) -> None:
    file = one(usual(tmp_path / "disk.img"), tmp_path, "hyperv-vhd").read_bytes()
    assert file[28:40] == b"win \x00\x06\x00\x03Wi2k"
    assert b"tdbatmap" not in file[:8192]


@pytest.mark.parametrize(
    ("size", "chs"),
    [
        (5000 * MIB, (10158, 16, 63)),
        (2 * MIB, (60, 4, 17)),
        (SIZE, (617, 16, 63)),
        (2040 << 30, (65535, 16, 255)),
        (127 << 30, (65278, 16, 255)),
    ],
)
def test_geometry_never_exceeds_the_disk(size: int, chs: tuple[int, int, int]) -> None:
    cylinders, heads, sectors = vhd.geometry(size)
    assert cylinders * heads * sectors * 512 <= size
    assert (cylinders, heads, sectors) == chs


def mended(change: Callable[[bytearray], None], at_head: bool = True) -> Callable[[Path], None]:
    """A change of the footer, both copies, with the checksum made right again."""

    def apply(path: Path) -> None:
        footer = bytearray(path.read_bytes()[-512:])
        change(footer)
        footer[64:68] = struct.pack(">I", summed(bytes(footer), 64))
        patch(path, -512, bytes(footer))
        if at_head:
            patch(path, 0, bytes(footer))

    return apply


def field(offset: int, content: bytes) -> Callable[[Path], None]:
    """A change of one field of the footer."""

    def change(footer: bytearray) -> None:
        footer[offset : offset + len(content)] = content

    return mended(change)


def cut(length: int) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - length)

    return apply


def table_entry(block: int, value: Callable[[tuple[int, ...]], int]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        table = struct.unpack(">152I", path.read_bytes()[1536 : 1536 + 608])
        patch(path, 1536 + 4 * block, struct.pack(">I", value(table)))

    return apply


def soon() -> bytes:
    return struct.pack(">I", int(time.time()) - vhd.EPOCH_2000 + 3600)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda path: patch(path, 2560, bytes(512)), checks.NO_BATMAP, id="no batmap"),
        pytest.param(
            lambda path: patch(path, 2560 + 24, b"\0\0\0\0"), checks.BATMAP_CHECKSUM, id="batmap checksum"
        ),
        pytest.param(lambda path: patch(path, 2560 + 23, b"\1"), checks.BATMAP_VERSION, id="batmap 1.1"),
        pytest.param(lambda path: patch(path, 3072 + 5, b"\xff"), checks.BATMAP_FULL, id="batmap bit"),
        pytest.param(field(32, b"\0\1\0\4"), checks.CREATOR_VERSION, id="tap 1.4"),
        pytest.param(field(32, b"\0\0\0\1"), checks.CREATOR_VERSION, id="tap 0.1"),
        pytest.param(field(56, b"\xff\xff\x10\xff"), checks.GEOMETRY, id="largest geometry"),
        pytest.param(
            field(56, struct.pack(">HBB", vhd.geometry(SIZE)[0] + 1, *vhd.geometry(SIZE)[1:])),
            checks.GEOMETRY,
            id="one cylinder up",
        ),
        pytest.param(field(24, soon()), checks.FUTURE, id="future"),
        pytest.param(field(68, bytes(16)), checks.NO_UUID, id="null uuid"),
        pytest.param(field(8, bytes(4)), checks.FEATURES, id="features 0"),
        pytest.param(field(100, b"x"), checks.FOOTER_RESERVED, id="reserved"),
        pytest.param(cut(512), checks.CUT_OFF, id="no footer"),
        pytest.param(cut(1), checks.FOOTER_511, id="511 byte footer"),
        pytest.param(lambda path: patch(path, 600, b"\1"), checks.HEADER_CHECKSUM, id="header bit flip"),
        pytest.param(lambda path: patch(path, -400, b"\1"), checks.FOOTER_CHECKSUM, id="footer bit flip"),
        pytest.param(table_entry(1, lambda table: table[0]), checks.OVER_BLOCK, id="same block twice"),
        pytest.param(table_entry(1, lambda table: table[151]), checks.OVER_BLOCK, id="last block twice"),
        pytest.param(table_entry(5, lambda table: table[151] + 8), checks.OVER_FOOTER, id="over the footer"),
        pytest.param(table_entry(5, lambda table: 1), checks.OVER_HEAD, id="over the head"),
        pytest.param(table_entry(5, lambda table: 0xFFFFFF00), checks.OVER_FOOTER, id="past the end"),
        pytest.param(field(60, b"\0\0\0\4"), vhd.NEEDS_PARENT, id="differencing"),
        pytest.param(field(60, b"\0\0\0\x63"), vhd.UNKNOWN_TYPE, id="unknown type"),
        pytest.param(field(48, struct.pack(">Q", 2 << 42)), vhd.FEW_ENTRIES, id="size lies"),
        pytest.param(lambda path: patch(path, 0, b"x"), checks.HEAD_COPY, id="head copy"),
    ],
)
def test_the_linter_sees(change: Callable[[Path], None], says: Code, xen: Path) -> None:
    change(xen)
    assert says in errors(xen, "vhd"), errors(xen, "vhd")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(field(28, b"tap "), checks.BY_GEOMETRY, id="creator tap and a space"),
        pytest.param(field(28, b"vpc "), checks.BY_GEOMETRY, id="creator vpc"),
        pytest.param(field(40, struct.pack(">Q", SIZE + 512)), checks.ORIGINAL_SIZE, id="original size"),
    ],
)
def test_the_linter_warns(change: Callable[[Path], None], says: Code, xen: Path) -> None:
    change(xen)
    assert any(finding.code == says for finding in lint(xen, "vhd"))


@pytest.mark.parametrize(
    "change",
    [
        field(56, bytes(4)),
        field(24, bytes(4)),
        field(28, b"win "),
        field(32, b"\0\1\0\1"),
    ],
    ids=["geometry 0", "time 0", "creator win", "tap 1.1 with a batmap that nobody reads"],
)
def test_the_linter_accepts_what_xenserver_accepts(change: Callable[[Path], None], xen: Path) -> None:
    change(xen)
    assert errors(xen, "vhd") == []


def test_findings_name_the_place_and_who_minds(xen: Path) -> None:
    field(68, bytes(16))(xen)
    found = next(finding for finding in lint(xen, "vhd") if finding.code == checks.NO_UUID)
    assert found.where == f"byte {xen.stat().st_size - 512 + 68:#x}"
    assert XENSERVER in found.affects
    assert found.fix


def test_sizes_that_the_geometry_tells_exactly() -> None:
    """Multiples of 63 MiB from 252 to 32,130; the even ones are what convert names."""
    exact = [mib for mib in range(252, 32_131) if not vhd.cut(mib * MIB)]
    assert exact == list(range(252, 32_131, 63))
    assert vhd.cut(5000 * MIB) == 376_832
    assert vhd.next_exact(5000 * MIB) == 5040
    assert vhd.next_exact(252 * MIB) == 252
    assert vhd.next_exact(253 * MIB) == 378
    assert vhd.next_exact(33_000 * MIB) == 0


def test_convert_says_what_would_be_cut(tmp_path: Path) -> None:
    told = ask(make(tmp_path / "a.img", 254 * MIB, []), tmp_path, [spec("vhd"), spec("qcow2")])
    (note,) = told["notes"]
    assert note.startswith("vhd.vhd: tools that round to a VHD's geometry would cut ")
    assert note.endswith("; 378 MiB would be exact")
    assert ask(make(tmp_path / "b.img", 252 * MIB, []), tmp_path, [spec("vhd")])["notes"] == []
