"""The rehearsal's pure parts: what is played, what is sent, how an end is judged and shown."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent import verbs
from build.agent.events import Failure
from build.agent.rehearsal import batch, health
from build.agent.rehearsal.stage import Record
from build.agent.verbs import rehearse as agent
from build.engine.errors import BuildError
from build.engine.hosts.host import agent as shipped
from build.verbs import boot_line as params
from build.verbs import rehearse

pytestmark = pytest.mark.unit

KINDS = {
    "ips", "guestnetwork", "networkacl", "firewallrules", "forwardrules", "staticnatrules", "loadbalancer",
    "dhcpentry", "dhcpconfig", "vmdata", "vmpassword", "remoteaccessvpn", "vpnuserlist", "site2sitevpn",
    "staticroutes", "monitorservice", "bgppeers",
}  # fmt: skip
"""Kinds of documents that a server sends (the boot line's, cmdline, is the guest's own)."""


# --- what is played --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", rehearse.TYPES)
def test_a_machine_of_every_type(kind: str) -> None:
    machine = rehearse.machine(kind)
    assert f"type={kind}" in machine.line.split()
    assert (f"authorized_key={wire.KEY}" in machine.line.split()) == (machine.port == 3922)
    (control,) = (nic for nic in machine.nics if nic.control)
    number = machine.nics.index(control)
    assert f"eth{number}ip={control.control}" in machine.line.split()
    assert len({nic.mac for nic in machine.nics}) == len(machine.nics)
    assert all(re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", nic.mac) for nic in machine.nics)


def test_all_plays_every_type_that_has_a_boot_line() -> None:
    assert set(rehearse.kinds("all")) == set(params.DEFAULTS)
    assert rehearse.kinds("") == ("router",)
    assert rehearse.kinds("secstorage") == ("secstorage",)


def test_cards_of_a_vpc_come_while_it_runs() -> None:
    vpc, router = rehearse.machine("vpcrouter"), rehearse.machine("router")
    assert [nic.late for nic in vpc.nics] == [False, True, True, True]
    assert not any(nic.late for nic in router.nics)
    text = next(each.text for each in router.documents if each.name == "ip_associations.json")
    assert json.loads(text)["ip_address"][0]["vif_mac_address"] == router.nics[2].mac


def test_a_pair_shares_a_network_and_nothing_else() -> None:
    one, other = rehearse.pair()
    assert one.nics[0].mac != other.nics[0].mac
    assert one.nics[1].control != other.nics[1].control
    for machine in (one, other):
        assert "redundant_router=1" in machine.line.split()
        assert machine.answers_state
    duel = rehearse.duel((one, other))
    assert duel.gateway not in {nic.control for nic in (*one.nics, *other.nics)}
    assert 3 < duel.bound < 5


@pytest.mark.parametrize("kind", ["bridge", "routers", "ALL"])
def test_an_unknown_type_is_named(kind: str) -> None:
    with pytest.raises(BuildError, match=kind):
        rehearse.kinds(kind)


# --- documents -------------------------------------------------------------------------------------


def test_the_samples_are_of_every_kind() -> None:
    sent = [document for kind in rehearse.ROUTING for document in rehearse.documents_of(kind, "")[0]]
    assert {json.loads(document.text)["type"] for document in sent} == KINDS
    assert all("\n" not in document.text for document in sent)


@pytest.mark.parametrize("kind", rehearse.ROUTING)
def test_samples_name_documentation_addresses_only(kind: str) -> None:
    text = "".join(document.text for document in rehearse.documents_of(kind, "")[0])
    public = set(re.findall(r"\b(?!10\.|169\.254\.|172\.|127\.|255\.|0\.)\d+\.\d+\.\d+\.\d+\b", text))
    assert public
    assert all(address.startswith(("192.0.2.", "198.51.100.", "203.0.113.")) for address in public)


@pytest.mark.parametrize("kind", rehearse.ROUTING)
def test_effects_of_the_samples_are_told_apart(kind: str) -> None:
    effects = rehearse.documents_of(kind, "")[1]
    assert len({effect.name for effect in effects}) == len(effects) > 10


def test_documents_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "02-vm_data.json").write_text('{"type": "vmdata",\n "x": "a b"}')
    (tmp_path / "01-dhcp.json").write_text('{"type": "dhcpconfig"}')
    documents, effects = rehearse.documents_of("router", str(tmp_path))
    assert [document.name for document in documents] == ["dhcp.json", "vm_data.json"]
    assert documents[1].text == '{"type":"vmdata","x":"a b"}'
    assert effects == ()
    (tmp_path / "vpcrouter").mkdir()
    (tmp_path / "vpcrouter" / "ips.json").write_text('{"type": "ips"}')
    assert [each.name for each in rehearse.documents_of("vpcrouter", str(tmp_path))[0]] == ["ips.json"]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, "no documents"),
        ({"a.json": "{"}, "is no JSON"),
        ({"a.json": "[]"}, "has no type"),
        ({"a.json": '{"type": 1}'}, "has no type"),
        ({"a.json": '{"type": "ips"}', "effects.yaml": "- {name: a, run: b}"}, "missing: expect"),
        ({"a.json": '{"type": "ips"}', "effects.yaml": "- {name: a, run: b, expect: '('}"}, "effects.yaml"),
        ({"a.json": '{"type": "ips"}', "effects.yaml": "- : ["}, "effects.yaml"),
    ],
)
def test_documents_that_are_none(tmp_path: Path, files: Mapping[str, str], what: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BuildError, match=re.escape(what)):
        rehearse.documents_of("router", str(tmp_path))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no folder"):
        rehearse.documents_of("router", str(tmp_path / "none"))


def test_a_batch_is_what_the_servers_script_reads() -> None:
    documents = [wire.Document("dhcp.json", '{"type":"dhcpconfig"}'), wire.Document("ips.json", "{}")]
    numbers = iter(("1", "2"))
    assert batch.compose(documents, lambda: next(numbers)) == (
        "#Apache CloudStack Virtual Router Config File\n"
        "<version>\n1.0\n</version>\n"
        '<file>\n/var/cache/cloud/dhcp.json.1\n{"type":"dhcpconfig"}\n</file>\n'
        "<script>\n/opt/cloud/bin/update_config.py dhcp.json.1\n</script>\n"
        "<file>\n/var/cache/cloud/ips.json.2\n{}\n</file>\n"
        "<script>\n/opt/cloud/bin/update_config.py ips.json.2\n</script>\n"
    )


def test_no_document_has_the_name_of_another() -> None:
    document = wire.Document("ips.json", "{}")
    first, second = batch.file_name(document), batch.file_name(document)
    assert first != second
    assert re.fullmatch(r"ips\.json\.[0-9a-f-]{36}", first)


# --- scripts ---------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """The three files as a management server has them."""
    inside = tmp_path / "patched.sh"
    inside.write_text("#!/bin/sh\n")
    with tarfile.open(tmp_path / "cloud-scripts.tgz", "w:gz") as archive:
        archive.add(inside, "opt/cloud/bin/patched.sh")
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as archive_of_agent:
        archive_of_agent.writestr("conf/agent.properties", "")
    (tmp_path / "patch-sysvms.sh").write_text("#!/bin/sh\n")
    return tmp_path


def test_the_others_lie_beside_the_scripts(served: Path) -> None:
    found = rehearse.find_scripts(str(served / "cloud-scripts.tgz"), "", "")
    assert found == wire.Scripts(
        str(served / "cloud-scripts.tgz"), str(served / "agent.zip"), str(served / "patch-sysvms.sh")
    )


def test_a_management_server_has_them(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "SERVER", tmp_path / "none")
    assert rehearse.find_scripts("", "", "") is None
    monkeypatch.setattr(rehearse, "SERVER", served)
    found = rehearse.find_scripts("", "", "")
    assert found
    assert found.agent == str(served / "agent.zip")


@pytest.mark.parametrize(
    ("broken", "content", "what"),
    [
        ("cloud-scripts.tgz", None, "no file"),
        ("cloud-scripts.tgz", b"text", "is no archive of system VM scripts"),
        ("cloud-scripts.tgz", b"\x1f\x8b\x08\0cut", "is no archive of system VM scripts"),
        ("agent.zip", None, "name it: --agent"),
        ("agent.zip", b"PK", "is no zip archive"),
        ("patch-sysvms.sh", None, "name it: --patch"),
        ("patch-sysvms.sh", b"\x7fELF", "is no script"),
    ],
)
def test_files_that_are_none(served: Path, broken: str, content: bytes | None, what: str) -> None:
    if content is None:
        (served / broken).unlink()
    else:
        (served / broken).write_bytes(content)
    with pytest.raises(BuildError) as caught:
        rehearse.find_scripts(str(served / "cloud-scripts.tgz"), "", "")
    assert what in f"{caught.value} {caught.value.hint}"
    assert broken in str(caught.value)


def test_an_archive_of_something_else(served: Path) -> None:
    with tarfile.open(served / "other.tgz", "w:gz") as archive:
        archive.add(served / "patched.sh", "etc/passwd")
    with pytest.raises(BuildError, match="is no archive of system VM scripts"):
        rehearse.find_scripts(str(served / "other.tgz"), "", "")


@pytest.mark.parametrize("kind", ["md5", "sha512"])
def test_the_signature_is_the_archives(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "a"
    archive.write_bytes(b"scripts")
    digest = hashlib.new(kind, b"scripts").hexdigest()
    assert batch.signature_fault(digest, archive) == ""
    assert kind in batch.signature_fault(digest[::-1], archive)


@pytest.mark.parametrize("signature", ["", "0" * 64, "nothing"])
def test_a_signature_of_no_known_kind(tmp_path: Path, signature: str) -> None:
    assert "neither md5 nor SHA-512" in batch.signature_fault(signature, tmp_path)


# --- over the wire ---------------------------------------------------------------------------------


def request(**changed: Any) -> wire.RehearseRequest:
    given: dict[str, Any] = {
        "image": "/none/x.img",
        "arch": "amd64",
        "memory": 256,
        "release": "",
        "work": "/none",
        "machines": (rehearse.machine("vpcrouter"),),
        "scripts": None,
        "pair": None,
    }
    return wire.RehearseRequest(**{**given, **changed})


def test_a_request_arrives_as_it_was_sent() -> None:
    scripts = wire.Scripts("/a", "/b", "/c", passing="/d")
    for sent in (request(), request(scripts=scripts, pair=wire.Pair("10.1.1.1", "10.1.1.9", 4.0))):
        assert wire.load(wire.RehearseRequest, json.loads(json.dumps(wire.dump(sent)))) == sent


def _without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: each for name, each in value.items() if name != key}


SENT = json.loads(json.dumps(wire.dump(request())))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (_without(SENT, "memory"), "memory"),
        ({**SENT, "memory": "256"}, "memory is no int"),
        ({**SENT, "memory": True}, "memory is no int"),
        ({**SENT, "more": 1}, "more"),
        ({**SENT, "machines": {}}, "machines is no list"),
        ({**SENT, "machines": ["x"]}, r"machines[0] is no object"),
        ({**SENT, "scripts": {"scripts": "/a"}}, "agent, patch"),
    ],
)
def test_what_is_no_request(value: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)):
        wire.load(wire.RehearseRequest, value)


def test_a_host_gets_what_the_verb_imports() -> None:
    files = shipped()
    assert {"build/wire.py", "build/agent/verbs/rehearse.py", "build/agent/rehearsal/part.py"} <= set(files)
    assert verbs.load("rehearse") is agent


# --- the agent's side ------------------------------------------------------------------------------


def quiet(kind: str, **fields: Any) -> None:
    """Nobody listens."""


def test_files_that_are_not_there_end_it_and_nothing_is_left(tmp_path: Path) -> None:
    passing = tmp_path / "lent"
    passing.mkdir()
    (passing / "scripts").write_bytes(b"x")
    scripts = wire.Scripts(
        str(passing / "scripts"), str(passing / "none"), str(passing / "none"), str(passing)
    )
    with pytest.raises(Failure, match="No such file"):
        agent.run(request(scripts=scripts), quiet)
    assert not passing.exists()


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"memory": 63}, "63 MiB of memory are too few"), ({"arch": "sparc"}, "unknown arch 'sparc'")],
)
def test_a_machine_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], what: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/bin/it")
    with pytest.raises(Failure, match=what):
        agent.run(request(accel="tcg", **changed), quiet)


def test_a_healthy_machine_has_no_faults() -> None:
    text = "\n".join(f"@@{name}" for name in health.QUESTIONS)
    assert health.complete(text)
    assert health.faults(text) == []
    assert not health.complete(text.rpartition("\n")[0])


def test_each_fault_is_told_with_what_it_is() -> None:
    text = "\n".join(f"@@{name}\n{name[:3]} is bad" for name in health.QUESTIONS)
    assert health.faults(text) == [f"{name}: {name[:3]} is bad" for name in health.QUESTIONS]


def test_the_console_is_told_once_for_failures_in_a_row() -> None:
    told: list[wire.Step] = []
    console = ["a"]
    record = Record("r-1-VM", told.append, lambda: list(console))
    record.note("one", "ok", "")
    record.note("two", "FAIL", "why")
    record.note("three", "FAIL", "why")
    console.append("b")
    record.note("four", "FAIL", "why")
    assert [step.tail for step in told] == [(), ("a",), (), ("a", "b")]


def test_a_step_is_a_row_with_its_reason_and_the_console() -> None:
    assert rehearse.lines(wire.Step("m", "boot line", "ok", 1.25, "787\n bytes")) == [
        "ok         1.2  boot line: 787 bytes"
    ]
    failed = wire.Step("m", "reboot", "FAIL", 60.0, "it does not go down", ("Linux", "login:"))
    assert rehearse.lines(failed) == [
        "FAIL      60.0  reboot: it does not go down",
        "                | Linux",
        "                | login:",
    ]
