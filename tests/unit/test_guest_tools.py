"""Programs that the guest's steps bring along."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build.minimize import closure, elf, minimize
from build.seal import seal

# ELF -------------------------------------------------------------------------------------------


def image(
    needed: list[str], *, runpath: str = "", interpreter: str = "", wide: bool = True, machine: int = 62
) -> bytes:
    """A file as a linker writes it, as far as ld.so looks."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in [*needed, runpath])
    at = {name: strings.index(name.encode() + b"\0") for name in [*needed, runpath]}
    header, program, entry = (64, 56, 16) if wide else (52, 32, 8)
    word = "<qQ" if wide else "<iI"
    text = interpreter.encode() + b"\0" if interpreter else b""
    start = header + program * (3 if interpreter else 2)
    dynamic = [(1, at[name]) for name in needed] + ([(29, at[runpath])] if runpath else [])
    table = start + len(text) + entry * (len(dynamic) + 3)
    dynamic += [(5, 0x1000 + table), (10, len(strings)), (0, 0)]
    body = text + b"".join(struct.pack(word, *pair) for pair in dynamic) + strings
    size = start + len(body)

    def segment(kind: int, offset: int, length: int) -> bytes:
        if wide:
            return struct.pack("<IIQQQQQQ", kind, 4, offset, 0x1000 + offset, 0, length, length, 8)
        return struct.pack("<IIIIIIII", kind, offset, 0x1000 + offset, 0, length, length, 4, 4)

    segments = [segment(1, 0, size), segment(2, start + len(text), entry * len(dynamic))]
    if interpreter:
        segments.append(segment(3, start, len(text)))
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    if wide:
        rest = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    else:
        rest = struct.pack("<HHIIIIIHHHHHH", 3, machine, 1, 0, 52, 0, 0, 52, 32, len(segments), 0, 0, 0)
    return ident + rest + b"".join(segments) + body


def put(root: Path, name: str, content: bytes, mode: int = 0o755) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.parametrize(("wide", "machine"), [(True, 62), (False, 3)])
def test_reads_what_a_file_needs(wide: bool, machine: int) -> None:
    data = image(
        ["liba.so.1", "libc.so.6"],
        runpath="$ORIGIN/../x:/opt/y",
        interpreter="/lib/ld.so",
        wide=wide,
        machine=machine,
    )
    found = elf.parse(data)
    assert found == elf.Elf(
        (2 if wide else 1, machine), "/lib/ld.so", ("liba.so.1", "libc.so.6"), ("$ORIGIN/../x", "/opt/y")
    )


@given(st.binary(max_size=300), st.integers(0, 400))
def test_broken_files_are_no_elf_files(noise: bytes, cut: int) -> None:
    whole = image(["liba.so.1"], interpreter="/lib/ld.so")
    for data in (noise, b"\x7fELF" + noise, whole[:cut], whole[:cut] + noise + whole[cut + len(noise) :]):
        try:
            elf.parse(data)
        except elf.NotElf:
            continue


def test_an_offset_beyond_every_file_is_no_elf_file() -> None:
    whole = bytearray(image(["liba.so.1"]))
    whole[32:40] = b"\xff" * 8
    with pytest.raises(elf.NotElf):
        elf.parse(bytes(whole))


def tree(root: Path) -> None:
    put(root, "usr/bin/tool", image(["liba.so.1"], interpreter="/lib64/ld.so"))
    put(root, "usr/lib64/ld.so", image([]))
    put(root, "usr/lib/x86_64-linux-gnu/liba.so.1.2", image(["libb.so"], runpath="$ORIGIN/private"), 0o644)
    put(root, "usr/lib/x86_64-linux-gnu/private/libb.so", image([]), 0o644)
    (root / "usr/lib/x86_64-linux-gnu/liba.so.1").symlink_to("liba.so.1.2")
    (root / "lib64").symlink_to("usr/lib64")
    put(root, "usr/bin/script", b"#!/bin/sh\n")


def test_whole_tree(tmp_path: Path) -> None:
    tree(tmp_path)
    report = elf.check(str(tmp_path))
    assert report.gaps == []
    assert report.count == 4
    assert {"/lib64/ld.so", "/usr/lib64/ld.so", "/usr/lib/x86_64-linux-gnu/liba.so.1.2"} <= report.used


@pytest.mark.parametrize(
    ("gone", "gap"),
    [
        ("usr/lib/x86_64-linux-gnu/liba.so.1.2", "/usr/bin/tool: liba.so.1 is nowhere"),
        (
            "usr/lib/x86_64-linux-gnu/private/libb.so",
            "/usr/lib/x86_64-linux-gnu/liba.so.1.2: libb.so is nowhere",
        ),
        ("usr/lib64/ld.so", "/usr/bin/tool: no program interpreter /lib64/ld.so"),
    ],
)
def test_names_what_is_missing(tmp_path: Path, gone: str, gap: str) -> None:
    tree(tmp_path)
    (tmp_path / gone).unlink()
    assert elf.check(str(tmp_path)).gaps == [gap]


def test_library_of_another_arch_does_not_count(tmp_path: Path) -> None:
    put(tmp_path, "usr/bin/tool", image(["liba.so.1"]))
    put(tmp_path, "usr/lib/liba.so.1", image([], wide=False, machine=3), 0o644)
    assert elf.check(str(tmp_path)).gaps == ["/usr/bin/tool: liba.so.1 is nowhere"]


def test_folders_of_ld_so_conf(tmp_path: Path) -> None:
    put(tmp_path, "usr/bin/tool", image(["liba.so.1"]))
    put(tmp_path, "opt/lib/liba.so.1", image([]), 0o644)
    put(tmp_path, "etc/ld.so.conf", b"include /etc/ld.so.conf.d/*.conf\n")
    put(tmp_path, "etc/ld.so.conf.d/opt.conf", b"# comment\n/opt/lib\n")
    assert elf.check(str(tmp_path)).gaps == []


def test_links_in_a_ring_end(tmp_path: Path) -> None:
    put(tmp_path, "usr/bin/tool", image(["liba.so.1"]))
    (tmp_path / "usr/lib").mkdir()
    (tmp_path / "usr/lib/liba.so.1").symlink_to("b")
    (tmp_path / "usr/lib/b").symlink_to("liba.so.1")
    assert elf.check(str(tmp_path)).gaps == ["/usr/bin/tool: liba.so.1 is nowhere"]


# Closure ---------------------------------------------------------------------------------------

STATUS = """\
Package: jre
Status: install ok installed
Depends: base (>= 1), sound | nosound, virtual-lib
Description: x
 Depends: not-a-field

Package: base
Status: install ok installed

Package: sound
Status: install ok installed
Pre-Depends: libx11-6:any (>= 2)

Package: libx11-6
Status: install ok installed

Package: removed
Status: deinstall ok config-files

Package: real-lib
Status: install ok installed
Provides: virtual-lib (= 1)

Package: desktop
Status: install ok installed
Depends: libx11-6
"""


def test_chains() -> None:
    found = closure.chains(closure.graph(STATUS), "jre")
    assert found["libx11-6"] == "jre -> sound -> libx11-6"
    assert found["real-lib"] == "jre -> virtual-lib -> real-lib"
    assert "desktop" not in found
    assert "removed" not in found


# Minimize --------------------------------------------------------------------------------------


def test_rules(tmp_path: Path) -> None:
    kept = [
        "usr/share/doc/a/copyright",
        "usr/share/locale/en/LC_MESSAGES/a.mo",
        "usr/share/locale/en_US/LC_MESSAGES/a.mo",
        "usr/share/locale/locale.alias",
        "usr/share/i18n/locales/en_US",
        "usr/share/i18n/charmaps/UTF-8.gz",
        "usr/share/i18n/SUPPORTED",
        "var/cache/debconf/config.dat",
        "var/lib/apt/lists/lock",
        "usr/share/perl/a.pm",
    ]
    gone = [
        "usr/share/doc/a/changelog.gz",
        "usr/share/doc/b/README",
        "usr/share/man/man1/a.1.gz",
        "usr/share/man/de/man1/a.1.gz",
        "usr/share/info/a.gz",
        "usr/share/fonts/a.ttf",
        "usr/share/locale/de/LC_MESSAGES/a.mo",
        "usr/share/locale/english/LC_MESSAGES/a.mo",
        "usr/share/i18n/locales/de_DE",
        "usr/share/i18n/charmaps/KOI8-R.gz",
        "var/lib/apt/lists/mirror_dists_Release",
        "var/cache/apt/pkgcache.bin",
        "var/cache/debconf/templates.dat-old",
    ]
    for name in [*kept, *gone]:
        put(tmp_path, name, b"12345")
    (tmp_path / "usr/share/doc/c").symlink_to("a")
    saved = sum(size for _, size in (minimize.apply(rule, str(tmp_path)) for rule in minimize.RULES))
    assert saved == 5 * len(gone)
    assert {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.is_file() and not path.is_symlink()
    } >= set(kept)
    assert not any((tmp_path / name).exists() for name in gone)
    assert (tmp_path / "usr/share/doc/c").is_symlink(), "it leads to another package's copyright file"
    assert (tmp_path / "usr/share/man/man1").is_dir(), "a JRE's maintainer script needs it"
    assert not (tmp_path / "usr/share/doc/b").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "precious", b"x")
    (tmp_path / "tree/usr/share").mkdir(parents=True)
    (tmp_path / "tree/usr/share/doc").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree/usr/share/man").symlink_to(tmp_path / "elsewhere")
    for rule in minimize.RULES:
        minimize.apply(rule, str(tmp_path / "tree"))
    assert (tmp_path / "elsewhere/precious").exists()


# Seal ------------------------------------------------------------------------------------------


def keystore(entries: list[tuple[str, int, bytes]], tag: int = 2) -> bytes:
    """A Java keystore of version 2, as keytool writes it."""
    body = struct.pack(">III", 0xFEEDFEED, 2, len(entries))
    for alias, time, certificate in entries:
        name = alias.encode()
        body += struct.pack(">IH", tag, len(name)) + name + struct.pack(">Q", time)
        body += struct.pack(">H", 5) + b"X.509" + struct.pack(">I", len(certificate)) + certificate
    return body + hashlib.sha1("changeit".encode("utf-16-be") + b"Mighty Aphrodite" + body).digest()


def test_keystores_of_different_hours_become_one() -> None:
    one = keystore([("b", 5, b"two"), ("a", 9, b"one")])
    two = keystore([("a", 1, b"one"), ("b", 2, b"two")])
    wanted = keystore([("a", 100_000, b"one"), ("b", 100_000, b"two")])
    assert [seal.normalized_keystore(data, 100) for data in (one, two)] == [wanted, wanted]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 100,
        keystore([("a", 1, b"x")])[:-1] + b"\0",
        keystore([("a", 1, b"x")], tag=1),
        keystore([])[:4] + b"\0\0\0\1" + keystore([])[8:],
    ],
)
def test_other_keystores_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"keystore|digest|certificate"):
        seal.normalized_keystore(data, 1)


@given(st.binary(max_size=200))
def test_any_keystore_is_taken_or_refused(data: bytes) -> None:
    salt = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"
    body = struct.pack(">III", 0xFEEDFEED, 2, 3) + data
    try:
        seal.normalized_keystore(body + hashlib.sha1(salt + body).digest(), 1)
    except (ValueError, struct.error):
        return


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b'Acquire::http::Proxy "http://cache:3142";\n', True),
        (b'Acquire {\n http { Proxy "http://x"; }\n}\n', True),
        (b'Acquire { http::Proxy "http://x"; };\n', True),
        (b"https_proxy=http://x\n", True),
        (b"HTTP_PROXY = http://x\n", True),
        (b'// Proxy "x";\n# Proxy "x";\n# no proxy here\nAPT::Install-Recommends "false";\n', False),
    ],
)
def test_proxy_lines(text: bytes, names: bool) -> None:
    assert bool(seal.PROXY.search(text)) is names


@pytest.mark.parametrize("hashed", ["$6$salt$abc/DEF.", "$y$j9T$x$y", "$6$rounds=5000$a$b"])
def test_hash_of_a_password(hashed: str) -> None:
    assert seal.HASH.fullmatch(hashed)


@pytest.mark.parametrize("hashed", ["password", "$6$a:b", "$6$a\nroot::0", "!", "*", "$$"])
def test_no_hash_of_a_password(hashed: str) -> None:
    assert not seal.HASH.fullmatch(hashed)
