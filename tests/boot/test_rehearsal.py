"""A rehearsal through the public command: the full image, and files of a server in the tests' own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import cli, standin
from tests.images import Built, sha256

pytestmark = pytest.mark.boot

DOCUMENTS = {
    "01-ip_associations.json": '{"type": "ips", "ip_address": []}',
    "02-firewall_rules.json": '{"type": "firewallrules", "rules": ["a  b"]}',
    "effects.yaml": "- {name: rule is there, run: cat /run/applied/firewall_rules, expect: '\\[\"a  b\"\\]'}",
}
PLAYED = (
    "guest agent answers",
    "boot line",
    "TCP 3922 answers",
    "set-up is not over yet",
    "scp of the scripts",
    "boot is done",
    "get_template_version.sh",
    "health after the start",
    "vr_cfg.sh -c, all documents",
    "rule is there",
    "update_config.py firewall_rules.json",
    "health with all documents",
    "checkrouter.sh",
    "live patch",
    "health after the live patch",
    "reboot",
    "health after the reboot",
)


@pytest.mark.slow(150, reason="the full system, emulated, from its start to its reboot")
def test_a_router_is_rehearsed_from_its_first_start_to_its_reboot(system: Built, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    for name, text in DOCUMENTS.items():
        (documents / name).write_text(text)
    scripts, report, before = standin.served(tmp_path / "vms"), tmp_path / "report.json", sha256(system.image)
    files = ("--scripts", str(scripts), "--documents", str(documents), "--report", str(report))
    done = cli.inv("rehearse", "--type", "router", *files, *system.flags)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert [(step["name"], step["state"]) for step in told["steps"] if step["name"] in PLAYED] == [
        (name, "ok") for name in PLAYED
    ]
    assert told["passed"] is True
    for name in PLAYED:
        assert f"  {name}" in done.stdout
    assert "what this could not see: " in done.stdout
    assert sha256(system.image) == before
    assert not [*system.location.glob("logs/.rehearse-*"), *system.location.glob("logs/.key-*")]
