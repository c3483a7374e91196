"""What a management server looks for: the table of releases, and the files beside the templates."""

from __future__ import annotations

import configparser
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

from build.agent import cloudstack as beside
from build.engine import cloudstack
from tests.disks import MIB, ask, spec, usual

CHECKOUT = Path(__file__).resolve().parents[2]
ARCH = "x86_64"
FILES = {
    "qcow2": "qcow2.qcow2",
    "ova": "ova.ova",
    "vhd": "vhd.vhd",
    "hyperv-vhd": "hyperv-vhd.vhd.zip",
    "raw": "raw.raw.bz2",
}
"""Names that `tests.disks.spec` gives."""


def described(release: str = "4.22.0") -> dict[str, Any]:
    return cloudstack.metadata(release, ARCH, FILES, "https://files.example/4.22")


def written(folder: Path) -> dict[str, dict[str, str]]:
    """Sections of metadata.ini as another reader of such files has them."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((folder / "metadata.ini").read_text(encoding="utf-8"))
    return {name: dict(parser[name]) for name in parser.sections()}


def summed(folder: Path, name: str) -> dict[str, str]:
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return {file: value for value, _, file in (line.partition("  ") for line in lines)}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return usual(tmp_path / "disk.img", 8 * MIB)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("release", "checksum", "template"),
    [
        ("4.20.0", "md5", "4.20.0"),
        ("4.20.0.1", "md5", "4.20.0"),
        ("4.20.2.0", "md5", "4.20.2"),
        ("4.20.3", "md5", "4.20.2"),
        ("4.21.0", "md5", "4.20.2"),
        ("4.22.0", "sha512", "4.22.0"),
        ("4.22.1.0", "sha512", "4.22.1"),
        ("4.100.0", "sha512", "4.100.0"),
        ("5.0.0", "sha512", "5.0.0"),
    ],
)
def test_what_a_release_expects(release: str, checksum: str, template: str) -> None:
    assert cloudstack.line_of(release).checksum == checksum
    assert cloudstack.template_version(release) == template


def test_the_guide_tells_the_table() -> None:
    text = (CHECKOUT / "docs/cloudstack.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in row.split("|")[1:-1]] for row in text.splitlines() if row[:1] == "|"
    ]
    releases = [row for row in rows if re.match(r"4\.\d", row[0])]
    assert [row[0] for row in releases] == ["4.20.0", "4.20.1, 4.20.2", "4.20.3, 4.21.0", "4.22.0 and later"]
    for first, checksum, template, arches in releases:
        for release in re.findall(r"[\d.]+\d", first):
            line = cloudstack.line_of(release)
            assert checksum == line.checksum
            assert arches.split(", ") == list(line.arches)
            assert template in ("its own", cloudstack.template_version(release))
            assert (template == "its own") == (cloudstack.template_version(release) == release)
    known = {re.findall(r"[\d.]+\d", row[0])[0]: row for row in releases}
    assert {".".join(map(str, line.first)) for line in cloudstack.LINES} <= {*known, "4.22.0"}
    named = [section for template in cloudstack.FORMATS.values() for section in template.sections]
    assert sorted(named) == sorted(cloudstack.SECTIONS)
    formats = {row[0]: row[1:] for row in rows if row[0] in cloudstack.FORMATS}
    assert formats == {
        name: [
            ", ".join(f"`{section}`" for section in template.sections).strip("`"),
            template.hypervisor,
            template.format,
            template.suffix,
            template.guest_os,
        ]
        for name, template in cloudstack.FORMATS.items()
    }


@pytest.mark.parametrize(("release", "checksum"), [("4.21.0", "md5"), ("4.22.0", "sha512")])
def test_files_are_described_as_the_release_wants(release: str, checksum: str, disk: Path, out: Path) -> None:
    told = ask(disk, out, [spec("qcow2"), spec("vhd")], cloudstack=described(release))
    sums = {row["file"]: row[checksum] for row in told["files"]}
    version = cloudstack.template_version(release)
    sections = written(out)
    assert list(sections) == ["default", "kvm-x86_64", "xenserver", "lxc"]
    assert sections["default"] == {"version": f"{version}.0"}
    assert sections["xenserver"] == {
        "templatename": f"systemvm-xenserver-{version}-x86_64",
        "checksum": sums["vhd.vhd"],
        "downloadurl": "https://files.example/4.22/vhd.vhd",
        "filename": "vhd.vhd",
        "arch": "x86_64",
        "guestos": "Other Linux (64-bit)",
    }
    assert sections["kvm-x86_64"]["guestos"] == "Debian GNU/Linux 12 (64-bit)"
    assert sections["lxc"] == {**sections["kvm-x86_64"], "templatename": f"systemvm-lxc-{version}-x86_64"}
    for name, algorithm in (("md5sum.txt", "md5"), ("sha512sum.txt", "sha512")):
        assert summed(out, name) == {
            file: hashlib.new(algorithm, (out / file).read_bytes()).hexdigest() for file in sums
        }
    assert told["beside"] == {name: (out / name).read_text() for name in (*beside.SUMS, "metadata.ini")}


def test_the_first_release_reads_no_file_that_lacks_a_section(disk: Path, out: Path) -> None:
    ask(disk, out, [spec("vhd")], cloudstack=described("4.20.0"))
    sections = written(out)
    assert list(sections) == ["default", *cloudstack.SECTIONS]
    assert {name for name, keys in sections.items() if keys.get("checksum")} == {"xenserver"}
    assert list(summed(out, "md5sum.txt")) == ["vhd.vhd"]


def test_another_format_of_the_same_disk_is_added(disk: Path, out: Path) -> None:
    ask(disk, out, [spec("qcow2")], cloudstack=described())
    first = written(out)
    ask(disk, out, [spec("hyperv-vhd", "zip")], cloudstack=described())
    assert list(written(out)) == ["default", "kvm-x86_64", "hyperv", "lxc"]
    assert written(out)["kvm-x86_64"] == first["kvm-x86_64"]
    assert list(summed(out, "sha512sum.txt")) == ["hyperv-vhd.vhd.zip", "qcow2.qcow2"]


@pytest.mark.parametrize("change", ["gone", "touched", "disk", "manifest"])
def test_nothing_stale_is_described(change: str, disk: Path, out: Path) -> None:
    ask(disk, out, [spec("qcow2"), spec("vhd")], cloudstack=described())
    if change == "gone":
        (out / "qcow2.qcow2").unlink()
    elif change == "touched":
        with (out / "qcow2.qcow2").open("ab") as file:
            file.write(b"more")
    elif change == "manifest":
        (out / "qcow2.qcow2.json").write_text("[]")
    else:
        os.utime(disk, ns=(1 << 60, 1 << 60))
    ask(disk, out, [spec("vhd")], cloudstack=described())
    assert list(written(out)) == ["default", "xenserver"]
    assert list(summed(out, "md5sum.txt")) == ["vhd.vhd"]


def test_formats_that_cloudstack_does_not_know_stay_out(disk: Path, out: Path) -> None:
    ask(disk, out, [spec("vhdx"), spec("vhd")], cloudstack=described())
    assert list(written(out)) == ["default", "xenserver"]
    assert list(summed(out, "md5sum.txt")) == ["vhd.vhd"]
    assert "vhdx.vhdx" in summed(out, "MD5SUMS")


def test_a_new_description_needs_no_conversion(disk: Path, out: Path) -> None:
    ask(disk, out, [spec("vhd")])
    assert not (out / "metadata.ini").exists()
    told = ask(disk, out, [spec("vhd")], cloudstack=described("4.21.0"))
    assert told["files"][0]["state"] == "cached"
    assert written(out)["default"] == {"version": "4.20.2.0"}
    before = (out / "metadata.ini").stat().st_mtime_ns
    ask(disk, out, [spec("vhd")], cloudstack=described("4.21.0"))
    assert (out / "metadata.ini").stat().st_mtime_ns == before


def test_a_file_is_never_described_by_its_predecessors_sums(
    disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off between the new file's name and the new sums, nothing is left that would lie."""
    ask(disk, out, [spec("vhd")], cloudstack=described())

    def cut(*_arguments: Any) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(beside, "texts", cut)
    with pytest.raises(KeyboardInterrupt):
        ask(disk, out, [spec("vhd")], cloudstack=described(), force=True)
    assert (out / "vhd.vhd").exists()
    assert not {"metadata.ini", *beside.SUMS} & {path.name for path in out.iterdir()}


def test_what_is_made_for_no_release_leaves_others_descriptions_alone(disk: Path, out: Path) -> None:
    ask(disk, out, [spec("vhd")], cloudstack=described())
    before = (out / "metadata.ini").read_text()
    told = ask(disk, out, [spec("vhdx")])
    assert told["beside"] == {}
    assert (out / "metadata.ini").read_text() == before
