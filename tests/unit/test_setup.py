"""The pure parts of set-up: the table of packages, the environment's scripts, the hand-over."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from build import STEPS, wire
from build.agent import facts
from build.agent.debian import packages
from build.agent.verbs import doctor as checks
from build.engine import handover, venv
from build.engine.errors import BuildError
from build.verbs import doctor

CHECKOUT = Path(__file__).resolve().parents[2]


# --- packages --------------------------------------------------------------------------------------


def test_the_table_is_sound() -> None:
    table = packages.parse(packages.TABLE)
    assert set(table.verbs) == {need.set for need in table.needs} == {"build", "boot", "login", "test"}
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", need.package) for need in table.needs)
    probes = [(need.set, need.probe) for need in table.needs]
    assert len(probes) == len(set(probes))


@pytest.mark.parametrize("text", ["verbs build", "need build unshare util-linux", "want build a b c", "need"])
def test_a_broken_row_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        packages.parse(f"verbs build build\n{text}")


@pytest.mark.parametrize(
    ("verb", "sets"),
    [
        ("build", {"build"}),
        ("convert.vhd", {"build"}),
        *((step, {"build"}) for step in (*STEPS, "disk")),
        ("verify", {"build", "boot"}),
        ("rehearse", {"boot", "login"}),
        ("test", {"build", "boot", "login", "test"}),
        *((verb, set()) for verb in ("config", "plan", "why", "doctor", "clean", "umount.x.y", "inspect")),
    ],
)
def test_a_verb_wants_its_sets(verb: str, sets: set[str]) -> None:
    expected = {"build"} if verb.startswith("umount") else sets
    assert packages.parse(packages.TABLE).sets(verb) == expected


def test_what_is_missing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = packages.parse("verbs build build\nneed build sh dash x\nneed build nowhere-such none x\n")
    here = [need.here for need in table.needs]
    assert here == [True, False]
    assert packages.Need("build", str(tmp_path), "x", "x").here
    assert not packages.Need("build", f"{tmp_path}/none", "x", "x").here


# --- the lock --------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, list[str]]:
    """Name and version (with marker) of every pin of a lock, and its hashes."""
    found: dict[str, list[str]] = {}
    pin = ""
    for line in (CHECKOUT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("    --hash=sha256:"):
            found[pin].append(line.split(":")[1].rstrip(" \\"))
        else:
            pin = line.rstrip(" \\")
            assert re.match(r"[a-z0-9][a-z0-9-]*==[0-9]", pin), f"{name}: {line!r} is no pin"
            found[pin] = []
    return found


def test_every_pin_has_hashes_and_no_host_stands_in_a_lock() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        assert all(
            len(hashes) > 0 and {len(text) for text in hashes} == {64} for hashes in pins(name).values()
        )
        assert "://" not in (CHECKOUT / name).read_text(encoding="utf-8")


def test_the_lock_for_tests_holds_all_of_the_other() -> None:
    base, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert {pin: dev.get(pin) for pin in base} == base


def test_nothing_in_a_lock_takes_the_name_of_our_package() -> None:
    assert not [pin for pin in pins("requirements-dev.lock") if pin.startswith("build==")]


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {re.split(r"[<>=]", text)[0].lower().replace("_", "-") for text in wanted}
    assert names <= {pin.partition("==")[0] for pin in pins("requirements-dev.lock")}


# --- the environment -------------------------------------------------------------------------------


def test_scripts_get_their_final_path(tmp_path: Path) -> None:
    aside, place = tmp_path / ".venv.part", tmp_path / ".venv"
    (aside / "bin").mkdir(parents=True)
    (aside / "bin" / "invoke").write_bytes(b"#!%s/bin/python\n" % os.fsencode(aside))
    (aside / "bin" / "tool").write_bytes(b"\x7fELF\xff\x00%s" % os.fsencode(aside))
    (aside / "bin" / "python").symlink_to("/usr/bin/python3")
    (aside / "pyvenv.cfg").write_text(f"command = python3 -m venv {aside}\n")
    venv.readdress(aside, place)
    assert (aside / "bin" / "invoke").read_text() == f"#!{place}/bin/python\n"
    assert (aside / "bin" / "tool").read_bytes() == b"\x7fELF\xff\x00%s" % os.fsencode(place)
    assert (aside / "bin" / "python").readlink() == Path("/usr/bin/python3")
    assert (aside / "pyvenv.cfg").read_text() == f"command = python3 -m venv {place}\n"


@pytest.mark.parametrize("before", ["nothing", "folder", "link", "dangling link"])
def test_publishing_replaces_what_was_there(tmp_path: Path, before: str) -> None:
    aside, place, old = tmp_path / ".venv.part", tmp_path / ".venv", tmp_path / ".venv.old"
    (aside / "bin").mkdir(parents=True)
    if before == "folder":
        (place / "lib").mkdir(parents=True)
    elif before != "nothing":
        other = tmp_path / "other"
        place.symlink_to(other)
        if before == "link":
            (other / "lib").mkdir(parents=True)
    venv.publish(aside, place, old)
    assert [path.name for path in place.iterdir()] == ["bin"]
    assert not os.path.lexists(aside)
    assert not os.path.lexists(old)
    assert (tmp_path / "other/lib").is_dir() == (before == "link")


def test_an_environment_counts_when_its_lock_is_the_lock(tmp_path: Path) -> None:
    lock, place = tmp_path / "requirements.lock", tmp_path / ".venv"
    lock.write_text("a==1\n")
    assert not venv.made_from(place, lock)
    (place / "bin").mkdir(parents=True)
    (place / "lock").write_text("a==1\n")
    assert not venv.made_from(place, lock)
    (place / "bin" / "python").symlink_to("/nowhere/python3.11")
    assert not venv.made_from(place, lock)
    (place / "bin" / "python").unlink()
    (place / "bin" / "python").touch()
    assert venv.made_from(place, lock)
    lock.write_text("a==2\n")
    assert not venv.made_from(place, lock)


# --- the hand-over ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "program", "foreign"),
    [
        ("/usr", "/usr/bin/inv", True),
        ("/usr", "/usr/bin/invoke", True),
        ("/usr", "/usr/lib/python3/dist-packages/invoke/__main__.py", True),
        ("/usr", "/usr/bin/pytest", False),
        ("/usr", "/usr/lib/python3/dist-packages/pytest/__main__.py", False),
        ("/usr", "/usr/bin/fab", False),
        (str(CHECKOUT / ".venv"), str(CHECKOUT / ".venv/bin/invoke"), False),
        (str(CHECKOUT / ".venv" / ".." / ".venv"), "/usr/bin/inv", False),
    ],
)
def test_only_a_foreign_invoke_hands_over(prefix: str, program: str, foreign: bool) -> None:
    assert handover.is_foreign(prefix, program) is foreign


def test_a_foreign_invoke_goes_on_in_the_launcher_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/inv", "build", "--formats", "a b\nc", ""])
    monkeypatch.setattr(os, "execv", lambda *arguments: ran.append(arguments))
    monkeypatch.setenv(handover.MARK, "")
    monkeypatch.delenv(handover.MARK)
    handover.hand_over()
    assert ran == [("/bin/sh", ["sh", str(CHECKOUT / "inv"), "build", "--formats", "a b\nc", ""])]
    with pytest.raises(SystemExit) as caught:
        handover.hand_over()
    assert str(caught.value.code).splitlines()[1] == f"  hint: run {CHECKOUT / 'inv'}"


# --- facts and the doctor --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "enough"),
    [
        ("tester:100000:65536\n", True),
        ("1001:100000:65536", True),
        ("other:1:9\ntester:100000:65535\ntester:300000:131072\n", True),
        ("tester:100000:65535\n", False),
        ("tester2:100000:65536\n", False),
        ("tester\ntester:\ntester:1\ntester:a:b\n", False),
        ("", False),
    ],
)
def test_a_range_of_sub_ids_must_hold_a_debian_tree(table: str, enough: bool) -> None:
    assert facts.has_range(table, "tester", 1001) is enough


@pytest.mark.parametrize(
    ("tables", "first"),
    [
        ("", 100000),
        ("a:100000:65536\n", 165536),
        ("a:100000:65536\nb:300000:10\nbroken:x:y\n", 300010),
        ("a:5:5", 100000),
    ],
)
def test_a_new_range_begins_behind_all_others(tables: str, first: int) -> None:
    assert checks.first_free_id(tables) == first


@pytest.mark.parametrize(
    ("older", "newer"), [("2.36.1", "2.38"), ("2.9", "2.10"), ("2.38", "2.38.1"), ("", "2.38")]
)
def test_versions_compare_by_number(older: str, newer: str) -> None:
    assert checks.numbers(older) < checks.numbers(newer)


def row(name: str, ok: bool, needed: bool = True) -> wire.Check:
    return wire.Check(name, ok, f"{name} seen", "" if ok else f"fix {name}", needed)


class Screen:
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.lines: list[str] = []

    def table(self, head: Any, rows: Any) -> None:
        self.rows += rows

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_the_doctor_shows_every_row_and_fixes_what_is_needed_first() -> None:
    screen = Screen()
    with pytest.raises(BuildError, match="this host cannot build yet: space") as caught:
        doctor.show(screen, [row("kvm", False, needed=False), row("space", False), row("tools", True)])
    assert caught.value.hint
    assert caught.value.code != 0
    assert screen.rows == [
        ("warn", "kvm", "kvm seen"),
        ("FAIL", "space", "space seen"),
        ("ok", "tools", "tools seen"),
    ]
    assert screen.lines == ["to fix:", "  space: fix space", "  kvm: fix kvm"]


@pytest.mark.parametrize("rows", [[], [row("tools", True)], [row("kvm", False, needed=False)]])
def test_a_host_that_can_build_passes(rows: list[wire.Check]) -> None:
    doctor.show(Screen(), rows)


# --- the whole -------------------------------------------------------------------------------------


def test_ci_calls_the_one_command() -> None:
    run = (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")
    assert "./inv test" in run
    assert os.access(CHECKOUT / ".ci" / "run", os.X_OK)


def test_invoke_finds_our_executor() -> None:
    config = yaml.safe_load((CHECKOUT / "invoke.yaml").read_text(encoding="utf-8"))
    assert config["tasks"]["executor_class"] == "build.engine.remote.HostExecutor"
