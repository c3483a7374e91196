"""Small valid inputs for every target, made anew each time: what the fuzzer starts from."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from build.formats.lib.codec import Zstandard
from tests.disks import ALL, MIB, ask, make, partition, spec
from tests.fuzz.targets import pack
from tests.unit.test_formats_xva import chunks, described

RELEASE = """Origin: Debian
Suite: stable
Codename: bookworm
Date: Sat, 10 Feb 2024 10:01:15 UTC
Valid-Until: Sat, 17 Feb 2024 10:01:15 UTC
Acquire-By-Hash: yes
Architectures: all amd64
Components: main
SHA256:
 {digest} 1234 main/binary-amd64/Packages.xz
 {digest} 1234 main/binary-all/Packages.gz
""".format(digest="0" * 64)
PACKAGES = """Package: base-files
Essential: yes
Priority: required
Version: 12.4
Depends: awk, libc6 (>= 2.36) | libc, python3:any
Description: a folded
 field

Package: other
Conffiles:
 /etc/other 0123
"""
BOOT = (
    "template=domP name=r-1-VM eth0ip=10.1.1.1 eth0mask=255.255.255.0 eth1ip6=fd00::1 eth1ip6prelen=64 "
    "domain=cs.internal type=router redundant_router=1 nic_macs=02:00:00:00:00:01|02:00:00:00:00:02 "
    "dns1=8.8.8.8 mgmtcidr=10.0.0.0/8,192.168.0.0/16 authorized_key=c3NoLXJzYQ== disable_rp_filter=true"
)
ARMOUR = (
    b"-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: 1\n\n%s\n=abcd\n-----END PGP PUBLIC KEY BLOCK-----\n"
)


def images(folder: Path) -> dict[str, list[bytes]]:
    """Every way in which a format can be asked for, of one small disk."""
    disk = make(folder / "disk.img", 4 * MIB, [(MIB, 3000, "text"), (3 * MIB, 600, "noise")])
    partition(disk)
    rows = [spec(name) for name in ALL]
    ask(disk, folder, rows)
    made: dict[str, list[bytes]] = {}
    for row in rows:
        made.setdefault(row["kind"], []).append(pack((folder / row["file"]).read_bytes()))
    return {**made, "gce": [pack(archive({"disk.raw": disk.read_bytes()}))], "xva": [export()]}


def archive(files: Mapping[str, bytes]) -> bytes:
    """A tar of files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def export() -> bytes:
    """An export of XenServer with one disk of a MiB."""
    files = chunks("Ref:5", bytes(MIB - 3) + b"end")
    return pack(archive({"ova.xml": described({"Ref:5": MIB}), **dict(files)}))


def outers() -> list[bytes]:
    """Every outer compression, two members or streams where there may be several, a hole inside."""
    content = b"text" * 300 + bytes(200_000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a", "b"):
            archive.writestr(
                zipfile.ZipInfo(name), content[: 1000 if name == "a" else None], zipfile.ZIP_DEFLATED
            )
    return [
        2 * bz2.compress(content, 1),
        2 * gzip.compress(content, mtime=0),
        2 * Zstandard().compress(content),
        packed.getvalue(),
    ]


def debs() -> list[bytes]:
    """A package with a control file, a conffile and a link."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in (("./control", PACKAGES.encode()), ("./conffiles", b"/etc/other\n")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("./link")
        link.type, link.linkname = tarfile.SYMTYPE, "control"
        tar.addfile(link)
    members = {"debian-binary": b"2.0\n", "control.tar.gz": gzip.compress(packed.getvalue(), mtime=0)}
    members["data.tar"] = packed.getvalue()
    return [
        b"!<arch>\n"
        + b"".join(
            b"%-16s%-12d%-6d%-6d%-8s%-10d`\n%s" % (name.encode(), 0, 0, 0, b"100644", len(content), content)
            + b"\n" * (len(content) % 2)
            for name, content in members.items()
        )
    ]


def texts() -> dict[str, list[bytes]]:
    """What is no image."""
    return {
        "inrelease": [RELEASE.encode()],
        "keyring": [ARMOUR % base64.b64encode(bytes(range(48)))],
        "packages": [PACKAGES.encode()],
        "boot": [BOOT.encode()],
    }


def of_all(folder: Path) -> Mapping[str, list[bytes]]:
    """Inputs by target; `folder` is room for work."""
    more: Mapping[str, Callable[[], list[bytes]]] = {"outer": outers, "deb": debs}
    return {**images(folder), **texts(), **{name: made() for name, made in more.items()}}
