"""The formats that one place wants: XCP-ng's stream, Azure's VHD, Google's archive, Vagrant's boxes."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import pytest

from build.agent.events import Failure
from build.engine.options import Options
from build.formats import FORMATS, gce, vagrant
from build.formats.lib import qcow2
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code
from build.formats.lib.platforms import XCP_NG, XEN_ORCHESTRA
from build.formats.lib.vhd import checksum, geometry
from build.verbs.convert import UNKNOWN, descriptor
from tests.disks import EPOCH, MIB, ask, errors, lint, make, one, patch, read, usual

GIB = 1 << 30
CLUSTER = 65536


class Pipe:
    """Reads a file as it comes, and never goes back."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def cluster(self, number: int) -> bytes:
        """The next cluster, which must be this one."""
        assert self.at == number * CLUSTER, f"cluster {number} is not the next"
        self.at += CLUSTER
        return self.content[self.at - CLUSTER : self.at].ljust(CLUSTER, b"\0")

    def skip_to(self, number: int) -> None:
        assert self.at <= number * CLUSTER, f"cluster {number} lies behind"
        self.at = number * CLUSTER


def streamed(content: bytes) -> bytes:
    """A disk as XCP-ng's importer takes it from a stream: its rules, in the order in which it reads."""
    pipe = Pipe(content)
    head = struct.unpack_from(">4sIQIIQIIQQIIQ", pipe.cluster(0))
    _, _, backing, _, bits, size, crypt, l1_size, l1_at, table_at, table_clusters, snapshots, _ = head
    assert (backing, bits, crypt, snapshots) == (0, 16, 0, 0)
    for number in range(table_clusters):
        pipe.cluster(table_at // CLUSTER + number)
    pipe.skip_to(l1_at // CLUSTER)  # refcount blocks lie between
    l1 = b"".join(pipe.cluster(l1_at // CLUSTER + number) for number in range(-(-l1_size * 8 // CLUSTER)))
    places: dict[int, int] = {}
    for group, (entry,) in enumerate(struct.iter_unpack(">Q", l1[: l1_size * 8])):
        if offset := entry & 0x00FFFFFFFFFFFE00:
            for row, (data,) in enumerate(struct.iter_unpack(">Q", pipe.cluster(offset // CLUSTER))):
                assert not data & 1 << 62, "compressed"
                if place := data & 0x00FFFFFFFFFFFE00:
                    places[place // CLUSTER] = group * 8192 + row
    out = bytearray(size)
    for place in sorted(places):
        start = places[place] * CLUSTER
        out[start : start + CLUSTER] = pipe.cluster(place)[: max(size - start, 0)]
    return bytes(out[:size])


@pytest.mark.parametrize(
    "size", [48 * MIB, pytest.param(600 * MIB, marks=pytest.mark.soak(10)), 8 * MIB + 512]
)
def test_xcp_qcow2_is_read_forward(size: int, tmp_path: Path) -> None:
    parts = [(0, 200_000, "text"), (5 * MIB, 3 * MIB, "noise"), (size - 512, 512, "noise")]
    disk = make(tmp_path / "disk.img", size, parts)
    file = one(disk, tmp_path, "xcp-qcow2")
    assert streamed(file.read_bytes()) == disk.read_bytes()
    assert lint(file, "qcow2") == []


def test_other_qcow2s_have_a_warning_for_xcp_ng_alone(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    for name, says in (("qcow2", qcow2.COMPRESSED_FOR_XCP), ("qcow2-plain", qcow2.NO_STREAM)):
        (warning,) = lint(one(disk, tmp_path, name), "qcow2")
        assert (warning.code, warning.severity) == (says, "warning")
        assert warning.affects == (XCP_NG, XEN_ORCHESTRA)


def test_azure_vhd_is_the_disk_and_a_footer(tmp_path: Path) -> None:
    disk = make(
        tmp_path / "disk.img", 5 * MIB, [(MIB, 300_000, "noise")]
    )  # odd MiB, which no dynamic one has
    content = one(disk, tmp_path, "azure-vhd").read_bytes()
    footer = content[5 * MIB :]
    assert content[: 5 * MIB] == disk.read_bytes()
    assert len(footer) == 512
    assert struct.unpack_from(">8sIIQ", footer) == (b"conectix", 2, 0x10000, 2**64 - 1)
    assert struct.unpack_from(">QQHBBI", footer, 40) == (5 * MIB, 5 * MIB, *geometry(5 * MIB), 2)
    assert int.from_bytes(footer[64:68], "big") == checksum(footer[:64] + bytes(4) + footer[68:])


def test_sizes_that_azure_does_not_take(tmp_path: Path) -> None:
    check = FORMATS["azure-vhd"].check_size
    assert check is not None
    for size in (MIB + 512, 0, (4095 << 30) + MIB):
        with pytest.raises(Unsupported):
            check(size)
    disk = make(tmp_path / "disk.img", MIB + 512, [])
    row = {"name": "azure-vhd", "kind": "vhd", "file": "x.vhd", "options": {}}
    with pytest.raises(Unsupported, match="whole MiB"):
        ask(disk, tmp_path / "out", [row])
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("size", [pytest.param(GIB, marks=pytest.mark.soak(10)), 300 * MIB])
def test_gce_is_disk_raw_of_whole_gib_in_a_gnu_tar(size: int, tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", size, [(MIB, 300_000, "text"), (size - 512, 512, "noise")])
    row = {"name": "gce", "kind": "gce", "file": "x.tar", "options": {}}
    (told,) = ask(disk, tmp_path, [row])["files"]
    path = tmp_path / "x.tar"
    assert told["virtual_size"] == GIB
    assert path.stat().st_blocks * 512 < 8 * MIB  # zeros are holes
    with tarfile.open(path) as archive:
        (entry,) = archive.getmembers()
        assert (entry.name, entry.size, entry.mode, entry.uid, entry.mtime) == (
            "disk.raw",
            GIB,
            0o644,
            0,
            EPOCH,
        )
        data = archive.extractfile(entry)
        assert data is not None
        assert data.read(2 * MIB) == disk.read_bytes()[: 2 * MIB]
        data.seek(size - 512)
        assert data.read(1024).rstrip(b"\0") == disk.read_bytes()[-512:].rstrip(b"\0")
    assert path.read_bytes()[257:265] == b"ustar  \0"
    assert errors(path, "gce") == []


def tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_what_google_would_refuse(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"disk.raw": bytes(MIB), "readme": b"x"})
    assert errors(path, "gce") == [
        gce.OTHER_FILE,
        gce.ODD_SIZE,
    ]


@pytest.mark.parametrize(
    ("provider", "disk_name"), [("libvirt", "box.img"), ("virtualbox", "box-disk1.vmdk")]
)
def test_boxes(provider: str, disk_name: str, tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    options = {"provider": provider, "ovf": descriptor("systemvm.ovf.j2", "x", UNKNOWN, Options(), "box")}
    row = {"name": f"vagrant-{provider}", "kind": "vagrant", "file": "box.box", "options": options}
    ask(disk, tmp_path, [row])
    with tarfile.open(tmp_path / "box.box") as archive:
        inside = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    assert list(inside)[:2] == ["metadata.json", "Vagrantfile"]
    assert json.loads(inside["metadata.json"])["provider"] == provider
    assert (tmp_path / "inner").write_bytes(inside[disk_name])
    kind = "qcow2" if provider == "libvirt" else "vmdk"
    assert read(tmp_path / "inner", kind) == disk.read_bytes()
    assert [finding for finding in lint(tmp_path / "inner", kind) if finding.severity == "error"] == []
    if provider == "libvirt":
        assert json.loads(inside["metadata.json"]) == {
            "provider": "libvirt",
            "format": "qcow2",
            "virtual_size": 1,
        }
    else:
        assert b"box-disk1.vmdk" in inside["box.ovf"]
        assert f'ovf:size="{len(inside[disk_name])}"'.encode() in inside["box.ovf"]
        assert b"base_mac" in inside["Vagrantfile"]
    assert errors(tmp_path / "box.box", "vagrant") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metadata.json": b"{}"}, vagrant.NO_PROVIDER),
        ({"metadata.json": b"no json"}, vagrant.NO_PROVIDER),
        ({"metadata.json": b'{"provider": "libvirt"}'}, vagrant.OTHER_FORMAT),
        ({"metadata.json": b'{"provider": "virtualbox"}'}, vagrant.NO_OVF),
        ({"box.img": None, "other.img": b"x"}, vagrant.NO_IMAGE),
    ],
)
def test_boxes_that_vagrant_refuses(change: dict[str, bytes | None], says: Code, tmp_path: Path) -> None:
    good = {
        "metadata.json": b'{"provider": "libvirt", "format": "qcow2", "virtual_size": 1}',
        "Vagrantfile": b"",
        "box.img": b"QFI\xfb",
    }
    files = {name: data for name, data in {**good, **change}.items() if data is not None}
    assert says in errors(tar(tmp_path / "x.box", files), "vagrant")


def test_a_family_is_asked_for_by_one_word(tmp_path: Path) -> None:
    from build.engine.settings import Settings
    from build.verbs.convert import chosen

    assert chosen("vagrant", Settings()) == ("vagrant-libvirt", "vagrant-virtualbox")
    assert vagrant.KIND.suffix == "box"


def test_an_unreadable_disk_of_a_box(tmp_path: Path) -> None:
    path = one(usual(tmp_path / "disk.img"), tmp_path, "vagrant-libvirt")
    raw = path.read_bytes()
    patch(path, raw.index(b"QFI\xfb"), b"XXXX")
    with pytest.raises(Failure) as failure:
        ask(path, tmp_path / "out", [{"name": "raw", "kind": "raw", "file": "x.raw"}], foreign=True)
    assert failure.value.details["code"] == vagrant.NO_QCOW2.id
