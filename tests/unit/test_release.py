"""Release files, indices and what apt says, as values."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from dataclasses import replace

import pytest

from build import debian
from build.agent.debian import archives, indices, release
from build.agent.events import Failure
from build.agent.verbs import resolve

TEXT = """\
Origin: Debian
Suite: oldstable-security
Codename: bookworm-security
Date: Sat, 21 Nov 2026 00:53:02 UTC
Valid-Until: Sat, 28 Nov 2026 00:53:02 UTC
Acquire-By-Hash: yes
Architectures: amd64 i386
Components: updates/main updates/contrib
MD5Sum:
 00000000000000000000000000000000 1 main/binary-amd64/Packages
SHA256:
 aa 17 main/binary-amd64/Packages
 bb  8 main/binary-amd64/Packages.xz
 cc  9 main/binary-i386/Packages.gz
"""


def test_a_release_is_read() -> None:
    told = release.parse(TEXT)
    assert told.codename == "bookworm-security"
    assert told.date == 1795222382
    assert told.valid_until == told.date + 7 * 86400
    assert told.components == ("main", "contrib")
    assert told.by_hash
    assert not told.separate_all
    assert told.files["main/binary-amd64/Packages.xz"] == ("bb", 8)


@pytest.mark.parametrize("missing", ["Date", "SHA256"])
def test_a_release_without_what_matters_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="no Date or no SHA256"):
        release.parse(TEXT.replace(missing, "X-Other"))


@pytest.mark.parametrize("size", ["-17", "1_7", "\u0661", "9" * 19, "x"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match="main/binary-amd64/Packages has no size"):
        release.parse(TEXT.replace(" aa 17 ", f" aa {size} "))


@pytest.mark.parametrize(
    "date",
    [
        "yesterday",
        "Sat, 21 Nov 1926 00:53:02 UTC",
        "Sat, 21 Nov 99999 00:53:02 UTC",
        f"Sat, 21 Nov {'9' * 30} 00:53:02 UTC",
        f"Sat, {'9' * 30} Nov 2026 00:53:02 UTC",
        f"Sat, 21 Nov 2026 {'9' * 30}:53:02 UTC",
    ],
)
def test_a_date_that_is_none_is_refused(date: str) -> None:
    with pytest.raises(ValueError, match=r"not a date|year"):
        release.parse(TEXT.replace("Sat, 21 Nov 2026 00:53:02 UTC", date))


def test_the_last_date_that_can_be_told() -> None:
    told = release.parse(TEXT.replace("Sat, 21 Nov 2026 00:53:02 UTC", "Fri, 31 Dec 9999 23:59:59 UTC"))
    told = replace(told, valid_until=None)
    with pytest.raises(Failure, match="Fri, 31 Dec 9999 23:59:59 UTC, in the future"):
        release.check(told, "bookworm-security", "x", 1_800_000_000)


BEGIN, MIDDLE, END = (
    "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n",
    "-----BEGIN PGP SIGNATURE-----\n\niHUEARYK\n=abcd\n",
    "-----END PGP SIGNATURE-----\n",
)


@pytest.mark.parametrize(
    ("text", "framed"),
    [
        (f"{BEGIN}A: 1\n- -----BEGIN PGP SIGNATURE-----\n{MIDDLE}{END}", True),
        (f"{BEGIN}A: 1\n{MIDDLE}{END}\n\n", True),
        (f"A: 0\n{BEGIN}A: 1\n{MIDDLE}{END}", False),
        (f"{BEGIN}A: 1\n{MIDDLE}{END}A: 2\n", False),
        (f"{BEGIN}A: 1\n{MIDDLE}{END}{BEGIN}A: 1\n{MIDDLE}{END}", False),
        (f"{BEGIN}A: 1\n{MIDDLE}{END}{MIDDLE}{END}", False),
        (f"{BEGIN}A: 1\n-----BEGIN PGP MESSAGE-----\n{MIDDLE}{END}", False),
        (f"{BEGIN}A: 1\n{MIDDLE}", False),
        (f"{BEGIN}A: 1\n", False),
        ("", False),
    ],
)
def test_only_one_signed_text_and_nothing_around_it_is_read(text: str, framed: bool) -> None:
    assert release.is_framed(text.encode()) is framed


def test_who_signed_is_told_by_primary_key_and_only_for_good_signatures() -> None:
    status = "".join(
        f"[GNUPG:] NEWSIG\n[GNUPG:] {kind} {sub} who\n"
        f"[GNUPG:] VALIDSIG {sub} 2026-01-01 1 0 4 0 22 8 01 {key}\n"
        for kind, sub, key in (
            ("GOODSIG", "S1", "K1"),
            ("EXPKEYSIG", "S2", "K2"),
            ("GOODSIG", "S3", "K3"),
            ("REVKEYSIG", "S4", "K4"),
            ("GOODSIG", "S5", "K1"),
        )
    )
    assert release.good_keys(f"{status}[GNUPG:] NEWSIG\n[GNUPG:] ERRSIG S6 22\n") == ("K1", "K3")


@pytest.mark.parametrize("suffix", [".xz", ".gz", ""])
def test_an_index_is_unpacked_as_far_as_its_signed_size(suffix: str) -> None:
    packers: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.compress, ".gz": gzip.compress, "": bytes}
    pack = packers[suffix]
    packed = pack(b"Package: a\n") + (pack(b"Package: b\n") if suffix else b"")
    size = len(b"Package: a\n") * (2 if suffix else 1)
    name = f"main/binary-amd64/Packages{suffix}"
    assert indices.unpacked(name, packed, size).startswith(b"Package: a\n")
    assert len(indices.unpacked(name, packed, size)) == size
    with pytest.raises(ValueError, match=f"unpacks to more than the {size - 1} bytes"):
        indices.unpacked(name, packed, size - 1)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
@pytest.mark.parametrize("data", [b"neither one nor the other", lzma.compress(bytes(999))[:60]])
def test_a_damaged_index_is_told(suffix: str, data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be unpacked"):
        indices.unpacked(f"Packages{suffix}", data, 999)


def test_the_smallest_readable_form_of_an_index_is_taken() -> None:
    told = release.parse(TEXT)
    assert release.compressed(told, "main/binary-amd64/Packages", "x") == "main/binary-amd64/Packages.xz"
    assert release.compressed(told, "main/binary-i386/Packages", "x") == "main/binary-i386/Packages.gz"
    with pytest.raises(Failure):
        release.compressed(told, "contrib/binary-i386/Packages", "x")


def test_an_archive_with_an_index_of_its_own_for_all() -> None:
    text = TEXT.replace("amd64 i386", "all amd64").replace(
        " cc  9 main/binary-i386/Packages.gz", " cc 9 main/binary-all/Packages"
    )
    paths = release.index_paths(release.parse(text), ["main"], ["amd64"], "x")
    assert paths == ["main/binary-amd64/Packages", "main/binary-all/Packages"]
    told = release.parse(f"No-Support-for-Architecture-all: Packages\n{text}")
    assert release.index_paths(told, ["main"], ["amd64"], "x") == ["main/binary-amd64/Packages"]


def test_folded_fields_and_odd_gaps_are_read() -> None:
    found = debian.stanzas("Package: a\nDepends: b,\n c\n\n \n\nX: y\nPackage: d\n")
    assert found == [{"Package": "a", "Depends": "b,\nc"}, {"X": "y", "Package": "d"}]
    assert [debian.name_of(text) for text in debian.paragraphs("Package: a\nX: 1\n\nX: y\nPackage: d\n")] == [
        "a",
        "d",
    ]


def test_an_armoured_key_is_decoded_and_a_damaged_one_refused() -> None:
    begin, end = b"-----BEGIN PGP PUBLIC KEY BLOCK-----", b"-----END PGP PUBLIC KEY BLOCK-----"
    block = begin + b"\nComment: x\n\naGVs\nbG8=\n=abcd\n" + end + b"\n"
    assert b"".join(release.dearmor(block + block)) == b"hellohello"
    with pytest.raises(Failure):
        list(release.dearmor(begin + b"\n\na!b\n" + end))


@pytest.mark.parametrize(
    ("mirror", "asked", "places"),
    [
        ("http://m/debian", "", ["http://m/debian-security", "http://m/debian"]),
        ("http://m/x/debian", "http://s/sec", ["http://s/sec"]),
        ("http://m/copy", "", ["http://m/debian-security", "http://m/copy-security", "http://m/copy"]),
        (
            "http://m/archive/debian/20261127T090000Z",
            "",
            [
                "http://m/archive/debian-security/20261127T090000Z",
                "http://m/archive/debian/20261127T090000Z",
            ],
        ),
    ],
)
def test_where_the_security_suite_is_looked_for(mirror: str, asked: str, places: list[str]) -> None:
    assert archives.security_mirrors(mirror, asked) == places


def test_what_apt_would_install_is_read() -> None:
    said = """\
Reading package lists...
Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable, Debian-Security:12/oldstable-security [amd64])
Inst libc6:i386 (2.36-9+deb12u14 Debian:12.15/oldstable [i386])
Inst adduser (3.134 Debian:12.15/oldstable [all]) []
Conf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])
"""
    assert resolve.selections(said) == [
        ("libc6", "2.36-9+deb12u14", "amd64"),
        ("libc6", "2.36-9+deb12u14", "i386"),
        ("adduser", "3.134", "all"),
    ]


def test_both_sides_of_what_does_not_fit_are_read() -> None:
    said = """\
Some packages could not be installed.

The following packages have unmet dependencies:
 openssl : Depends: libssl3 (>= 3.0.18) but 3.0.17-1 is to be installed
 libc6-dev:i386 : Depends: libc6:i386 (= 2.36-9) but 2.36-9+deb12u14 is to be installed
                  Breaks: gcc-12 (< 12.2) but 12.1 is to be installed
E: Unable to correct problems, you have held broken packages.
"""
    assert resolve.unmet(said) == {"openssl", "libssl3", "libc6-dev", "libc6", "gcc-12"}
    assert resolve.unmet("E: Something else\n") == set()


def test_what_apt_complains_about_is_one_line() -> None:
    said = """\
The following packages have unmet dependencies:
 broken : Depends: not-there but it is not installable
          Conflicts: other but 1 is to be installed
E: Unable to correct problems, you have held broken packages.
"""
    assert resolve.complaint(said) == (
        "broken : Depends: not-there but it is not installable; Conflicts: other but 1 is to be installed"
    )
    assert resolve.complaint("E: Something else\n") == "Something else"


def test_the_base_follows_dependencies_inside_the_set() -> None:
    def entry(name: str, arch: str = "amd64", **fields: str) -> tuple[tuple[str, str, str], dict[str, str]]:
        return (name, "1", arch), {"Package": name, **fields}

    installed = dict(
        [
            entry("base-files", **{"Pre-Depends": "awk"}),
            entry("gawk", Provides="awk", Depends="libmpfr"),
            entry("mawk", Provides="awk"),
            entry("libmpfr"),
            entry("apt", Depends="none | libapt (>= 2), perl:any"),
            entry("libapt"),
            entry("libapt", "i386"),
            entry("perl", "all"),
            entry("other"),
        ]
    )
    reached = resolve.closure({"base-files", "mawk", "apt"}, installed)
    assert {key[0] for key in reached} == {"base-files", "mawk", "apt", "libapt", "perl"}
    assert ("libapt", "1", "i386") not in reached


def test_providers_are_found_by_whole_names() -> None:
    texts = [
        "Package: nfs-kernel-server\nProvides: knfs, nfs-server (= 1)\n",
        "Package: other\nProvides: nfs-server-extra\n",
        "Package: nfs-server-doc\nDescription: nfs-server\n",
    ]
    assert resolve.provided_by("nfs-server", texts) == {"nfs-kernel-server"}


def test_architectures_come_from_qualified_names() -> None:
    assert debian.architectures("amd64", ["a", "libc6:i386", "b:i386"]) == ["amd64", "i386"]


def test_all_that_apt_may_come_to_is_kept() -> None:
    texts = [
        "Package: root\nDepends: a (>= 1) | b, virtual\n",
        "Package: root\nVersion: 2\nPre-Depends: newer\n",
        "Package: a\nRecommends: left-out\n",
        "Package: provider\nProvides: x, virtual (= 1)\nDepends: deep:any\n",
        "Package: deep\n",
        "Package: left-out\n",
    ]
    kept = resolve.reachable(texts, ["root:amd64"])
    assert kept & {debian.name_of(text) for text in texts} == {"root", "a", "provider", "deep"}
    assert {"b", "newer"} <= kept


@pytest.mark.parametrize(
    ("relation", "separators", "found"),
    [
        ("libc6 (>= 2.36), debconf (>= 0.5) | debconf-2.0", ",|", ["libc6", "debconf", "debconf-2.0"]),
        ("libc6:any [amd64], g++-12 <!nocheck>", ",|", ["libc6", "g++-12"]),
        ("a | b", "|", ["a", "b"]),
        ("a | b, c", ",", ["a", "c"]),
        ("\n a,\n b", ",|", ["a", "b"]),
        (" , ,", ",|", []),
        ("", ",|", []),
    ],
)
def test_names_are_read_from_relations(relation: str, separators: str, found: list[str]) -> None:
    assert debian.names(relation, separators) == found


def test_the_base_is_what_is_essential_or_required() -> None:
    texts = [
        "Package: dpkg\nEssential: yes\n",
        "Package: apt\nPriority: required\n",
        "Package: vim\nPriority: optional\nDescription: x\n Essential: yes\n",
    ]
    assert debian.base_names(texts) == {"dpkg", "apt"}


def test_a_package_file_is_named_as_apt_names_it() -> None:
    assert debian.deb("acpid", "1:2.0.33-2+b1", "amd64") == "acpid_1%3a2.0.33-2+b1_amd64.deb"
