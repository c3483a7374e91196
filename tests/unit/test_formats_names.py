"""The table of formats: names, what is asked of the build host, and every way to get it wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.engine.errors import BuildError
from build.engine.options import Options, Qcow2
from build.engine.settings import Loaded, Settings, load
from build.formats import FORMATS
from build.verbs import convert, inspect

SHIPPED = Path(__file__).resolve().parents[2] / "config" / "systemvm.yaml"


def loaded(**values: Any) -> Loaded:
    settings = Settings.model_validate(values)
    return Loaded(settings, {}, Path("image.yaml"))


def ask(asked: str, options: Options | None = None, **values: Any) -> dict[str, Any]:
    given = loaded(**values)
    chosen = convert.chosen(asked, given.settings)
    made: dict[str, Any] = wire.dump(convert.request(given, chosen, "/l/x.img", "/l", 1, options))
    return made


def test_the_shipped_table_gives_cloudstacks_names() -> None:
    given = load(SHIPPED, {}, overrides=["cloudstack_release=4.22.0.1"])
    made = convert.request(given, convert.chosen("", given.settings), "/l/x.img", "/l", 1)
    assert {row["name"]: row["file"] for row in made.formats} == {
        "qcow2": "systemvmtemplate-4.22.0-x86_64-kvm.qcow2.bz2",
        "ova": "systemvmtemplate-4.22.0-x86_64-vmware.ova",
        "vhd": "systemvmtemplate-4.22.0-x86_64-xen.vhd.bz2",
        "hyperv-vhd": "systemvmtemplate-4.22.0-x86_64-hyperv.vhd.zip",
        "raw": "systemvmtemplate-4.22.0-x86_64-ovm.raw.bz2",
    }
    assert convert.file_name("vhdx", given.settings) == "systemvm.vhdx"


def test_a_release_with_an_earlier_ones_template_goes_by_its_name() -> None:
    given = load(SHIPPED, {}, overrides=["cloudstack_release=4.21.0"])
    assert convert.file_name("ova", given.settings) == "systemvmtemplate-4.20.2-x86_64-vmware.ova"


def test_an_empty_release_is_an_error_and_never_a_blank_field() -> None:
    given = load(SHIPPED, {}, overrides=["cloudstack_release="])
    with pytest.raises(BuildError, match=r"{template} would be blank") as caught:
        convert.request(given, ["vhd"], "/l/x.img", "/l", 1)
    assert "cloudstack_release" in caught.value.hint


def test_without_a_table_files_are_called_after_the_image() -> None:
    files = [row["file"] for row in ask(",".join(FORMATS), imagename="box")["formats"]]
    shown = {"box.vhd", "box.ova", "box.vmdk", "box.qcow2", "box.vhdx", "box-hyperv.vhd", "box.raw"}
    assert shown <= set(files)
    assert len(files) == len(set(files)) == len(FORMATS)


def test_what_is_chosen() -> None:
    bare = Settings()
    assert convert.chosen("", bare) == tuple(FORMATS)
    assert convert.chosen(" ova , vhd,ova", bare) == ("ova", "vhd")
    assert convert.chosen("", Settings(names={"vhd": "a.vhd"})) == ("vhd",)
    assert convert.chosen("", Settings(formats=("raw",), names={"vhd": "a.vhd"})) == ("raw",)


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(BuildError, match="unknown format 'qcow3'") as caught:
        convert.chosen("vhd,qcow3", Settings())
    assert "did you mean 'qcow2'" in caught.value.hint
    assert "hyperv-vhd" in caught.value.hint
    with pytest.raises(BuildError, match="unknown format 'hdd'"):
        convert.chosen("vhd", Settings(names={"hdd": "x.hdd"}))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("disk.qcow2", "does not end in .vhd"),
        ("disk-{version}.vhd", "unknown field {version}"),
        ("../disk.vhd", "is no file name"),
        ("disk image.vhd", "is no file name"),
        (".vhd", "is no file name"),
        ("disk.vhd.xz", "does not end in .vhd"),
    ],
)
def test_names_that_cannot_be(row: str, says: str) -> None:
    with pytest.raises(BuildError, match=says):
        ask("vhd", names={"vhd": row})


def test_two_formats_may_not_share_a_name() -> None:
    with pytest.raises(BuildError, match="is the name of vhd, too"):
        ask("vhd,hyperv-vhd", names={"vhd": "a.vhd", "hyperv-vhd": "a.vhd"})


def test_the_end_of_a_name_asks_for_the_outer_compression() -> None:
    table = {
        "vhd": "a.vhd.bz2",
        "qcow2": "a.qcow2.gz",
        "ova": "a.ova",
        "raw": "a.img.zst",
        "hyperv-vhd": "b.vhd.zip",
    }
    rows = {row["name"]: row for row in ask("", names=table)["formats"]}
    assert {name: row["compress"] for name, row in rows.items()} == {
        "vhd": "bz2",
        "qcow2": "gz",
        "ova": "",
        "raw": "zst",
        "hyperv-vhd": "zip",
    }
    assert rows["qcow2"]["options"]["compression"] == "none"
    assert rows["hyperv-vhd"]["options"] == {"creator": "hyperv"}
    assert 'ovf:href="a-disk1.vmdk"' in rows["ova"]["options"]["ovf"]


def test_zstd_needs_version_3() -> None:
    zstd = Options(qcow2=Qcow2(compression="zstd"))
    with pytest.raises(BuildError, match="version 2 knows no zstd"):
        ask("qcow2", zstd)
    options = ask("qcow2", Options(qcow2=Qcow2(compression="zstd", version=3)))["formats"][0]["options"]
    assert options == {"compression": "zstd", "version": 3}


def test_register_parameters_name_the_hypervisor_and_system() -> None:
    rows = {row["name"]: row for row in ask("", cloudstack_release="4.22.0")["formats"]}
    assert {name: row["register"]["name"] for name, row in rows.items() if "register" in row} == {
        "qcow2": "systemvm-kvm-4.22.0-x86_64",
        "ova": "systemvm-vmware-4.22.0-x86_64",
        "vhd": "systemvm-xenserver-4.22.0-x86_64",
        "hyperv-vhd": "systemvm-hyperv-4.22.0-x86_64",
        "raw": "systemvm-ovm3-4.22.0-x86_64",
    }
    assert rows["vhd"]["register"]["hypervisor"] == "XenServer"
    assert rows["vhd"]["register"]["ostype"] == "Other Linux (64-bit)"
    assert rows["ova"]["register"]["format"] == "OVA"
    assert rows["qcow2"]["register"]["ostype"] == "Debian GNU/Linux 12 (64-bit)"


@pytest.mark.parametrize(
    "values", [{}, {"cloudstack_release": "4.22.0", "arch": "i386"}], ids=["none", "32 bits"]
)
def test_what_no_cloudstack_starts_is_not_described_to_it(values: dict[str, Any]) -> None:
    made = ask("", **values)
    assert made["cloudstack"] is None
    assert not [row for row in made["formats"] if "register" in row]


def test_i386_describes_a_32_bit_guest() -> None:
    ovf = ask("ova", arch="i386")["formats"][0]["options"]["ovf"]
    assert 'ovf:id="95" vmw:osType="debian10Guest"' in ovf
    assert convert.file_name("raw", Settings(arch="i386", names={"raw": "a-{arch}.raw"})) == "a-i386.raw"


FOUND = wire.Finding(
    code="VHD099",
    severity="error",
    where="byte 0x1",
    text="wrong\x1b[31m\nvalue",
    refused_by="XenServer",
    fix="fix it",
    lossy=False,
    disk=None,
    fields={},
    affects=({"platform": "xenserver"},),
    repair="",
    times=1,
)
SEEN = wire.Inspected(
    file="x.vhd",
    size=10,
    allocated=0,
    outer="bz2",
    format="vhd",
    virtual_size=2 << 20,
    facts={"creator": "tap 1.3"},
    findings=(replace(FOUND, severity="info", fix="", refused_by="", affects=()), FOUND),
)


def test_what_inspect_shows() -> None:
    shown = inspect.lines(SEEN)
    assert shown[0] == "x.vhd: vhd inside bz2"
    assert any(line.split() == ["virtual", "size", "2097152", "bytes", "(2", "MiB)"] for line in shown)
    assert shown[-4:] == [
        r"error VHD099: byte 0x1: wrong\x1b[31m\nvalue  [XenServer]",
        "  hint: fix it",
        r"info VHD099: byte 0x1: wrong\x1b[31m\nvalue",
        "findings: 1 error, 1 info",
    ]
    assert inspect.status(SEEN) == 1
    assert inspect.status(replace(SEEN, findings=SEEN.findings[:1])) == 0
    assert inspect.lines(replace(SEEN, findings=()))[-1] == "no findings"
