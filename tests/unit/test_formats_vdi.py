"""VDI: header and table as VirtualBox and QEMU read them."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from build.formats import vdi
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code, Damaged
from tests.disks import MIB, errors, lint, make, one, opened, patch, read, usual


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A VDI of the usual disk."""
    return one(usual(tmp_path / "disk.img"), tmp_path, "vdi")


def test_header(file: Path) -> None:
    raw = file.read_bytes()
    assert raw.startswith(b"<<< Oracle VM VirtualBox Disk Image >>>\n\0")
    assert struct.unpack_from("<IIIII", raw, 64) == (0xBEDA107F, 0x00010001, 0x190, 1, 0)
    table, data = struct.unpack_from("<II", raw, 0x154)
    size, block, extra, blocks, stored = struct.unpack_from("<QIIII", raw, 0x170)
    assert (table, data) == (512, MIB)
    assert (size, block, extra, blocks) == (48 * MIB, MIB, 0, 48)
    assert len(raw) == data + stored * MIB
    assert uuid.UUID(bytes_le=raw[0x188:0x198]).version == 5
    assert raw[0x1A8:0x1C8] == bytes(32)


def test_blocks_rise_and_zeros_are_left_out(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", 8 * MIB, [(MIB + 5, 10, "noise"), (7 * MIB, MIB, "noise")])
    made = one(disk, tmp_path, "vdi")
    assert struct.unpack_from("<8I", made.read_bytes(), 512) == (vdi.ABSENT, 0, *[vdi.ABSENT] * 5, 1)
    assert read(made, "vdi") == disk.read_bytes()


def test_an_odd_end_is_a_whole_block(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", 3 * MIB + 512, [(3 * MIB, 512, "noise")])
    made = one(disk, tmp_path, "vdi")
    assert read(made, "vdi") == disk.read_bytes()
    assert made.stat().st_size == 2 * MIB


def test_sizes_that_no_vdi_has() -> None:
    for size in (0, 511, vdi.LARGEST + 512):
        with pytest.raises(Unsupported):
            vdi.check_size(size)


def test_fixed_ones_and_blocks_of_other_sizes_are_read(file: Path, tmp_path: Path) -> None:
    """Blocks in any order, and discarded ones."""
    content = bytes(range(256)) * 4096
    head = struct.pack("<64sIIIII256sII", b"any title", 0xBEDA107F, 0x10001, 0x180, 2, 0, b"", 512, 1024)
    head += struct.pack(
        "<16sIQIIII64s", struct.pack("<IIII", 0, 0, 0, 512), 0, MIB, MIB // 4, 0, 4, 4, b"\1" * 16
    )
    path = tmp_path / "fixed.vdi"
    table = struct.pack("<4I", 1, 0, vdi.DISCARDED, 2)
    quarter = MIB // 4
    data = content[quarter : 2 * quarter] + content[:quarter] + content[3 * quarter :]
    path.write_bytes(head.ljust(512, b"\0") + table.ljust(512, b"\0") + data)
    assert read(path, "vdi") == content[: 2 * quarter] + bytes(quarter) + content[3 * quarter :]
    with opened(path) as reader:
        assert vdi.VdiDisk(reader).facts()["type"] == "fixed"


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (76, b"\4\0\0\0", vdi.NEEDS_PARENT),
        (0x1B8, b"\1", vdi.NEEDS_PARENT),
        (68, b"\1\0\0\0", vdi.OTHER_VERSION),
        (0x178, b"\3\0\0\0", vdi.BLOCK_SIZE),
        (0x180, b"\1\0\0\0", vdi.FEW_BLOCKS),
        (0x170, b"\xff" * 8, vdi.BAD_SIZE),
    ],
)
def test_what_cannot_be_read(offset: int, value: bytes, says: Code, file: Path) -> None:
    patch(file, offset, value)
    assert errors(file, "vdi")[-1] == says
    with pytest.raises(Damaged):
        read(file, "vdi")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda path: patch(path, 512, b"\xee\0\0\0"), vdi.PAST_END, id="past"),
        pytest.param(lambda path: patch(path, 516, bytes(4)), vdi.SHARED_PLACE, id="twice"),
        pytest.param(lambda path: patch(path, 0x188, bytes(16)), vdi.NO_UUID, id="uuid"),
    ],
)
def test_what_lint_finds(spoil: Callable[[Path], None], says: Code, file: Path) -> None:
    assert lint(file, "vdi") == []
    spoil(file)
    assert says in errors(file, "vdi")
