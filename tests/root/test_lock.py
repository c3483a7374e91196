"""Locks against a mirror of our own that moves on: made, used, renewed, offline, of a snapshot, outdated."""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from build.engine.references import literal
from tests import cli, mirror
from tests.images import Built
from tests.mirror import Deb, Key, Mirror
from tests.root.test_json import documented
from tests.root.test_layers import ODD

pytestmark = pytest.mark.root
DAY = 86400


def changelog(*entries: tuple[str, str, str]) -> str:
    """A Debian changelog of version, urgency and text, newest first."""
    return "".join(
        f"libtool ({version}) stable; urgency={urgency}\n\n  * {text}\n\n"
        " -- Test <test@example.org>  Thu, 01 Jan 2026 00:00:00 +0000\n\n"
        for version, urgency, text in entries
    )


@dataclass
class Place:
    """An image definition, a mirror for it, and a LOCATION."""

    folder: Path
    archive: Mirror
    url: str

    @property
    def lock(self) -> Path:
        return self.folder / "probe.amd64.lock"

    @property
    def definition(self) -> Path:
        return self.folder / "probe.yaml"

    @property
    def flags(self) -> list[str]:
        settings = {
            "location": self.folder / "location",
            "debian_mirror": f"{self.url}/debian",
            "keyring": self.archive.key.ring,
        }
        pairs = [f"{name}={value}" for name, value in settings.items()]
        return ["--image", str(self.definition), *(word for pair in pairs for word in ("--set", pair))]

    def succeed(self, *words: str) -> str:
        return cli.succeed(*words, *self.flags)

    def refuse(self, *words: str) -> str:
        return cli.refuse(*words, *self.flags)

    def versions(self) -> dict[str, str]:
        """Name and version of each package in the lock."""
        rows = (line.split() for line in self.lock.read_text().splitlines())
        return {row[1]: row[2] for row in rows if row[0] == "package"}

    def update(self, suite: str, *debs: Deb) -> None:
        """Put newer packages into a suite."""
        names = {deb.name for deb in debs}
        kept = [deb for deb in self.archive.suites[suite] if deb.name not in names]
        self.archive.suites[suite] = [*kept, *debs]
        self.archive.publish(suite)


@pytest.fixture
def place(tmp_path: Path, key: Key) -> Iterator[Place]:
    archive = Mirror(tmp_path / "mirror", key)
    archive.suites["bookworm"] += [
        Deb("grub-pc-bin"),
        Deb("systemd-boot-efi"),
        Deb("e2fsprogs"),
        Deb("usr-is-merged"),
        Deb("other", extra={"Depends": "libother (= 1)"}),
        Deb("libother"),
    ]
    archive.publish("bookworm")
    tmp_path.chmod(0o755)
    (tmp_path / "probe.yaml").write_text("imagename: probe\npackages: {all: [tool, other]}\n")
    with archive.served() as url:
        yield Place(tmp_path, archive, url)


@pytest.fixture
def locked(place: Place) -> Place:
    place.succeed("lock")
    return place


# --- made and used ----------------------------------------------------------------------------------


def test_a_lock_is_made_once_and_used_by_whatever_resolves(locked: Place) -> None:
    text = locked.lock.read_text()
    assert locked.versions()["libtool"] == "1"
    assert "--update" in locked.succeed("lock"), "one that fits is left alone"
    assert locked.lock.read_text() == text
    locked.update("bookworm-security", Deb("libtool", "1+deb12u1"))
    shown = locked.succeed("resolve")
    assert re.search(
        r"^locked .*probe\.amd64\.lock of .*bookworm-security is .* newer: inv .*outdated", shown, re.M
    )
    assert locked.succeed("resolve", "--unlocked").startswith(("ok", " "))
    locked.succeed("fetch")
    assert (locked.folder / "location/debs/libtool_1_amd64.deb").is_file()
    assert not (locked.folder / "location/debs/libtool_1+deb12u1_amd64.deb").exists()


def test_the_same_set_with_and_without_a_lock_has_the_same_keys(place: Place) -> None:
    place.succeed("resolve")
    before = json.loads(place.succeed("plan", "--json"))["steps"]
    place.succeed("lock")
    assert json.loads(place.succeed("plan", "--json"))["steps"] == before
    place.update("bookworm", Deb("libtool", "2"))
    assert json.loads(place.succeed("plan", "--json"))["steps"] == before


def test_a_locked_build_asks_for_release_files_and_no_list(locked: Place) -> None:
    locked.archive.asked.clear()
    locked.succeed("resolve")
    assert sorted(path.rpartition("/")[2] for path in locked.archive.asked) == ["InRelease"] * 3


def test_a_mirror_out_of_reach_leaves_a_locked_build_alone(locked: Place) -> None:
    locked.succeed("fetch")
    flags = [word.replace(locked.url, f"http://127.0.0.1:{mirror.closed_port()}") for word in locked.flags]
    shown = cli.succeed("resolve", *flags)
    assert "what is newer is not known" in shown
    cli.succeed("fetch", *flags)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace("package libtool 1 ", "package libtool 2 "), r"lock:\d+: libtool_1_amd64"),
        (lambda text: text.replace("suite bookworm\n", "suite trixie\n"), "of suite trixie, not of bookworm"),
        (lambda text: text.replace("image probe\n", "image other\n"), "of image other, not of probe"),
        (lambda text: text.replace("arch amd64\n", "arch i386\n"), "of arch i386, not of amd64"),
        (lambda text: text.replace("asked tool\n", ""), r"has changed since .*: \+tool"),
        (lambda text: "", r"lock:1: the line `lock` is missing"),
    ],
)
def test_a_lock_that_is_wrong_is_refused_in_one_line(
    locked: Place, edit: Callable[[str], str], says: str
) -> None:
    sound = locked.lock.read_text()
    locked.lock.write_text(edit(sound))
    assert re.search(says, locked.refuse("resolve"))
    assert re.search(says, locked.refuse("plan"))
    locked.succeed("resolve", "--unlocked")
    locked.succeed("lock", "--update")
    assert locked.lock.read_text() == sound


def test_a_package_that_is_gone_is_named(locked: Place) -> None:
    (locked.archive.root / "debian/pool/libtool_1_amd64.deb").unlink()
    told = locked.refuse("fetch")
    assert "libtool 1 of probe.amd64.lock of " in told
    assert "snapshot" in told
    assert "inv --image" in told
    assert "lock --update libtool" in told


def test_a_package_that_was_changed_at_the_same_version_is_refused(locked: Place) -> None:
    file = locked.archive.root / "debian/pool/libtool_1_amd64.deb"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "changed at the same version" in locked.refuse("fetch")
    assert not (locked.folder / "location/debs/libtool_1_amd64.deb").exists()


# --- renewed ----------------------------------------------------------------------------------------


def test_all_of_it_is_renewed_and_what_is_new_is_shown(locked: Place) -> None:
    log = gzip.compress(
        changelog(
            ("1+deb12u2", "high", "Fix CVE-2026-1234 and CVE-2025-99999."),
            ("1+deb12u1", "medium", "Fix CVE-2026-0001."),
            ("1", "critical", "CVE-2020-0001 was long ago."),
        ).encode(),
        mtime=0,
    )
    blobs = {"usr/share/doc/libtool/changelog.Debian.gz": log}
    locked.update("bookworm-security", Deb("libtool", "1+deb12u2", blobs=blobs))
    before = locked.lock.read_text()
    preview = locked.succeed("lock", "--update", "--dry-run")
    assert "would be" in preview
    assert locked.lock.read_text() == before
    shown = locked.succeed("lock", "--update")
    row = next(line.split() for line in shown.splitlines() if line.startswith("libtool "))
    assert row == ["libtool", "1", "1+deb12u2", "high", "CVE-2025-99999,", "CVE-2026-0001,", "CVE-2026-1234"]
    assert "1+deb12u1: * Fix CVE-2026-0001." in shown
    assert "CVE-2020-0001" not in shown
    assert locked.versions()["libtool"] == "1+deb12u2"
    told = [line for line in locked.lock.read_text().splitlines() if line.startswith("package ")]
    known = [line for line in before.splitlines() if line.startswith("package ")]
    assert len(set(told) - set(known)) == 1, "one package, one line"


def test_only_what_is_needed_is_renewed(locked: Place) -> None:
    locked.update(
        "bookworm",
        Deb("tool", "2", extra={"Depends": "libtool (>= 2)"}),
        Deb("libtool", "2", extra={"Depends": "added"}),
        Deb("added"),
        Deb("libbase", "2"),
        Deb("other", "2", extra={"Depends": "libother (= 2)"}),
        Deb("libother", "2"),
    )
    found = json.loads(locked.succeed("lock", "--update", "tool", "--json"))
    assert set(found) == documented("lock")
    assert {(row["package"], row["old"], row["new"]) for row in found["changes"]} == {
        ("tool", "1", "2"),
        ("libtool", "1", "2"),
        ("added", "", "1"),
    }
    assert locked.versions()["libbase"] == "1", "which no index lists any more"
    assert locked.versions()["other"] == "1"
    locked.succeed("fetch")
    locked.succeed("lock", "--update", "libother")
    assert (locked.versions()["other"], locked.versions()["libother"]) == ("2", "2"), "its user needs it so"
    assert locked.versions()["libbase"] == "1"
    locked.succeed("lock", "--update", "libbase", "tool")
    assert locked.versions()["libbase"] == "2"


def test_what_was_changed_at_the_same_version_is_not_taken_in_silence(locked: Place) -> None:
    locked.update("bookworm", Deb("libbase", "1", files={"usr/share/libbase": "another"}))
    before = locked.lock.read_text()
    told = locked.refuse("lock", "--update", "tool")
    assert "libbase 1 is another file than the lock names" in told
    assert locked.lock.read_text() == before
    locked.succeed("lock", "--update", "libbase")
    assert locked.lock.read_text() != before


def test_what_is_nowhere_any_more_is_renewed_too(locked: Place) -> None:
    locked.update("bookworm", Deb("libbase", "2"), Deb("tool", "2", extra={"Depends": "libtool"}))
    (locked.archive.root / "debian/pool/libbase_1_amd64.deb").unlink()
    shown = locked.succeed("lock", "--update", "tool")
    assert "libbase 1 is nowhere any more" in shown
    assert locked.versions()["libbase"] == "2"


def test_a_new_name_in_the_definition_is_added_and_the_rest_kept(locked: Place) -> None:
    locked.update("bookworm", Deb("libtool", "2"))
    locked.definition.write_text("imagename: probe\npackages: {all: [tool, other, manual]}\n")
    assert "+manual" in locked.refuse("build")
    locked.succeed("lock")
    assert locked.versions()["manual"] == "1"
    assert locked.versions()["libtool"] == "1"


def test_a_name_that_nobody_knows_is_refused(locked: Place) -> None:
    before = locked.lock.read_text()
    assert "did you mean libtool" in locked.refuse("lock", "--update", "libtoll")
    assert locked.lock.read_text() == before


def test_one_that_is_to_be_renewed_has_to_be_there(place: Place) -> None:
    assert "there is no" in place.refuse("lock", "--update", "tool")
    assert "what a mirror has today" in place.refuse("lock", "--offline")
    assert "no stored resolution" in place.refuse("lock", "--frozen")
    place.succeed("resolve")
    asked = len(place.archive.asked)
    place.succeed("lock", "--frozen")
    assert len(place.archive.asked) == asked


# --- offline ----------------------------------------------------------------------------------------


def test_a_store_is_filled_checked_and_pruned(locked: Place) -> None:
    debs = locked.folder / "location/debs"
    assert "not there" not in locked.succeed("fetch")
    assert "0 missing, 0 damaged" in locked.succeed("fetch", "--check")
    (debs / "stranger_1_all.deb").write_bytes(b"x")
    (debs / "libtool_1_amd64.deb").write_bytes(b"damaged")
    (debs / "tool_1_amd64.deb").unlink()
    done = cli.inv("fetch", "--check", *locked.flags)
    assert done.returncode == 1
    assert "missing  tool_1_amd64.deb" in done.stdout
    assert "damaged  libtool_1_amd64.deb" in done.stdout
    assert (debs / "stranger_1_all.deb").exists()
    told = locked.refuse("fetch", "--offline")
    assert "2 packages are not in" in told
    assert "libtool 1 (damaged)" in told
    cli.inv("fetch", "--prune", *locked.flags)
    assert not (debs / "stranger_1_all.deb").exists()
    assert not (debs / "libtool_1_amd64.deb").exists()
    locked.succeed("fetch")
    assert "0 missing, 0 damaged" in locked.succeed("fetch", "--check")
    found = json.loads(locked.succeed("fetch", "--json"))
    assert set(found) == documented("fetch")
    assert (found["whole"], found["missing"]) == (13, [])


def test_one_store_serves_several_locks(locked: Place) -> None:
    old = locked.folder / "old.lock"
    shutil.copy(locked.lock, old)
    locked.update("bookworm", Deb("libtool", "2"))
    locked.succeed("lock", "--update")
    both = f"{old},{locked.lock}"
    locked.succeed("fetch", "--locks", both)
    debs = locked.folder / "location/debs"
    assert {path.name for path in debs.glob("libtool_*")} == {"libtool_1_amd64.deb", "libtool_2_amd64.deb"}
    assert "0 missing" in locked.succeed("fetch", "--locks", both, "--prune")
    locked.succeed("fetch", "--prune")
    assert {path.name for path in debs.glob("libtool_*")} == {"libtool_2_amd64.deb"}
    assert "there is no lock" in locked.refuse("fetch", "--locks", "nowhere.lock")


@pytest.mark.slow(25, reason="a whole build")
def test_what_is_locked_is_built_without_a_network_and_has_the_same_bytes(
    tiny: Built, tmp_path: Path
) -> None:
    """In a LOCATION of an odd name besides."""
    shutil.copytree(cli.CHECKOUT / "config", tmp_path / "config", symlinks=True)
    image = ("--image", str(tmp_path / "config/tiny.yaml"))
    cli.succeed("lock", *image, "--set", f"location={tiny.location}")
    other = tmp_path / "o t" / ODD
    flags = (*image, "--set", f"location={literal(str(other))}")
    shutil.copytree(tiny.location / "debs", other / "debs", copy_function=os.link)
    shown = cli.succeed("build", "--offline", *flags, prefix=("unshare", "--net"))
    assert "nobody was asked" in shown
    assert sums(other / "tiny.img") == sums(tiny.image)


def sums(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- snapshots --------------------------------------------------------------------------------------


def stamp(seconds: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


def expire(place: Place, date: int) -> None:
    """Sign every suite anew as it was on a day, valid for a week from then."""
    until = email.utils.formatdate(date + 7 * DAY, usegmt=True)
    for suite in mirror.BOOKWORM:
        place.archive.publish(suite, date=date, fields={"Valid-Until": until})


def test_a_named_snapshot_is_taken_though_expired_and_said_so(place: Place) -> None:
    taken = int(time.time()) - 60 * DAY
    expire(place, taken)
    assert "expired" in place.refuse("resolve")
    moment = stamp(taken + DAY)
    for name in ("debian", "debian-security"):
        (place.archive.root / "archive" / name).mkdir(parents=True)
        (place.archive.root / "archive" / name / moment).symlink_to(place.archive.root / name)
    snapshot = [
        *place.flags,
        *("--set", f"debian_mirror={place.url}/archive/debian/{{snapshot}}"),
        *("--set", f"snapshot={moment}"),
    ]
    shown = cli.succeed("resolve", *snapshot)
    assert shown.count("it is taken because snapshot") == 3
    cli.succeed("fetch", *snapshot)
    asked = {path for path in place.archive.asked if path.startswith("archive/")}
    assert any(path.startswith(f"archive/debian-security/{moment}/dists/bookworm-security") for path in asked)
    late = stamp(taken + 8 * DAY)
    for name in ("debian", "debian-security"):
        (place.archive.root / "archive" / name / late).symlink_to(place.archive.root / name)
    told = cli.refuse("resolve", *snapshot, "--set", f"snapshot={late}")
    assert "expired" in told, "it was stale even then"
    early = stamp(taken - DAY)
    for name in ("debian", "debian-security"):
        (place.archive.root / "archive" / name / early).symlink_to(place.archive.root / name)
    assert "in the future" in cli.refuse("resolve", *snapshot, "--set", f"snapshot={early}")


def test_a_snapshot_may_be_older_than_what_was_seen(place: Place) -> None:
    place.succeed("resolve")
    taken = place.archive.now - 30 * DAY
    expire(place, taken)
    moment = stamp(taken + 60)
    (place.archive.root / "archive/debian").mkdir(parents=True)
    (place.archive.root / "archive/debian" / moment).symlink_to(place.archive.root / "debian")
    flags = [
        *place.flags,
        *("--set", f"debian_mirror={place.url}/archive/debian/{moment}", "--set", f"snapshot={moment}"),
        *("--set", f"security_mirror={place.url}/debian-security"),
    ]
    assert "older than what was seen before" in cli.succeed("resolve", *flags)
    assert "snapshot needs a debian_mirror" in cli.refuse(
        "config", *place.flags, "--set", f"snapshot={moment}"
    )
    assert "20261127T090000Z" in cli.refuse("config", *place.flags, "--set", "snapshot=yesterday")


def test_a_lock_is_consent_for_its_own_release_files_only(locked: Place) -> None:
    text = locked.lock.read_text()
    old = {
        suite: (locked.archive.archive(suite) / "dists" / suite / "InRelease") for suite in mirror.BOOKWORM
    }
    kept = {suite: file.read_bytes() for suite, file in old.items()}
    locked.update("bookworm-security", Deb("libtool", "1+deb12u1"))
    assert "newer" in locked.succeed("resolve")
    for suite, file in old.items():
        file.write_bytes(kept[suite])
    shown = locked.succeed("resolve")
    assert "bookworm-security has nothing newer" in shown, "its own are taken, however old"
    assert "older than what was seen" in locked.refuse("resolve", "--unlocked")
    locked.archive.publish("bookworm-security", date=locked.archive.now - 3 * DAY)
    assert "is not known" in locked.succeed("resolve"), "another old one is not believed"
    assert locked.lock.read_text() == text


# --- outdated ---------------------------------------------------------------------------------------


def test_a_lock_behind_its_security_suite_is_foundto_cron(locked: Place) -> None:
    assert "none of" in locked.succeed("outdated")
    locked.update("bookworm", Deb("tool", "2", extra={"Depends": "libtool"}))
    locked.succeed("outdated")
    log = gzip.compress(changelog(("1+deb12u1", "high", "CVE-2026-1234")).encode())
    blobs = {"usr/share/doc/libtool/changelog.Debian.gz": log}
    locked.update("bookworm-security", Deb("libtool", "1+deb12u1", blobs=blobs))
    done = cli.inv("outdated", *locked.flags)
    assert done.returncode == 10
    assert "libtool  1    1+deb12u1  -" in done.stdout
    assert "1 of " in done.stdout
    newer = locked.archive.root / "debian-security/pool/libtool_1+deb12u1_amd64.deb"
    (locked.folder / "location/debs").mkdir(exist_ok=True)
    shutil.copy(newer, locked.folder / "location/debs")
    done = cli.inv("outdated", str(locked.lock), "--json", *locked.flags)
    told = json.loads(done.stdout)
    assert set(told) == documented("outdated")
    assert (done.returncode, told["behind"]) == (10, True)
    (row,) = told["updates"]
    assert (row["package"], row["old"], row["new"], row["cves"], row["urgency"]) == (
        "libtool",
        "1",
        "1+deb12u1",
        ["CVE-2026-1234"],
        "high",
    )
    locked.lock.unlink()
    assert "there is no lock" in locked.refuse("outdated")
