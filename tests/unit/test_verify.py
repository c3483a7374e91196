"""What a guest's answers mean, how they are shown, and how a machine is described to QEMU."""

from __future__ import annotations

import io
import itertools
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build import wire
from build.agent.events import Failure
from build.agent.guest import kvm, last_words, qemu
from build.agent.guest.media import Media
from build.agent.guest.qemu import Machine, Nic
from build.agent.verbs import boot, verify
from build.agent.verbs.verify import Answer
from build.engine.settings import Settings
from build.formats import FORMATS, KINDS
from build.verbs import verify as client

pytestmark = pytest.mark.unit

SECTORS = 4096
MIB = 1 << 20


def superblock(blocks: int, log: int = 2, wide: bool = True) -> bytes:
    raw = bytearray(1024)
    struct.pack_into("<I", raw, 4, blocks & 0xFFFFFFFF)
    struct.pack_into("<I", raw, 0x18, log)
    struct.pack_into("<H", raw, 0x38, 0xEF53)
    struct.pack_into("<I", raw, 0x60, 0x80 if wide else 0)
    struct.pack_into("<I", raw, 0x150, blocks >> 32)
    return bytes(raw)


def gpt(sectors: int = SECTORS) -> bytes:
    """What the guest sends of a sound disk: primary header, backup entries, backup header."""
    entries = bytearray(128 * 128)
    entries[:16] = b"\x01" * 16

    def header(here: int, there: int, start: int) -> bytes:
        fields = (1, 0, 0, here, there, 34, sectors - 34, bytes(16), start, 128, 128)
        raw = bytearray(
            struct.pack(
                "<8sIIIIQQQQ16sQII",
                b"EFI PART",
                0x10000,
                92,
                0,
                0,
                *fields[3:],
            )
        )
        raw += struct.pack("<I", zlib.crc32(entries))
        struct.pack_into("<I", raw, 16, zlib.crc32(raw))
        return bytes(raw.ljust(512, b"\0"))

    return header(1, sectors - 1, 2) + bytes(entries) + header(sectors - 1, 1, sectors - 33)


def socket_row(local: str, state: str, inode: int) -> str:
    rest = "00000000:00000000 00:00000000 00000000     0        0"
    return f"   0: {local} 0100007F:A001 {state} {rest} {inode} 1 00 100 0\n"


LISTENING = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    + socket_row("00000000:0F52", "0A", 1234)
    + socket_row("0100007F:0035", "0A", 999)
    + socket_row("0100007F:A000", "01", 1236)
    + socket_row("00000000000000000000000000000000:0F52", "0A", 1235)
    + "".join(
        f"lrwx------ 1 root root 64 Jan  1 00:00 3 -> socket:[{inode}]\n" for inode in (1234, 1235, 1236)
    )
)


Texts = dict[str, str | bytes]


def good(changed: Texts) -> dict[str, Answer]:
    root = {"target": "/", "source": "/dev/vda3", "fstype": "ext4", "options": "rw,relatime", "size": 1}
    texts: Texts = {
        "system": "running\n",
        "failed": "",
        "killed": "",
        "firmware": "bios\n",
        "mounts": json.dumps({"filesystems": [root]}),
        "disk": f"{SECTORS} 2048 {SECTORS - 2048 - 34}\n",
        "superblock": superblock((SECTORS - 2048 - 34) // 8),
        "gpt": gpt(),
        "drivers": "virtio_blk\nvirtio-pci\n",
        "cards": "virtio_net\n",
        "kernel": "6.1.0-1-amd64\nx86_64\n",
        "cmdline": "BOOT_IMAGE=/vmlinuz root=LABEL=ROOT ro console=ttyS0 net.ifnames=0\n",
        "release": "Cloudstack Release 4.22.0 Mon Jan  5 10:00:00 UTC 2026\n",
        "listening": LISTENING,
        "memory": "MemTotal:         209716 kB\nMemFree: 1 kB\nMemAvailable:     153600 kB\n",
        "times": "60900000\n",
    }
    texts |= changed
    return {
        name: Answer(text if isinstance(text, bytes) else text.encode(), 0) for name, text in texts.items()
    }


EXPECT = {
    "release": "Cloudstack Release 4.22.0",
    "ssh_port": 3922,
    "kernel_cmdline": "console=ttyS0 net.ifnames=0",
    "min_disk": 2,
}


HEALTHY: Texts = {}
PLAIN = Machine()


def judge(changed: Texts = HEALTHY, model: Machine = PLAIN, size: int = SECTORS * 512) -> dict[str, Any]:
    found = verify.checks(good(changed), EXPECT, model, size)
    return {check["name"]: check for check in found}


def bad(found: dict[str, Any]) -> list[str]:
    return [name for name, check in found.items() if not check["ok"]]


def test_a_healthy_guest_passes_every_check() -> None:
    found = judge()
    assert bad(found) == []
    assert found["memory"]["value"] == "150 of 204 MiB available"
    assert found["boot time"]["value"] == "60.9 s"
    assert found["sshd port"]["value"] == "3922"


def test_every_question_is_judged() -> None:
    assert set(good(HEALTHY)) == set(verify.QUESTIONS)
    for name in verify.QUESTIONS:
        model = Machine(nics=(Nic(),))
        assert bad(judge({name: b"\xff nonsense"}, model)) or name == "memory", name


@pytest.mark.parametrize(
    ("changed", "row", "value"),
    [
        ({"system": "degraded\n"}, "system", "degraded"),
        ({"failed": "ssh.service\n  no keys\n"}, "failed units", "ssh.service\n  no keys"),
        (
            {"killed": "Out of memory: Killed process 1 (java)\n"},
            "out of memory",
            "Out of memory: Killed process 1 (java)",
        ),
        ({"firmware": "uefi\n"}, "firmware", "uefi"),
        ({"disk": f"{SECTORS - 8} 2048 100\n"}, "disk size", "2.0 MiB"),
        ({"superblock": bytes(1024)}, "root grown", "0 MiB, 1 MiB unused behind it"),
        ({"gpt": gpt()[:-512] + bytes(512)}, "backup GPT", "no backup header"),
        ({"drivers": "sd\nahci\n"}, "disk driver", "sd ahci"),
        ({"kernel": "6.1.0-1-686-pae\ni686\n"}, "kernel", "6.1.0-1-686-pae i686"),
        ({"cmdline": "console=ttyS0\n"}, "kernel arguments", "without net.ifnames=0: console=ttyS0"),
        ({"release": "Cloudstack Release 4.22.01 x\n"}, "release", "Cloudstack Release 4.22.01 x"),
        ({"release": ""}, "release", "nothing"),
        ({"listening": LISTENING.replace("0F52", "0016")}, "sshd port", "22"),
        ({"listening": ""}, "sshd port", "nothing"),
        ({"times": "0\n"}, "boot time", "unknown"),
    ],
)
def test_each_fault_is_told(changed: Texts, row: str, value: str) -> None:
    found = judge(changed)
    assert row in bad(found)
    assert found[row]["value"] == value


def test_a_root_that_is_read_only_or_of_another_kind_is_told() -> None:
    mounts = json.loads(good(HEALTHY)["mounts"].text)
    for key, value in (("options", "ro,relatime"), ("fstype", "xfs"), ("target", "/mnt")):
        changed = {"filesystems": [mounts["filesystems"][0] | {key: value}]}
        assert bad(judge({"mounts": json.dumps(changed)})) == ["mounts"]


def test_root_that_did_not_grow_is_told() -> None:
    sectors = SECTORS + 64 * 2048
    found = judge({"disk": f"{sectors} 2048 {SECTORS - 2082}\n", "gpt": gpt(sectors)}, size=sectors * 512)
    assert bad(found) == ["root grown"]
    # The partition alone is not enough.
    found = judge({"disk": f"{sectors} 2048 {sectors - 2082}\n", "gpt": gpt(sectors)}, size=sectors * 512)
    assert bad(found) == ["root grown"]


def test_a_disk_smaller_than_asked_for_is_told() -> None:
    found = verify.checks(good(HEALTHY), EXPECT | {"min_disk": 3}, Machine(), SECTORS * 512)
    assert [check["name"] for check in found if not check["ok"]] == ["disk size"]


def test_what_is_not_expected_is_not_asked_for() -> None:
    found = verify.checks(good({"release": "", "listening": ""}), {}, Machine(), SECTORS * 512)
    assert all(check["ok"] for check in found)
    assert {"release", "sshd port", "nic driver"}.isdisjoint(check["name"] for check in found)


def test_the_card_is_judged_only_if_there_is_one() -> None:
    assert judge({"cards": "e1000\n"}, Machine(nics=(Nic("vmxnet3"),)))["nic driver"] == {
        "name": "nic driver",
        "ok": False,
        "value": "e1000",
        "expected": "vmxnet3",
    }


@given(st.integers(1, 1 << 40), st.integers(0, 6))
def test_ext4_size_reads_both_halves(blocks: int, log: int) -> None:
    assert verify.ext4_size(superblock(blocks, log)) == blocks * (1024 << log)
    assert verify.ext4_size(superblock(blocks, log, wide=False)) == (blocks & 0xFFFFFFFF) * (1024 << log)


@given(st.binary(max_size=2048))
def test_ext4_size_takes_anything(data: bytes) -> None:
    assert verify.ext4_size(data) >= 0


def test_a_sound_partition_table_has_no_fault() -> None:
    assert verify.gpt_fault(gpt(), SECTORS) == ""


@given(st.integers(0, 34 * 512 - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_header_or_an_entry_is_a_fault(at: int, flip: int) -> None:
    data = bytearray(gpt())
    data[at] ^= flip
    padding = 92 <= at < 512 or at >= 33 * 512 + 92
    assert bool(verify.gpt_fault(bytes(data), SECTORS)) is not padding


@pytest.mark.parametrize("sectors", [SECTORS - 1, SECTORS + 2048])
def test_a_backup_that_is_not_at_the_end_is_a_fault(sectors: int) -> None:
    assert "points to the wrong sectors" in verify.gpt_fault(gpt(), sectors)


@given(st.binary(max_size=34 * 512 + 10))
def test_gpt_fault_takes_anything(data: bytes) -> None:
    assert verify.gpt_fault(data, SECTORS)


SAID = b"\x1bc\x1b[2J\x1b[01;31mred\x1b[0m\r\nplain\n\n[    0.0] \xff\xfe bytes\nlogin: "


@given(st.lists(st.integers(0, len(SAID)), max_size=12))
def test_serial_lines_do_not_depend_on_how_they_come(cuts: list[int]) -> None:
    heard: list[tuple[str, bool]] = []
    log = io.BytesIO()
    serial = qemu.Serial(log, lambda line, ended: heard.append((line, ended)))
    places = [0, *sorted(cuts), len(SAID)]
    for start, end in itertools.pairwise(places):
        serial.feed(SAID[start:end])
    whole = [line for line, ended in heard if ended]
    assert [line.replace("\ufffd", "") for line in whole] == ["red", "plain", "[    0.0]  bytes"]
    assert heard[-1] == ("login:", False)
    assert serial.last()[-1] == "login:"
    assert log.getvalue() == SAID


def test_serial_keeps_the_last_twenty_lines_and_no_endless_one() -> None:
    serial = qemu.Serial(io.BytesIO(), lambda line, ended: None)
    serial.feed(b"".join(b"line %d\n" % number for number in range(100)))
    assert serial.last() == [f"line {number}" for number in range(80, 100)]
    for _ in range(100):
        serial.feed(b"x" * 1000)
    assert len(serial.last()) == 20
    assert len(serial.last()[-1]) == 4096


def test_last_words_are_known_in_whole_lines_and_prompts() -> None:
    assert last_words.fatal("[ 1.0] Kernel panic - not syncing: x", True) == "the kernel panicked"
    assert last_words.fatal("[ 1.0] Kernel panic - not syncing: x", False) == ""
    assert last_words.fatal("grub rescue>", False) == "GRUB finds no configuration"
    assert last_words.fatal("systemd[1]: Reached target Multi-User System.", True) == ""
    assert last_words.fatal("systemvm login:", False) == ""


def test_the_probe_is_a_rom_with_code_at_both_ends() -> None:
    rom = kvm.firmware()
    assert len(rom) == 65536
    assert rom[0xFFF0:0xFFF5] == bytes.fromhex("ea000000f0")
    assert rom.index(bytes.fromhex("0f0b")) < 0x130


@pytest.mark.parametrize("disk", qemu.DISKS)
def test_every_disk_model_has_its_drive_on_its_own_controller(disk: str) -> None:
    argv = qemu.hardware(Machine(disk=disk))
    devices = [value for flag, value in itertools.pairwise(argv) if flag == "-device"]
    assert devices[-1].endswith(",drive=disk,bootindex=0")
    assert len(devices) == len(qemu.DISKS[disk].devices)
    assert re.search(r"-accel tcg -cpu qemu64 -smp 1 -m 256", " ".join(argv))


def test_a_machine_has_a_network_only_if_asked() -> None:
    assert not {"-netdev", "-nic"} & set(qemu.hardware(Machine()))
    argv = qemu.hardware(Machine(nics=(Nic(mac="02:00:00:00:00:01"), Nic("e1000", "socket,listen=:1"))))
    assert "user,restrict=on,id=net0" in argv
    assert "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:01,romfile=" in argv
    assert "socket,listen=:1,id=net1" in argv
    assert "e1000,netdev=net1,romfile=" in argv


def test_uefi_writes_no_variables_and_needs_its_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "ovmf", lambda: ("/fw/code.fd", "/fw/vars.fd"))
    argv = qemu.hardware(Machine(firmware="uefi"))
    assert "if=pflash,unit=0,format=raw,readonly=on,file=/fw/code.fd" in argv
    assert "if=pflash,unit=1,format=raw,snapshot=on,file=/fw/vars.fd" in argv
    assert "q35,graphics=off" in argv
    monkeypatch.undo()
    monkeypatch.setattr(qemu, "OVMF", (("/nonexistent/code", "/nonexistent/vars"),))
    with pytest.raises(Failure, match="OVMF is missing"):
        qemu.hardware(Machine(firmware="uefi"))


def test_kvm_gives_the_guest_the_host_s_processor() -> None:
    argv = " ".join(qemu.hardware(Machine(accel="kvm")))
    assert "randomize_va_space" not in argv
    assert "randomize_va_space=0" in " ".join(qemu.hardware(Machine(accel="tcg")))
    assert "-accel kvm -cpu host" in argv


@pytest.mark.parametrize(
    ("request_", "firmware", "says"),
    [
        ({"arch": "i386"}, "uefi", "i386 boots under BIOS only"),
        ({"arch": "arm64"}, "bios", "unknown arch 'arm64'"),
        ({"machine": {"disk": "mfm"}}, "bios", "unknown disk model 'mfm'"),
        ({"memory": 16}, "bios", "16 MiB"),
        ({}, "efi", "unknown firmware 'efi'"),
    ],
)
def test_an_impossible_machine_is_refused(request_: dict[str, Any], firmware: str, says: str) -> None:
    with pytest.raises(Failure, match=says):
        qemu.machine(request_, firmware, "tcg")


def test_a_machine_is_read_from_a_request() -> None:
    asked = {"arch": "i386", "memory": 512, "machine": {"disk": "pvscsi", "nic": "vmxnet3"}}
    assert qemu.machine(asked, "bios", "kvm") == Machine(
        "bios", "i386", 512, "kvm", "pvscsi", (Nic("vmxnet3"),)
    )
    assert qemu.machine({}, "bios", "tcg") == Machine()


def test_paths_reach_qemu_untouched(tmp_path: Path) -> None:
    name = '/images/a, b: "c".raw'
    node = json.loads(json.dumps(qemu.drive(Media("raw", name), "/scratch/o.qcow2")))
    assert node["backing"]["file"]["filename"] == name
    assert node["backing"]["read-only"] is True
    image = tmp_path / "a, b.raw"
    image.write_bytes(b"x")
    argv = boot.argv(wire.Boot(str(image), "bios", 64, "amd64", str(tmp_path)), "tcg")
    (drive,) = [value for value in argv if value.startswith("if=none")]
    assert f"file.filename={tmp_path}/a,, b.raw" in drive
    assert "snapshot=on" in drive


def test_only_the_top_of_a_disk_is_written_to() -> None:
    node = qemu.drive(Media("raw", "/i.raw"), "/top", ("/lowest", "/higher"))
    seen = []
    while node:
        seen.append((node["file"]["filename"], node.get("read-only", False), node["driver"]))
        node = node.get("backing", {})
    assert seen == [
        ("/top", False, "qcow2"),
        ("/higher", True, "qcow2"),
        ("/lowest", True, "qcow2"),
        ("/i.raw", True, "raw"),
    ]


def guest(firmware: str = "bios", **more: Any) -> dict[str, Any]:
    rows = [
        {"name": "system", "ok": True, "value": "running", "expected": "running"},
        {"name": "kernel arguments", "ok": True, "value": "x" * 60, "expected": ""},
    ]
    base = {
        "name": "raw",
        "firmware": firmware,
        "format": "raw",
        "disk": "virtio",
        "accel": "tcg",
        "seconds": 61.25,
    }
    return {**base, "ok": True, "checks": rows, "serial_log": f"/scratch/serial-raw-{firmware}.log", **more}


class Shown:
    """A console that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def table(self, head: Any, rows: Any) -> None:
        self.lines += ["|".join(map(str, row)) for row in (head, *rows)]

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_the_table_has_a_row_a_check_and_a_column_a_guest() -> None:
    uefi = guest("uefi", ok=False)
    uefi["checks"] = [
        {"name": "system", "ok": False, "value": "degraded", "expected": "running"},
        {"name": "failed units", "ok": False, "value": "ssh.service\n  no keys", "expected": "none"},
    ]
    result = {"guests": [guest(), uefi]}
    shown = Shown()
    client.show(shown, result)
    assert shown.lines == [
        "STATE|CHECK|BIOS|UEFI",
        "FAIL|system|running|degraded",
        f"ok|kernel arguments|{'x' * 22}...|-",
        "FAIL|failed units|-|ssh.service",
        "uefi: system: degraded (expected: running)",
        "uefi: failed units: ssh.service (expected: none)",
        "      no keys",
        "bios: 61.2 s under TCG, serial log /scratch/serial-raw-bios.log",
        "uefi: 61.2 s under TCG, serial log /scratch/serial-raw-uefi.log",
    ]
    assert not client.passed(result)
    assert client.passed({"guests": [guest()]})


def test_guests_of_several_formats_are_told_apart() -> None:
    assert client.head({"guests": [guest(), guest(name="vhd", disk="ide")]})[2:] == [
        "RAW VIRTIO BIOS",
        "VHD IDE BIOS",
    ]


def test_every_format_is_tried_on_a_machine_that_qemu_has() -> None:
    files = {name: f"/images/{name}" for name in FORMATS}
    for definition in ({}, {"arch": "i386"}, {"ovf": {"firmware": "efi", "controller": "pvscsi"}}):
        settings = Settings.model_validate(definition)
        asked = client.guests(settings, files)
        assert {one.name for one in asked} == set(FORMATS)
        for one in asked:
            assert one.format in KINDS
            assert one.firmware in settings.boots_under
            model = qemu.machine({"arch": settings.arch, "machine": wire.dump(one)}, one.firmware, "tcg")
            assert (model.disk, model.nics[0].model) == (one.disk, one.nic)


def test_vmware_s_machine_follows_the_ovf_settings() -> None:
    def disk(**ovf: str) -> tuple[str, str]:
        (one,) = client.guests(Settings.model_validate({"ovf": ovf}), {"ova": "/images/a.ova"})
        return one.firmware, one.disk

    assert disk() == ("bios", "pvscsi")
    assert disk(firmware="efi") == ("uefi", "ahci")


def test_what_is_expected_comes_from_the_settings() -> None:
    wanted = Settings(cloudstack_release="4.22.0", size=1001, kernel_cmdline="console=ttyS0")
    assert client.expectations(wanted) == {
        "release": "Cloudstack Release 4.22.0",
        "ssh_port": None,
        "kernel_cmdline": "console=ttyS0",
        "min_disk": 1002,
    }
    assert client.expectations(Settings())["release"] is None


def test_the_port_is_that_of_the_last_overlay_that_sets_one(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    for folder, name, text in (
        (first, "sshd_config", "# Port 22\nPort 3922\n"),
        (second, "sshd_config.d/port.conf", "ListenAddress 0.0.0.0\n  port = 2222\n"),
        (third, "sshd_config", "#Port 22\nPermitRootLogin no\n"),
    ):
        file = folder / "etc/ssh" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    assert client.ssh_port([first]) == 3922
    assert client.ssh_port([first, second, third]) == 2222
    assert client.ssh_port([third]) is None
