"""OVAs of other makers: no false alarm about what their own products take, no silence about broken ones."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import pytest

from build.formats import KINDS, ova
from build.formats.lib import hardware, manifest, ovf
from build.formats.lib import reader as readers
from build.formats.lib.findings import Code, Finding, collect
from build.formats.lib.platforms import CLOUDSTACK, VIRT_V2V, VSPHERE, Affected
from build.formats.lib.tar import Member
from build.formats.vmdk import NO_HEADER
from tests.disks import MIB, errors, lint, opened
from tests.packages import (
    CPU,
    SCSI,
    SIZE,
    descriptor,
    disk,
    drive,
    item,
    pack,
    reference,
    sums,
    vmdk,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A disk's file."""
    return vmdk(tmp_path_factory.mktemp("disk"))


def codes(found: list[Finding], severity: str = "error") -> list[Code]:
    return [finding.code for finding in found if finding.severity == severity]


def checked(content: bytes, size: int | None = SIZE) -> list[Finding]:
    """What is said of a descriptor whose files are all there."""
    members = {}
    for file in ovf.read_descriptor(content).files:
        name = file.href.replace("%20", " ")
        members[name] = Member(name, 0, 0, int(file.size or 1), "0", (0, 0))
    return collect(ovf.lint_descriptor(content, members, lambda _: size))


def plain(*items: str, family: str = "vmx-13", space: str = ovf.OVF, systems: str = "") -> list[Finding]:
    return checked(
        descriptor([reference("a.vmdk", 1)], [disk()], items or (CPU, SCSI, drive()), family, space, systems)
    )


# -- disks


def test_every_disk_is_looked_at_and_named(tmp_path: Path, good: bytes) -> None:
    bad = b"XXXX" + good[4:]
    for second, capacity, says in (
        (bad, SIZE, NO_HEADER),
        (good, SIZE // 2, ovf.OTHER_CAPACITY),
        (good, SIZE, None),
    ):
        text = descriptor(
            [reference("1.vmdk", len(good)), reference("2.vmdk", len(second), 2)],
            [disk(), disk(2, capacity)],
            [CPU, SCSI, drive(), drive(2)],
        )
        path = pack(tmp_path / "two.ova", {"vm.ovf": text, "1.vmdk": good, "2.vmdk": second})
        assert errors(path, "ova") == ([says] if says else [])
        with opened(path) as reader:
            assert [disk.name for disk in KINDS["ova"].inner(reader)] == ["1.vmdk", "2.vmdk"]
    pack(path, {"vm.ovf": text, "1.vmdk": good, "2.vmdk": bad})
    assert [(finding.disk, finding.where) for finding in lint(path, "ova") if finding.code == NO_HEADER] == [
        (2, "2.vmdk: byte 0x0")
    ]


def test_the_disks_come_in_the_order_of_the_descriptor(tmp_path: Path, good: bytes) -> None:
    files = {"vm.ovf": b"", "1.vmdk": good, "my 2.vmdk": good, "cd.iso": b"x" * 9}
    files["vm.ovf"] = descriptor(
        [reference("1.vmdk", len(good)), reference("my%202.vmdk", len(good), 2), reference("cd.iso", 9, 3)],
        [disk(2), disk(1), disk(4, 10 << 30, ref=False, populatedSize="")],
        [CPU, SCSI, drive(), drive(2)],
    )
    path = pack(tmp_path / "order.ova", files)
    with opened(path) as reader:
        found = KINDS["ova"].inner(reader)
        facts = KINDS["ova"].read(reader).facts()
    assert [disk.name for disk in found] == ["my 2.vmdk", "1.vmdk"]
    assert facts["empty disks"] == f"d4 ({10 << 30} bytes)"
    assert codes(lint(path, "ova")) == []
    assert codes(lint(path, "ova"), "warning") == []


def test_without_a_readable_descriptor_the_vmdks_are_the_disks(tmp_path: Path, good: bytes) -> None:
    path = pack(
        tmp_path / "odd.ova", {"vm.ovf": b"<html>", "b.vmdk": good, "a.VMDK": good[:900], "c.txt": b"c"}
    )
    with opened(path) as reader:
        assert [disk.name for disk in KINDS["ova"].inner(reader)] == ["b.vmdk", "a.VMDK"]
    assert ovf.NOT_XML in errors(path, "ova")
    assert readers.PAST_END in errors(path, "ova")


@pytest.mark.parametrize(("name", "more"), [("1.vmdk.gz", 'ovf:compression="gzip"'), ("1.vmdk", "")])
def test_a_gzip_disk_is_one_error(name: str, more: str, tmp_path: Path, good: bytes) -> None:
    packed = gzip.compress(good, 1)
    content = descriptor([reference(name, len(packed), 1, more)], [disk()])
    path = pack(tmp_path / "gz.ova", {"vm.ovf": content, name: packed})
    assert errors(path, "ova") == [ova.GZIP_DISK]
    with opened(path) as reader:
        (found,) = KINDS["ova"].inner(reader)
        assert found.head(4) == b"KDMV"
        assert KINDS["ova"].read(reader).size == SIZE
    assert (found.compression, found.whole) == ("gz", None)
    wrong = descriptor([reference(name, len(packed), 1, more)], [disk(capacity=SIZE + 1)])
    pack(path, {"vm.ovf": wrong, name: packed})
    assert ovf.OTHER_CAPACITY in errors(path, "ova")


def test_a_disk_that_is_said_to_be_gzip_and_is_not(tmp_path: Path, good: bytes) -> None:
    content = descriptor([reference("1.vmdk", len(good), 1, 'ovf:compression="gzip"')], [disk()])
    path = pack(tmp_path / "no.ova", {"vm.ovf": content, "1.vmdk": good})
    assert errors(path, "ova") == [ova.NOT_COMPRESSED]


def test_chunks_are_one_disk(tmp_path: Path, good: bytes) -> None:
    step = 50_000
    chunks = {f"1.vmdk.{n:09d}": good[at : at + step] for n, at in enumerate(range(0, len(good), step))}
    content = descriptor([reference("1.vmdk", len(good), 1, f'ovf:chunkSize="{step}"')], [disk()])
    path = pack(tmp_path / "chunks.ova", {"vm.ovf": content, **chunks})
    found = lint(path, "ova")
    assert codes(found) == []
    (warning,) = [finding for finding in found if finding.severity == "warning"]
    assert (warning.code, warning.fields) == (ovf.CHUNKS, {"count": len(chunks)})
    assert warning.affects == (VIRT_V2V, CLOUDSTACK)
    with opened(path) as reader:
        (inner,) = KINDS["ova"].inner(reader)
    assert sum(part.size for part in inner.parts) == len(good)
    (lone,) = lint(pack(path, {"vm.ovf": content, "1.vmdk": good}), "ova")
    assert lone.code == ovf.ONE_CHUNK
    missing = dict(list(chunks.items())[:-1])
    pack(path, {"vm.ovf": content, **missing})
    assert ovf.OTHER_SIZE in errors(path, "ova")
    pack(path, {"vm.ovf": content})
    assert ovf.NO_CHUNK in errors(path, "ova")


@pytest.mark.parametrize(
    ("capacity", "units", "bytes_"),
    [
        ("48", "byte * 2^20", 48 * MIB),
        ("48", "byte*2^20", 48 * MIB),
        ("48", "MegaBytes", 48 * MIB),
        ("48", "MB", 48 * MIB),
        ("3", "GigaBytes", 3 << 30),
        ("5", "byte * 10^9", 5_000_000_000),
        ("50331648", "", 48 * MIB),
        ("48 MB", "", None),
        ("0x30", "byte", None),
        ("1", "furlong", None),
        ("-1", "byte", None),
    ],
)
def test_units(capacity: str, units: str, bytes_: int | None) -> None:
    assert ovf.capacity(capacity, units) == bytes_


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"capacity": "${size}"}, []),
        ({"capacity": "x"}, [ovf.BAD_CAPACITY_UNITS]),
        ({"capacity": ""}, [ovf.NO_CAPACITY]),
        ({"capacity": "48", "units": "byte * 2^20"}, []),
        ({"capacity": "1", "units": "byte * 2^30"}, []),
        ({"capacity": "47", "units": "byte * 2^20"}, [ovf.OTHER_CAPACITY]),
        ({"format": ""}, []),
        ({"format": "http://qcow2"}, [ovf.OTHER_FORMAT]),
        ({"format": "http://www.vmware.com/specifications/vmdk.html#sparse"}, []),
        ({"populatedSize": ""}, []),
    ],
)
def test_what_a_disk_says(given: dict[str, str], says: list[Code]) -> None:
    found = checked(descriptor([reference("a.vmdk", 1)], [disk(**given)]))  # type: ignore[arg-type]
    assert codes(found) == says
    assert not any("None" in finding.text for finding in found)


def test_what_only_old_cloudstack_minds_is_a_warning_with_its_name() -> None:
    found = checked(descriptor([reference("a.vmdk", 1)], [disk(populatedSize="")]))
    assert [(finding.severity, finding.affects) for finding in found] == [
        ("warning", (Affected("cloudstack", before="4.11.1"),))
    ]


def test_references_that_nobody_can_know_yet() -> None:
    content = descriptor([reference("${file}", "${size}"), reference("my%20x.vmdk", 1, 2)], [disk(), disk(2)])
    members = {"my x.vmdk": Member("my x.vmdk", 0, 0, 1, "0", (0, 0))}
    assert codes(collect(ovf.lint_descriptor(content, members, lambda _: None))) == []
    assert codes(collect(ovf.lint_descriptor(content, {}, lambda _: None))) == [ovf.GONE]


# -- hardware


def test_only_the_elements_of_cim_have_an_order() -> None:
    more = '<vmw:Config ovf:required="false" vmw:key="slotInfo.pciSlotNumber" vmw:value="160"/>'
    assert plain(CPU, item(ElementName="s", InstanceID=3, ResourceType=6, extra=more), drive()) == []
    swapped = item(InstanceID=3, ElementName="s", ResourceType=6)
    (found,) = plain(CPU, swapped, drive())
    assert (found.severity, found.affects) == ("warning", ())


@pytest.mark.parametrize(
    "family",
    ["vmx-10,vmx-11", "vmx-10 vmx-11", "vmx-08 Cisco:Internal:VMCloud-01", "foobar, vmx-04, xen3", "vmx-6"],
)
def test_several_families(family: str) -> None:
    assert plain(family=family) == []


@pytest.mark.parametrize("family", ["virtualbox-2.2", "xen-3.0-x86_64", "DMTF:xen:pvm", "vmx"])
def test_other_families_are_an_error_for_vsphere(family: str) -> None:
    (found,) = plain(family=family)
    assert (found.severity, found.affects) == ("error", (VSPHERE,))
    assert (found.code, found.fields) == (hardware.OTHER_FAMILY, {"named": family})


def test_families_of_several_systems_and_new_ones() -> None:
    systems = "".join(
        f"<System><vssd:VirtualSystemType>{kind}</vssd:VirtualSystemType></System>"
        for kind in ("xen3", "vmx-11")
    )
    assert plain(systems=systems) == []
    (new,) = plain(family="vmx-20 vmx-21")
    assert (new.severity, new.affects) == ("warning", (Affected("esxi", before="8.0"),))


def test_one_id_for_each_deployment_option() -> None:
    def cpus(count: int, attributes: str = "") -> str:
        return item(
            attributes=attributes, ElementName="c", InstanceID=1, ResourceType=3, VirtualQuantity=count
        )

    assert (
        plain(
            cpus(1),
            cpus(2, ' ovf:configuration="large medium"'),
            cpus(4, ' ovf:configuration="large"'),
            cpus(1, ' ovf:bound="min"'),
            SCSI,
            drive(),
        )
        == []
    )
    assert codes(plain(cpus(1), cpus(2), SCSI, drive())) == [hardware.SAME_ID]
    large = ' ovf:configuration="large"'
    assert codes(plain(cpus(1, large), cpus(2, large), SCSI, drive())) == [hardware.SAME_ID_IN]
    assert codes(plain(item(ElementName="c", ResourceType=3), SCSI, drive())) == [hardware.NO_ID]


@pytest.mark.parametrize(
    ("kind", "subtype", "says"),
    [
        (6, "buslogic lsilogic", None),
        (6, "someother, lsilogic", None),
        (6, "", None),
        (6, "VirtualSCSI", None),
        (6, "whatever", hardware.SCSI_UNKNOWN),
        (20, "vmware.sata.ahci", None),
        (20, "AHCI", None),
        (20, "vmware.nvme.controller", None),
        (20, "VirtioSCSI", hardware.STORAGE_UNKNOWN),
        (35, "ensoniq1371", hardware.SOUND),
        (35, "vmware.soundcard.hdaudio", None),
        (5, "PIIX3", None),
        (10, "E10000", None),
    ],
)
def test_devices(kind: int, subtype: str, says: Code | None) -> None:
    device = item(ElementName="x", InstanceID=3, ResourceSubType=subtype, ResourceType=kind)
    assert codes(plain(CPU, device, drive())) == ([says] if says else [])
    optional = device.replace("<Item>", '<Item ovf:required="false">')
    assert codes(plain(CPU, optional, drive())) == []


def test_sata_needs_newer_hardware() -> None:
    sata = item(ElementName="x", InstanceID=3, ResourceSubType="AHCI", ResourceType=20)
    (found,) = plain(CPU, sata, drive(), family="vmx-09")
    assert (found.severity, found.affects) == ("warning", (VSPHERE,))
    assert found.code == hardware.STORAGE_SINCE
    assert plain(CPU, sata, drive(), family="vmx-09 vmx-10") == []


@pytest.mark.parametrize(
    ("resource", "says"),
    [
        ("ovf:/disk/d1", None),
        ("/disk/d1", None),
        ("ovf://disk/d1", None),
        ("ovf:/file/f1", None),
        ("${where}", None),
        ("ovf:/disk/d7", hardware.NO_SUCH_DISK),
        ("d1", hardware.NO_RESOURCE),
    ],
)
def test_what_a_drive_names(resource: str, says: Code | None) -> None:
    device = item(ElementName="d", HostResource=resource, InstanceID=9, Parent=3, ResourceType=17)
    assert codes(plain(CPU, SCSI, device)) == ([says] if says else [])


# -- other versions and other spellings


def test_ovf_2_is_one_finding_and_checked_by_the_same_rules() -> None:
    sasd = f"{ovf.RASD.replace('Resource', 'Storage')}.xsd"
    ide = item(
        "sasd", ElementName="d", HostResource="/disk/d1", InstanceID=9, Parent=77, ResourceType=17
    ).replace("<StorageItem>", f'<StorageItem xmlns:sasd="{sasd}">')
    found = codes(plain(CPU, SCSI, ide, space=ovf.OVF2))
    assert found == [ovf.VERSION_2, hardware.NO_PARENT]


def test_a_collection_is_one_finding() -> None:
    content = descriptor([reference("a.vmdk", 1)], [disk()])
    system = content[content.index(b"<VirtualSystem ") : content.index(b"</Envelope>")]
    second = system.replace(b'ovf:id="vm"', b'ovf:id="vm2"')
    both = b'<VirtualSystemCollection ovf:id="c">' + system + second + b"</VirtualSystemCollection>"
    (found,) = checked(content.replace(system, both))
    assert (found.severity, found.code) == ("warning", ovf.SEVERAL_SYSTEMS)


def test_ovf_before_the_standard_is_named() -> None:
    content = (
        '<ovf:Envelope xmlns:ovf="http://www.vmware.com/schema/ovf/1/envelope" xmlns:xsi="urn:x" '
        f'xmlns:rasd="{ovf.RASD}" xmlns:vssd="{ovf.VSSD}"><References>'
        '<File ovf:href="a.vmdk" ovf:id="f1" ovf:size="1"/></References>'
        '<Section xsi:type="ovf:DiskSection_Type"><Disk ovf:diskId="d1" ovf:fileRef="f1" '
        'ovf:capacity="50331648" ovf:format="http://www.vmware.com/specifications/vmdk.html#sparse"/></Section>'
        '<Content xsi:type="ovf:VirtualSystem_Type"><Section xsi:type="ovf:VirtualHardwareSection_Type">'
        "<System><vssd:VirtualSystemType>vmx-4</vssd:VirtualSystemType></System><Item><rasd:InstanceId>1"
        "</rasd:InstanceId><rasd:ResourceType>3</rasd:ResourceType></Item></Section></Content></ovf:Envelope>"
    ).encode()
    found = checked(content)
    assert codes(found) == []
    assert ovf.VERSION_09 in codes(found, "warning")
    assert ovf.read_descriptor(content).disks[0].file is not None


def test_prefixes_are_free() -> None:
    content = (
        f'<o:Envelope xmlns:o="{ovf.OVF}" xmlns:r="{ovf.RASD}" xmlns:v="{ovf.VSSD}"><o:References>'
        '<o:File o:href="a.vmdk" o:id="f1" o:size="1"/></o:References><o:DiskSection><o:Disk o:diskId="d1" '
        f'o:fileRef="f1" o:capacity="{SIZE}" o:capacityAllocationUnits="byte" o:populatedSize="1" '
        f'o:format="{ovf.STREAM}"/></o:DiskSection><o:VirtualSystem><o:VirtualHardwareSection><o:System>'
        "<v:VirtualSystemType>vmx-13</v:VirtualSystemType></o:System><o:Item><r:InstanceID>1</r:InstanceID>"
        "<r:ResourceType>3</r:ResourceType></o:Item></o:VirtualHardwareSection></o:VirtualSystem></o:Envelope>"
    ).encode()
    assert codes(checked(content)) == []
    assert set(codes(checked(content), "warning")) <= {ovf.NO_OVF_PREFIX, ovf.NO_RASD_PREFIX}


@pytest.mark.parametrize("root", ['<Envelope xmlns="urn:x"/>', "<Envelope/>", "<HTML/>"])
def test_what_is_no_descriptor_is_told_so(root: str) -> None:
    found = collect(ovf.lint_descriptor(root.encode(), {}, lambda _: None))
    assert {ovf.OTHER_SPACE, ovf.NO_SPACE, ovf.OTHER_ROOT} & {finding.code for finding in found}


# -- archive and manifest


def package(good: bytes) -> dict[str, bytes]:
    return {"vm.ovf": descriptor([reference("1.vmdk", len(good))], [disk()]), "1.vmdk": good}


def test_pax_is_one_error_and_gnu_none(tmp_path: Path, good: bytes) -> None:
    files = package(good)
    pax = pack(tmp_path / "pax.ova", files, tarfile.PAX_FORMAT)
    assert errors(pax, "ova") == [ova.PAX]
    long = "n" * 120 + ".vmdk"
    content = descriptor([reference(long, len(good))], [disk()])
    gnu = pack(tmp_path / "gnu.ova", {"vm.ovf": content, "long.nvram": b"n"}, tarfile.GNU_FORMAT)
    assert errors(gnu, "ova") == [ovf.GONE]
    gnu = pack(tmp_path / "gnu.ova", files, tarfile.GNU_FORMAT)
    assert lint(gnu, "ova") == []


def test_names_in_folders_and_with_dots(tmp_path: Path, good: bytes) -> None:
    files = {f"./{name}": data for name, data in package(good).items()}
    assert errors(pack(tmp_path / "dots.ova", files, manifest=sums(package(good))), "ova") == []
    content = descriptor([reference("sub/1.vmdk", len(good))], [disk()])
    found = lint(pack(tmp_path / "sub.ova", {"vm.ovf": content, "sub/1.vmdk": good}), "ova")
    assert codes(found) == []
    assert codes(found, "warning") == [ova.FOLDERS]


@pytest.mark.parametrize(
    ("form", "algorithm", "says"),
    [
        ("{a}({n})= {h}\n", "SHA1", None),
        ("{a}({n})= {h}\n", "SHA512", None),
        ("{a}({n})= {h}\r\n", "SHA256", None),
        ("{a}({n}) = {h}\n", "SHA256", None),
        ("{a} ({n}) = {h}\n", "SHA256", manifest.BLANK),
        ("{a}: {n} {h}\n", "SHA256", manifest.FORM),
    ],
)
def test_manifests(form: str, algorithm: str, says: Code | None, tmp_path: Path, good: bytes) -> None:
    files = package(good)
    lines = sums(files, algorithm, form)
    for written in (
        lines,
        lines + b"\n",
        lines.upper().replace(b"VM.OVF", b"vm.ovf").replace(b"1.VMDK", b"1.vmdk"),
    ):
        found = errors(pack(tmp_path / "m.ova", files, manifest=written), "ova")
        assert set(found) <= {says}
        assert bool(found) == bool(says)
    assert len(found) == (2 if says == manifest.FORM else bool(says))
    assert codes(lint(pack(tmp_path / "m.ova", files, manifest=b""), "ova")) == []


def test_a_manifest_names_files_as_urls_do(tmp_path: Path, good: bytes) -> None:
    files = {"vm.ovf": descriptor([reference("my%201.vmdk", len(good))], [disk()]), "my 1.vmdk": good}
    escaped = sums(files).replace(b"my 1", b"my%201")
    assert lint(pack(tmp_path / "u.ova", files, manifest=escaped), "ova") == []
    wrong = escaped.replace(b"= ", b"= 0", 1)
    assert errors(pack(tmp_path / "u.ova", files, manifest=wrong), "ova") == [manifest.DESCRIPTOR_DIGEST]


def test_files_beside_the_disks_are_no_fault(tmp_path: Path, good: bytes) -> None:
    files = {**package(good), "vm.nvram": b"n", "de.msg": b"m", "cd.iso": b"i"}
    files["vm.ovf"] = descriptor(
        [
            reference("1.vmdk", len(good)),
            *(reference(name, 1, number) for number, name in ((2, "vm.nvram"), (3, "de.msg"), (4, "cd.iso"))),
        ],
        [disk()],
    )
    assert lint(pack(tmp_path / "more.ova", files), "ova") == []
    files["vm.cert"] = b"c"
    manifest = sums({name: data for name, data in files.items() if name != "vm.cert"})
    assert lint(pack(tmp_path / "more.ova", files, manifest=manifest), "ova") == []


def test_no_message_shows_python(tmp_path: Path, good: bytes) -> None:
    found = [
        *checked(descriptor([], [disk(capacity="", format="")], [item(ResourceType=17)], family="")),
        *lint(pack(tmp_path / "x.ova", {"vm.ovf": b"<Envelope/>", "1.vmdk": b""}), "ova"),
    ]
    for finding in found:
        for odd in ("None", "b'", "[]", "''"):
            assert odd not in finding.text + finding.where + finding.fix


def test_tables_of_hardware_are_what_the_rules_use() -> None:
    assert hardware.words("a, b\n c,") == ["a", "b", "c"]
    assert ova.DISK_NAMES[0] == ".vmdk"
