"""What the tools of the bootstrap write for dpkg and apt, as text."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from build import debootstrap, initramfs
from build.debootstrap import tidy, unpack
from build.debootstrap.unpack import ChangedPackage, Unpacked, UnsupportedPackage
from build.engine.resolution import Package, Resolution
from build.engine.settings import Loaded, Settings
from build.tools import nosync


def package(
    name: str, files: tuple[str, ...] = ("/.",), triggers: str = "", preinst: str = "", **fields: str
) -> Unpacked:
    told = {
        "Package": name,
        "Architecture": "amd64",
        **{key.replace("_", "-"): text for key, text in fields.items()},
    }
    control = "".join(f"{key}: {value}\n" for key, value in told.items()).strip()
    return Unpacked(name, control, files, {}, (), triggers, preinst, told)


def test_packages_come_after_what_they_need() -> None:
    ordered = unpack.by_dependency(
        [
            package("a", Depends="c | x, virtual"),
            package("b", Provides="virtual (= 1)"),
            package("c", Pre_Depends="b"),
        ]
    )
    assert [one.key for one in ordered] == ["b", "c", "a"]


def test_a_circle_is_cut_the_same_way_every_time() -> None:
    circle = [package("a", Depends="b"), package("b", Depends="c"), package("c", Depends="a")]
    assert [one.key for one in unpack.by_dependency(circle)] == ["c", "b", "a"]
    assert [one.key for one in unpack.by_dependency(circle[::-1])] == ["c", "b", "a"]


def test_a_stanza_says_unpacked_and_lists_new_conffiles() -> None:
    one = package("a", Version="1")
    one = Unpacked(one.key, one.control, one.files, {}, ("/etc/a",), fields=one.fields)
    assert unpack.stanza(one) == (
        "Package: a\nStatus: install ok unpacked\nArchitecture: amd64\nVersion: 1\n"
        "Conffiles:\n /etc/a newconffile\n"
    )


def test_conffiles_with_flags_and_nonsense() -> None:
    assert unpack.parse_conffiles("/etc/a\n\nremove-on-upgrade /etc/old\n", "x.deb") == ("/etc/a",)
    with pytest.raises(UnsupportedPackage):
        unpack.parse_conffiles("etc/a\n", "x.deb")


def test_triggers_are_registered_and_set_off(tmp_path: Path) -> None:
    (tmp_path / "triggers").mkdir()
    (tmp_path / "triggers/File").write_text("/usr/lib libc-bin/noawait\n")
    (tmp_path / "triggers/ldconfig").write_text("libc-bin/noawait\n")
    unpack.write_triggers(
        [
            package("mime", triggers="interest-noawait /usr/share/mime\ninterest update-mime # why\n"),
            package("lib", ("/.", "/usr", "/usr/lib", "/usr/lib/liba.so"), "activate-noawait ldconfig\n"),
            package("doc", ("/.", "/usr/share/mime/x.xml"), "activate nobody-cares\n"),
        ],
        tmp_path,
    )
    folder = tmp_path / "triggers"
    assert (folder / "File").read_text() == "/usr/lib libc-bin/noawait\n/usr/share/mime mime/noawait\n"
    assert (folder / "update-mime").read_text() == "mime\n"
    assert (folder / "Unincorp").read_text() == "/usr/lib -\n/usr/share/mime -\nldconfig -\n"


def test_every_preinst_runs_as_dpkg_would_run_it() -> None:
    text = unpack.runner([package("a", preinst="#!/bin/sh\n"), package("b")])
    assert "DPKG_MAINTSCRIPT_PACKAGE=a" in text
    assert "/var/lib/dpkg/info/a.preinst install" in text
    assert "b.preinst" not in text


def test_files_of_the_base_and_diverted_ones_are_left_to_dpkg(tmp_path: Path) -> None:
    (tmp_path / "info").mkdir()
    (tmp_path / "info/base.list").write_text("/.\n/etc\n/etc/issue\n")
    (tmp_path / "diversions").write_text("/bin/sh\n/bin/sh.distrib\ndash\n")
    unpack.check_owners([package("a", ("/.", "/etc/other"))], tmp_path)
    unpack.check_owners([package("base", ("/.", "/etc/issue"))], tmp_path)
    for path in ("/etc/issue", "/bin/sh"):
        with pytest.raises(UnsupportedPackage):
            unpack.check_owners([package("a", ("/.", path))], tmp_path)


def archive(*entries: tuple[str, bytes | str | None, int]) -> tarfile.TarFile:
    """A tar stream of files (bytes), symbolic links (text) and folders (None) with a user number."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content, uid in entries:
            info = tarfile.TarInfo(name)
            info.uid = info.gid = uid
            info.mtime, info.mode = 1_000_000_000, 0o644
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    raw.seek(0)
    return tarfile.open(fileobj=raw, mode="r|")


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([("./usr/../../x", b"", 0)], "leaves the tree"),
        ([("./x", b"", 1000)], "not in every system"),
        ([("./dir/x", b"", 0), ("./dir/x", b"", 0)], "in two packages"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[tuple[str, bytes, int]], why: str
) -> None:
    monkeypatch.setattr("os.chown", lambda *_args, **_options: None)
    with pytest.raises(UnsupportedPackage, match=why):
        unpack.extract(archive(*entries), tmp_path, frozenset(), summing=False)


def test_files_links_and_conffiles_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.chown", lambda *_args, **_options: None)
    unpack.prepare(tmp_path)
    entries = (
        ("./", None, 0),
        ("./lib/", None, 0),
        ("./lib/a b", b"text", 0),
        ("./etc/conf", b"kept", 0),
        ("./usr/bin/link", "../lib/a b", 0),
    )
    paths, folders, sums = unpack.extract(archive(*entries), tmp_path, frozenset({"/etc/conf"}), summing=True)
    assert paths == ["/.", "/lib", "/lib/a b", "/etc/conf", "/usr/bin/link"]
    assert (tmp_path / "usr/lib/a b").read_bytes() == b"text"
    assert (tmp_path / "usr/lib/a b").stat().st_mtime == 1_000_000_000
    assert not (tmp_path / "etc/conf").exists()
    assert (tmp_path / "etc/conf.dpkg-new").read_bytes() == b"kept"
    assert (tmp_path / "usr/bin/link").read_bytes() == b"text"
    assert folders["/lib"] == (0o755, 0, 0)
    assert sums[0] == ("lib/a b", "1cb251ec0d568de6a929b520c4aed8d1")


def test_something_that_is_no_package_is_refused() -> None:
    with pytest.raises(UnsupportedPackage):
        list(unpack.members(io.BytesIO(b"<html>")))


@pytest.mark.parametrize("size", [b"-60       ", b"1_0       ", b"          ", b"\xb2         "])
def test_a_size_that_is_none_is_refused(size: bytes) -> None:
    """One below zero would lead back to its own header for ever."""
    header = b"%-16s%-12d%-6d%-6d%-8s%s`\n" % (b"debian-binary", 0, 0, 0, b"100644", size)
    with pytest.raises(UnsupportedPackage, match="not an ar archive"):
        list(unpack.members(io.BytesIO(b"!<arch>\n" + header)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("control.tar.gz", b"no gzip"),
        ("control.tar.gz", gzip.compress(bytes(1024), mtime=0)[:20]),
        ("control.tar.xz", b"no xz"),
        ("control.tar", b"no tar".ljust(512)),
    ],
)
def test_a_package_that_is_broken_inside_is_left_to_dpkg(name: str, content: bytes, tmp_path: Path) -> None:
    header = b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"100644", len(content))
    data = b"!<arch>\n" + header + content
    (tmp_path / "a.deb").write_bytes(data)
    with pytest.raises(UnsupportedPackage, match=r"a\.deb is broken"):
        unpack.control_of(tmp_path / "a.deb", hashlib.sha256(data).hexdigest())


def test_what_is_read_of_a_package_is_what_was_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(b"signed")
    digest = hashlib.sha256(b"signed").hexdigest()
    file = unpack.signed(path, digest)
    with path.open("r+b") as swapped:
        swapped.write(b"forged")
    assert file.read() == b"signed"
    with pytest.raises(ChangedPackage, match=r"a\.deb"):
        unpack.signed(path, digest)


def test_what_differs_from_the_set_is_told() -> None:
    wanted = {
        "packages": [
            {"name": "a", "version": "1", "arch": "all"},
            {"name": "b", "version": "1", "arch": "all"},
        ]
    }
    assert tidy.compare(wanted, "a 1 all installed\nb 1 all installed\n") == []
    assert tidy.compare(wanted, "a 1 all installed\nb 2 all installed\n") == [
        "+ b 2 all installed",
        "- b 1 all installed",
    ]
    assert tidy.compare(wanted, "a 1 all installed\nb 1 all half-configured\n")


def test_what_nobody_asked_for_is_automatic() -> None:
    packages = [
        {"name": name, "arch": arch} for name, arch in (("asked", "all"), ("lib", "all"), ("dash", "amd64"))
    ]
    wanted = {"packages": packages, "asked": ["asked:amd64"], "archs": ["amd64"]}
    assert (
        tidy.extended_states(wanted, {"dash"}) == "Package: lib\nArchitecture: amd64\nAuto-Installed: 1\n\n"
    )


def test_the_filter_jumps_stay_inside_it() -> None:
    code = [
        struct.unpack("=HBBI", nosync.program()[at : at + 8]) for at in range(0, len(nosync.program()), 8)
    ]
    for place, (kind, yes, no, value) in enumerate(code):
        if kind == nosync.EQUAL and value not in nosync.SYNCS:
            assert code[place + 1 + yes] == (nosync.RETURN, 0, 0, nosync.SUCCEED)
        if kind == nosync.EQUAL and value in nosync.SYNCS:
            assert code[place + 1 + no][0] in (nosync.EQUAL, nosync.RETURN)
    assert code[-1] == (nosync.RETURN, 0, 0, nosync.ALLOW)


RESOLUTION = Resolution(
    (
        Package("apt", "2", "amd64", "a" * 64, 1, "http://internal/a.deb", True),
        Package("tool", "1:1", "all", "b" * 64, 1, "http://internal/b.deb"),
    ),
    1,
    2,
    "http://default.example/debian",
)


def loaded(**settings: object) -> Loaded:
    return Loaded(Settings.model_validate(settings), {}, Path("x.yaml"))


def test_the_image_names_debians_mirror_and_never_the_builds() -> None:
    private = {
        "debian_mirror": "http://internal/debian",
        "security_mirror": "http://internal/sec",
        "apt_proxy": "http://proxy:3142",
    }
    step = debootstrap.step(loaded(**private), RESOLUTION)
    listed = step.files["debian.sources"].content.decode()
    assert "URIs: http://default.example/debian\nSuites: bookworm bookworm-updates\n" in listed
    assert "URIs: http://default.example/debian-security\nSuites: bookworm-security\n" in listed
    everything = step.script + "".join(file.content.decode() for file in step.files.values())
    assert "internal" not in everything
    assert "proxy:3142" not in everything


def test_the_image_mirror_is_taken_and_security_may_be_left_out() -> None:
    step = debootstrap.step(loaded(image_mirror="http://own/debian", security=False), RESOLUTION)
    listed = step.files["debian.sources"].content.decode()
    assert "http://own/debian\n" in listed
    assert "security" not in listed


def test_the_key_holds_the_set_and_not_where_it_came_from() -> None:
    elsewhere = Resolution(
        tuple(
            Package(p.name, p.version, p.arch, p.sha256, p.size, "http://other/x", p.essential)
            for p in RESOLUTION.packages
        ),
        1,
        3,
        RESOLUTION.default_mirror,
    )
    newer = Resolution((RESOLUTION.packages[0],), 1, 2, RESOLUTION.default_mirror)
    step = debootstrap.step(loaded(), RESOLUTION)
    assert debootstrap.step(loaded(), elsewhere) == step
    assert debootstrap.step(loaded(), newer) != step
    assert step.bootstrap


def test_the_initramfs_depends_on_nothing_but_its_drivers() -> None:
    one = initramfs.step(loaded(hostname="a"), RESOLUTION)
    assert initramfs.step(loaded(hostname="b"), Resolution((), 1, 2)) == one
    assert "virtio_blk" in one.files["hook"].content.decode()
    assert one.files["hook"].mode == 0o755


def late(**packages: dict[str, str]) -> dict[str, dict[str, str]]:
    """Late packages, by their files: fields, and what their triggers files say."""
    return {f"{name}.deb": {"Package": name, "Triggers": "", **told} for name, told in packages.items()}


def test_what_nothing_needs_may_come_late() -> None:
    kernel = {"Depends": "kmod"}
    meta = {"Depends": "kernel (= 1)"}
    assert unpack.on_time(late(kernel=kernel, meta=meta), [package("kmod"), package("other")]) == set()


@pytest.mark.parametrize("relation", ["kernel", "a | kernel (>= 2)", "virtual:any"])
def test_what_another_needs_comes_on_time_and_all_that_it_needs(relation: str) -> None:
    packages = late(
        kernel={"Provides": "virtual (= 1)", "Pre-Depends": "modules"}, modules={}, meta={"Depends": "kernel"}
    )
    needing = [package("other", Depends=f"libc6, {relation}")]
    assert unpack.on_time(packages, needing) == {"kernel.deb", "modules.deb"}


def test_what_waits_for_the_deeds_of_others_comes_on_time() -> None:
    """Its interest is registered before they set it off."""
    packages = late(
        kernel={"Triggers": "interest-noawait /usr/share/x\n"}, meta={"Triggers": "activate ldconfig\n"}
    )
    assert unpack.on_time(packages, [package("other")]) == {"kernel.deb"}


def test_late_packages_are_left_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(packages: Iterable[Mapping[str, Any]], debs: Path, folder: Path) -> list[Unpacked]:
        unpack.prepare(folder)
        return [unpack.unpack(debs / package["file"], package["sha256"], folder) for package in packages]

    monkeypatch.setattr(unpack, "stage", alone)
    debs = tmp_path / "debs"
    debs.mkdir()
    rows = []
    for name, depends in (("other", ""), ("needed", ""), ("kernel", "other"), ("needing", "needed")):
        data = deb(name, depends)
        (debs / f"{name}.deb").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        row = {
            "file": f"{name}.deb",
            "sha256": digest,
            "size": len(data),
            "late": name in ("needed", "kernel"),
        }
        rows.append(row)
    unpacked, left = unpack.stage_but_late(rows, debs, tmp_path / "stage")
    assert [each.key for each in unpacked] == ["needed", "needing", "other"]
    assert [row["file"] for row in left] == ["kernel.deb"]
    assert (tmp_path / "stage/usr/share/needed").read_bytes() == b"needed"
    assert not (tmp_path / "stage/usr/share/kernel").exists()


def deb(name: str, depends: str) -> bytes:
    """A package with one file."""
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\n" + (
        f"Depends: {depends}\n" if depends else ""
    )
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar": plain_tar("./control", control.encode()),
        "data.tar": plain_tar(f"./usr/share/{name}", name.encode()),
    }
    members = [
        f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        + data
        + b"\n" * (len(data) % 2)
        for member, data in parts.items()
    ]
    return b"!<arch>\n" + b"".join(members)


def plain_tar(path: str, content: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo(path)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()
