"""Tar archives of every form as Python's tarfile makes them, and headers that lie."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.formats.lib import tar
from build.formats.lib.findings import Code, Damaged
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import BLOCK, Archive, member_header, number
from tests.disks import EPOCH, MIB, chunk, opened, patch

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "folder/" * 20 + "a-disk-with-a-very-long-name.vmdk"


@pytest.fixture
def memory() -> Iterator[int]:
    """A file in memory, which may be as large as no disk."""
    fd = os.memfd_create("archive")
    yield fd
    os.close(fd)


def made(path: Path, form: int, files: dict[str, bytes], mtime: float = 0, uid: int = 0) -> Path:
    """An archive by Python's tarfile."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.uid = len(data), mtime, uid
            archive.addfile(entry, io.BytesIO(data))
    return path


def listed(path: Path) -> dict[str, bytes]:
    """What our reader finds."""
    with opened(path) as reader:
        archive = Archive(reader)
        assert archive.findings == []
        return {member.name: archive.window(member).read(0, member.size) for member in archive.members}


def form(path: Path) -> str:
    with opened(path) as reader:
        return Archive(reader).form


def signed(head: bytes) -> bytes:
    """A header with its checksum made right."""
    blank = head[:148] + b" " * 8 + head[156:]
    return head[:148] + b"%06o\0 " % sum(blank) + head[156:]


def header(name: str = "a", size: int = 0, **fields: tuple[int, bytes]) -> bytes:
    """A ustar header with some fields written over."""
    head = bytearray(member_header(name, size, EPOCH))
    for at, value in fields.values():
        head[at : at + len(value)] = value
    return signed(bytes(head))


def broken(path: Path, *blocks: bytes) -> Code:
    """What the reader says of an archive that it cannot follow."""
    path.write_bytes(b"".join(blocks))
    with opened(path) as reader, pytest.raises(Damaged) as error:
        Archive(reader)
    return error.value.finding.code


@pytest.mark.parametrize("name", FORMS)
def test_every_form_that_tarfile_writes(name: str, tmp_path: Path) -> None:
    files = {"a.ovf": b"<x/>", "empty": b"", "b.vmdk": chunk("noise", 70_000, 1), LONG: b"long"}
    path = made(tmp_path / "a.tar", FORMS[name], files, mtime=EPOCH + 0.25)
    assert listed(path) == files
    assert form(path) == name


def test_names_that_are_not_ascii_and_owners_that_are_large(tmp_path: Path) -> None:
    for name, kind in FORMS.items():
        files = {"für-größe-" + "ä" * 20 + ".raw": b"x"}
        path = made(tmp_path / f"{name}.tar", kind, files, uid=0 if name == "ustar" else 3_000_000)
        assert listed(path) == files
        with opened(path) as reader:
            assert Archive(reader).members[0].owner == (0 if name == "ustar" else 3_000_000, 0)


@pytest.mark.parametrize("name", ["gnu", "pax"])
def test_a_file_of_more_than_8_gib(name: str, tmp_path: Path, memory: int) -> None:
    """The size is in base 256 or in a pax record; the next file is found behind it."""
    size = (9 << 30) + 5
    entry = tarfile.TarInfo("disk.vmdk")
    entry.size = size
    head = entry.tobuf(tarfile.GNU_FORMAT if name == "gnu" else tarfile.PAX_FORMAT)
    os.pwrite(memory, head, 0)
    os.pwrite(memory, b"end", len(head) + size - 3)
    after = len(head) + -(-size // BLOCK) * BLOCK
    os.pwrite(memory, member_header("b", 3, 0) + b"abc", after)
    os.ftruncate(memory, after + 2 * BLOCK + 1024)
    archive = Archive(BoundedReader.whole(memory))
    assert [(member.name, member.size) for member in archive.members] == [("disk.vmdk", size), ("b", 3)]
    assert archive.window(archive.members[0]).read(size - 3, 3) == b"end"
    assert archive.form == name
    assert archive.findings == []


def test_a_header_for_more_than_8_gib_is_read_by_tarfile(tmp_path: Path) -> None:
    size = (8 << 30) + 1
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(member_header("disk.vmdk", size, EPOCH))
        file.truncate(BLOCK + (size // BLOCK + 1) * BLOCK + 1024)
    with tarfile.open(tmp_path / "a.tar") as archive:
        (entry,) = archive.getmembers()
        assert (entry.name, entry.size, entry.mtime, entry.uid) == ("disk.vmdk", size, EPOCH, 0)
    with opened(tmp_path / "a.tar") as reader:
        assert Archive(reader).members[0].size == size
        assert Archive(reader).form == "gnu"
    assert b"ustar\x0000" in member_header("disk.vmdk", size - 2, EPOCH)


def test_folders_links_and_global_headers(tmp_path: Path) -> None:
    """A global pax header with a comment, as git archive makes it; a link says a size and has no content."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 40}) as archive:
        folder, link, file = (tarfile.TarInfo(name) for name in ("folder", "link", "folder/disk"))
        folder.type, link.type, link.linkname, link.size = tarfile.DIRTYPE, tarfile.LNKTYPE, "a", 4096
        for entry in (folder, link):
            archive.addfile(entry)
        file.size = 3
        archive.addfile(file, io.BytesIO(b"abc"))
    with opened(path) as reader:
        archive_read = Archive(reader)
        kinds = [(member.name.rstrip("/"), member.kind, member.size) for member in archive_read.members]
    assert kinds == [("folder", "5", 0), ("link", "1", 0), ("folder/disk", "0", 3)]
    assert form(path) == "pax"


def test_an_archive_that_is_cut_off(tmp_path: Path) -> None:
    path = made(tmp_path / "a.tar", tarfile.USTAR_FORMAT, {"a": b"abc"})
    path.write_bytes(path.read_bytes()[:1024])
    with opened(path) as reader:
        assert [finding.code for finding in Archive(reader).findings] == [tar.NO_END]


LENGTH = 124
END = bytes(1024)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        pytest.param((header(size=(1 << 33) - 1), END), tar.CUT_MEMBER, id="octal"),
        pytest.param(
            (header(size_=(LENGTH, b"\x80\0\0\0" + (1 << 63).to_bytes(8, "big"))), END),
            tar.CUT_MEMBER,
            id="2^63",
        ),
        pytest.param((header(size_=(LENGTH, b"\xff" * 12)), END), tar.NEGATIVE, id="negative"),
        pytest.param((header(size_=(LENGTH, b"12345678 9  ")), END), tar.BAD_NUMBER, id="blank"),
        pytest.param(
            (header("././@LongLink", 513, kind=(156, b"L")), b"x" * 1024) * 20,
            tar.NO_FILE,
            id="names of names",
        ),
        pytest.param(
            (header("././@LongLink", 2 << 20, kind=(156, b"L")), bytes(3 << 20)),
            tar.LONG_EXTENSION,
            id="a name of 2 MiB",
        ),
        pytest.param(
            (
                header("x", 18, kind=(156, b"x")),
                b"18 size=999999999\n".ljust(512, b"\0"),
                header("a", 5),
                END,
            ),
            tar.CUT_MEMBER,
            id="pax size",
        ),
        pytest.param(
            (
                header("x", 10, kind=(156, b"x")),
                b"10 size=5\n".ljust(512, b"\0"),
                header("a", 900),
                b"x" * 2048,
            ),
            tar.CHECKSUM,
            id="pax size too small",
        ),
        pytest.param(
            (header("x", 11, kind=(156, b"x")), b"11 size=-5\n".ljust(512, b"\0"), header("a"), END),
            tar.BAD_PAX_NUMBER,
            id="pax size negative",
        ),
        pytest.param(
            (header("x", 12, kind=(156, b"x")), b"99999 a=b\nxx".ljust(512, b"\0"), header("a"), END),
            tar.BAD_RECORD,
            id="pax length",
        ),
        pytest.param(
            (header("x", 12, kind=(156, b"x")), b"0 a=b\nxxxxxx".ljust(512, b"\0"), header("a"), END),
            tar.BAD_RECORD,
            id="pax length of zero",
        ),
        pytest.param((header()[:-1] + b"x", END), tar.CHECKSUM, id="checksum"),
        pytest.param(
            (header("././@LongLink", 5000, kind=(156, b"L")), b"x" * 5120, header("a"), END),
            tar.LONG_NAME,
            id="name",
        ),
        pytest.param(
            (header(kind=(156, b"S"), real=(483, b"\x80\0\0\0\x40" + bytes(7))), END),
            tar.LARGE_SPARSE,
            id="sparse size",
        ),
        pytest.param(
            (header(kind=(156, b"S"), more=(482, b"\1")), (b"1" * 504 + b"\1" + bytes(7)) * 60_000),
            tar.MANY_PARTS,
            id="a map without end",
        ),
    ],
)
def test_headers_that_lie(blocks: tuple[bytes, ...], says: Code, tmp_path: Path) -> None:
    assert broken(tmp_path / "a.tar", *blocks) == says


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        (((0, 512), (256, 512)), 1 << 20),
        (((512, 512), (0, 512)), 1 << 20),
        (((0, 513),), 512),
        (((1 << 32, 512),), 1 << 20),
        (((0, 1 << 20),), 1 << 21),
    ],
)
def test_maps_of_sparse_files_that_lie(
    entries: tuple[tuple[int, int], ...], size: int, tmp_path: Path
) -> None:
    table = b"".join(b"%011o\0%011o\0" % entry for entry in entries)
    head = header("disk.raw", 1024, kind=(156, b"S"), map=(386, table), real=(483, b"%011o\0" % size))
    (tmp_path / "a.tar").write_bytes(head + b"x" * 1024 + END)
    with opened(tmp_path / "a.tar") as reader:
        archive = Archive(reader)
        with pytest.raises(Damaged):
            archive.inner(archive.members[0])


def test_more_files_than_any_archive_of_ours(tmp_path: Path) -> None:
    code = broken(tmp_path / "a.tar", *(header(f"f{row}") for row in range(1002)), END)
    assert code == tar.MANY_MEMBERS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"\x80" + bytes(10) + b"\5", 5),
        (b"\x80\0\0\0" + b"\x80" + bytes(7), 1 << 63),
        (b"\xff" * 12, -1),
        (b"\xff\xff\xff\xff\xff\xfe\xee\x90", -70_000),
        (b"00000000017\0", 15),
        (b"     17 ", 15),
    ],
)
def test_numbers_in_octal_and_in_base_256(field: bytes, value: int) -> None:
    assert number(field) == value


def test_an_old_sum_of_signed_bytes(tmp_path: Path) -> None:
    head = bytearray(header("größe"))
    blank = bytes(head[:148]) + b" " * 8 + bytes(head[156:])
    head[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in blank)
    (tmp_path / "a.tar").write_bytes(bytes(head) + END)
    assert list(listed(tmp_path / "a.tar")) == ["größe"]


def test_a_walk_keeps_nothing(memory: int) -> None:
    """An export of a large disk has hundreds of thousands of members."""
    block = header("Ref:1/00000000") * 1000
    for row in range(20):
        os.pwrite(memory, block, row * len(block))
    os.ftruncate(memory, 20 * len(block) + 1024)
    tracemalloc.start()
    try:
        assert sum(1 for _ in tar.Walk(BoundedReader.whole(memory))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_the_archive_of_a_member_changed_on_the_way(tmp_path: Path) -> None:
    path = made(tmp_path / "a.tar", tarfile.GNU_FORMAT, {LONG: b"x" * 2000})
    patch(path, 3, b"!")
    assert broken(tmp_path / "b.tar", path.read_bytes()) == tar.CHECKSUM
