"""What a mirror holds today: against a mirror of our own that is updated, damaged and taken away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.events import Failure
from build.agent.verbs import resolve
from tests import cli, mirror
from tests.images import TINY
from tests.mirror import Deb, Key, Mirror

pytestmark = pytest.mark.root
Resolve = Callable[..., dict[str, Any]]


@pytest.fixture
def archive(tmp_path: Path, key: Key) -> Mirror:
    return Mirror(tmp_path / "mirror", key)


@pytest.fixture
def url(archive: Mirror) -> Iterator[str]:
    with archive.served() as served:
        yield served


@pytest.fixture
def ask(tmp_path: Path, key: Key, url: str) -> Resolve:
    """Resolve `tool` at the served mirror; keywords change the request; notes are in `notes`."""

    def run(notes: list[str] | None = None, **changes: Any) -> dict[str, Any]:
        mirrors = {
            "suite": "bookworm",
            "mirror": f"{url}/debian",
            "security_mirror": "",
            "security": True,
            "keyring": str(key.ring),
            "apt_proxy": "",
            "store": str(tmp_path / "store"),
        }
        own = wire.Mirrors.__dataclass_fields__.keys() & changes.keys()
        request = {
            "mirrors": {**mirrors, **{name: changes.pop(name) for name in own}},
            "arch": "amd64",
            "components": ["main"],
            "packages": ["tool"],
            **changes,
        }

        def emit(kind: str, **fields: Any) -> None:
            if kind == "note" and notes is not None:
                notes.append(fields["text"])

        return resolve.run(wire.load(wire.Resolve, request), emit)

    return run


def names(answer: dict[str, Any]) -> list[str]:
    return [package["name"] for package in answer["packages"]]


def versions(answer: dict[str, Any]) -> dict[str, str]:
    return {package["name"]: package["version"] for package in answer["packages"]}


def refuse(ask: Resolve, **changes: Any) -> Failure:
    with pytest.raises(Failure) as caught:
        ask(**changes)
    assert caught.value.hint, "every failure says what to do"
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def test_the_set_is_exact_and_without_recommendations(ask: Resolve, archive: Mirror, url: str) -> None:
    answer = ask()
    assert names(answer) == ["apt", "base-files", "libapt", "libbase", "libtool", "tool"]
    assert {p["name"] for p in answer["packages"] if p["essential"]} == {
        "apt",
        "base-files",
        "libapt",
        "libbase",
    }
    assert answer["changed"]
    assert answer["epoch"] == archive.now
    assert set(answer["releases"]) == set(mirror.BOOKWORM)
    tool = next(p for p in answer["packages"] if p["name"] == "tool")
    built = archive.root / "debian/pool/tool_1_amd64.deb"
    assert tool["url"] == f"{url}/debian/pool/tool_1_amd64.deb"
    assert tool["size"] == built.stat().st_size
    assert not [path for path in archive.asked if path.endswith(".deb")], "nothing is downloaded yet"


def test_an_unchanged_mirror_costs_three_conditional_questions(ask: Resolve, archive: Mirror) -> None:
    first = ask()
    archive.asked.clear()
    archive.headers.clear()
    second = ask()
    assert sorted(archive.asked) == sorted(
        f"{archive.archive(suite).name}/dists/{suite}/InRelease" for suite in mirror.BOOKWORM
    )
    assert all("If-None-Match" in headers for headers in archive.headers)
    assert not second["changed"]
    assert second["packages"] == first["packages"]
    assert second["epoch"] == first["epoch"]


def test_a_security_update_is_never_missed(ask: Resolve, archive: Mirror) -> None:
    first = ask()
    archive.suites["bookworm-security"].append(Deb("libtool", "1+deb12u1"))
    archive.publish("bookworm-security")
    second = ask()
    assert second["changed"]
    assert versions(second) == {**versions(first), "libtool": "1+deb12u1"}
    updated = next(p for p in second["packages"] if p["name"] == "libtool")
    assert "/debian-security/pool/" in updated["url"]
    assert second["epoch"] == archive.now > first["epoch"]


def test_a_pulse_that_touches_none_of_ours_keeps_set_and_epoch(ask: Resolve, archive: Mirror) -> None:
    first = ask()
    archive.suites["bookworm-updates"].append(Deb("tzdata", "2026a"))
    archive.publish("bookworm-updates")
    second = ask()
    assert not second["changed"]
    assert (second["packages"], second["epoch"]) == (first["packages"], first["epoch"])
    assert second["releases"]["bookworm-updates"]["date"] == archive.now


def test_another_list_of_packages_is_another_answer(ask: Resolve) -> None:
    one = ask()
    assert "manual" in names(ask(packages=["tool", "manual"]))
    again = ask()
    assert again == {**one, "changed": False, "checked": again["checked"]}


def test_the_same_set_at_another_mirror_keeps_its_epoch(ask: Resolve, archive: Mirror, url: str) -> None:
    first = ask()
    (archive.root / "copy").symlink_to("debian")
    second = ask(mirror=f"{url}/copy", security_mirror=f"{url}/debian-security")
    assert second["epoch"] == first["epoch"]
    assert all("/copy/" in package["url"] for package in second["packages"])


def test_a_broken_signature_is_refused(ask: Resolve, archive: Mirror) -> None:
    file = archive.root / "debian/dists/bookworm-updates/InRelease"
    file.write_bytes(file.read_bytes().replace(b"Origin: Test", b"Origin: Evil"))
    failure = refuse(ask)
    assert "signature" in failure.message
    assert "bookworm-updates/InRelease" in failure.message


def test_a_key_that_is_not_in_the_keyring_is_refused(ask: Resolve, archive: Mirror, tmp_path: Path) -> None:
    other = Key(tmp_path / "other")
    try:
        archive.publish("bookworm-security", key=other)
    finally:
        other.close()
    failure = refuse(ask)
    assert "signature" in failure.message
    assert "keyring" in failure.hint


def test_an_armoured_keyring_is_read_and_a_missing_one_named(ask: Resolve, key: Key) -> None:
    assert "tool" in names(ask(keyring=str(key.armoured)))
    assert "/no/such" in refuse(ask, keyring="/no/such").message


def test_something_else_that_answers_is_refused(ask: Resolve, archive: Mirror) -> None:
    (archive.root / "debian/dists/bookworm/InRelease").write_text("<html>log in first</html>")
    assert "not a signed file" in refuse(ask).message


def test_an_expired_release_is_refused(ask: Resolve, archive: Mirror) -> None:
    archive.publish("bookworm-security", fields={"Valid-Until": "Sat, 01 Jan 2022 00:00:00 UTC"})
    assert "expired" in refuse(ask).message


def test_a_release_from_the_future_is_refused(ask: Resolve, archive: Mirror) -> None:
    archive.publish("bookworm-updates", date=int(time.time()) + 86400)
    failure = refuse(ask)
    assert "future" in failure.message
    assert "clock" in failure.hint


def test_a_release_older_than_one_seen_is_refused_wherever_it_comes_from(
    ask: Resolve, archive: Mirror, url: str
) -> None:
    file = archive.root / "debian-security/dists/bookworm-security/InRelease"
    old, before = file.read_bytes(), ask()
    archive.suites["bookworm-security"].append(Deb("libtool", "1+deb12u1"))
    archive.publish("bookworm-security")
    newer = ask()
    file.write_bytes(old)
    (archive.root / "copy").symlink_to("debian-security")
    for mirror_url in (f"{url}/debian-security", f"{url}/copy"):
        failure = refuse(ask, security_mirror=mirror_url)
        assert f"{mirror_url}/dists/bookworm-security is older than what was seen before" in failure.message
        assert "accept_older" in failure.hint
    notes: list[str] = []
    taken = ask(notes, accept_older=True)
    assert versions(taken) == versions(before) != versions(newer)
    assert any("taken because accept_older is set" in note for note in notes)
    refuse(ask)


def test_the_setting_that_takes_an_older_release(archive: Mirror, url: str, key: Key, tmp_path: Path) -> None:
    given = {"location": tmp_path, "debian_mirror": f"{url}/debian", "keyring": key.ring}
    flags = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    line = ("build", *TINY, *flags)
    assert "no such package" in cli.refuse(*line), "which comes after the dates"
    archive.publish("bookworm", date=archive.now - 3600)
    assert "older than what was seen before" in cli.refuse(*line)
    assert "no such package" in cli.refuse(*line, "--set", "accept_older=true")


def test_of_several_good_keys_each_remembers(ask: Resolve, archive: Mirror, key: Key, tmp_path: Path) -> None:
    other = Key(tmp_path / "other")
    ring = tmp_path / "both.gpg"
    ring.write_bytes(key.ring.read_bytes() + other.ring.read_bytes())
    ask(keyring=str(ring))
    try:
        archive.publish("bookworm", date=archive.now - 3600, key=other)
        assert "tool" in names(ask(keyring=str(ring))), "who has signed nothing before is not bound"
        archive.publish("bookworm", date=archive.now - 1800, key=key)
        refuse(ask, keyring=str(ring))
        archive.publish("bookworm", key=other)
        ask(keyring=str(ring))
        archive.publish("bookworm", date=archive.now - 1800, key=other)
        refuse(ask, keyring=str(ring))
    finally:
        other.close()


def test_nothing_is_remembered_of_a_release_that_is_refused(
    ask: Resolve, archive: Mirror, tmp_path: Path
) -> None:
    archive.publish("bookworm", date=int(time.time()) + 86400)
    refuse(ask)
    archive.publish("bookworm", fields={"Valid-Until": "Sat, 01 Jan 2022 00:00:00 UTC"})
    refuse(ask)
    assert not (tmp_path / "store/releases/seen.json").exists()
    archive.publish("bookworm", date=archive.now - 3600)
    assert "tool" in names(ask())


def test_a_security_suite_without_news_is_told(ask: Resolve, archive: Mirror) -> None:
    notes: list[str] = []
    ask(notes)
    assert not any("hold updates back" in note for note in notes)
    archive.publish("bookworm-security", date=int(time.time()) - 20 * 86400)
    ask(notes, accept_older=True)
    assert any("20 days ago: its mirror may hold updates back" in note for note in notes)


def test_the_release_of_another_suite_is_refused(ask: Resolve, archive: Mirror) -> None:
    archive.publish("bookworm-updates", fields={"Codename": "trixie-updates", "Suite": "stable-updates"})
    assert "not of bookworm-updates" in refuse(ask).message


def test_an_unknown_suite_is_told_from_a_wrong_mirror(ask: Resolve, url: str) -> None:
    failure = refuse(ask, suite="trixie")
    assert f"{url}/debian has no suite trixie" in failure.message
    failure = refuse(ask, mirror=f"{url}/nothing-here")
    assert "is not a Debian mirror" in failure.message
    assert "debian_mirror" in failure.hint


def test_a_dead_mirror_and_a_dead_proxy_are_told_apart(ask: Resolve) -> None:
    dead = f"http://127.0.0.1:{mirror.closed_port()}"
    failure = refuse(ask, mirror=f"{dead}/debian")
    assert f"mirror {dead}/debian does not answer" in failure.message
    assert "debian_mirror" in failure.hint
    failure = refuse(ask, apt_proxy=dead)
    assert f"proxy {dead}" in failure.message
    assert "apt_proxy" in failure.hint


def test_the_environments_proxies_count_where_the_settings_name_none(
    ask: Resolve, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"http://127.0.0.1:{mirror.closed_port()}"
    monkeypatch.setenv("no_proxy", "elsewhere.invalid")
    monkeypatch.setenv("http_proxy", url)
    assert ask(mirror="http://mirror.invalid/debian")["packages"]
    monkeypatch.setenv("http_proxy", dead)
    assert ask(mirror="http://mirror.invalid/debian", apt_proxy=url)["packages"]
    failure = refuse(ask, mirror="http://mirror.invalid/debian")
    assert f"proxy {dead}" in failure.message
    assert "http_proxy" in failure.hint
    monkeypatch.setenv("no_proxy", "elsewhere.invalid,127.0.0.1")
    assert ask()["packages"]
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv("all_proxy", "socks5://me:secret@proxy.invalid")
    failure = refuse(ask, mirror="http://mirror.invalid/debian")
    assert failure.message == "the environment's proxy socks5://proxy.invalid speaks no HTTP"


def test_a_proxy_is_used(ask: Resolve, archive: Mirror, url: str) -> None:
    answer = ask(mirror="http://mirror.invalid/debian", apt_proxy=url)
    assert "tool" in names(answer)
    assert all(headers["target"].startswith("http://mirror.invalid/") for headers in archive.headers)


def test_a_missing_security_suite_is_an_error_unless_switched_off(ask: Resolve, archive: Mirror) -> None:
    (archive.root / "debian-security").rename(archive.root / "elsewhere")
    failure = refuse(ask)
    assert "bookworm-security" in failure.message
    assert "security: false" in failure.hint
    notes: list[str] = []
    answer = ask(notes, security=False)
    assert set(answer["releases"]) == {"bookworm", "bookworm-updates"}
    assert any("security" in note for note in notes)


def test_the_security_suite_is_looked_for_beside_and_inside_a_custom_mirror(
    ask: Resolve, archive: Mirror, url: str
) -> None:
    (archive.root / "debian-security/dists/bookworm-security").rename(
        archive.root / "debian/dists/bookworm-security"
    )
    assert "bookworm-security" in ask()["releases"]


def test_missing_packages_are_all_named_with_near_ones(ask: Resolve) -> None:
    failure = refuse(ask, packages=["tool", "libtoool", "zzz-nothing"])
    assert "libtoool" in failure.message
    assert "zzz-nothing" in failure.message
    assert "libtool" in failure.hint


def test_virtual_packages(ask: Resolve) -> None:
    notes: list[str] = []
    answer = ask(notes, packages=["nfs-server"])
    assert "nfs-kernel-server" in names(answer)
    assert any("nfs-server is a virtual package" in note for note in notes)
    failure = refuse(ask, packages=["mail-agent"])
    assert "mail-agent is a virtual package" in failure.message
    assert "exim, postfix" in failure.hint


def test_packages_that_do_not_fit_are_told_with_the_reason(ask: Resolve) -> None:
    assert "not-there" in refuse(ask, packages=["broken"]).message
    assert "exim" in refuse(ask, packages=["exim", "postfix"]).message


def test_an_index_that_is_not_what_was_signed_is_refused(ask: Resolve, archive: Mirror) -> None:
    index = archive.root / "debian/dists/bookworm/main/binary-amd64"
    for file in (*index.glob("by-hash/SHA256/*"), index / "Packages.xz"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "not what was signed" in refuse(ask).message


def test_an_index_is_found_without_by_hash(ask: Resolve, archive: Mirror) -> None:
    archive.publish("bookworm", fields={"Acquire-By-Hash": "no"})
    assert "tool" in names(ask())
    assert not [path for path in archive.asked if "/by-hash/" in path and "/bookworm/" in path]


def test_an_unknown_component_and_architecture_are_named(ask: Resolve) -> None:
    assert "'contrib'" in refuse(ask, components=["main", "contrib"]).message
    assert "i386" in refuse(ask, arch="i386").message


def test_a_frozen_build_asks_nobody(ask: Resolve, archive: Mirror) -> None:
    assert "--frozen" in refuse(ask, frozen=True).hint
    stored = ask()
    archive.asked.clear()
    assert ask(frozen=True) == {**stored, "changed": False}
    assert archive.asked == []


def test_a_passing_fault_is_tried_again(ask: Resolve, archive: Mirror) -> None:
    def once(handler: Any, data: bytes) -> None:
        archive.faults.clear()
        mirror.status(503)(handler, data)

    archive.faults["bookworm/InRelease"] = once
    assert "tool" in names(ask())


def test_a_damaged_store_is_made_anew(ask: Resolve, tmp_path: Path) -> None:
    first = ask()
    for file in (tmp_path / "store").rglob("*.json"):
        file.write_text(file.read_text()[:40])
    assert ask()["packages"] == first["packages"]
    for file in (tmp_path / "store").rglob("*.json"):
        json.loads(file.read_text())
