"""Disks inside of other files: compressions and archives around each other, and several disks in one."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent import image
from build.agent.events import Failure
from build.agent.guest import media
from build.agent.verbs import inspect
from build.formats import vmdk
from build.formats.lib import manifest, partitions, pieces
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import NOT_LOOKED_INTO
from build.formats.lib.inner import NOT_EXPANDED, Inner
from tests.disks import MIB, ask, chunk, content, damaged, make, one, opened, patch, read, spec, usual
from tests.unit.test_formats_tar import END, header
from tests.unit.test_formats_xva import chunks, described, export


def look(path: Path, **more: Any) -> dict[str, Any]:
    request = wire.Inspect(str(path), str(path.parent), **more)
    told: dict[str, Any] = wire.dump(inspect.run(request, lambda kind, **fields: None))
    return told


def codes(told: Mapping[str, Any], severity: str = "error") -> list[str]:
    return [finding["code"] for finding in told["findings"] if finding["severity"] == severity]


def silent(kind: str, **fields: Any) -> None:
    """No word of progress."""


def seen(path: Path, **more: Any) -> tuple[str, str, str, bytes]:
    """Layers, archive, kind and content of the disk that opens."""
    with image.opened_file(path) as fd, image.opened(fd, path.name, silent, **more) as found:
        holder = found.holder.kind.name if found.holder else ""
        return found.outer, holder, found.kind.name, content(found.kind.read(found.reader))


def packed(files: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return made.getvalue()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return usual(tmp_path_factory.mktemp("disk") / "disk.img", 8 * MIB)


@pytest.fixture(scope="module")
def made(disk: Path) -> dict[str, bytes]:
    """The disk in several formats."""
    ask(disk, disk.parent, [spec(name) for name in ("vmdk", "qcow2", "vhd", "ova")])
    return {name: (disk.parent / f"{name}.{name}").read_bytes() for name in ("vmdk", "qcow2", "vhd", "ova")}


README = b"A disk of somebody's.\n"


@pytest.mark.parametrize(
    ("name", "kind", "outer"),
    [
        ("disk.tar.gz", "raw", "gz+tar"),
        ("disk.tgz", "raw", "gz+tar"),
        ("disk.tar.xz", "raw", "xz+tar"),
        ("disk.tar.bz2", "qcow2", "bz2+tar"),
        ("disk.tar", "vhd", "tar"),
        ("disk.vmdk.gz.zip", "vmdk", "zip+gz"),
        ("disk.qcow2.xz", "qcow2", "xz"),
        ("disk.vhd.zip.tar.xz", "vhd", "xz+tar+zip"),
    ],
)
def test_what_lies_in_each_other(
    name: str, kind: str, outer: str, disk: Path, made: dict[str, bytes], tmp_path: Path
) -> None:
    makers = {
        "gz": lambda data: gzip.compress(data, 1),
        "xz": lambda data: lzma.compress(data, preset=0),
        "bz2": lambda data: bz2.compress(data, 1),
        "zip": lambda data: zipped("folder/inside", data),
        "tar": lambda data: packed({"README": README, "folder/disk.raw": data, "SHA256SUMS": README}),
    }
    data = disk.read_bytes() if kind == "raw" else made[kind]
    for layer in reversed(outer.split("+")):
        data = makers[layer](data)
    (tmp_path / name).write_bytes(data)
    assert seen(tmp_path / name) == (outer, "", kind, disk.read_bytes())
    told = look(tmp_path / name, content=True)
    assert (told["format"], told["outer"], told["virtual_size"]) == (kind, outer, 8 * MIB)
    assert told["guest_sha256"] == hashlib.sha256(disk.read_bytes()).hexdigest()
    assert codes(told) == []


def test_four_layers_are_too_many(disk: Path, tmp_path: Path) -> None:
    data = disk.read_bytes()
    for row in range(4):
        data = gzip.compress(data, 1)
        (tmp_path / f"{row}.gz").write_bytes(data)
    assert seen(tmp_path / "2.gz")[0] == "gz+gz+gz"
    with pytest.raises(Unsupported, match="more than 3 compressions"):
        look(tmp_path / "3.gz")


def test_a_tar_of_several_disks(disk: Path, made: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "two.tar").write_bytes(packed({"a.qcow2": made["qcow2"], "b.vhd": made["vhd"]}))
    with pytest.raises(Unsupported, match=r"holds 2 disk images: a\.qcow2, b\.vhd"):
        look(tmp_path / "two.tar")


def test_a_tar_of_no_disk(tmp_path: Path) -> None:
    (tmp_path / "none.tar").write_bytes(packed({"README": README, "empty.img": b""}))
    assert look(tmp_path / "none.tar")["outer"] == ""
    assert codes(look(tmp_path / "none.tar"))


def test_a_raw_disk_that_a_tar_holds_without_its_holes(tmp_path: Path) -> None:
    """GNU tar's map: four parts in the header, more in the blocks behind it."""
    parts = {place * MIB: chunk("noise", 700 + place, place) for place in (0, 1, 2, 3, 5, 7)}
    rows = [b"%011o\0%011o\0" % (place, len(data)) for place, data in parts.items()]
    stored = b"".join(parts.values())
    size = 8 * MIB + 512
    head = header(
        "folder/disk.raw",
        len(stored),
        kind=(156, b"S"),
        rows=(386, b"".join(rows[:4])),
        more=(482, b"\1"),
        size_=(483, b"%011o\0" % size),
    )
    more = b"".join(rows[4:]).ljust(512, b"\0")
    body = stored.ljust(-(-len(stored) // 512) * 512, b"\0")
    (tmp_path / "a.tar").write_bytes(head + more + body + END)
    wanted = bytearray(size)
    for place, data in parts.items():
        wanted[place : place + len(data)] = data
    assert seen(tmp_path / "a.tar") == ("tar", "", "raw", bytes(wanted))
    told = look(tmp_path / "a.tar", content=True)
    assert told["guest_sha256"] == hashlib.sha256(wanted).hexdigest()


@pytest.mark.parametrize("pack", ["", "gz", "xz"])
def test_an_export_of_two_disks(pack: str, disk: Path, tmp_path: Path) -> None:
    """As `xe vm-export compress=true` writes it: packed, under a name that does not say so."""
    second = chunk("text", 3 * MIB, 9)
    first = disk.read_bytes()
    path = export(
        tmp_path / "vm.xva",
        described({"Ref:5": len(first), "Ref:6": len(second)}),
        [*chunks("Ref:5", first), *chunks("Ref:6", second)],
    )
    if pack:
        packer = gzip.compress if pack == "gz" else lzma.compress
        path.write_bytes(packer(path.read_bytes()))
    assert seen(path) == (pack, "xva", "raw", first)
    assert seen(path, disk=2) == (pack, "xva", "raw", second)
    told = look(path, disk=2, content=True)
    assert (told["format"], told["outer"]) == ("xva", pack)
    assert told["guest_sha256"] == hashlib.sha256(second).hexdigest()
    with image.opened_file(path) as fd, image.opened(fd, path.name, silent, disk=2) as found:
        assert found.number == 2
        assert found.name == "Ref:6 (disk 1)"
        assert found.described == " inside ".join(filter(None, ("raw", "xva", pack)))


def ova(path: Path, files: Mapping[str, bytes], disks: Mapping[str, str]) -> Path:
    """An OVA whose descriptor names files by reference, with attributes of each."""
    names = list(disks)
    references = "".join(
        f'<File ovf:href="{name}" ovf:id="f{row}" {disks[name]}/>' for row, name in enumerate(names)
    )
    rows = "".join(
        f'<Disk ovf:capacity="1" ovf:diskId="d{row}" ovf:fileRef="f{row}"/>' for row in range(len(names))
    )
    text = (
        '<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" '
        'xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">'
        f"<References>{references}</References><DiskSection>{rows}</DiskSection></Envelope>"
    )
    path.write_bytes(packed({"vm.ovf": text.encode(), **files}, tarfile.USTAR_FORMAT))
    return path


def test_disks_of_an_ova_that_do_not_lie_there_whole(
    disk: Path, made: dict[str, bytes], tmp_path: Path
) -> None:
    vmdk, step = made["vmdk"], 200_000
    parts = {
        f"b.vmdk.{row:09d}": vmdk[place : place + step] for row, place in enumerate(range(0, len(vmdk), step))
    }
    other = one(make(tmp_path / "other.img", 4 * MIB, [(MIB, 5000, "text")]), tmp_path, "vmdk").read_bytes()
    path = ova(
        tmp_path / "vm.ova",
        {"a.vmdk": other, **parts, "c.vmdk.gz": gzip.compress(vmdk)},
        {
            "a.vmdk": f'ovf:size="{len(other)}"',
            "b.vmdk": f'ovf:size="{len(vmdk)}" ovf:chunkSize="{step}"',
            "c.vmdk.gz": 'ovf:compression="gzip"',
        },
    )
    assert seen(path) == ("", "ova", "vmdk", (tmp_path / "other.img").read_bytes())
    assert seen(path, disk=2) == ("", "ova", "vmdk", disk.read_bytes())
    assert seen(path, disk=3)[1:] == ("ova", "vmdk", disk.read_bytes())
    for number, size in ((1, 4 * MIB), (2, 8 * MIB), (3, 8 * MIB)):
        told = look(path, disk=number, content=True)
        assert (told["format"], told["virtual_size"]) == ("ova", size)
        wanted = disk if size == 8 * MIB else tmp_path / "other.img"
        assert told["guest_sha256"] == hashlib.sha256(wanted.read_bytes()).hexdigest()
        assert told["facts"]["hashed"] == f"disk {number}"
    for number in (0, 4):
        with pytest.raises(Failure, match=f"vm.ova has no disk {number}") as error:
            look(path, disk=number)
        assert "2: b.vmdk" in error.value.hint
        with pytest.raises(Failure, match=f"vm.ova has no disk {number}"):
            seen(path, disk=number)


def test_every_disk_is_looked_at(made: dict[str, bytes], tmp_path: Path) -> None:
    bad = b"XXXX" + made["vmdk"][4:]
    for name, data, place in (("b.vmdk", bad, "b.vmdk"), ("b.vmdk.gz", gzip.compress(bad), "b.vmdk.gz")):
        path = ova(tmp_path / "vm.ova", {"a.vmdk": made["vmdk"], name: data}, {"a.vmdk": "", name: ""})
        told = look(path)
        assert told["virtual_size"] == 8 * MIB
        found = [row for row in told["findings"] if row["where"].startswith(place)]
        assert found, name


def test_what_would_be_lost_is_that_of_the_chosen_disk_alone(made: dict[str, bytes], tmp_path: Path) -> None:
    """Neither what is wrong with another disk nor its sum keeps a good one from being read."""
    bad = b"XXXX" + made["vmdk"][4:]
    files = {"a.vmdk": made["vmdk"], "b.vmdk": bad, "c.vmdk": made["vmdk"]}
    lines = "".join(f"SHA256({name})= {hashlib.sha256(data).hexdigest()}\n" for name, data in files.items())
    wrong = lines.replace(hashlib.sha256(files["a.vmdk"]).hexdigest(), "0" * 64, 1)
    path = ova(tmp_path / "vm.ova", {"vm.mf": wrong.encode(), **files}, dict.fromkeys(files, ""))
    found = []
    with image.opened_file(path) as fd:
        for number in (1, 2, 3):
            with image.opened(fd, path.name, silent, disk=number) as disk:
                found.append({finding.code for finding in disk.losses()})
    assert found == [{manifest.DIGEST}, {vmdk.NO_HEADER}, set()]


@pytest.mark.parametrize("other", ["grain", "b-disk2.vmdk", "the", "byte", "VMDK", "a.vmdk.vmdk"])
def test_the_name_of_another_disk_hides_no_loss(other: str, made: dict[str, bytes], tmp_path: Path) -> None:
    """Names are words of the file's maker, and may stand in what is said of another disk."""
    lost = tmp_path / "lost.vmdk"
    lost.write_bytes(made["vmdk"])
    with opened(lost) as reader:
        table = vmdk.VmdkDisk(reader).directory[0] * 512
    entry = next(row for row in range(table, table + 2048, 4) if made["vmdk"][row : row + 4] != bytes(4))
    patch(lost, entry, bytes(4))  # a grain that no table names reads as zeros
    path = ova(
        tmp_path / "vm.ova", {"a.vmdk": lost.read_bytes(), other: made["vmdk"]}, {"a.vmdk": "", other: ""}
    )
    rows = [{"name": "raw", "kind": "raw", "file": "x.raw"}]
    with pytest.raises(Failure) as failure:
        ask(path, tmp_path / "out", rows, foreign=True)
    assert failure.value.details["code"] == vmdk.LOST_GRAIN.id
    assert list((tmp_path / "out").glob("*")) == []
    ask(path, tmp_path / "out", rows, foreign=True, disk=2)
    assert {finding["disk"] for finding in look(path)["findings"] if finding["lossy"]} == {1}


def test_what_is_lost_of_one_disk_hides_nothing_of_another(made: dict[str, bytes], tmp_path: Path) -> None:
    """The table of the first says that the disk was larger; convert writes no such file, its writer does."""
    cut = usual(tmp_path / "large.img", 12 * MIB).read_bytes()[: 10 * MIB]
    with open(tmp_path / "a.vmdk", "w+b") as file:
        writer = vmdk.VmdkWriter(file, len(cut), "a.vmdk")
        for number in range(5):
            piece = cut[number * 2 * MIB : (number + 1) * 2 * MIB]
            units = [unit and writer.codec.compress(unit) for unit in pieces.units(piece)]
            writer.add(number, piece, {writer.codec: units})
        writer.close("x")
    files = {"a.vmdk": (tmp_path / "a.vmdk").read_bytes(), "b.vmdk": b"XXXX" + made["vmdk"][4:]}
    told = look(ova(tmp_path / "vm.ova", files, dict.fromkeys(files, "")))
    lossy = {(row["code"], row["disk"]) for row in told["findings"] if row["lossy"]}
    assert lossy == {(partitions.CUT_OFF.id, 1), (vmdk.NO_HEADER.id, 2)}


def test_a_loss_hides_behind_no_crowd_of_other_faults(made: dict[str, bytes], tmp_path: Path) -> None:
    """Findings of many kinds are counted for the report; what decides looks at each."""
    lines = "".join(f"line {number}\n" for number in range(300))
    bad = b"XXXX" + made["vmdk"][4:]
    files = {"vm.mf": lines.encode(), "a.vmdk": made["vmdk"], "b.vmdk": bad}
    path = ova(tmp_path / "vm.ova", files, {"a.vmdk": "", "b.vmdk": ""})
    with image.opened_file(path) as fd, image.opened(fd, path.name, silent, disk=2) as disk:
        assert vmdk.NO_HEADER in {finding.code for finding in disk.losses()}
    sum_of_it = f"SHA256(a.vmdk)= {'0' * 64}\n"
    path = ova(
        tmp_path / "vm.ova", {**files, "vm.mf": (lines + sum_of_it).encode()}, {"a.vmdk": "", "b.vmdk": ""}
    )
    with image.opened_file(path) as fd, image.opened(fd, path.name, silent) as disk:
        assert {finding.code for finding in disk.losses()} == {manifest.DIGEST}


def test_a_file_that_two_disks_share_is_lost_to_both(made: dict[str, bytes], tmp_path: Path) -> None:
    """Two references may mean one file, by its name and by that of its URL."""
    wrong = f"SHA256(a b.vmdk)= {'0' * 64}\n".encode()
    path = ova(
        tmp_path / "vm.ova",
        {"vm.mf": wrong, "a b.vmdk": made["vmdk"]},
        {"a b.vmdk": "", "a%20b.vmdk": ""},
    )
    for number in (1, 2):
        with image.opened_file(path) as fd, image.opened(fd, path.name, silent, disk=number) as disk:
            assert {finding.code for finding in disk.losses()} == {manifest.DIGEST}


def test_a_disk_that_a_single_file_does_not_have(disk: Path) -> None:
    with pytest.raises(Failure, match="has no disk 2") as error:
        look(disk, disk=2)
    assert error.value.hint == "leave the number out: it holds one"


def test_disks_that_grow_without_end(made: dict[str, bytes], tmp_path: Path) -> None:
    """All of them together are held to the limit; what is known of the archive is told nevertheless."""
    bomb = gzip.compress(bytes(20 * MIB))
    names = [f"{row}.vmdk" for row in range(3)]
    path = ova(tmp_path / "vm.ova", dict.fromkeys(names, bomb), dict.fromkeys(names, ""))
    told = look(path, limit=30 * MIB)
    assert codes(told, "warning").count(NOT_LOOKED_INTO.id) == 2
    assert told["format"] == "ova"


@pytest.mark.parametrize("pack", ["", ".gz"])
def test_what_a_machine_boots_from(pack: str, disk: Path, made: dict[str, bytes], tmp_path: Path) -> None:
    """The disk of an OVA as QEMU opens it: by its own driver, where it lies."""
    path = tmp_path / f"vm.ova{pack}"
    path.write_bytes(gzip.compress(made["ova"]) if pack else made["ova"])
    with media.opened(str(path), "ova", tmp_path, silent) as found:
        assert found.driver == "vmdk"
        assert found.window is not None
        place, length = found.window
        with open(found.path, "rb") as file:
            file.seek(place)
            (tmp_path / "disk.vmdk").write_bytes(file.read(length))
    assert read(tmp_path / "disk.vmdk", "vmdk") == disk.read_bytes()


def test_a_packed_disk_is_nothing_to_boot_from(made: dict[str, bytes], tmp_path: Path) -> None:
    path = ova(tmp_path / "vm.ova", {"a.vmdk.gz": gzip.compress(made["vmdk"])}, {"a.vmdk.gz": ""})
    with (
        pytest.raises(Failure, match=r"a\.vmdk\.gz is packed inside of the ova"),
        media.opened(str(path), "ova", tmp_path, silent),
    ):
        pass


def test_heads_of_packed_images(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"begin" + bytes(MIB))
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"x" * 1000)[:10] + b"\xff" * 50)
    with opened(tmp_path / "a") as plain, opened(tmp_path / "a.gz") as gz, opened(tmp_path / "bad.gz") as bad:
        parts = (plain.window(0, 3), plain.window(3, plain.size - 3))
        assert Inner("a", parts).head(7) == b"begin\0\0"
        assert Inner("a", parts).whole is None
        assert Inner("a", (gz,), "gz").head(7) == b"begin\0\0"
        assert len(Inner("a", (plain,)).head(9 * MIB)) == MIB + 5
        with damaged(NOT_EXPANDED):
            Inner("a", (bad,), "gz").head(7)
