"""What verbs print for programs: one line a host, with the fields that docs/json.md lists."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from build.engine.settings import Settings
from tests import cli
from tests.disks import one, usual
from tests.images import STEPS, TINY, Built

PAGE = (cli.CHECKOUT / "docs/json.md").read_text(encoding="utf-8")


def documented(verb: str) -> set[str]:
    """Fields that the page lists for a verb."""
    section = PAGE.partition(f"### {verb}\n")[2].partition("\n### ")[0]
    return {"host", *(name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in names(row))}


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def line(verb: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    """Run a verb; its only line of output, which has every documented field and no other."""
    done = cli.inv(verb, "--json", *arguments)
    assert done.returncode == status, done.stderr
    (only,) = done.stdout.splitlines()
    told: dict[str, Any] = json.loads(only)
    assert set(told) == documented(verb)
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
    for finding in told["findings"]:
        assert set(finding) == {"severity", "where", "text", "refused_by", "fix", "lossy"}


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


@pytest.mark.parametrize("verb", ["build", "convert", "boot"])
def test_a_verb_that_prints_none_says_so(verb: str) -> None:
    assert f"{verb} has no flag --json" in cli.refuse(verb, "--json").replace("convert.all", "convert")


def test_quiet_leaves_results_and_errors(tiny: Built) -> None:
    done = cli.inv("build", "--quiet", "--frozen", *tiny.flags)
    assert done.returncode == 0
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["image"]
    assert done.stderr == ""
