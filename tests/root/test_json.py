"""What verbs print for programs: one line a host, with the fields that docs/json.md lists."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from build.engine.settings import Settings
from build.formats.lib.reader import PAST_END
from tests import cli
from tests.disks import one, usual
from tests.images import STEPS, TINY, Built, sha256

PAGE = (cli.CHECKOUT / "docs/json.md").read_text(encoding="utf-8")


PARTS = "\n| field of "
"""Begins the table of what a field of a verb's line is made of."""


def documented(verb: str) -> set[str]:
    """Fields that the page lists for a verb."""
    section = PAGE.partition(f"### {verb}\n")[2].partition("\n### ")[0]
    return {"host", *rows(section.partition(PARTS)[0])}


def rows(text: str) -> set[str]:
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in names(row)}


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def line(verb: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    """Run a verb; its only line of output, which has every documented field and no other."""
    done = cli.inv(verb, "--json", *arguments)
    assert done.returncode == status, done.stderr
    (only,) = done.stdout.splitlines()
    told: dict[str, Any] = json.loads(only)
    assert set(told) == documented(verb.partition(".")[0])
    assert told["host"] == ""
    return told


def test_settings_and_plan(tiny: Built) -> None:
    told = line("config", *tiny.flags)["settings"]
    assert set(told) == set(Settings.model_fields)
    assert told["size"] == {"value": 1024, "origin": "config/tiny.yaml:7"}
    assert told["location"]["value"] == str(tiny.location)
    told = line("plan", *tiny.flags)
    assert [step["step"] for step in told["steps"]] == list(STEPS)
    assert [step["key"] for step in told["steps"]] == tiny.manifest["layers"]
    assert (told["resolved"], told["epoch"]) == (True, tiny.manifest["epoch"])
    assert all(step["cached"] for step in told["steps"])


def test_a_plan_before_anything_is_resolved(tmp_path: Any) -> None:
    told = line("plan", *TINY, "--set", f"location={tmp_path}/none")
    assert (told["resolved"], told["epoch"]) == (False, None)
    assert {step["key"] for step in told["steps"]} == {None}


def test_why(tiny: Built) -> None:
    key = tiny.manifest["layers"][STEPS.index("tweak")]
    told = line("why", "tweak", *tiny.flags)
    assert (told["cached"], told["key"], told["built"], told["changes"]) == (True, key, key, [])
    told = line("why", "tweak", *tiny.flags, "--set", "hostname=other")
    assert (told["cached"], told["built"]) == (False, key)
    assert told["key"] != key
    assert told["changes"]


def test_doctor(tiny: Built) -> None:
    checks = line("doctor", *tiny.flags)["checks"]
    assert {check["state"] for check in checks} <= {"ok", "warn"}
    assert {"tools: build", "mirror", "space"} <= {check["name"] for check in checks}
    assert all(set(check) == {"name", "state", "ok", "needed", "value", "fix"} for check in checks)


def test_inspect(tiny: Built, tmp_path: Any) -> None:
    told = line("inspect", str(tiny.image))
    assert (told["format"], told["virtual_size"], told["findings"]) == ("raw", 1 << 30, [])
    bad = tmp_path / "bad.qcow2"
    bad.write_bytes(b"QFI\xfb\x00\x00\x00\x02")
    told = line("inspect", str(bad), status=1)
    assert {finding["severity"] for finding in told["findings"]} == {"error"}
    parts = rows(PAGE.partition(f"{PARTS}a finding ")[2].partition("\n### ")[0])
    assert {"code", "severity", "lossy"} < parts
    assert all(set(finding) == parts for finding in told["findings"])
    assert told["findings"][0]["code"] == PAST_END.id
    assert told["findings"][0]["fields"] == {"size": 72, "end": 8}


def test_repair(tmp_path: Any) -> None:
    """An OVA of ours needs none."""
    good = one(usual(tmp_path / "disk.img"), tmp_path, "ova")
    told = line("repair", str(good))
    assert (told["file"], told["changes"]) == ("", [])


def test_status_and_clean(tiny: Built) -> None:
    told = line("status", *tiny.flags)
    assert (told["state"], told["location"], told["lock"]) == ("none", str(tiny.location), None)
    told = line("clean", "--dry-run", *tiny.flags)
    assert told["dry_run"] is True


def test_build(tiny: Built) -> None:
    told = line("build", "--frozen", *tiny.flags)
    assert (told["image"], told["here"]) == (str(tiny.image),) * 2
    assert json.loads(Path(told["manifest"]).read_text()) == tiny.manifest
    assert (told["size"], told["sha256"]) == (tiny.image.stat().st_size, sha256(tiny.image))
    assert [row["step"] for row in told["steps"]] == [*STEPS, "disk"]
    assert [row["key"] for row in told["steps"]] == [*tiny.manifest["layers"], tiny.manifest["key"]]
    assert {(row["state"], row["seconds"]) for row in told["steps"]} == {("cached", 0.0)}
    packages = tiny.manifest["packages"]
    text = "".join(f"{p['name']} {p['version']} {p['arch']} {p['sha256']}\n" for p in packages)
    assert told["package_set"] == {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "packages": len(packages),
        "epoch": tiny.manifest["epoch"],
        "lock": None,
    }
    assert (told["artifacts"], told["beside"]) == ([], [])


@pytest.mark.parametrize("foreign", [False, True])
def test_convert(foreign: bool, tmp_path: Path) -> None:
    source = usual(tmp_path / "tiny.img")
    own = (*TINY, "--set", f"location={tmp_path}")
    where = ("--from", str(source), "--to", str(tmp_path / "to")) if foreign else own
    told = line("convert", *where, "--formats", "vhd,qcow2")
    assert (told["source"], told["guest_sha256"]) == (str(source), sha256(source))
    assert told["virtual_size"] == source.stat().st_size
    assert [(row["format"], row["state"]) for row in told["artifacts"]] == [
        ("vhd", "built"),
        ("qcow2", "built"),
    ]
    for row in told["artifacts"]:
        file = Path(row["here"])
        assert file.parent == (tmp_path / "to" if foreign else tmp_path)
        assert json.loads(Path(row["manifest"]).read_text())["artifact"]["sha256"] == row["sha256"]
        assert (row["size"], row["sha256"]) == (file.stat().st_size, sha256(file))
        assert row["sha512"] == hashlib.sha512(file.read_bytes()).hexdigest()
        assert row["md5"] == hashlib.md5(file.read_bytes()).hexdigest()
    (again,) = line("convert.vhd", *where)["artifacts"]
    assert again == {**told["artifacts"][0], "state": "cached", "seconds": 0.0}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("build", "--frozen"), "no stored resolution for this image"),
        (("build", "--set", "siute=trixie"), "--set siute: unknown key 'siute'"),
        (("convert.vhd", "--from", "/nowhere/disk.img"), "there is no file /nowhere/disk.img"),
        (("convert", "--formats", "vdh"), "unknown format 'vdh'"),
    ],
)
def test_a_failure_is_a_line_too(words: tuple[str, ...], what: str, tmp_path: Path) -> None:
    done = cli.inv(*words, "--json", *TINY, "--set", f"location={tmp_path}")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert set(told) == {"host", "error", "hint"}
    assert (told["host"], told["error"]) == ("", what)
    assert done.stderr.endswith(f"error: {told['error']}\n  hint: {told['hint']}\n")


def test_each_verb_of_a_line_prints_its_own_and_the_others_print_none(tmp_path: Path) -> None:
    words = ("config", "--json", "plan", "build", "--frozen", "--json", *TINY)
    done = cli.inv(*words, "--set", f"location={tmp_path}")
    told = [set(json.loads(row)) for row in done.stdout.splitlines()]
    assert told == [documented("config"), {"host", "error", "hint"}]
    assert "keepalived-render" in done.stderr


@pytest.mark.parametrize("verb", ["disk", "boot", "render"])
def test_a_verb_that_prints_none_says_so(verb: str) -> None:
    assert f"{verb} has no flag --json" in cli.refuse(verb, "--json")


def test_the_page_lists_every_verb_that_has_the_flag() -> None:
    from tasks import namespace

    contexts = namespace.to_contexts()
    verbs = {context.name.partition(".")[0] for context in contexts if "--json" in context.flags}
    assert set(re.findall(r"^### (\S+)$", PAGE, re.M)) == verbs


def test_quiet_leaves_results_and_errors(tiny: Built) -> None:
    done = cli.inv("build", "--quiet", "--frozen", *tiny.flags)
    assert done.returncode == 0
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["image"]
    assert done.stderr == ""
