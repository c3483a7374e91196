"""Small valid inputs for every target, made anew each time: what the fuzzer starts from."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import struct
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
CHANGELOG = """openssl (3.0.17-1~deb12u2) bookworm-security; urgency=medium

  * CVE-2025-9230 and CVE-2025-9232

 -- A Person <a@example.org>  Sat, 10 Feb 2024 10:01:15 +0000

openssl (3.0.16-1) bookworm; urgency=low (HIGH for some)

  [ Another ]
  * New upstream version

 -- A Person <a@example.org>  Fri, 09 Feb 2024 10:01:15 +0000
"""
LOCK = """lock 1
image probe
suite bookworm
arch amd64
components main
security yes
epoch 1707559275
asked openssl
release bookworm 2024-02-10T10:01:15Z {digest} 4D64FEC119C2029067D6E791F8D2585B8783D481
package openssl 3.0.17-1 amd64 bookworm 10 {digest} openssl pool/o/openssl_3.0.17-1_amd64.deb base
package zlib1g 1:1.2-1 amd64 bookworm 10 {digest} zlib pool/z/zlib1g_1.2-1_amd64.deb
""".format(digest="0" * 64)
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


def ext2(extents: bool) -> bytes:
    """A file system of 1 KiB blocks with one file four folders deep, by the kernel's description of ext4."""
    names = ("var", "lib", "dpkg", "status")
    content = b"Package: dpkg\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\n"
    image = bytearray(20 * 1024)
    struct.pack_into("<6I", image, 1024, 16, 20, 0, 0, 0, 1)
    struct.pack_into("<I", image, 1024 + 24, 0)
    struct.pack_into("<III", image, 1024 + 32, 8192, 8192, 16)
    struct.pack_into("<H", image, 1024 + 56, 0xEF53)
    struct.pack_into("<I", image, 1024 + 76, 1)
    struct.pack_into("<H", image, 1024 + 88, 128)
    struct.pack_into("<III", image, 2048, 3, 4, 5)
    for number, name in zip((2, 11, 12, 13, 14), (*names, ""), strict=True):
        block = number if number > 9 else 10
        size = 1024 if name else len(content)
        map_ = struct.pack("<15I", block, *([0] * 14))
        if extents:
            map_ = struct.pack("<4HI", 0xF30A, 1, 4, 0, 0) + struct.pack("<IHHI", 0, 1, 0, block)
        place = 5 * 1024 + (number - 1) * 128
        struct.pack_into("<HxxI", image, place, 0x41ED if name else 0x81A4, size)
        struct.pack_into("<I", image, place + 32, 0x80000 if extents else 0)
        image[place + 40 : place + 40 + len(map_)] = map_
        data = content
        if name:
            data = struct.pack("<IHBB", 11 if number == 2 else number + 1, 1024, len(name), 0) + name.encode()
        image[block * 1024 : block * 1024 + len(data)] = data
    return bytes(image)


def texts() -> dict[str, list[bytes]]:
    """What is no image."""
    return {
        "inrelease": [RELEASE.encode()],
        "keyring": [ARMOUR % base64.b64encode(bytes(range(48)))],
        "packages": [PACKAGES.encode()],
        "boot": [BOOT.encode()],
        "files": [pack(ext2(extents)) for extents in (False, True)],
        "changelog": [CHANGELOG.encode()],
        "lock": [LOCK.encode()],
    }


def of_all(folder: Path) -> Mapping[str, list[bytes]]:
    """Inputs by target; `folder` is room for work."""
    more: Mapping[str, Callable[[], list[bytes]]] = {"outer": outers, "deb": debs}
    return {**images(folder), **texts(), **{name: made() for name, made in more.items()}}
