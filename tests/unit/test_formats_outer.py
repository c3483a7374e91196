"""Outer compression: standard files that the standard library reads, cut in chunks or not."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import tempfile
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build.agent.events import Failure
from build.formats.lib import outer, unwrap
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Damaged
from build.formats.lib.reader import BoundedReader
from tests.disks import EPOCH, MIB, ask, chunk, damaged, opened, spec, usual


def pack(kind: str, content: bytes, folder: Path, threads: int = 3) -> Path:
    source, target = folder / "source", folder / f"packed.{kind}"
    source.write_bytes(content)
    with opened(source) as reader, open(target, "w+b") as file, ThreadPoolExecutor(threads) as pool:
        done: list[int] = []
        told = outer.compress(kind, reader, file, "disk.vhd", EPOCH, pool, 4, done.append)
        assert sum(done) == len(content)
        file.flush()
        made = BoundedReader.whole(file.fileno())
        for number, row in enumerate(told.chunks):
            part = made.read(told.places[number], told.places[number + 1] - told.places[number])
            assert outer.unpack(kind, part, row.length) == content[row.offset : row.offset + row.length]
    return target


def unpack(kind: str, path: Path) -> bytes:
    """Read by the standard library alone; zst has no reader there."""
    if kind == "bz2":
        return bz2.decompress(path.read_bytes())
    if kind == "gz":
        return gzip.decompress(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["disk.vhd"]
        assert archive.testzip() is None
        return archive.read("disk.vhd")


def again(path: Path, kind: str, limit: int = 1 << 30, room: int = 1 << 30) -> bytes:
    """Read by our own unwrapper."""
    with opened(path) as reader, tempfile.TemporaryFile() as space:
        assert unwrap.recognize(reader) == kind
        size = unwrap.expand(kind, reader, space, limit, room, lambda done: None)
        space.seek(0)
        content = space.read()
        assert len(content) == size
        return content


CONTENTS = {
    "one byte": b"x",
    "a chunk": chunk("text", 900_000, 1),
    "chunks": chunk("noise", 1_200_000, 2) + bytes(3 * MIB) + chunk("text", 4 * MIB + 5, 3),
    "zeros": bytes(5 * MIB),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("kind", outer.KINDS)
def test_standard_readers_read_it(kind: str, content: bytes, tmp_path: Path) -> None:
    packed = pack(kind, content, tmp_path)
    if kind != "zst":
        assert unpack(kind, packed) == content
    assert again(packed, kind) == content


@pytest.mark.parametrize("kind", outer.KINDS)
def test_threads_do_not_change_the_bytes(kind: str, tmp_path: Path) -> None:
    content = CONTENTS["chunks"]
    first = pack(kind, content, tmp_path, threads=1).read_bytes()
    assert pack(kind, content, tmp_path, threads=7).read_bytes() == first


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 3 * MIB), kind=st.sampled_from(outer.KINDS))
def test_any_size(size: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = chunk("text", size // 2, 1) + bytes(size - size // 2)
        assert again(pack(kind, content, Path(folder)), kind) == content


def test_the_first_stream_of_a_bz2_holds_the_head_of_the_image(tmp_path: Path) -> None:
    """Readers that stop after one stream, as Java's do by default, still see what kind of disk it is."""
    content = CONTENTS["chunks"]
    packed = pack("bz2", content, tmp_path).read_bytes()
    assert bz2.BZ2Decompressor().decompress(packed) == content[: outer.CHUNK["bz2"]]


def test_gz_and_zip_are_one_deflate_stream(tmp_path: Path) -> None:
    packed = pack("gz", CONTENTS["chunks"], tmp_path).read_bytes()
    assert packed.count(b"\x1f\x8b\x08\0") == 1
    assert packed[4:8] == EPOCH.to_bytes(4, "little")


@pytest.mark.parametrize("kind", outer.KINDS)
@pytest.mark.parametrize("where", [0.05, 0.5, 0.999])
def test_cut_off_and_damaged(kind: str, where: float, tmp_path: Path) -> None:
    packed = pack(kind, CONTENTS["chunks"], tmp_path)
    raw = packed.read_bytes()
    packed.write_bytes(raw[: int(len(raw) * where)])
    with pytest.raises(Damaged):
        again(packed, kind)


@pytest.mark.parametrize("kind", ["bz2", "gz", "zip"])
def test_a_flipped_byte(kind: str, tmp_path: Path) -> None:
    packed = pack(kind, CONTENTS["a chunk"], tmp_path)
    raw = bytearray(packed.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    packed.write_bytes(bytes(raw))
    with pytest.raises(Damaged):
        again(packed, kind)


@pytest.mark.parametrize("kind", outer.KINDS)
def test_what_grows_without_end_is_stopped(kind: str, tmp_path: Path) -> None:
    packed = pack(kind, bytes(40 * MIB), tmp_path)
    with pytest.raises(Unsupported, match="expands to more than"):
        again(packed, kind, limit=8 * MIB)


def test_many_small_streams_in_one_file(tmp_path: Path) -> None:
    """Cut into portions anywhere, within their heads too."""
    parts = [b"%d" % number for number in range(20_000)]
    (tmp_path / "many.gz").write_bytes(b"".join(gzip.compress(part, 1) for part in parts) + bytes(100))
    assert again(tmp_path / "many.gz", "gz") == b"".join(parts)
    (tmp_path / "many.bz2").write_bytes(b"".join(bz2.compress(part, 1) for part in parts[:2000]))
    assert again(tmp_path / "many.bz2", "bz2") == b"".join(parts[:2000])


def test_foreign_archives(tmp_path: Path) -> None:
    content = CONTENTS["chunks"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("readme.txt", "read me")
        archive.writestr("../../disk.vhd", content)
    (tmp_path / "stored.zip").write_bytes(buffer.getvalue())
    assert again(tmp_path / "stored.zip", "zip") == content
    (tmp_path / "two.gz").write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert again(tmp_path / "two.gz", "gz") == content
    (tmp_path / "one.bz2").write_bytes(bz2.compress(content))
    assert again(tmp_path / "one.bz2", "bz2") == content


@pytest.mark.parametrize("kind", outer.KINDS)
def test_a_converted_file_is_wrapped_and_its_sums_are_the_wrapped_files(kind: str, tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img", 8 * MIB)
    told = ask(disk, tmp_path / "out", [spec("vhd", kind), spec("vhd")])
    assert told["files"][0]["md5"] != told["files"][1]["md5"]
    assert again(tmp_path / "out" / f"vhd.vhd.{kind}", kind) == (tmp_path / "out" / "vhd.vhd").read_bytes()
    assert told["files"][0]["reproducible"] == (kind != "zst")


def xz(path: Path, *streams: bytes) -> Path:
    path.write_bytes(b"".join(streams))
    return path


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("check", [lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256])
def test_xz(content: bytes, check: int, tmp_path: Path) -> None:
    assert again(xz(tmp_path / "a.xz", lzma.compress(content, check=check, preset=0)), "xz") == content


def test_several_xz_streams_with_padding(tmp_path: Path) -> None:
    parts = [b"%d" % number for number in range(300)]
    streams = [lzma.compress(part, preset=0) + bytes(4 * (number % 3)) for number, part in enumerate(parts)]
    assert again(xz(tmp_path / "a.xz", *streams), "xz") == b"".join(parts)


@pytest.mark.parametrize("where", [0.05, 0.5, 0.999])
def test_an_xz_that_is_cut_off_or_changed(where: float, tmp_path: Path) -> None:
    raw = lzma.compress(CONTENTS["a chunk"], preset=0)
    at = int(len(raw) * where)
    with damaged(unwrap.XZ_NO_END):
        again(xz(tmp_path / "a.xz", raw[:at]), "xz")
    with pytest.raises(Damaged):
        again(xz(tmp_path / "a.xz", raw[:at] + bytes((raw[at] ^ 0x10,)) + raw[at + 1 :]), "xz")
    with pytest.raises(Damaged):
        again(xz(tmp_path / "a.xz", raw, b"text behind it"), "xz")


def test_an_xz_that_grows_without_end(tmp_path: Path) -> None:
    path = xz(tmp_path / "a.xz", lzma.compress(bytes(100 * MIB), preset=0))
    tracemalloc.start()
    try:
        with pytest.raises(Unsupported, match="the xz expands to more than 8"):
            again(path, "xz", limit=8 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()


def test_an_xz_that_asks_for_a_gigabyte(tmp_path: Path) -> None:
    """Its dictionary is in a header of some bytes; xz -9, the most that people use, asks for 64 MiB."""
    for size, taken in ((64 << 20, True), (1 << 30, False)):
        head = {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 16}
        raw = bytearray(lzma.compress(b"x" * 1000, filters=[head]))
        place = raw.index(b"\x21\x01", 12) + 2  # the filter's id, the length of its properties, the size
        raw[place] = {64 << 20: 28, 1 << 30: 36}[size]
        length = (raw[12] + 1) * 4
        raw[12 + length - 4 : 12 + length] = zlib.crc32(raw[12 : 12 + length - 4]).to_bytes(4, "little")
        if taken:
            assert again(xz(tmp_path / "a.xz", bytes(raw)), "xz") == b"x" * 1000
        else:
            with pytest.raises(Unsupported, match="takes more than 128"):
                again(xz(tmp_path / "a.xz", bytes(raw)), "xz")


def test_parts_put_together(tmp_path: Path) -> None:
    content = CONTENTS["chunks"]
    (tmp_path / "whole").write_bytes(content)
    with opened(tmp_path / "whole") as reader, tempfile.TemporaryFile() as space:
        cuts = [0, 1, 700_000, 700_000, 5 * MIB, len(content)]
        parts = [reader.window(start, end - start) for start, end in itertools.pairwise(cuts)]
        assert unwrap.join(parts, space, 1 << 30, 1 << 30, lambda done: None) == len(content)
        space.seek(0)
        assert space.read() == content
        with pytest.raises(Unsupported, match="the parts make more than 1"):
            unwrap.join(parts, space, MIB, 1 << 30, lambda done: None)


WRAPPED = [
    spec("vhd", "bz2"),
    {**spec("raw"), "file": "raw.raw.bz2", "compress": "bz2"},
    {**spec("qcow2-plain", "bz2"), "options": {"compression": "none", "whole": True}},
    spec("vhdx", "bz2"),
]


def streams(packed: bytes) -> list[bytes]:
    """The streams of a bz2 one by one."""
    found = []
    while packed:
        reader = bz2.BZ2Decompressor()
        reader.decompress(packed)
        found.append(packed[: len(packed) - len(reader.unused_data)])
        packed = reader.unused_data
    return found


def test_files_share_the_streams_of_a_disk(tmp_path: Path) -> None:
    """The same bytes alone and together, on any number of threads; what differs lies between the pieces."""
    disk = usual(tmp_path / "disk.img", 24 * MIB)
    ask(disk, tmp_path / "all", WRAPPED, threads=3)
    ask(disk, tmp_path / "back", list(reversed(WRAPPED)), threads=1)
    held = []
    for row in WRAPPED:
        ask(disk, tmp_path / "alone", [row])
        wanted = (tmp_path / "alone" / row["file"]).read_bytes()
        assert (tmp_path / "all" / row["file"]).read_bytes() == wanted, row["file"]
        assert (tmp_path / "back" / row["file"]).read_bytes() == wanted, row["file"]
        held.append({*streams(wanted)})
    shared = set.intersection(*held)
    assert len(shared) > 6
    for each in held:
        assert sum(map(len, each - shared)) < sum(map(len, shared)) // 20
    assert bz2.decompress((tmp_path / "all/raw.raw.bz2").read_bytes()) == disk.read_bytes()


@pytest.mark.parametrize("what", ["packed", "content"])
def test_a_stream_that_spoils_on_its_way_gets_no_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(outer.Origin, what)
    told: list[bytes] = []

    def spoilt(origin: outer.Origin) -> bytes:
        data = bytearray(right(origin))
        told.append(bytes(data))
        if len(told) == 3:
            data[len(data) // 2] ^= 1
        return bytes(data)

    monkeypatch.setattr(outer.Origin, what, spoilt)
    disk = usual(tmp_path / "disk.img", 24 * MIB)
    with pytest.raises(Failure, match="differs from the raw disk"):
        ask(disk, tmp_path / "out", WRAPPED[:2])
    assert not list((tmp_path / "out").glob("[!.]*"))
    assert not list((tmp_path / "out").glob(".*"))
