"""Conversion against independent readers: qemu-utils, libvhdi, libvmdk, libqcow, tar, bzip2, xmllint."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from build import wire
from build.agent.verbs import inspect
from build.formats import vhd, vmdk
from build.formats.lib import partitions, qcow2
from tests.disks import ALL, MIB, ask, errors, lint, make, one, patch, spec, usual

pytestmark = pytest.mark.root

DRIVERS = {"vhd": "vpc", "vhdx": "vhdx", "qcow2": "qcow2", "vmdk": "vmdk", "raw": "raw", "vdi": "vdi"}
PYTHON = "/usr/bin/python3"  # Debian's, which has the bindings of libvhdi, libvmdk and libqcow
READ = """
import hashlib, sys
kind, path = sys.argv[1:]
if kind in ("vhd", "vhdx"):
    import pyvhdi
    disk = pyvhdi.file(); disk.open(path); size = disk.get_media_size()
elif kind == "qcow2":
    import pyqcow
    disk = pyqcow.file(); disk.open(path); size = disk.get_media_size()
else:
    import pyvmdk
    disk = pyvmdk.handle(); disk.open(path); disk.open_extent_data_files(); size = disk.get_media_size()
digest, done = hashlib.sha256(), 0
while done < size:
    data = disk.read_buffer(min(1 << 20, size - done))
    digest.update(data); done += len(data)
print(size, digest.hexdigest())
"""


UNZIP = (
    "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); sys.stdout.buffer.write(z.read(z.namelist()[0]))"
)


def run(*argv: object, status: int = 0) -> str:
    """Run a tool and hold it to an exit status."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False)
    assert done.returncode == status, (argv, done.returncode, done.stdout, done.stderr)
    return done.stdout


def independent(kind: str, path: Path) -> tuple[int, str]:
    """Virtual size and SHA-256 of the content as a libyal library sees them."""
    size, digest = run(PYTHON, "-I", "-c", READ, kind, path).split()
    return int(size), digest


DISKS: dict[str, tuple[int, list[tuple[int, int, str]]]] = {
    "full": (10 * MIB, [(0, 10 * MIB, "noise")]),
    "text": (70 * MIB, [(0, 70 * MIB, "text")]),
    "tiny": (2 * MIB, [(0, 512, "text"), (2 * MIB - 512, 512, "noise")]),
    "empty": (40 * MIB, []),
    "large": (3 << 30, [(2 << 30, 100_000, "noise"), ((3 << 30) - 512, 512, "text")]),
}
"""Size and content of disks, all of whole 2 MiB; beside them the usual one."""
LONG = {"full": 15, "text": 20, "large": 40}
"""Of which only the soak ring looks at these: seconds by name."""


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(name, marks=[pytest.mark.soak(LONG[name])] if name in LONG else [])
        for name in ("usual", *DISKS)
    ],
)
def test_qemu_and_the_libraries_see_the_raw_disk(which: str, tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", *DISKS[which]) if which in DISKS else usual(tmp_path / "disk.img")
    names = [name for name, row in ALL.items() if row["kind"] in DRIVERS and name != "qcow2-plain"]
    told = ask(disk, tmp_path / "out", [spec(name) for name in names])
    assert told["guest_sha256"] == run("sha256sum", disk).split()[0]
    for name in names:
        kind = str(ALL[name]["kind"])
        path = tmp_path / "out" / str(spec(name)["file"])
        info = json.loads(run("qemu-img", "info", "--output=json", "-f", DRIVERS[kind], path))
        assert info["virtual-size"] == disk.stat().st_size, name
        run("qemu-img", "compare", "-f", "raw", "-F", DRIVERS[kind], disk, path)
        if kind in ("qcow2", "vhdx", "vmdk", "vdi"):
            run("qemu-img", "check", "-f", DRIVERS[kind], path)
        # libqcow knows no zstd, and libyal has nothing for VDI
        if kind not in ("raw", "vdi") and name != "qcow2-zstd" and which != "large":
            assert independent(kind, path) == (disk.stat().st_size, told["guest_sha256"]), name


@pytest.mark.parametrize("size", [512, 65_536 + 512, 3 * MIB, 5 * MIB + 1536, 513 * MIB + 512])
def test_odd_sizes(size: int, tmp_path: Path) -> None:
    disk = make(tmp_path / "odd.img", size, [(0, 100_000, "text"), (size - 512, 512, "noise")])
    for name in ("qcow2", "qcow2-v3", "vmdk", "vhdx"):
        kind = str(ALL[name]["kind"])
        path = one(disk, tmp_path, name)
        run("qemu-img", "compare", "-f", "raw", "-F", DRIVERS[kind], disk, path)
        if name != "vhdx":
            assert independent(kind, path)[0] == size


def test_two_tebibytes_sparse(tmp_path: Path) -> None:
    """The largest VHD: written by the writer alone, because hashing 2 TiB of zeros takes its time."""
    from build.formats import KINDS
    from build.formats.lib.format import Target
    from build.formats.lib.pieces import units

    size = 2040 << 30
    data = b"first".ljust(2 * MIB, b".")
    for name in ("vhd", "vhdx", "qcow2", "vmdk"):
        path = tmp_path / f"large.{name}"
        with open(path, "w+b") as file:
            writer = KINDS[name].write(Target(file, size, path.name, 0), {})
            packed = (
                {writer.codec: [writer.codec.compress(u or b"") for u in units(data)]} if writer.codec else {}
            )
            for index in (0, (size // (2 * MIB)) - 1):
                writer.add(index, data, packed)
            writer.close("seed")
        info = json.loads(run("qemu-img", "info", "--output=json", "-f", DRIVERS[name], path))
        assert info["virtual-size"] == size
        read = run("qemu-io", "-r", "-f", DRIVERS[name], "-c", f"read -P 0x2e {size - 4096} 4096", path)
        assert "read 4096/4096" in read
        assert "verification failed" not in read


def test_vhdiinfo_shows_the_exact_size_and_our_uuid(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    path = one(disk, tmp_path, "vhd")
    shown = run("vhdiinfo", path)
    assert f"({disk.stat().st_size} bytes)" in shown
    told = inspect.run(wire.Inspect(str(path)), lambda kind, **fields: None)
    assert told.facts["uuid"] in shown
    assert "Dynamic" in shown


@pytest.mark.parametrize(
    ("offset", "content", "sees"),
    [
        (28, b"tap\0", "exact"),
        (28, b"win ", "exact"),
        (28, b"qem2", "exact"),
        (28, b"tap ", "geometry"),
        (28, b"vpc ", "geometry"),
        (28, b"qemu", "geometry"),
        (56, bytes(4), "exact"),
        (24, bytes(4), "exact"),
        (68, bytes(16), "exact"),
        (8, bytes(4), "exact"),
    ],
)
def test_qemu_and_libvhdi_see_each_variant_as_our_linter_says(
    offset: int, content: bytes, sees: str, tmp_path: Path
) -> None:
    """The rows of the table of VHD variants that these two readers can show."""
    size = 304 * MIB
    disk = make(tmp_path / "disk.img", size, [(0, 4 * MIB, "text"), (size - 4096, 4096, "noise")])
    path = one(disk, tmp_path, "vhd")
    footer = bytearray(path.read_bytes()[-512:])
    footer[offset : offset + len(content)] = content
    footer[64:68] = (~sum(footer[:64] + footer[68:]) & 0xFFFFFFFF).to_bytes(4, "big")
    patch(path, 0, bytes(footer))
    patch(path, -512, bytes(footer))
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "vpc", path))
    assert f"({size} bytes)" in run("vhdiinfo", path)
    by_geometry = vhd.BY_GEOMETRY in [finding.code for finding in lint(path, "vhd")]
    assert by_geometry == (sees == "geometry")
    assert (info["virtual-size"] == size) == (sees == "exact")
    run("qemu-img", "compare", "-f", "raw", "-F", "vpc", disk, path, status=0 if sees == "exact" else 1)


def test_broken_vhds_are_refused_by_others_where_our_linter_says_so(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    path = one(disk, tmp_path, "vhd")
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    assert vhd.CUT_OFF in errors(path, "vhd")
    run("vhdiinfo", path, status=1)
    path.write_bytes(whole[: 1536 + 8] + (0xFFFFF0).to_bytes(4, "big") + whole[1536 + 12 :])
    assert vhd.OVER_FOOTER in errors(path, "vhd")
    run("qemu-img", "compare", "-f", "raw", "-F", "vpc", disk, path, status=2)


def test_ova_by_tar_xmllint_and_qemu(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    path = one(disk, tmp_path, "ova")
    assert run("tar", "-tf", path).split() == ["ova.ovf", "ova.mf", "ova-disk1.vmdk"]
    folder = tmp_path / "unpacked"
    folder.mkdir()
    run("tar", "--no-same-owner", "--no-same-permissions", "-xf", path, "-C", folder)
    run("xmllint", "--noout", folder / "ova.ovf")
    run("qemu-img", "compare", "-f", "raw", "-F", "vmdk", disk, folder / "ova-disk1.vmdk")
    for line in (folder / "ova.mf").read_text().splitlines():
        name, digest = line.removeprefix("SHA256(").split(")= ")
        assert run("sha256sum", folder / name).split()[0] == digest
    with tarfile.open(path) as archive:
        assert archive.getmembers()[0].name == "ova.ovf"


@pytest.mark.parametrize(
    ("outer", "tool"),
    [
        ("bz2", ["bzip2", "-dc"]),
        ("gz", ["gzip", "-dc"]),
        ("zst", ["zstd", "-dcq"]),
        (
            "zip",
            [
                PYTHON,
                "-c",
                UNZIP,
            ],
        ),
    ],
)
def test_outer_compression_by_the_usual_tools(outer: str, tool: Sequence[str], tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    ask(disk, tmp_path, [spec("vhd", outer), spec("vhd")])
    done = subprocess.run([*tool, str(tmp_path / f"vhd.vhd.{outer}")], capture_output=True, check=True)
    assert (
        hashlib.sha256(done.stdout).digest() == hashlib.sha256((tmp_path / "vhd.vhd").read_bytes()).digest()
    )


@pytest.mark.soak(20)
def test_a_zip_of_more_than_4_gib(tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", (4 << 30) + 2 * MIB, [(0, MIB, "text"), (4 << 30, 2 * MIB, "text")])
    ask(disk, tmp_path, [spec("raw", "zip")])
    script = (
        "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); i = z.infolist()[0];"
        "print(i.filename, i.file_size, z.testzip())"
    )
    assert run(PYTHON, "-c", script, tmp_path / "raw.raw.zip").split() == [
        "raw.raw",
        str((4 << 30) + 2 * MIB),
        "None",
    ]
    told = inspect.run(
        wire.Inspect(str(tmp_path / "raw.raw.zip"), str(tmp_path)), lambda kind, **fields: None
    )
    assert told.virtual_size == (4 << 30) + 2 * MIB


FOREIGN = {
    "qcow2": ["-O", "qcow2"],
    "qcow2 compressed": ["-O", "qcow2", "-c"],
    "qcow2 small clusters": ["-O", "qcow2", "-o", "cluster_size=4096"],
    "qcow2 large clusters": ["-O", "qcow2", "-c", "-o", "cluster_size=2M"],
    "qcow2 1-bit refcounts": ["-O", "qcow2", "-o", "refcount_bits=1"],
    "qcow2 64-bit refcounts": ["-O", "qcow2", "-o", "refcount_bits=64"],
    "qcow2 old": ["-O", "qcow2", "-o", "compat=0.10"],
    "qcow2 zstd": ["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
    "vmdk stream": ["-O", "vmdk", "-o", "subformat=streamOptimized,adapter_type=lsilogic"],
    "vmdk sparse": ["-O", "vmdk", "-o", "subformat=monolithicSparse"],
    "vhd dynamic": ["-O", "vpc", "-o", "force_size=on"],
    "vhd fixed": ["-O", "vpc", "-o", "subformat=fixed,force_size=on"],
    "vhdx": ["-O", "vhdx"],
    "vhdx 1 MiB": ["-O", "vhdx", "-o", "block_size=1M"],
    "vhdx fixed": ["-O", "vhdx", "-o", "subformat=fixed"],
    "raw": ["-O", "raw"],
}
EXPECTED = {
    "vmdk sparse": vmdk.NOT_STREAM,
    "vhd dynamic": vhd.GEOMETRY,
    "vhd fixed": vhd.GEOMETRY,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_others_made_are_read_right(name: str, tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    path = tmp_path / "foreign"
    run("qemu-img", "convert", "-f", "raw", *FOREIGN[name], disk, path)
    told = inspect.run(wire.Inspect(str(path), content=True), lambda kind, **fields: None)
    assert told.guest_sha256 == hashlib.sha256(disk.read_bytes()).hexdigest()
    found = [finding.code for finding in told.findings if finding.severity == "error"]
    if name in EXPECTED:
        assert EXPECTED[name].id in found
    else:
        assert found == []


def test_what_qemu_does_to_a_vhd_is_named(tmp_path: Path) -> None:
    """Without force_size the disk grows to a whole geometry, past its backup partition table."""
    disk = usual(tmp_path / "disk.img")
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", disk, tmp_path / "q.vhd")
    told = inspect.run(wire.Inspect(str(tmp_path / "q.vhd")), lambda kind, **fields: None)
    assert (told.virtual_size or 0) > disk.stat().st_size
    assert partitions.LARGER.id in [finding.code for finding in told.findings]


def test_qemu_agrees_when_refcounts_are_wrong(tmp_path: Path) -> None:
    path = one(usual(tmp_path / "disk.img"), tmp_path, "qcow2")
    raw = path.read_bytes()
    table = int.from_bytes(raw[48:56], "big")
    block = int.from_bytes(raw[table : table + 8], "big")
    patch(path, block + 2, b"\0\x77")
    run("qemu-img", "check", "-f", "qcow2", path, status=3)
    assert qcow2.HIGH_REFCOUNT in [finding.code for finding in lint(path, "qcow2")]
    patch(path, block + 2, b"\0\0")
    run("qemu-img", "check", "-f", "qcow2", path, status=2)
    assert qcow2.LOW_REFCOUNT in errors(path, "qcow2")


def test_nothing_but_the_artifacts_is_left(tmp_path: Path) -> None:
    disk = usual(tmp_path / "disk.img")
    ask(disk, tmp_path / "out", [spec("vhd", "bz2"), spec("ova")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "vhd.vhd.bz2",
        "vhd.vhd.bz2.json",
        "ova.ova",
        "ova.ova.json",
        "MD5SUMS",
        "SHA256SUMS",
        "SHA512SUMS",
    }
    for sums, tool in (("MD5SUMS", "md5sum"), ("SHA256SUMS", "sha256sum"), ("SHA512SUMS", "sha512sum")):
        subprocess.run([tool, "-c", "--quiet", sums], cwd=tmp_path / "out", check=True)
