"""How a rehearsal judges what a machine says, with a machine that only says it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from build import wire
from build.agent.guest import qemu
from build.agent.rehearsal import part
from build.agent.rehearsal.login import Ended, File, Login
from build.agent.rehearsal.stage import Fault, Over, Record, Stage

pytestmark = pytest.mark.unit

MACHINE = wire.Machine("router", "r-1-VM", "template=domP", ())
SCRIPTS = b"scripts"
DIGEST = hashlib.sha512(SCRIPTS).hexdigest()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A machine to which scripts were copied."""
    archive = tmp_path / "cloud-scripts.tgz"
    archive.write_bytes(SCRIPTS)

    async def until(work: Awaitable[Any]) -> Any:
        return await work

    guest: Any = SimpleNamespace(until=until)
    record = Record("r-1-VM", lambda step: None)
    files = (File("cloud-scripts.tgz", 0),)
    return Stage(guest, MACHINE, Login(1, ""), files, archive, "Cloudstack Release 4.22.0", record)


def without(stage: Stage) -> Stage:
    """The same machine, with what is in the image."""
    return replace(stage, files=(), signed=None)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how every command and copy ends."""

    def end(status: int, out: str = "", err: str = "") -> None:
        async def ended(*_: Any) -> Ended:
            return Ended(status, out, err)

        monkeypatch.setattr("build.agent.rehearsal.login.run", ended)
        monkeypatch.setattr("build.agent.rehearsal.login.copy", ended)

    return end


def test_release_and_signature_are_compared(stage: Stage, says: Any) -> None:
    says(0, f"Cloudstack Release 4.22.0 Thu Nov 26&{DIGEST}\n")
    assert "sha512" in asyncio.run(part._version(stage))
    assert "no scripts to compare" in asyncio.run(part._version(without(stage)))


@pytest.mark.parametrize(
    ("out", "why"),
    [
        (f"Cloudstack Release 4.22.0 x&{DIGEST[::-1]}", "is not that of the archive"),
        (f"Cloudstack Release 4.22.01&{DIGEST}", "does not begin with"),
        (f"Cloudstack Release 4.22.0 a&b&{DIGEST}", "no `RELEASE&SIGNATURE`"),
        ("Cloudstack Release 4.22.0 x&", "neither md5 nor SHA-512"),
        ("", "no `RELEASE&SIGNATURE`"),
    ],
)
def test_a_wrong_version_is_a_fault(stage: Stage, says: Any, out: str, why: str) -> None:
    says(0, out)
    with pytest.raises(Fault, match=why):
        asyncio.run(part._version(stage))


@pytest.mark.parametrize("state", ["PRIMARY", "BACKUP", "FAULT", "UNKNOWN"])
def test_a_state_is_one_line(stage: Stage, says: Any, state: str) -> None:
    says(0, f"Status: {state}\n")
    assert asyncio.run(part.state(stage)) == state
    for out in (
        f"{state}\n",
        f"Status: {state} or so",
        f"Status: {state}\nStatus: {state}",
        "Status: MASTER",
    ):
        says(0, out)
        with pytest.raises(Fault, match="no line `Status"):
            asyncio.run(part.state(stage))
    says(1, f"Status: {state}\n")
    with pytest.raises(Fault):
        asyncio.run(part.state(stage))


def test_a_live_patch_tells_its_version_with_one_colon(stage: Stage, says: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(part, "_copy", lambda stage: asyncio.sleep(0))
    says(0, f"/root\nversion:{DIGEST} \n")
    assert DIGEST[:16] in asyncio.run(part.live_patch(stage))
    for out, why in (
        (f"note: x\nversion:{DIGEST}", "one colon"),
        ("", "one colon"),
        (f"version:{DIGEST[::-1]}", "is not that of the archive"),
    ):
        says(0, out)
        with pytest.raises(Fault, match=why):
            asyncio.run(part.live_patch(stage))
    says(1, f"version:{DIGEST}")
    with pytest.raises(Fault, match="exit status 1"):
        asyncio.run(part.live_patch(stage))


def test_a_document_must_be_applied_where_scripts_came(stage: Stage, says: Any) -> None:
    document = wire.Document("ips.json", "{}")
    says(0)
    assert asyncio.run(part._single(stage, document)) == ""
    says(1, err="no such thing")
    with pytest.raises(Fault, match="no such thing"):
        asyncio.run(part._single(stage, document))


def test_a_document_must_be_refused_where_none_came(
    stage: Stage, says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "_send", lambda *_: asyncio.sleep(0))
    document = wire.Document("ips.json", "{}")
    says(3, err="ips: nothing here applies this")
    assert "nothing here applies this" in asyncio.run(part._single(without(stage), document))
    says(0)
    with pytest.raises(Fault, match="a server would believe it"):
        asyncio.run(part._single(without(stage), document))


def test_a_batch_that_ends_with_0_can_have_failed(stage: Stage, says: Any) -> None:
    says(0)
    assert asyncio.run(part._batch(stage)) == ""
    says(0, err='VR config: execution failed: "x", check the log')
    with pytest.raises(Fault, match="execution failed"):
        asyncio.run(part._batch(stage))


def test_a_set_up_that_waits_is_idle() -> None:
    shown = "ExecMainStartTimestampMonotonic=5000000\nExecMainExitTimestampMonotonic={}\nCPUUsageNSec={}\n"
    assert part.set_up(shown.format(126000000, 1000000000)) == (121.0, 120.0)
    assert part.set_up(shown.format(126000000, 90000000000)) == (121.0, 31.0)
    assert part.set_up("ExecMainStartTimestampMonotonic=0\nCPUUsageNSec=[not set]") == (0.0, 0.0)


def test_what_ends_a_rehearsal_and_what_does_not() -> None:
    told: list[wire.Step] = []

    async def journal(seconds: float) -> Sequence[str]:
        return [f"{seconds:.0f} s ago"]

    record = Record("r-1-VM", told.append, journal=journal)

    async def fails(error: Exception) -> str:
        raise error

    assert not asyncio.run(record.step("a", fails(Fault("why"))))
    with pytest.raises(Over):
        asyncio.run(record.step("b", fails(Fault("why")), essential=True))
    assert not asyncio.run(record.step("c", fails(qemu.Interrupted("killed"))))
    with pytest.raises(Over):
        asyncio.run(record.step("d", fails(qemu.Stopped("the kernel panicked"))))
    assert [(step.name, step.state, step.says) for step in told] == [
        ("a", "FAIL", "why"),
        ("b", "FAIL", "why"),
        ("c", "FAIL", "killed"),
        ("d", "FAIL", "the kernel panicked"),
    ]
    assert {step.tail for step in told} == {("0 s ago",)}
