"""inv repair: an OVA that vSphere refuses becomes one that it takes, with the same bytes for a guest."""

from __future__ import annotations

import gzip
import hashlib
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from build import wire
from build.agent.events import Failure
from build.agent.verbs import repair
from build.engine.errors import BuildError
from build.formats import KINDS, ova
from build.formats.lib import manifest, ovf, unwrap
from build.formats.lib import repair as repairs
from build.formats.lib.findings import Code
from build.formats.lib.places import PLACES, is_affected
from build.formats.vmdk import BROKEN_GRAIN, NO_FOOTER
from build.verbs.repair import default_output, lines
from tests.disks import content, errors, lint, opened, patch, read
from tests.packages import CPU, SCSI, SIZE, descriptor, disk, drive, item, pack, reference, sums, vmdk

EULA = (
    b"<EulaSection><Info>license</Info><License>Do &lt;good&gt; &amp; no harm.\n  All of it.</License>"
    b"<!-- kept -->\n</EulaSection></VirtualSystem>"
)
SASD, EPASD = (f"{ovf.RASD.replace('Resource', kind)}.xsd" for kind in ("Storage", "EthernetPort"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A disk's file."""
    return vmdk(tmp_path_factory.mktemp("disk"))


def run(path: Path, output: Path | None = None, hardware: int = 13) -> wire.Repaired:
    """Repair, with every change that an operator sees."""
    target = output or path.with_name("new.ova")
    request = wire.Repair(str(path), str(target), hardware, str(path.parent))
    return repair.run(request, lambda kind, **fields: None)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


def guest(data: bytes, folder: Path) -> str:
    """SHA-256 of what a guest sees of a VMDK."""
    path = folder / "guest.vmdk"
    path.write_bytes(data)
    return hashlib.sha256(read(path, "vmdk")).hexdigest()


def refused_by_vsphere(path: Path) -> list[Code]:
    place = PLACES["vsphere"]
    return [f.code for f in lint(path, "ova") if f.severity != "info" and is_affected(place, f.affects)]


def virtualbox(good: bytes, **change: bytes) -> dict[str, bytes]:
    """What VirtualBox exports: order, names and devices as its ApplianceImplExport.cpp writes them."""
    items = (
        item(Caption="1 virtual CPU", Description="cpus", InstanceID=1, ResourceType=3, VirtualQuantity=1),
        item(Address=0, Caption="ide0", InstanceID=3, ResourceSubType="PIIX4", ResourceType=5),
        item(Address=0, Caption="sata0", InstanceID=5, ResourceSubType="AHCI", ResourceType=20),
        item(
            AddressOnParent=3, Caption="sound", InstanceID=7, ResourceSubType="ensoniq1371", ResourceType=35
        ),
        item(Caption="disk1", HostResource="/disk/d1", InstanceID=8, Parent=5, ResourceType=17),
        item(Caption="net", Connection="NAT", InstanceID=9, ResourceSubType="virtio", ResourceType=10),
        item(Caption="cd", HostResource="/disk/d2", InstanceID=10, Parent=3, ResourceType=15),
    )
    iso = "http://www.ecma-international.org/publications/standards/Ecma-119.htm"
    content = descriptor(
        [reference("b-disk1.vmdk", len(good)), reference("b-disk2.iso", 4, 2)],
        [disk(units="", populatedSize=""), disk(2, 4, units="", format=iso, populatedSize="")],
        items,
        "virtualbox-2.2",
    ).replace(b"</VirtualSystem>", EULA)
    content = content.replace(
        b"</VirtualHardwareSection>",
        b'</VirtualHardwareSection><vbox:Machine ovf:required="false" name="b"><a x="1"/></vbox:Machine>',
    )
    return {"b.ovf": content, "b-disk1.vmdk": good, "b-disk2.iso": b"iso!", **change}


def test_a_virtualbox_export(good: bytes, tmp_path: Path) -> None:
    old = good[:4] + b"\1" + good[5:-1020] + b"\1" + good[-1019:]
    files = virtualbox(old)
    old_lines = sums(files, "SHA1", "{a} ({n})= {h}\n")
    path = pack(tmp_path / "b.ova", dict(reversed(files.items())), manifest=old_lines)
    before = path.read_bytes()
    assert len(errors(path, "ova")) == 5
    done = run(path)
    assert path.read_bytes() == before
    new = Path(done.file)
    assert refused_by_vsphere(new) == []
    assert errors(new, "ova") == []
    inside = members(new)
    assert list(inside) == ["b.ovf", "b.mf", "b-disk1.vmdk", "b-disk2.iso"]
    assert inside["b-disk1.vmdk"] == good
    assert inside["b-disk2.iso"] == b"iso!"
    assert inside["b.mf"] == sums({name: inside[name] for name in inside if name != "b.mf"})
    text = inside["b.ovf"]
    assert EULA in text
    assert b'<vbox:Machine ovf:required="false" name="b"><a x="1"/></vbox:Machine>' in text
    for part in (b">vmx-13<", b">vmware.sata.ahci<", b">VmxNet3<", b">ovf:/file/f2<", b">/disk/d1<"):
        assert part in text
    for part in (b"ensoniq", b"PIIX4", b"Caption", b"Ecma-119", b"virtualbox-2.2"):
        assert part not in text
    assert (done.size, done.sha256) == (new.stat().st_size, hashlib.sha256(new.read_bytes()).hexdigest())
    for change in (
        "b-disk1.vmdk: header version 1 is 3 (bytes 4 to 7 of the header)",
        "hardware family virtualbox-2.2 is vmx-13",
        "sound card removed",
        "storage controller AHCI is vmware.sata.ahci",
        "network card virtio is VmxNet3",
        "Disk d2 is a CD image: referenced as a file",
        "Caption is ElementName (6 times)",
        "the descriptor is the first file",
        "the manifest has SHA256",
        "the manifest is written as SHA256(name)= hex",
    ):
        assert change in done.changes
    assert len(set(done.changes)) == len(done.changes)


def test_python_reads_what_was_written_as_plain_ustar(good: bytes, tmp_path: Path) -> None:
    new = Path(run(pack(tmp_path / "b.ova", virtualbox(good), tarfile.PAX_FORMAT)).file)
    with tarfile.open(new) as archive:
        entries = archive.getmembers()
    assert [(entry.uid, entry.mode, entry.mtime, entry.isreg()) for entry in entries] == [
        (0, 0o644, 1_600_000_000, True)
    ] * 4
    assert new.read_bytes()[257:265] == b"ustar\x0000"
    assert new.stat().st_size % 10240 == 0
    assert not any(entry.pax_headers for entry in entries)


def test_the_same_file_gives_the_same_bytes(good: bytes, tmp_path: Path) -> None:
    path = pack(tmp_path / "b.ova", virtualbox(good))
    first, second = (run(path, tmp_path / name) for name in ("one.ova", "two.ova"))
    assert first.sha256 == second.sha256
    assert (tmp_path / "one.ova").read_bytes() == (tmp_path / "two.ova").read_bytes()
    assert b">vmx-19<" in members(Path(run(path, tmp_path / "three.ova", 19).file))["b.ovf"]


def test_a_repaired_file_needs_nothing(good: bytes, tmp_path: Path) -> None:
    new = Path(run(pack(tmp_path / "b.ova", virtualbox(good))).file)
    again = run(new, tmp_path / "again.ova")
    assert again == wire.Repaired("", ())
    assert not (tmp_path / "again.ova").exists()
    assert lines("new.ova", again) == ["new.ova: nothing to change, nothing written"]


def ovf2(good: bytes) -> dict[str, bytes]:
    items = (
        CPU,
        item(Caption="sata", InstanceID=5, ResourceSubType="AHCI", ResourceType=20),
        item("sasd", Caption="d", HostResource="/disk/d1", InstanceID=8, Parent=5, ResourceType=17),
        item("epasd", Caption="n", Connection="NAT", InstanceID=9, ResourceSubType="E1000", ResourceType=10),
    )
    content = descriptor([reference("1.vmdk", len(good))], [disk()], items, "virtualbox-2.2", ovf.OVF2)
    spaces = f'<Envelope ovf:version="2.0" xmlns:sasd="{SASD}" xmlns:epasd="{EPASD}"'
    return {"vm.ovf": content.replace(b"<Envelope", spaces.encode(), 1), "1.vmdk": good}


def test_ovf_2_becomes_ovf_1(good: bytes, tmp_path: Path) -> None:
    path = pack(tmp_path / "two.ova", ovf2(good))
    assert ovf.VERSION_2 in errors(path, "ova")
    new = Path(run(path).file)
    assert errors(new, "ova") == []
    text = members(new)["vm.ovf"]
    assert b"StorageItem" not in text
    assert b"<epasd:" not in text
    assert b'ovf:version="1.0"' in text
    devices = [
        sorted(child.tag.rpartition("}")[2] for child in element)
        for element in ovf.parse_xml(text).iter(f"{{{ovf.OVF}}}Item")
    ]
    assert len(devices) == 4
    assert all(
        f"{{{ovf.RASD}}}" in child.tag for e in ovf.parse_xml(text).iter(f"{{{ovf.OVF}}}Item") for child in e
    )


@pytest.mark.parametrize("prefix", [b"o:", b""])
def test_new_attributes_have_the_prefix_of_the_others(prefix: bytes, good: bytes, tmp_path: Path) -> None:
    files = virtualbox(good)
    files["b.ovf"] = files["b.ovf"].replace(b"ovf:", prefix).replace(b"xmlns:ovf", b"xmlns:o")
    text = members(Path(run(pack(tmp_path / "b.ova", files)).file))["b.ovf"]
    assert b" " + prefix + b'capacityAllocationUnits="byte"' in text


def packed_disks(good: bytes) -> Mapping[str, dict[str, bytes]]:
    zipped = gzip.compress(good, 1, mtime=0)
    step = 50_000
    chunks = {f"1.vmdk.{n:09d}": good[at : at + step] for n, at in enumerate(range(0, len(good), step))}

    def described(name: str, size: int, more: str) -> dict[str, bytes]:
        return {"vm.ovf": descriptor([reference(name, size, 1, more)], [disk()])}

    return {
        "gzip": {**described("1.vmdk.gz", len(zipped), 'ovf:compression="gzip"'), "1.vmdk.gz": zipped},
        "undeclared": {**described("1.vmdk", len(zipped), ""), "1.vmdk": zipped},
        "chunks": {**described("1.vmdk", len(good), f'ovf:chunkSize="{step}"'), **chunks},
    }


@pytest.mark.parametrize("name", ["gzip", "undeclared", "chunks"])
def test_disks_are_unpacked_and_joined(name: str, good: bytes, tmp_path: Path) -> None:
    done = run(pack(tmp_path / "p.ova", packed_disks(good)[name]))
    assert members(Path(done.file))["1.vmdk"] == good
    assert lint(Path(done.file), "ova") == []
    with opened(Path(done.file)) as reader:
        whole = content(KINDS["ova"].read(reader))
    assert hashlib.sha256(whole).hexdigest() == guest(good, tmp_path)


def test_several_disks_empty_ones_and_files_beside_them(good: bytes, tmp_path: Path) -> None:
    files = {
        "vm.ovf": descriptor(
            [
                reference("my%201.vmdk", len(good)),
                reference("2.vmdk", len(good), 2),
                reference("n.nvram", 1, 3),
            ],
            [disk(), disk(2, SIZE - 512), disk(3, "${size}", ref=False, populatedSize="")],
            [CPU, SCSI, drive(), drive(2), drive(3)],
        ),
        "my 1.vmdk": good,
        "2.vmdk": good,
        "n.nvram": b"n",
        "README": b"r",
        "vm.cert": b"c",
    }
    done = run(pack(tmp_path / "many.ova", files))
    inside = members(Path(done.file))
    assert set(inside) == {"vm.ovf", "vm.mf", "my 1.vmdk", "2.vmdk", "n.nvram", "README"}
    assert b'ovf:capacity="${size}"' in inside["vm.ovf"]
    assert f"Disk d2: the capacity is {SIZE} bytes, as the disk's" in done.changes
    assert any("vm.cert left out" in change for change in done.changes)
    assert errors(Path(done.file), "ova") == []


@pytest.mark.parametrize(
    ("subtype", "kind", "becomes", "number"),
    [
        ("VirtioSCSI", 20, "VirtualSCSI", 6),
        ("NVMe", 20, "vmware.nvme.controller", 20),
        ("odd", 6, "lsilogic", 6),
        ("LsiLogicSas", 6, "LsiLogicSas", 6),
        ("vmware.sata.ahci", 20, "vmware.sata.ahci", 20),
    ],
)
def test_controllers(subtype: str, kind: int, becomes: str, number: int, good: bytes, tmp_path: Path) -> None:
    device = item(ElementName="c", InstanceID=3, ResourceSubType=subtype, ResourceType=kind)
    content = descriptor([reference("1.vmdk", len(good))], [disk()], [CPU, device, drive()], "vmx-09")
    path = pack(tmp_path / "c.ova", {"vm.ovf": content, "1.vmdk": good}, manifest=b"")
    text = members(Path(run(path).file))["vm.ovf"]
    assert f"<rasd:ResourceSubType>{becomes}</rasd:ResourceSubType>".encode() in text
    assert (
        f"<rasd:ResourceType>{number}</rasd:ResourceType></Item>\n<Item><rasd:ElementName>disk".encode()
        in text
    )
    assert (b"vmx-13" in text) == (number == 20)


def broken(good: bytes, name: str) -> tuple[dict[str, bytes], bytes | None]:
    files = virtualbox(good)
    lines = sums(files)
    if name == "digest":
        return {**files, "b-disk1.vmdk": good[:-1] + b"x"}, lines
    if name == "grain":
        hurt = good[:70_000] + bytes(3000) + good[73_000:]
        return {**files, "b-disk1.vmdk": hurt}, None
    if name == "cut":
        return {**files, "b-disk1.vmdk": good[:-4096]}, None
    if name == "missing":
        return {key: data for key, data in files.items() if not key.endswith("vmdk")}, None
    if name == "no ovf":
        return {"a.txt": b"a", "b-disk1.vmdk": good}, None
    if name == "namespace":
        return {**files, "b.ovf": files["b.ovf"].replace(b"<Envelope", b'<Envelope xmlns:x="a b"')}, None
    if name == "doctype":
        return {**files, "b.ovf": b"<!DOCTYPE a>" + files["b.ovf"].partition(b"?>")[2]}, None
    return {**files, "b-disk1.vmdk": gzip.compress(good)[:-9]}, None


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("digest", manifest.DIGEST.id),
        ("grain", BROKEN_GRAIN.id),
        ("cut", NO_FOOTER.id),
        ("missing", ovf.GONE.id),
        ("no ovf", ova.NO_DESCRIPTOR.id),
        ("doctype", ovf.DOCTYPE.id),
        ("namespace", repairs.NO_URI.id),
        ("gzip", unwrap.NO_END.id),
    ],
)
def test_what_would_lose_data_is_refused(name: str, code: str, good: bytes, tmp_path: Path) -> None:
    files, lines = broken(good, name)
    path = pack(tmp_path / "bad.ova", files, manifest=lines)
    before = path.read_bytes()
    with pytest.raises(Failure) as failure:
        run(path)
    assert failure.value.details["code"] == code
    assert failure.value.hint
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["bad.ova"]


def test_a_cut_archive_links_and_double_names_are_refused(good: bytes, tmp_path: Path) -> None:
    path = pack(tmp_path / "b.ova", virtualbox(good))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Failure):
        run(path)
    path.write_bytes(whole)
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as archive:
        link = tarfile.TarInfo("passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(Failure) as failure:
        run(path)
    assert failure.value.details["code"] == ova.NO_PLAIN_FILE.id
    assert [file.name for file in tmp_path.iterdir()] == ["b.ova"]


def test_what_is_there_is_not_written_over(good: bytes, tmp_path: Path) -> None:
    path = pack(tmp_path / "b.ova", virtualbox(good))
    for output in (path, tmp_path / "other.ova"):
        output.touch()
        before = output.read_bytes()
        with pytest.raises(Failure, match="already there"):
            run(path, output)
        assert output.read_bytes() == before
    (tmp_path / "raw.img").write_bytes(bytes(4096))
    with pytest.raises(Failure, match="is no OVA"):
        run(tmp_path / "raw.img")
    with pytest.raises(Failure, match="there is no file"):
        run(tmp_path / "none.ova", tmp_path / "new.ova")
    with pytest.raises(Failure, match="there is no folder"):
        run(path, tmp_path / "none" / "new.ova")


def test_a_disk_that_changes_on_its_way_gets_no_name(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "b.ova", virtualbox(good))
    copied = repair._archive

    def hurt(file: object, *rest: object) -> None:
        copied(file, *rest)  # type: ignore[arg-type]
        file.flush()  # type: ignore[attr-defined]
        aside = next(tmp_path.glob(".*.part"))
        patch(aside, aside.stat().st_size // 2, b"\xff" * 64)

    monkeypatch.setattr(repair, "_archive", hurt)
    with pytest.raises(Failure):
        run(path)
    assert [file.name for file in tmp_path.iterdir()] == ["b.ova"]


def test_the_new_file_has_usual_rights(good: bytes, tmp_path: Path) -> None:
    path = pack(tmp_path / "b.ova", virtualbox(good))
    new = Path(run(path).file)
    ours = tmp_path / "mine"
    ours.touch()
    assert stat.S_IMODE(new.stat().st_mode) == stat.S_IMODE(ours.stat().st_mode)
    path.chmod(0o640)
    assert stat.S_IMODE(Path(run(path, tmp_path / "secret.ova").file).stat().st_mode) == 0o600


def test_where_it_goes_and_what_is_shown() -> None:
    assert default_output("/a/b.c/vm.ova") == "/a/b.c/vm-vsphere.ova"
    with pytest.raises(BuildError, match="no file"):
        default_output("/")
    shown = lines("vm.ova", wire.Repaired("/x\x1b.ova", ("one", "t\x1bwo"), 5, "ab"))
    assert shown == ["changed: one", "changed: t\\x1bwo", "wrote /x\\x1b.ova: 5 bytes, SHA-256 ab"]
