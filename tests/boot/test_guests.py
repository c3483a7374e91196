"""Guests that end badly, and what is left of them: nothing."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.events import Failure
from build.agent.guest import kvm
from build.agent.verbs import verify
from tests.agent import CHECKOUT, Agent, Refused
from tests.boot.guest import RESET, WRITE, disk, sector
from tests.images import sha256
from tests.waiting import LONG

pytestmark = pytest.mark.boot


def request(
    image: Path, work: Path, *firmware: str, model: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "guests": [{"image": str(image), "firmware": one, **(model or {})} for one in firmware or ("bios",)],
        "memory": 128,
        "accel": "tcg",
        "arch": "amd64",
        "expect": {},
        "work": str(work),
        **more,
    }


def failure(asked: dict[str, Any]) -> tuple[Failure, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    with pytest.raises(Failure) as caught:
        verify.run(
            wire.load(wire.Verify, asked), lambda kind, **fields: events.append({"event": kind, **fields})
        )
    return caught.value, events


def test_the_probe_runs_to_its_end_where_guests_run() -> None:
    assert kvm.probe("tcg", limit=60) == ""


def test_the_probe_tells_a_guest_that_does_not_get_on(tmp_path: Path) -> None:
    assert "too slowly" in kvm.probe("tcg", limit=0.001)
    assert "sorcery" in kvm.probe("sorcery")


def test_kvm_is_judged() -> None:
    assert kvm.accelerator() == ("tcg" if kvm.missing() else "kvm")


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("Kernel panic - not syncing: VFS: Unable to mount root fs", "the kernel panicked"),
        ("ALERT!  LABEL=ROOT does not exist.  Dropping to a shell!", "does not find the root file system"),
        ("\r\n(initramfs) ", "does not find the root file system"),
        ("You are in emergency mode. After logging in, type ...", "emergency mode"),
        ("error: you need to load the kernel first.", "GRUB cannot load the kernel"),
        ("\r\ngrub rescue> ", "GRUB finds no configuration"),
    ],
)
def test_last_words_end_the_wait_at_once(tmp_path: Path, says: str, why: str) -> None:
    image = disk(
        tmp_path / "disk.raw", sector(f"\nLinux version 6.1 (me)\n{says}\n" if says[-1] != " " else says)
    )
    told, _ = failure(request(image, tmp_path))
    assert told.message.startswith("bios: ")
    assert why in told.message
    assert any(says.strip() in line for line in told.details["tail"])
    assert says.strip() in Path(told.details["log"]).read_text(errors="replace")
    assert str(tmp_path / "serial-raw-bios.log") in told.hint


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_a_disk_with_nothing_to_boot(tmp_path: Path, firmware: str) -> None:
    told, _ = failure(request(disk(tmp_path / "empty.raw"), tmp_path, firmware))
    assert told.message.startswith(f"{firmware}: the firmware finds nothing to boot (phase: firmware")


def test_a_silent_guest_is_given_up_with_the_phase_it_reached(tmp_path: Path) -> None:
    image = disk(tmp_path / "disk.raw", sector("\nLinux version 6.1 (me)\nlast line"))
    told, events = failure(request(image, tmp_path, timeout=5))
    assert "bios: no end within 5 s (phase: kernel" in told.message
    assert told.details["phase"] == "kernel"
    assert told.details["tail"][-1] == "last line"
    assert len(told.details["tail"]) <= 20
    assert [event["phase"] for event in events if event["event"] == "phase"] == ["firmware", "kernel"]


def test_a_reboot_is_not_followed(tmp_path: Path) -> None:
    image = disk(tmp_path / "disk.raw", sector("\nso long\n", last=RESET))
    told, _ = failure(request(image, tmp_path))
    assert "the guest rebooted" in told.message
    assert told.details["tail"][-1] == "so long"


def test_what_a_guest_writes_never_reaches_the_image(tmp_path: Path) -> None:
    image = disk(tmp_path / "disk.raw", sector("\nKernel panic - not syncing: done\n", first=WRITE))
    before = sha256(image), image.stat().st_mtime_ns
    told, _ = failure(request(image, tmp_path))
    assert "the kernel panicked" in told.message
    assert (sha256(image), image.stat().st_mtime_ns) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw", "serial-raw-bios.log"]


def test_one_bad_firmware_does_not_hide_the_other(tmp_path: Path) -> None:
    image = disk(tmp_path / "disk.raw", sector("\nKernel panic - not syncing: bios only\n"))
    told, _ = failure(request(image, tmp_path, "uefi", "bios"))
    assert told.message.startswith("uefi: the firmware finds nothing to boot")
    assert "bios: the kernel panicked" in told.message


@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        ({"image": "/nonexistent/disk.raw"}, {}, "no image /nonexistent/disk.raw"),
        ({"firmware": "openboot"}, {}, "unknown firmware 'openboot'"),
        ({"disk": "floppy"}, {}, "unknown disk model 'floppy'"),
        ({"nic": "token-ring"}, {}, "unknown network card 'token-ring'"),
        ({"firmware": "uefi"}, {"arch": "i386"}, "i386 boots under BIOS only"),
        ({}, {"memory": 8}, "8 MiB of memory are too few"),
        ({"image": "BIG"}, {"grow_to": 1}, "grow_to 1 MiB is less than"),
        ({"format": "qcow2"}, {}, "a raw image, not in qcow2 format"),
        ({"format": "hdd"}, {}, "unknown format 'hdd'"),
    ],
)
def test_a_wrong_request_starts_nothing(
    tmp_path: Path, model: dict[str, str], more: dict[str, Any], says: str
) -> None:
    big = disk(tmp_path / "big.raw", size=4 << 20)
    asked = {key: value.replace("BIG", str(big)) for key, value in model.items()}
    told, events = failure(request(disk(tmp_path / "disk.raw"), tmp_path, model=asked, **more))
    assert says in told.message
    assert events == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.raw", "disk.raw"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("end", ["kill", "close"])
def test_no_guest_outlives_its_agent(tmp_path: Path, end: str) -> None:
    agent = Agent()
    agent.send("verify", **request(disk(tmp_path / "disk.raw", sector("\nLinux version 6 (me)\n")), tmp_path))
    while agent.until("phase")["phase"] != "kernel":
        pass
    (guest,) = children(agent.pid)
    assert Path(f"/proc/{guest}/exe").readlink().name == "qemu-system-x86_64"
    watched = os.pidfd_open(guest)
    if end == "kill":
        os.kill(agent.pid, signal.SIGKILL)
        agent.reap()
    else:
        agent.close()
    assert select.select([watched], [], [], LONG)[0], "QEMU lives on"
    os.close(watched)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1 << 16]
    assert [path.name for path in left] == ["disk.raw"]


def test_failure_reaches_the_client_with_its_last_lines(tmp_path: Path) -> None:
    agent = Agent()
    try:
        with pytest.raises(Refused) as caught:
            agent.call(
                "verify",
                **request(disk(tmp_path / "d", sector("\nKernel panic - not syncing: x\n")), tmp_path),
            )
        assert caught.value.event["tail"][-1] == "Kernel panic - not syncing: x"
        assert caught.value.event["phase"] == "firmware"
    finally:
        agent.close()


def boot_program(image: Path) -> list[str]:
    """Command line of the agent's program `boot`, its request in a file beside the image."""
    asked = image.with_name("request.json")
    asked.write_text(json.dumps(wire.dump(wire.Boot(str(image), "bios", 64, "amd64", str(image.parent)))))
    return [sys.executable, "-I", "-B", str(CHECKOUT / "build/agent/__main__.py"), "exec", "boot", str(asked)]


def test_boot_shows_the_serial_line_and_ends_with_ctrl_a_x(tmp_path: Path) -> None:
    image = disk(tmp_path / "a, b.raw", sector("\nhello, terminal\n", first=WRITE))
    before = sha256(image)
    program = boot_program(image)
    ours, theirs = pty.openpty()
    child = subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""
    while b"hello, terminal" not in shown:
        assert select.select([ours], [], [], LONG)[0], shown
        shown += os.read(ours, 4096)
    os.write(ours, b"\x01x")
    assert child.wait(LONG) == 0
    os.close(ours)
    assert sha256(image) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a, b.raw"]


def test_boot_without_an_image_says_so(tmp_path: Path) -> None:
    told = subprocess.run(
        boot_program(tmp_path / "none\x1b[2J.raw"), capture_output=True, text=True, check=False, timeout=LONG
    )
    assert told.returncode == 1
    assert f"no image {tmp_path}/none" + r"\x1b[2J.raw" in told.stderr
    assert "hint: run `inv build` first" in told.stderr
