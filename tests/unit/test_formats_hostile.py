"""Fields that lie: numbers that are none, sizes of zero, counts that no file of this size explains."""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.verbs import inspect
from build.formats import vhdx, vmdk
from build.formats.lib import codec, ovf, tar, unwrap
from build.formats.lib import qcow2 as structures
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import LONGEST, MOST_KINDS, OTHERS, SAME_KIND, Code
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import octal
from tests.disks import MIB, chunk, damaged, one, patch, usual

NO_NUMBER, NOT_GIVEN = ovf.BAD_CAPACITY_UNITS, ovf.NO_CAPACITY


def look(path: Path | str) -> dict[str, Any]:
    request = wire.Inspect(str(path), tempfile.gettempdir())
    told: dict[str, Any] = wire.dump(inspect.run(request, lambda kind, **fields: None))
    return told


def codes(path: Path | str) -> list[str]:
    return [finding["code"] for finding in look(path)["findings"]]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return usual(tmp_path_factory.mktemp("disk") / "disk.img", 8 * MIB)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A file in memory, which may be as large as no disk."""
    fd = os.memfd_create("hostile")
    yield Path(f"/proc/self/fd/{fd}")
    os.close(fd)


def test_a_vmdk_with_grains_of_nothing_in_its_header_alone(disk: Path, tmp_path: Path) -> None:
    path = one(disk, tmp_path, "vmdk")
    patch(path, 20, bytes(8))
    assert vmdk.OTHER_FOOTER.id in codes(path)


def test_a_vmdk_with_grains_of_nothing(disk: Path, tmp_path: Path) -> None:
    path = one(disk, tmp_path, "vmdk")
    patch(path, 20, bytes(8))
    patch(path, path.stat().st_size - 1024 + 20, bytes(8))
    assert codes(path) == [vmdk.GRAIN_SIZE.id]


@pytest.mark.parametrize("digits", ["²", "٣", "1_0", "+5", "9" * 30, "", "-1"])
def test_a_capacity_that_is_no_number(digits: str, disk: Path, tmp_path: Path) -> None:
    """Python counts more characters among digits than it reads as numbers."""
    path = one(disk, tmp_path, "ova")
    raw = path.read_bytes()
    before = f'ovf:capacity="{8 * MIB}"'.encode()
    after = f'ovf:capacity="{digits}"'.encode()
    assert raw.count(before) == 1
    end = raw.index(b"</Envelope>")
    grown = raw[:end].replace(before, after) + raw[end:]
    pad = len(raw) - len(grown)  # line ends stand behind the descriptor: what grew takes of them
    place = grown.index(b"</Envelope>") + len(b"</Envelope>")
    path.write_bytes(grown[:place] + (b"\n" * pad if pad >= 0 else b"") + grown[place + max(-pad, 0) :])
    said = [row for row in look(path)["findings"] if row["code"] in (NOT_GIVEN.id, NO_NUMBER.id)]
    assert [row["code"] for row in said] == [NO_NUMBER.id if digits else NOT_GIVEN.id]
    assert not digits or said[0]["fields"] == {"said": digits, "units": "byte"}


def test_a_vmdk_descriptor_whose_extent_is_no_number(disk: Path, tmp_path: Path) -> None:
    path = one(disk, tmp_path, "vmdk")
    raw = path.read_bytes()
    place = raw.index(b"RW 16384 SPARSE")
    patch(path, place + 3, b"\xb2    ")
    assert vmdk.NO_EXTENT.id in codes(path)


@pytest.mark.parametrize("field", [b"-5", b"+5", b"0o17", b"1_0", b"8", b"\xb2", b"5 5", b"\x80\0\0\0\5"])
def test_numbers_of_a_tar_header_are_octal_digits(field: bytes) -> None:
    with pytest.raises(ValueError, match="octal"):
        octal(field)


def test_octal_digits_between_blanks_and_zero_bytes() -> None:
    assert [octal(field) for field in (b"0000644\0", b"  17 \0", b"\0\0", b"")] == [0o644, 0o17, 0, 0]


def test_a_vhdx_larger_than_any(disk: Path, tmp_path: Path, memory: Path) -> None:
    """A file of 8 EiB: no table is made as large as the file says it is."""
    content = one(disk, tmp_path, "vhdx").read_bytes()
    memory.write_bytes(content)
    os.truncate(memory, (1 << 63) - 4096)
    assert vhdx.LARGE_FILE.id in codes(memory)


def test_a_vhdx_whose_metadata_claim_the_same_bytes_over_and_over(disk: Path, tmp_path: Path) -> None:
    path = one(disk, tmp_path, "vhdx")
    rows = b"".join(struct.pack("<16sIIII", os.urandom(16), 0, 1 << 20, 6, 0) for _ in range(2000))
    patch(path, 2 * MIB + 10, struct.pack("<H", 2005))
    patch(path, 2 * MIB + 32 + 5 * 32, rows)
    tracemalloc.start()
    try:
        assert look(path)["virtual_size"] == 8 * MIB
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def qcow2(path: Path, entries: int, l1: int = 3, refcount_clusters: int = 1) -> Path:
    """A QCOW2 of three L2 tables whose entries all name one compressed cluster."""
    cluster = 65536
    packed = codec.Deflate(12).compress(chunk("text", cluster, 1))
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        2,
        0,
        0,
        16,
        3 << 29,
        0,
        l1,
        cluster,
        6 * cluster,
        refcount_clusters,
        0,
        0,
    )
    entry = 1 << 62 | (-(-len(packed) // 512) - 1) << 54 | 5 * cluster
    with open(path, "wb") as file:
        file.write(head)
        file.seek(cluster)
        file.write(struct.pack(">3Q", *(table * cluster | 1 << 63 for table in (2, 3, 4))))
        file.seek(2 * cluster)
        file.write(struct.pack(">Q", entry) * entries)
        file.seek(5 * cluster)
        file.write(packed)
        file.truncate(8 * cluster)
    return path


def test_a_qcow2_that_expands_one_cluster_without_end(tmp_path: Path) -> None:
    path = qcow2(tmp_path / "one.qcow2", 3 * 8192)
    assert structures.NOT_EXPANDED.id in codes(path)
    assert structures.NOT_EXPANDED.id not in codes(qcow2(path, 100))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"l1": (1 << 32) - 1}, structures.LARGE_L1),
        ({"refcount_clusters": (1 << 32) - 1}, structures.LARGE_REFCOUNTS),
    ],
)
def test_a_qcow2_with_tables_that_qemu_refuses(fields: dict[str, int], says: Code, tmp_path: Path) -> None:
    assert says.id in codes(qcow2(tmp_path / "large.qcow2", 1, **fields))


def test_a_window_is_judged_right_whatever_the_portions() -> None:
    near = b"".join(bytes([n % 50]) * 40 for n in range(1600))
    far = os.urandom(20_000) * 3
    for content, small in ((near, True), (far, False)):
        stream = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = stream.compress(content) + stream.flush()
        assert codec.keeps_window(packed, 12, len(content)) is small
        assert codec.keeps_window(packed, 15, len(content))
        assert not codec.keeps_window(packed, 15, len(content) - 1)
        assert not codec.keeps_window(packed[:-3], 15, len(content))


def member(name: str, content: bytes) -> bytes:
    return tar.member_header(name, len(content), 0) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def archive(path: Path, **files: bytes) -> Path:
    packed = b"".join(member(name.replace("_", "."), content) for name, content in files.items())
    path.write_bytes(packed + bytes(1024))
    return path


def test_findings_of_many_kinds_are_bounded(tmp_path: Path) -> None:
    lines = b"".join(b"%d\n" % number for number in range(100_000))
    long = b"SHA256(" + b"x" * 200_000 + b")= 00\n"
    told = look(archive(tmp_path / "many.ova", a_ovf=b"<x/>", a_mf=long + lines))
    assert len(told["findings"]) <= (MOST_KINDS + 3) * SAME_KIND
    assert any(finding["code"] == OTHERS["error"].id for finding in told["findings"])
    said = [value for finding in told["findings"] for value in finding.values() if isinstance(value, str)]
    assert max(map(len, said)) <= LONGEST


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><x>&b;</x>', ovf.DOCTYPE),
        (b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>', ovf.DOCTYPE),
        (b"<x>" * 200 + b"</x>" * 200, ovf.NESTED),
        (b"<x>" + b"<y/>" * 60_000 + b"</x>", ovf.MANY_ELEMENTS),
        (b"<x " + b" ".join(b"a%d='1'" % n for n in range(60_000)) + b"/>", ovf.MANY_ELEMENTS),
        (b"<?xml version='1.0' encoding='idna'?><x/>", ovf.NOT_XML),
        (b"<?xml version='1.0' encoding='rot13'?><x/>", ovf.NOT_XML),
        (b"\xff\xfe<x/>", ovf.NOT_XML),
    ],
)
def test_descriptors_that_would_take_too_much(content: bytes, says: Code) -> None:
    with damaged(says):
        ovf.parse_xml(content)


@pytest.mark.parametrize("made", [b"text" * 4 * MIB, os.urandom(2 * MIB)])
def test_what_is_inside_takes_more_than_is_free(made: bytes, tmp_path: Path) -> None:
    """It is counted to its end, for the error, and no more is written than there is room for."""
    path = tmp_path / "disk.gz"
    path.write_bytes(gzip.compress(bytes(MIB) + made, 1))
    fd = os.open(path, os.O_RDONLY)
    try:
        with tempfile.TemporaryFile(dir=tmp_path) as space:
            with pytest.raises(Unsupported) as error:
                unwrap.expand("gz", BoundedReader.whole(fd), space, 1 << 30, MIB, lambda done: None)
            space.flush()
            assert os.fstat(space.fileno()).st_blocks * 512 <= 2 * MIB
    finally:
        os.close(fd)
    assert f"takes {len(made) / MIB:.1f} MiB, and there is room for 1.0 MiB" in str(error.value)
    assert "where there is room" in error.value.hint
