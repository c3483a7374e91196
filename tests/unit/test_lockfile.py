"""The lock's text: written, read again, and refused where it cannot be right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from build.engine import lockfile
from build.engine.errors import BuildError
from build.engine.lockfile import Change, Lock
from build.engine.resolution import Package, Release
from build.engine.settings import Settings
from build.wire import Seen

DAY = 86400
KEY = "04B54C3CDCA79751B16BC6B5225629DF75B188BD"
RELEASES = {
    "bookworm": Release(1_700_000_000, "a" * 64, (KEY,)),
    "bookworm-security": Release(1_700_100_000, "b" * 64, (KEY, "4D64FEC119C2029067D6E791F8D2585B8783D481")),
}
ZLIB = Package(
    "zlib1g",
    "1:1.2.13.dfsg-1",
    "amd64",
    "c" * 64,
    86716,
    "",
    True,
    "pool/main/z/zlib/zlib1g_1.2.13.dfsg-1_amd64.deb",
    "bookworm",
    "zlib",
)
SSL = Package(
    "openssl",
    "3.0.17-1~deb12u2",
    "amd64",
    "d" * 64,
    1_400_000,
    "",
    False,
    "pool/updates/main/o/openssl/openssl_3.0.17-1~deb12u2_amd64.deb",
    "bookworm-security",
    "openssl",
)
SETTINGS = Settings.model_validate({"imagename": "probe", "packages": {"all": ["openssl"]}})
LOCK = Lock(
    "probe",
    "bookworm",
    "amd64",
    ("main",),
    True,
    1_700_100_000,
    tuple(sorted(SETTINGS.package_list)),
    RELEASES,
    (ZLIB, SSL),
)
TEXT = lockfile.text(LOCK)


def test_what_is_written_is_read_again() -> None:
    read = lockfile.parse(TEXT, "probe.amd64.lock")
    assert lockfile.text(read) == TEXT
    assert set(read.packages) == {ZLIB, SSL}
    assert (read.releases, read.epoch, read.asked) == (RELEASES, LOCK.epoch, LOCK.asked)
    assert read.date == 1_700_100_000
    assert read.title == "probe.amd64.lock of 2023-11-16"
    lockfile.check(read, SETTINGS)


def test_one_package_is_one_line_and_lines_are_sorted() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("package ")]
    assert lines == sorted(lines)
    other = lockfile.text(replace(LOCK, packages=(ZLIB, replace(SSL, sha256="e" * 64))))
    differing = [
        pair for pair in zip(TEXT.splitlines(), other.splitlines(), strict=True) if len(set(pair)) > 1
    ]
    assert len(differing) == 1


def test_there_may_be_no_lock(tmp_path: Path) -> None:
    assert lockfile.read(tmp_path / "x.lock") is None
    assert lockfile.path_of(Path("config/probe.yaml"), "amd64") == Path("config/probe.amd64.lock")


@pytest.mark.parametrize(
    ("pattern", "instead", "says"),
    [
        ("^lock 1$", "lock 2", "what this version can read"),
        ("^epoch .*\n", "", "the line `epoch` is missing"),
        ("^epoch .*$", "epoch soon", "epoch is a number"),
        ("^suite .*$", "suite bookworm\nsuite trixie", "suite is there twice"),
        ("^package openssl 3", "package openssl v3", "'v3.0.17-1~deb12u2' is no version"),
        ("d{64}", "d" * 63, "is no SHA-256"),
        (" 1400000 ", " 14e5 ", "'14e5' is no size"),
        ("^(package openssl)(.*)$", r"\1\2" + "\n" + r"\1\2", "stands in line"),
        ("openssl_3.0.17-1~deb12u2_amd64.deb", "openssl_3.0.17-1~deb12u1_amd64.deb", "is not the file of"),
        ("pool/updates/main", "../pool", "is no file"),
        ("pool/updates/main", "pool/../../main", "is no file"),
        ("pool/updates/main", "/pool", "is no file"),
        ("pool/updates/main", "http://elsewhere/pool", "is no file"),
        (" base$", " basis", "write: package NAME"),
        (" bookworm-security 1400000", " trixie 1400000", "no release of trixie"),
        ("^release bookworm .*\n", "", "no release of bookworm "),
        ("^(release bookworm) \\S+", r"\1 yesterday", "write: release SUITE DATE"),
        ("^package zlib1g.*\n", "<<<<<<< HEAD\n", "not a line of a lock"),
    ],
)
def test_a_line_that_cannot_be_right_is_named(pattern: str, instead: str, says: str) -> None:
    text, count = re.subn(pattern, instead, TEXT, flags=re.M)
    assert count, pattern
    with pytest.raises(BuildError) as caught:
        lockfile.parse(text, "probe.lock")
    assert re.search(rf"^probe\.lock:\d+: .*({says})", caught.value.what), caught.value.what
    assert caught.value.hint


def test_a_lock_without_a_package_is_none() -> None:
    with pytest.raises(BuildError, match="names no package"):
        lockfile.parse(re.sub("(?m)^package .*\n", "", TEXT), "x")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"imagename": "other"}, "is of image probe, not of other"),
        ({"suite": "trixie"}, "is of suite bookworm, not of trixie"),
        ({"arch": "i386"}, "is of arch amd64, not of i386"),
        ({"packages": {"all": ["openssl", "nginx"]}}, r"\+nginx"),
        ({"packages": {}}, "-openssl"),
        ({"components": ["main", "contrib"]}, "components main contrib"),
        ({"security": False}, "security false"),
    ],
)
def test_a_lock_of_something_else_is_refused(changes: dict[str, object], says: str) -> None:
    told = {"imagename": "probe", "packages": {"all": ["openssl"]}, **changes}
    with pytest.raises(BuildError, match=says) as caught:
        lockfile.check(lockfile.parse(TEXT, "probe.amd64.lock"), Settings.model_validate(told))
    assert "inv lock" in caught.value.hint


def test_changes_name_old_and_new() -> None:
    newer = replace(SSL, version="3.0.18-1")
    added = replace(SSL, name="nginx", source="nginx")
    assert lockfile.changes((ZLIB, SSL), (ZLIB, newer, added)) == [
        Change("nginx", "amd64", "nginx", "", SSL.version),
        Change("openssl", "amd64", "openssl", SSL.version, "3.0.18-1"),
    ]
    assert lockfile.changes((ZLIB, SSL), (ZLIB,)) == [Change("openssl", "amd64", "openssl", SSL.version, "")]
    rebuilt = replace(ZLIB, sha256="f" * 64)
    assert [change.name for change in lockfile.changes((ZLIB,), (rebuilt,))] == ["zlib1g"]


@pytest.mark.parametrize(
    ("dates", "says"),
    [
        ({}, "what is newer is not known: no network"),
        (
            {"bookworm-security": 1_700_100_000, "bookworm": 1_800_000_000},
            "bookworm-security has nothing newer",
        ),
        ({"bookworm-security": 1_700_100_000 + 12 * DAY}, "bookworm-security is 12 days newer: inv outdated"),
        ({"bookworm-security": 1_700_100_000 + 7200}, "bookworm-security is 2 hours newer: inv outdated"),
    ],
)
def test_its_age_is_that_of_its_security_suite(dates: dict[str, int], says: str) -> None:
    assert lockfile.age(LOCK, Seen({}, dates, "", "no network")) == says
