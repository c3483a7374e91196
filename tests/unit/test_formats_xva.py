"""XVA: exports as XenServer makes them, written by Python's tarfile, and some that no host would import."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.events import Failure
from build.agent.verbs import inspect
from build.formats import recognize, xva
from build.formats.lib.findings import Code, Damaged, collect
from build.formats.lib.pieces import sha256
from build.formats.lib.reader import BoundedReader
from build.formats.lib.tar import member_header
from tests.disks import MIB, ask, chunk, content, damaged, opened, usual

Chunks = Sequence[tuple[str, bytes]]


def value(content: object) -> str:
    """An XML-RPC value."""
    if isinstance(content, Mapping):
        rows = (f"<member><name>{name}</name>{value(row)}</member>" for name, row in content.items())
        return f"<value><struct>{''.join(rows)}</struct></value>"
    if isinstance(content, Sequence) and not isinstance(content, str):
        return f"<value><array><data>{''.join(map(value, content))}</data></array></value>"
    if isinstance(content, bool):
        return f"<value><boolean>{int(content)}</boolean></value>"
    return f"<value>{content}</value>"


def described(sizes: Mapping[str, object], devices: Mapping[str, int] | None = None) -> bytes:
    """An ova.xml with one VM, its disks by reference, an installer's ISO and an empty drive."""
    objects: list[dict[str, object]] = [
        {"class": "VM", "id": "Ref:0", "snapshot": {"name_label": "router", "is_a_snapshot": False}},
        {"class": "SR", "id": "Ref:1", "snapshot": {"content_type": "iso"}},
        {"class": "SR", "id": "Ref:2", "snapshot": {"content_type": "user", "VDIs": []}},
        {"class": "VDI", "id": "Ref:900", "snapshot": {"SR": "Ref:1", "virtual_size": "400000000"}},
        {"class": "VBD", "id": "Ref:901", "snapshot": {"type": "CD", "VDI": "Ref:900", "userdevice": "3"}},
        {"class": "VBD", "id": "Ref:902", "snapshot": {"type": "Disk", "VDI": "Ref:900", "userdevice": "9"}},
        {"class": "VBD", "id": "Ref:903", "snapshot": {"type": "CD", "VDI": "OpaqueRef:NULL"}},
    ]
    for row, (reference, size) in enumerate(sizes.items()):
        device = devices[reference] if devices else row
        objects += [
            {
                "class": "VDI",
                "id": reference,
                "snapshot": {"name_label": f"disk {row}", "virtual_size": str(size), "SR": "Ref:2"},
            },
            {
                "class": "VBD",
                "id": f"Ref:8{row}",
                "snapshot": {"type": "Disk", "VDI": reference, "userdevice": str(device)},
            },
        ]
    version = {"product_brand": "XCP-ng", "product_version": "8.2.1", "export_vsn": "2"}
    text = value({"version": version, "objects": objects})
    return f"<?xml version='1.0'?>\n{text}".encode()


def chunks(reference: str, disk: bytes, sums: str = ".checksum") -> Chunks:
    """What XenServer writes of a disk: chunks that are not zero, the first and the last in any case."""
    files = []
    last = (len(disk) - 1) // MIB
    for number in range(last + 1):
        data = disk[number * MIB : (number + 1) * MIB]
        if any(data) or number in (0, last):
            files += [(f"{reference}/{number:08d}", data), summed(f"{reference}/{number:08d}", data, sums)]
    return files


def summed(name: str, data: bytes, sums: str = ".checksum") -> tuple[str, bytes]:
    return name + sums, hashlib.sha1(
        data
    ).hexdigest().encode() if sums == ".checksum" else b"0123456789ABCDEF"


def export(path: Path, description: bytes, files: Chunks) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in [("ova.xml", description), *files]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def look(path: Path, **more: Any) -> dict[str, Any]:
    request = wire.Inspect(str(path), str(path.parent), **more)
    told: dict[str, Any] = wire.dump(inspect.run(request, lambda kind, **fields: None))
    return told


def codes(path: Path, severity: str = "error") -> list[str]:
    return [finding["code"] for finding in look(path)["findings"] if finding["severity"] == severity]


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    return usual(tmp_path / "disk.img", 12 * MIB).read_bytes()


@pytest.mark.parametrize("sums", [".checksum", ".xxhash"])
def test_an_export(sums: str, disk: bytes, tmp_path: Path) -> None:
    path = export(tmp_path / "vm.xva", described({"Ref:5": len(disk)}), chunks("Ref:5", disk, sums))
    told = look(path, content=True)
    assert told["findings"] == []
    assert (told["format"], told["outer"], told["virtual_size"]) == ("xva", "", len(disk))
    assert told["guest_sha256"] == hashlib.sha256(disk).hexdigest()
    assert told["facts"]["exported by"] == "XCP-ng 8.2.1"
    assert told["facts"]["VM"] == "router"
    assert told["facts"]["disk 1"] == f"Ref:5 (disk 0) (raw, {len(disk)} bytes)"
    assert ("not checked here" in told["facts"]["sums"]) == (sums == ".xxhash")


@pytest.mark.parametrize("size", [1, 512, MIB - 512, MIB, MIB + 512, 2 * MIB, 5 * MIB - 1, 7 * MIB])
def test_disks_of_any_size(size: int, tmp_path: Path) -> None:
    data = chunk("noise", size, size)
    with opened(export(tmp_path / "a.xva", described({"Ref:5": size}), chunks("Ref:5", data))) as reader:
        assert collect(xva.lint(reader)) == []
        assert content(xva.read(reader)) == data


def test_several_disks_in_the_order_of_their_devices(disk: bytes, tmp_path: Path) -> None:
    """The archive has them in the order of their names as text: Ref:10 before Ref:9."""
    data = chunk("text", 3 * MIB, 9)
    description = described({"Ref:9": len(data), "Ref:10": len(disk)}, {"Ref:9": 1, "Ref:10": 0})
    path = export(tmp_path / "vm.xva", description, [*chunks("Ref:10", disk), *chunks("Ref:9", data)])
    assert codes(path) == []
    for number, wanted in ((1, disk), (2, data)):
        told = look(path, disk=number, content=True)
        assert told["virtual_size"] == len(wanted)
        assert told["guest_sha256"] == hashlib.sha256(wanted).hexdigest()
        assert told["facts"]["hashed"] == f"disk {number}"
        assert told["facts"]["disk 2"].startswith("Ref:9 (disk 0)")


def test_a_chunk_of_no_bytes_moves_those_behind_it(tmp_path: Path) -> None:
    """XenServer writes one to keep a connection alive, and counts on with the chunk that it stands for."""
    data = chunk("noise", 3 * MIB, 1)
    names = ["Ref:5/00000000", "Ref:5/00000001", "Ref:5/00000002", "Ref:5/00000003"]
    parts = [data[:MIB], b"", data[MIB : 2 * MIB], data[2 * MIB :]]
    files = [
        row for name, part in zip(names, parts, strict=True) for row in ((name, part), summed(name, part))
    ]
    with opened(export(tmp_path / "a.xva", described({"Ref:5": len(data)}), files)) as reader:
        assert collect(xva.lint(reader)) == []
        assert content(xva.read(reader)) == data


def test_a_last_chunk_filled_up_to_a_mib(tmp_path: Path) -> None:
    data = chunk("noise", MIB + 512, 1)
    files = [*chunks("Ref:5", data[:MIB]), *chunks("Ref:5", data.ljust(2 * MIB, b"\0"))[2:]]
    with opened(export(tmp_path / "a.xva", described({"Ref:5": len(data)}), files)) as reader:
        assert collect(xva.lint(reader)) == []
        assert content(xva.read(reader)) == data


def test_a_changed_chunk_is_found_by_its_sum(disk: bytes, tmp_path: Path) -> None:
    files = list(chunks("Ref:5", disk))
    files[0] = (files[0][0], files[0][1][:-1] + b"!")
    path = export(tmp_path / "vm.xva", described({"Ref:5": len(disk)}), files)
    found = look(path, content=True)
    assert [finding["code"] for finding in found["findings"]] == [xva.OTHER_SUM.id]
    assert found["findings"][0]["fields"] == {"number": 0, "named": "Ref:5 (disk 0)"}
    assert found["guest_sha256"] is None


GOOD = chunk("noise", 2 * MIB + 512, 1)
FIRST, FIRST_SUM, SECOND, SECOND_SUM, THIRD, THIRD_SUM = chunks("Ref:5", GOOD)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([FIRST, FIRST_SUM, SECOND, SECOND_SUM], xva.CUT_OFF),
        ([], xva.CUT_OFF),
        ([FIRST, SECOND, SECOND_SUM, THIRD, THIRD_SUM], xva.NO_SUM),
        ([FIRST, FIRST_SUM, THIRD], xva.NO_SUM),
        ([FIRST, FIRST_SUM, FIRST_SUM, THIRD, THIRD_SUM], xva.LOST_SUM),
        ([SECOND, SECOND_SUM, FIRST, FIRST_SUM, THIRD, THIRD_SUM], xva.NOT_RISING),
        ([FIRST, FIRST_SUM, FIRST, FIRST_SUM, THIRD, THIRD_SUM], xva.NOT_RISING),
        ([(FIRST[0], FIRST[1][:-512]), FIRST_SUM, THIRD, THIRD_SUM], xva.OTHER_LENGTH),
        ([(FIRST[0], FIRST[1] + b"x"), FIRST_SUM, THIRD, THIRD_SUM], xva.OTHER_LENGTH),
        ([FIRST, FIRST_SUM, (THIRD[0], b"x" * 511), THIRD_SUM], xva.OTHER_LENGTH),
        ([FIRST, FIRST_SUM, ("Ref:5/00000003", b"x" * MIB)], xva.BEYOND),
        ([FIRST, FIRST_SUM, ("Ref:5/9999999999", b"x" * MIB)], xva.BEYOND),
        ([("folder", b""), FIRST, FIRST_SUM, THIRD, THIRD_SUM], xva.OTHER_MEMBER),
        ([FIRST, FIRST_SUM, THIRD, THIRD_SUM, *chunks("Ref:7", GOOD)], xva.UNKNOWN_DISK),
        ([*chunks("Ref:7", GOOD), FIRST, FIRST_SUM, THIRD, THIRD_SUM], xva.ORDER),
        ([FIRST, FIRST_SUM, *chunks("Ref:7", GOOD), THIRD, THIRD_SUM], xva.SCATTERED),
    ],
)
def test_what_no_host_would_import(files: Chunks, says: Code, tmp_path: Path) -> None:
    path = export(tmp_path / "vm.xva", described({"Ref:5": len(GOOD)}), files)
    assert codes(path).count(says.id) == 1, codes(path)


def test_a_disk_without_its_end_is_not_read_as_if_it_were_zeros(tmp_path: Path) -> None:
    path = export(tmp_path / "vm.xva", described({"Ref:5": len(GOOD)}), [FIRST, FIRST_SUM])
    with opened(path) as reader:
        read = xva.read(reader)
        assert read.piece(0) == GOOD[:MIB] + bytes(MIB)
        with damaged(xva.CUT_OFF):
            read.piece(1)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        (b"<appliance version='0.1'/>", xva.OLD_FORM),
        (b"text", xva.UNREADABLE),
        (b"<!DOCTYPE x><value/>", xva.UNREADABLE),
        (b"<value/>", xva.NO_ROWS),
        (b"<value><struct><member/><member><name>objects</name></member></struct></value>", xva.NO_ROWS),
        (
            b"<value><struct><member><name>objects</name><value>x</value></member></struct></value>",
            xva.NO_ROWS,
        ),
        (value({"objects": ["x", {}, {"class": "VDI"}]}).encode(), xva.NO_DISK),
        (described({"Ref:5": "many"}), xva.BAD_SIZE),
        (described({"Ref:5": -1}), xva.BAD_SIZE),
        (described({"Ref:5": (1 << 63) - 1}), xva.LARGE_DISKS),
        (described({f"Ref:{row}": 9 << 40 for row in (5, 6)}), xva.LARGE_DISKS),
        (b" " * (17 << 20), xva.LARGE),
    ],
)
def test_descriptions_that_lie(description: bytes, says: Code, tmp_path: Path) -> None:
    path = export(tmp_path / "vm.xva", description, [])
    assert says.id in codes(path), codes(path)
    with opened(path) as reader, pytest.raises(Damaged):
        xva.read(reader)


def test_an_export_that_is_cut_off_anywhere(disk: bytes, tmp_path: Path) -> None:
    path = export(tmp_path / "vm.xva", described({"Ref:5": len(disk)}), chunks("Ref:5", disk))
    whole = path.read_bytes().rstrip(b"\0")
    for keep in (512, 1000, 4096, len(whole) // 3, len(whole) - 1000):
        path.write_bytes(whole[:keep])
        assert codes(path), keep


def test_a_tar_of_something_else_is_none(tmp_path: Path) -> None:
    path = export(tmp_path / "a.tar", b"<x/>", [])
    with opened(path) as reader:
        assert recognize(reader).name == "xva"
    path.write_bytes(b"ova.xml".ljust(1024, b"\0"))
    with opened(path) as reader:
        assert recognize(reader).name == "raw"


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("export")
    yield fd
    os.close(fd)


def test_a_disk_of_16_tib_and_very_many_chunks(memory: int) -> None:
    """The table of the disk is all that is kept, 8 bytes a chunk; sums and names are not."""
    size, count = 16 << 40, 5000
    description = described({"Ref:5": size})
    offset = 0
    for name, data in [("ova.xml", description)]:
        os.pwrite(memory, member_header(name, len(data), 0) + data, offset)
        offset += 512 + -(-len(data) // 512) * 512
    numbers = [*range(0, count * 3, 3), (16 << 20) - 1]
    for number in numbers:
        os.pwrite(memory, member_header(f"Ref:5/{number:08d}", MIB, 0), offset)
        sum_at = offset + 512 + MIB
        os.pwrite(memory, member_header(f"Ref:5/{number:08d}.xxhash", 16, 0) + b"0" * 16, sum_at)
        offset = sum_at + 1024
    os.ftruncate(memory, offset + 1024)
    tracemalloc.start()
    try:
        reader = BoundedReader.whole(memory)
        found = xva.Export(reader)
        assert found.findings == {}
        assert (found.disks[0].size, found.disks[0].last) == (size, MIB)
        assert tracemalloc.get_traced_memory()[1] < 140 * MIB
    finally:
        tracemalloc.stop()


def test_reading_by_pieces_is_reading_all(disk: bytes, tmp_path: Path) -> None:
    path = export(tmp_path / "vm.xva", described({"Ref:5": len(disk)}), chunks("Ref:5", disk))
    with opened(path) as reader:
        read = xva.read(reader)
        assert sha256(read) == hashlib.sha256(disk).hexdigest()
        assert read.piece(1) is None  # it holds no chunk of it
        assert read.facts()["VM"] == "router"


def test_a_disk_that_is_whole_is_converted_beside_one_that_is_cut_off(tmp_path: Path) -> None:
    path = export(
        tmp_path / "vm.xva",
        described({"Ref:5": len(GOOD), "Ref:6": len(GOOD)}),
        [*chunks("Ref:5", GOOD), *chunks("Ref:6", GOOD)[:-2]],
    )
    rows = [{"name": "raw", "kind": "raw", "file": "x.raw"}]
    ask(path, tmp_path / "out", rows, foreign=True)
    assert (tmp_path / "out/x.raw").read_bytes() == GOOD
    with pytest.raises(Failure) as failure:
        ask(path, tmp_path / "second", rows, foreign=True, disk=2)
    assert failure.value.details["code"] == xva.CUT_OFF.id
    (cut,) = (finding for finding in look(path)["findings"] if finding["lossy"])
    assert (cut["code"], cut["disk"]) == (xva.CUT_OFF.id, 2)
