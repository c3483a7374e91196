"""OVA: archive, manifest and descriptor as vSphere and CloudStack read them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from build.engine.options import Options, Ovf
from build.engine.settings import Settings
from build.formats import ova
from build.formats.lib import hardware, ovf
from build.formats.lib.errors import Unsupported
from build.formats.lib.findings import Code
from build.formats.lib.manifest import BLANK, DESCRIPTOR_DIGEST, DIGEST, FORM, NOT_THERE, SHA1
from build.verbs.convert import debian, descriptor
from tests.disks import EPOCH, MIB, ask, damaged, errors, lint, make, one, spec, usual

OVF, RASD = f"{{{ovf.OVF}}}", f"{{{ovf.RASD}}}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An OVA of the usual disk."""
    return one(usual(tmp_path / "disk.img"), tmp_path, "ova")


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


def test_the_archive_is_plain_ustar_with_the_descriptor_first(file: Path) -> None:
    with tarfile.open(file) as archive:
        entries = archive.getmembers()
    assert [entry.name for entry in entries] == ["ova.ovf", "ova.mf", "ova-disk1.vmdk"]
    for entry in entries:
        assert (entry.mode, entry.uid, entry.gid, entry.uname, entry.gname) == (0o644, 0, 0, "", "")
        assert entry.isreg()
        assert entry.mtime == EPOCH
    assert file.stat().st_size % 10240 == 0
    assert file.read_bytes()[257:265] == b"ustar\x0000"


def test_it_is_the_archive_that_pythons_tarfile_would_write(file: Path) -> None:
    rebuilt = io.BytesIO()
    with tarfile.open(fileobj=rebuilt, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members(file).items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), EPOCH
            archive.addfile(entry, io.BytesIO(content))
    assert rebuilt.getvalue() == file.read_bytes()


def test_manifest(file: Path) -> None:
    inside = members(file)
    assert inside["ova.mf"].decode().splitlines() == [
        f"SHA256({name})= {hashlib.sha256(inside[name]).hexdigest()}"
        for name in ("ova.ovf", "ova-disk1.vmdk")
    ]


def test_descriptor_numbers(file: Path) -> None:
    inside = members(file)
    root = ElementTree.fromstring(inside["ova.ovf"])
    reference = root.find(f".//{OVF}File")
    disk = root.find(f".//{OVF}Disk")
    assert reference is not None
    assert disk is not None
    assert reference.get(OVF + "size") == str(len(inside["ova-disk1.vmdk"]))
    assert disk.get(OVF + "capacity") == str(48 * MIB)
    assert disk.get(OVF + "capacityAllocationUnits") == "byte"
    populated = int(disk.get(OVF + "populatedSize", "0"))
    assert 3 * MIB < populated < 5 * MIB
    assert populated % 65536 == 0


def text(**ovf: object) -> str:
    options = Options(ovf=Ovf.model_validate(ovf))
    return descriptor("systemvm.ovf.j2", "systemvm", debian(Settings()), options, "name")


def test_settings_reach_the_descriptor() -> None:
    rendered = text(
        hardware_version=19,
        memory=512,
        cpus=2,
        controller="pvscsi",
        firmware="efi",
        guest_os="debian12_64Guest",
    )
    for part in (
        "vmx-19<",
        ">512<",
        "2 virtual CPU(s)",
        ">VirtualSCSI<",
        'vmw:key="firmware" vmw:value="efi"',
        'vmw:osType="debian12_64Guest"',
    ):
        assert part in rendered
    assert "firmware" not in text()
    assert "vmx-13<" in text()
    assert ">lsilogic<" in text()
    assert 'ovf:id="96" vmw:osType="debian10_64Guest"' in text()


def test_no_network_unless_asked() -> None:
    assert "Network" not in text()
    rendered = text(networks=["VM Network", 'odd "<&> name'])
    root = ElementTree.fromstring(rendered)
    cards = [
        item.findtext(RASD + "Connection")
        for item in root.iter(OVF + "Item")
        if item.findtext(RASD + "ResourceType") == "10"
    ]
    assert cards == ["VM Network", 'odd "<&> name']


@pytest.mark.parametrize("networks", [(), ("one", "two")])
@pytest.mark.parametrize("controller", ["lsilogic", "pvscsi"])
@pytest.mark.parametrize("firmware", ["bios", "efi"])
def test_what_we_render_passes_our_own_rules(
    networks: tuple[str, ...], controller: str, firmware: str, tmp_path: Path
) -> None:
    disk = make(tmp_path / "disk.img", 2 * MIB, [(0, 1000, "text")])
    rendered = text(networks=networks, controller=controller, firmware=firmware).replace(
        "name-disk1", "ova-disk1"
    )
    ask(disk, tmp_path, [{**spec("ova"), "options": {"ovf": rendered}}])
    assert errors(tmp_path / "ova.ova", "ova") == []


def rebuild(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], **entry: object) -> None:
    """Write the archive again with other members, the manifest as it is."""
    inside = change(members(path))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in inside.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for key, value in entry.items():
                setattr(header, key, value)
            archive.addfile(header, io.BytesIO(content))


def swapped(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Change the descriptor's text and make the manifest right again."""

    def change(inside: dict[str, bytes]) -> dict[str, bytes]:
        assert old in inside["ova.ovf"]
        ovf = inside["ova.ovf"].replace(old, new)
        lines = inside["ova.mf"].decode().splitlines()
        lines[0] = f"SHA256(ova.ovf)= {hashlib.sha256(ovf).hexdigest()}"
        return {**inside, "ova.ovf": ovf, "ova.mf": "\n".join(lines).encode()}

    return change


def manifest(change: Callable[[str], str]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda inside: {**inside, "ova.mf": change(inside["ova.mf"].decode()).encode()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda i: dict(reversed(i.items())), ova.NOT_FIRST, id="order"),
        pytest.param(lambda i: {**i, "../../etc/passwd": b"x"}, ova.LEADS_OUT, id="dots"),
        pytest.param(lambda i: {**i, "/etc/passwd": b"x"}, ova.LEADS_OUT, id="absolute"),
        pytest.param(manifest(lambda t: t.replace("(", " (")), BLANK, id="manifest blanks"),
        pytest.param(manifest(lambda t: t.replace("SHA256", "SHA2-256")), FORM, id="manifest name"),
        pytest.param(
            manifest(lambda t: t.replace("(ova.ovf)= ", "(ova.ovf)= 00")), DESCRIPTOR_DIGEST, id="digest"
        ),
        pytest.param(manifest(lambda t: t.replace("ova.ovf", "other.ovf")), NOT_THERE, id="unknown"),
        pytest.param(
            lambda i: {**i, "ova-disk1.vmdk": i["ova-disk1.vmdk"] + b"x"}, DIGEST, id="disk changed"
        ),
        pytest.param(
            swapped(b'ovf:capacity="50331648"', b'ovf:capacity="1"'), ovf.OTHER_CAPACITY, id="capacity"
        ),
        pytest.param(swapped(b'ovf:size="', b'ovf:size="9'), ovf.OTHER_SIZE, id="size"),
        pytest.param(swapped(b"vmx-13", b"vmx"), hardware.OTHER_FAMILY, id="hardware"),
        pytest.param(swapped(b">lsilogic<", b">PIIX9<"), hardware.SCSI_UNKNOWN, id="controller"),
        pytest.param(swapped(b"<rasd:Parent>3<", b"<rasd:Parent>9<"), hardware.NO_PARENT, id="parent"),
        pytest.param(swapped(b"ovf:/disk/", b"disk:"), hardware.NO_RESOURCE, id="host resource"),
        pytest.param(swapped(b"rasd:", b"ns9:"), ovf.NOT_XML, id="prefix not bound"),
        pytest.param(swapped(b"<References>", b"<!-- "), ovf.NOT_XML, id="broken XML"),
        pytest.param(
            swapped(b"<Envelope", b'<!DOCTYPE x [<!ENTITY a "b">]><Envelope'),
            ovf.DOCTYPE,
            id="document type",
        ),
        pytest.param(swapped(b'href="ova-disk1.vmdk"', b'href="no.vmdk"'), ovf.GONE, id="no such file"),
        pytest.param(
            lambda i: {k: v for k, v in i.items() if k != "ova.ovf"}, ova.NO_DESCRIPTOR, id="no ovf"
        ),
    ],
)
def test_the_linter_sees(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], says: Code, file: Path
) -> None:
    rebuild(file, change)
    assert says in errors(file, "ova"), errors(file, "ova")


def test_the_linter_warns(file: Path) -> None:
    rebuild(file, manifest(lambda t: t.replace("SHA256", "SHA1")), uid=1000)
    assert {SHA1, ova.OWNER} <= {finding.code for finding in lint(file, "ova")}


def test_links_are_no_plain_files(file: Path) -> None:
    rebuild(file, lambda inside: inside)
    with tarfile.open(file, "a", format=tarfile.USTAR_FORMAT) as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert ova.NO_PLAIN_FILE in errors(file, "ova")


def test_entities_that_grow_are_refused_at_once() -> None:
    bomb = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">' + b"".join(
        b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(12)
    )
    with damaged(ovf.DOCTYPE):
        ovf.parse_xml(bomb + b"]><l>&m;</l>")
    with damaged(ovf.NESTED):
        ovf.parse_xml(b"<a>" * 5000)


def test_a_template_without_a_placeholder_is_refused(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", 2 * MIB, [])
    with pytest.raises(Unsupported, match="never uses @populated@"):
        ask(disk, tmp_path / "out", [{**spec("ova"), "options": {"ovf": "@capacity@ @vmdk_size@"}}])
    assert list((tmp_path / "out").iterdir()) == []
