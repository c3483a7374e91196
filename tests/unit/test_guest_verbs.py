from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import guest
from tests.guest import Recorder

main, transport, patch, redundancy, setup = (
    guest.module(name) for name in ("main", "transport", "patch", "redundancy", "setup")
)
CMDLINE = "/var/cache/cloud/cmdline"


@pytest.fixture
def box(tmp_path: Path) -> Recorder:
    """A machine with the overlay's own files and a place for its log."""
    recorder = Recorder(tmp_path)
    for name in (
        "/etc/ssh/sshd_config",
        "/etc/sysctl.conf",
        *(f"/etc/iptables/iptables-{kind}" for kind in ("router", "vpcrouter")),
    ):
        recorder.put(name, guest.overlay(name))
    recorder.put(
        "/usr/local/lib/systemvm/keepalived.conf.j2",
        (guest.CHECKOUT / "templates/keepalived.conf.j2").read_bytes(),
    )
    recorder.put("/usr/local/lib/systemvm/keepalived.json", json.dumps(guest.defaults()))
    recorder.put("/etc/cloudstack-release", "Cloudstack Release 4.22.0 Thu Jan  1 00:00:00 UTC 2026\n")
    recorder.put("/var/log/cloud.log", "")
    return recorder


def kvm(box: Recorder) -> None:
    box.put("/sys/class/virtio-ports/vport1p1/name", "org.qemu.guest_agent.0\n")


def nic(box: Recorder, name: str, mac: str) -> None:
    box.put(f"/sys/class/net/{name}/address", f"{mac}\n")
    box.put(f"/sys/class/net/{name}/device/vendor", "")


# The boot line ---------------------------------------------------------------------------------


def test_kvm_waits_until_the_host_has_written(box: Recorder) -> None:
    kvm(box)
    begin = box.clock
    box.put("/etc/cloudstack/ips.json", "{}")

    def host(now: float) -> None:
        if now - begin > 3 and not (box.root / CMDLINE[1:]).exists():
            box.put(CMDLINE, "")  # opened, and empty for a while
        elif now - begin > 6 and not box.text(CMDLINE):
            box.put(CMDLINE, guest.ROUTER)

    box.later = host
    assert main.main(["receive"], box.machine) == 0
    assert box.text(CMDLINE) == guest.ROUTER
    assert 6 < box.clock - begin < 8
    assert not (box.root / "etc/cloudstack/ips.json").exists()
    assert box.text("/run/systemvm/hypervisor") == "kvm\n"


def test_kvm_gives_up_and_says_so(box: Recorder) -> None:
    kvm(box)
    begin = box.clock
    assert main.main(["receive"], box.machine) == 0
    assert 59 < box.clock - begin < 62
    assert "no boot line came from kvm" in box.text("/var/log/cloud.log")


def test_kvm_without_a_channel_does_not_wait(box: Recorder) -> None:
    box.put("/sys/class/dmi/id/sys_vendor", "QEMU\n")
    begin = box.clock
    assert main.main(["receive"], box.machine) == 0
    assert box.clock == begin


def origin(box: Recorder) -> str:
    return box.text("/run/systemvm/boot-line").strip()


def test_kvm_takes_an_old_line_after_a_reboot_but_rather_a_new_one(box: Recorder) -> None:
    kvm(box)
    box.put(CMDLINE, "advert_int=1 type=router")
    begin = box.clock
    assert main.main(["receive"], box.machine) == 0
    # The agent may be there before us: at a first start what is there is what the host has just written.
    assert box.clock - begin < 2
    assert origin(box) == "started"
    begin = box.clock
    assert main.main(["receive"], box.machine) == 0
    assert 4.5 < box.clock - begin < 6.5
    assert box.text(CMDLINE) == "advert_int=1 type=router"
    assert origin(box) == "rebooted"

    def host(now: float) -> None:
        if now - begin > 2 and "=1 " in box.text(CMDLINE):
            box.put(CMDLINE, "advert_int=2 type=router")

    begin, box.later = box.clock, host
    assert main.main(["receive"], box.machine) == 0
    assert box.text(CMDLINE) == "advert_int=2 type=router"
    assert box.clock - begin < 3
    assert origin(box) == "started"


def test_the_same_line_written_anew_is_a_new_one(box: Recorder) -> None:
    kvm(box)
    path = box.put(CMDLINE, "type=router")
    main.main(["receive"], box.machine)
    begin = box.clock

    def host(now: float) -> None:
        if now - begin > 2:
            box.later = None
            path.write_text("type=router")
            os.utime(path, (now, now))

    box.later = host
    main.main(["receive"], box.machine)
    assert origin(box) == "started"


@pytest.mark.parametrize(("kind", "swaps"), [("router", True), ("cksnode", False), ("sharedfsvm", False)])
def test_swap_is_for_system_vms(box: Recorder, kind: str, swaps: bool) -> None:
    kvm(box)
    box.put(CMDLINE, guest.LINES[kind])
    main.main(["receive"], box.machine)
    assert box.has("systemctl", "start", "--no-block", "systemvm-swap") == swaps


def test_a_boot_is_not_done_before_it_is(box: Recorder) -> None:
    box.put(main.DONE, "")
    main.main(["receive"], box.machine)
    assert not (box.root / main.DONE[1:]).exists()


def test_xen_paravirtual(box: Recorder) -> None:
    box.put("/sys/hypervisor/type", "xen\n")
    box.put("/sys/hypervisor/guest_type", "PV\n")
    box.put("/proc/cmdline", "root=LABEL=ROOT ro%template=domP%type=router%name=r-4-VM\n")
    main.main(["receive"], box.machine)
    assert box.text(CMDLINE).split()[-3:] == ["template=domP", "type=router", "name=r-4-VM"]
    assert box.has("systemctl", "stop", "--no-block", "ntpsec") is False  # the recorder says: not loaded


def test_xen_hardware(box: Recorder) -> None:
    box.put("/sys/hypervisor/type", "xen\n")
    box.put("/sys/hypervisor/guest_type", "HVM\n")
    box.answers = {"xenstore-read vm-data/cloudstack/init": (0, "type=dhcpsrvr%name=r-4-VM")}
    main.main(["receive"], box.machine)
    assert box.text(CMDLINE) == "type=dhcpsrvr name=r-4-VM\n"


def test_vmware_asks_again_until_the_tools_answer(box: Recorder) -> None:
    box.put("/sys/class/dmi/id/sys_vendor", "VMware, Inc.\n")
    box.answers = {"vmtoolsd": (1, "No value found"), "systemctl show": (0, "LoadState=loaded\n")}
    box.later = lambda now: (
        setattr(box, "answers", {"vmtoolsd": (0, "type=router name=r-1-VM")}) if now % 1 == 0 else None
    )
    main.main(["receive"], box.machine)
    assert box.text(CMDLINE) == "type=router name=r-1-VM\n"
    assert box.has("systemctl", "start", "--no-block", "open-vm-tools")
    assert box.has("systemctl", "stop", "--no-block", "ntpsec")


@pytest.mark.parametrize("place", ["/var/lib/hyperv/.kvp_pool_0", "/var/opt/hyperv/.kvp_pool_0"])
def test_hyperv_pools(box: Recorder, place: str) -> None:
    def record(key: str, value: str) -> bytes:
        return struct.pack("512s2048s", key.encode(), value.encode())

    box.put("/sys/class/dmi/id/sys_vendor", "Microsoft Corporation\n")
    box.put(
        place,
        record("other", "nothing here") + record("cloudstack-vm-userdata", "type=secstorage name=s-1-VM"),
    )
    main.main(["receive"], box.machine)
    assert box.text(CMDLINE) == "type=secstorage name=s-1-VM\n"


def test_virtualbox(box: Recorder) -> None:
    box.put("/sys/class/dmi/id/sys_vendor", "innotek GmbH\n")
    box.answers = {
        "dmidecode": (0, "OEM Strings\n\tString 1: vboxVer_7\n\tString 2: cmdline:type=router name=r-9-VM\n")
    }
    main.main(["receive"], box.machine)
    assert box.text(CMDLINE) == "type=router name=r-9-VM\n"


def test_unknown_hypervisor_is_no_reason_to_stop(box: Recorder) -> None:
    assert main.main(["receive"], box.machine) == 0
    assert "no way to get a boot line" in box.text("/var/log/cloud.log")


def test_test_hook_replaces_what_came(box: Recorder) -> None:
    box.put("/sys/class/dmi/id/sys_vendor", "innotek GmbH\n")
    box.put("/mnt/cmdline", "type=elbvm\n")
    main.main(["receive"], box.machine)
    assert box.text(CMDLINE) == "type=elbvm\n"


@pytest.mark.parametrize("data", [b"", b"\0" * 2560, b"x" * 100, os.urandom(2560 * 3), b"a=b\0\0"])
def test_any_pool_decodes(data: bytes) -> None:
    assert isinstance(transport.decode("pool", data), str)


# The boot --------------------------------------------------------------------------------------


def test_preinit(box: Recorder) -> None:
    key = "ssh-rsa AAAAB3NzaC1yc2E= root@management"
    line = (
        guest.ROUTER + " vmpassword=p:w authorized_key=c3NoLXJzYSBBQUFBQjNOemFDMXljMkU9IHJvb3RAbWFuYWdlbWVudA"
    )
    box.put(CMDLINE, line)
    for index, mac in enumerate(("02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03")):
        nic(box, f"eth{index}", mac)
    assert main.main(["preinit"], box.machine) == 0
    assert box.text("/root/.ssh/authorized_keys") == f"{key}\n"
    assert (box.root / "root/.ssh/authorized_keys").stat().st_mode & 0o777 == 0o600
    assert box.typed[box.ran.index(("chpasswd",))] == "root:p:w\n"
    assert box.has("iptables-restore", "/etc/iptables/rules.v4")
    assert box.has("systemctl", "start", "--no-block", "ssh")
    assert "advert_int 2\n" in box.text("/etc/keepalived/keepalived.conf")
    assert "p:w" not in box.text("/var/log/cloud.log")


def test_preinit_puts_nics_in_order(box: Recorder) -> None:
    box.put(CMDLINE, "type=router nic_macs=02:00:00:00:00:02|02:00:00:00:00:01")
    nic(box, "eth0", "02:00:00:00:00:01")
    nic(box, "eth1", "02:00:00:00:00:02")
    main.main(["preinit"], box.machine)
    named = [command[4:] for command in box.ran if command[:3] == ("ip", "link", "set") and "name" in command]
    assert named == [
        ("eth1", "name", "moving0"),
        ("eth0", "name", "moving1"),
        ("moving0", "name", "eth0"),
        ("moving1", "name", "eth1"),
    ]
    assert 'ATTR{address}=="02:00:00:00:00:02", NAME="eth0"' in box.text(
        "/etc/udev/rules.d/70-persistent-net.rules"
    )


def test_redundancy_that_went_away_leaves_no_file(box: Recorder) -> None:
    box.put(CMDLINE, guest.ROUTER)
    main.main(["preinit"], box.machine)
    assert (box.root / "etc/keepalived/keepalived.conf").exists()
    box.put(CMDLINE, " ".join(word for word in guest.ROUTER.split() if not word.startswith("redundant")))
    main.main(["preinit"], box.machine)
    for name in redundancy.FILES:
        assert not (box.root / name[1:]).exists()


@pytest.mark.parametrize("verb", ["receive", "preinit", "early-config", "postinit"])
def test_boot_goes_on_whatever_breaks(box: Recorder, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(guest.module("machine").Machine, "read", broken)
    machine = box.machine
    assert main.main([verb], machine) == 0
    assert any("boom" in line for line in machine.logged)


def test_postinit(box: Recorder) -> None:
    box.put(CMDLINE, guest.ROUTER)
    main.main(["preinit"], box.machine)
    box.answers = {
        "systemctl show": (
            0,
            "LoadState=loaded\n\nLoadState=not-found\n\nLoadState=loaded\n\nLoadState=masked\n",
        )
    }
    box.ran.clear()
    assert main.main(["postinit"], box.machine) == 0
    # Of haproxy, apache2, keepalived, conntrackd this image has two.
    assert box.has("systemctl", "start", "--no-block", "haproxy", "keepalived")
    assert "not in this image: apache2 conntrackd" in box.text("/var/log/cloud.log")
    assert (box.root / "var/cache/cloud/boot_up_done").exists()
    packed = (box.root / "var/cache/cloud/processed/cmd_line.json.gz").read_bytes()
    assert json.loads(gzip.decompress(packed))["cmd_line"]["redundant_router"] == "1"
    assert json.loads(box.text("/etc/cloudstack/cmdline.json"))["config"]["redundant_router"] == "true"


def test_template_version_waits_for_the_boot(box: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    box.put("/var/cache/cloud/cloud-scripts-signature", "abc\n")
    begin = box.clock

    def boot(now: float) -> None:
        if now > begin + 7:
            box.put("/var/cache/cloud/boot_up_done", "")

    box.later = boot
    assert main.main(["template-version"], box.machine) == 0
    assert capsys.readouterr().out == "Cloudstack Release 4.22.0 Thu Jan  1 00:00:00 UTC 2026&abc\n"
    assert box.clock - begin < 8


def test_template_version_does_not_wait_for_ever(box: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    begin = box.clock
    assert main.main(["template-version"], box.machine) == 0
    assert 239 < box.clock - begin < 241
    assert "&" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["update-config"], ["preinit", "x"]])
def test_wrong_usage(box: Recorder, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv, box.machine) == 2
    assert "usage: systemvm" in capsys.readouterr().err


# Scripts of a management server -------------------------------------------------------------------


def packed(*members: tuple[str, str] | tarfile.TarInfo, form: str = "sha512") -> bytes:
    """An archive of scripts as a management server has it: files (name, text) and whatever else is given."""
    early = ("opt/cloud/bin/setup/cloud-early-config", f"#!/bin/bash\n{form}sum $patchfile\n")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for member in (early, *members):
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1].encode()))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def started(box: Recorder, line: str = guest.ROUTER, how: str = "started") -> None:
    box.put(CMDLINE, line)
    box.put(main.ORIGIN, f"{how}\n")


def brought(box: Recorder, data: bytes, after: float = 10) -> None:
    """A host copies an archive some seconds from now."""
    begin = box.clock

    def host(now: float) -> None:
        if now - begin >= after and not (box.root / patch.COPIED[1:]).exists():
            box.later = None
            box.put(patch.COPIED, data)

    box.later = host


def log(box: Recorder) -> str:
    return box.text("/var/log/cloud.log")


@pytest.mark.parametrize("form", ["sha512", "md5"])
def test_scripts_that_come_are_taken_in(box: Recorder, form: str) -> None:
    """Servers up to 4.21 compare MD5, later ones SHA-512: the scripts say which."""
    data = packed(form=form)
    started(box)
    brought(box, data)
    box.put(patch.AGENT, "")
    box.put(patch.COPIED_KEYS, "ssh-rsa HOST\n")
    (box.root / patch.AGENT[1:]).unlink()
    begin = box.clock
    assert main.main(["early-config"], box.machine) == 0
    assert 10 <= box.clock - begin < 14
    assert box.has("tar", "-xzf", patch.COPIED, "-C", "/")
    assert box.text(patch.SIGNATURE) == f"{hashlib.new(form, data).hexdigest()}\n"
    assert (box.root / patch.REQUIRED[1:]).exists()
    assert box.has("systemctl", "daemon-reload")
    assert box.text("/root/.ssh/authorized_keys") == "ssh-rsa HOST\n"
    assert (box.root / patch.KEPT[1:]).read_bytes() == data
    assert not (box.root / patch.COPIED[1:]).exists()


def test_their_own_set_up_goes_on_and_finds_nothing_of_ours_beside_it(box: Recorder) -> None:
    main.main(["preinit"], box.machine)
    started(box, guest.LINES["router"] + " redundant_router=1")
    main.main(["preinit"], box.machine)
    assert (box.root / redundancy.KEEPALIVED[1:]).exists()
    brought(box, packed())
    box.put(patch.BOOTSTRAP, "#!/bin/sh\n")
    box.put("/etc/iptables/iptables-router", "# theirs\n-A INPUT -i eth9 -p tcp --dport 3922 -j ACCEPT\n")
    box.ran.clear()
    main.main(["early-config"], box.machine)
    assert box.ran[-1] == (patch.BOOTSTRAP,)
    assert not [name for name in setup.OURS_ALONE if (box.root / name[1:]).exists()]
    assert box.text(setup.RULES) == "# theirs\n-A INPUT -i eth1 -p tcp --dport 3922 -j ACCEPT\n"


def test_scripts_without_a_set_up_leave_it_to_ours(box: Recorder) -> None:
    started(box, guest.VPC_ROUTER)
    brought(box, packed())
    main.main(["early-config"], box.machine)
    assert box.has("ip", "rule", "add")
    assert not box.has(patch.BOOTSTRAP)


@pytest.mark.parametrize(("kind", "stays"), [("router", False), ("consoleproxy", True)])
def test_the_agent_stays_where_it_is_run(box: Recorder, kind: str, stays: bool) -> None:
    started(box, guest.LINES[kind])
    brought(box, packed())
    box.put(f"{patch.AGENT_HOME}/run.sh", "")
    main.main(["early-config"], box.machine)
    assert (box.root / patch.AGENT_HOME[1:]).exists() == stays


def test_an_archive_that_still_comes_is_waited_for(box: Recorder) -> None:
    data = packed()
    started(box)
    begin = box.clock

    def host(now: float) -> None:
        came = min(len(data), int(len(data) * (now - begin) / 20))
        box.put(patch.COPIED, data[:came])
        if came == len(data):
            box.later = None

    box.later = host
    main.main(["early-config"], box.machine)
    assert 20 <= box.clock - begin < 24
    assert box.text(patch.SIGNATURE).strip() == hashlib.sha512(data).hexdigest()
    assert "refused" not in log(box)


def test_so_is_an_agent(box: Recorder) -> None:
    started(box, guest.LINES["secstorage"])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as agent:
        agent.writestr("agent.jar", os.urandom(1000))
    whole, begin = stream.getvalue(), box.clock
    box.put(patch.COPIED, packed())

    def host(now: float) -> None:
        box.put(patch.AGENT, whole if now - begin > 30 else whole[:500])

    box.later = host
    main.main(["early-config"], box.machine)
    assert 30 < box.clock - begin < 33


def test_nothing_comes_and_the_log_says_what_was_waited_for(box: Recorder) -> None:
    started(box, guest.VPC_ROUTER)
    begin = box.clock
    assert main.main(["early-config"], box.machine) == 0
    assert 120 <= box.clock - begin < 122
    assert f"waiting for {patch.COPIED}, 120 s at most" in log(box)
    assert "no scripts of a management server came within 120 s" in log(box)
    assert box.has("ip", "rule", "add")  # our own set-up goes on
    assert not (box.root / patch.SIGNATURE[1:]).exists()


def test_the_time_is_one_value_of_the_unit(box: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = guest.overlay("/etc/systemd/system/cloud-early-config.service.d/systemvm.conf")
    assert f"Environment={main.WAIT}=120\n" in unit
    monkeypatch.setenv(main.WAIT, "3")
    started(box)
    begin = box.clock
    main.main(["early-config"], box.machine)
    assert 3 <= box.clock - begin < 5


REFUSED = {
    "no archive": (b"this is no archive", "no whole archive"),
    "nothing": (gzip.compress(b""), "empty"),
    "cut off": (packed(("root/x", "y" * 5000))[:-20], "no whole archive"),
    "wrong checksum": (packed()[:-8] + b"\1\2\3\4" + packed()[-4:], "no whole archive"),
    "absolute": (packed(("/etc/passwd", "x")), "leads out"),
    "upwards": (packed(("etc/../../x", "x")), "leads out"),
    "device": (packed(member("dev/sda", tarfile.BLKTYPE)), "no file, folder or link"),
    "pipe": (packed(member("run/x", tarfile.FIFOTYPE)), "no file, folder or link"),
    "hard link": (packed(member("x", tarfile.LNKTYPE, "/etc/shadow")), "leads out"),
    "too large": (gzip.compress(bytes((32 << 20) + 1)), "more than 32 MiB"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_bad_archive_is_refused_and_told_once(box: Recorder, what: str) -> None:
    data, why = REFUSED[what]
    started(box)
    box.put(patch.SIGNATURE, "own\n")
    box.put(patch.COPIED, data)
    assert main.main(["early-config"], box.machine) == 0
    assert log(box).count("is refused") == 1
    assert why in log(box)
    assert not box.has("tar")
    assert box.text(patch.SIGNATURE) == "own\n"
    assert not (box.root / patch.REQUIRED[1:]).exists()


def test_a_good_archive_after_a_bad_one_is_taken_in(box: Recorder) -> None:
    started(box)
    box.put(patch.COPIED, b"half")
    begin, data = box.clock, packed()

    def host(now: float) -> None:
        if now - begin > 60:
            box.later = None
            box.put(patch.COPIED, data)

    box.later = host
    main.main(["early-config"], box.machine)
    assert box.text(patch.SIGNATURE).strip() == hashlib.sha512(data).hexdigest()


def test_a_disk_that_is_full_leaves_the_signature(box: Recorder) -> None:
    started(box)
    brought(box, packed())
    box.put(patch.SIGNATURE, "own\n")
    box.answers = {"tar": (2, "tar: No space left on device")}
    main.main(["early-config"], box.machine)
    assert box.text(patch.SIGNATURE) == "own\n"
    assert "does not unpack" in log(box)


@pytest.mark.parametrize("kind", ["cksnode", "sharedfsvm"])
def test_machines_of_a_users_own_do_not_wait(box: Recorder, kind: str) -> None:
    started(box, guest.LINES[kind])
    begin = box.clock
    main.main(["early-config"], box.machine)
    assert box.clock == begin


def test_without_a_boot_line_nobody_can_copy_anything(box: Recorder) -> None:
    started(box, "", "")
    begin = box.clock
    main.main(["early-config"], box.machine)
    assert box.clock == begin


def test_a_reboot_does_not_wait(box: Recorder) -> None:
    started(box)
    brought(box, packed())
    main.main(["early-config"], box.machine)
    for how in ("rebooted", "given"):
        started(box, how=how)
        box.put(patch.BOOTSTRAP, "")
        box.ran.clear()
        begin = box.clock
        main.main(["early-config"], box.machine)
        assert box.clock == begin
        assert box.has(patch.BOOTSTRAP)  # their set-up, as at every start
        assert not box.has("tar")


def test_after_a_reboot_scripts_that_came_do_not_wait_either(box: Recorder) -> None:
    """They look into the agent's folder, which a router has not."""
    kvm(box)
    box.put(CMDLINE, guest.ROUTER)
    main.main(["receive"], box.machine)
    brought(box, packed())
    main.main(["early-config"], box.machine)
    assert not (box.root / patch.AGENT_HOME[1:]).exists()
    main.main(["receive"], box.machine)
    assert [*(box.root / patch.AGENT_HOME[1:]).iterdir()]


def test_a_host_that_starts_it_again_may_bring_newer_ones(box: Recorder) -> None:
    started(box)
    brought(box, packed())
    main.main(["early-config"], box.machine)
    newer = packed(("opt/cloud/bin/new", ""))
    started(box)
    brought(box, newer)
    main.main(["early-config"], box.machine)
    assert box.text(patch.SIGNATURE).strip() == hashlib.sha512(newer).hexdigest()


# Documents and user data --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["firewallrules", "networkacl", "vmdata", "guestnetwork"])
def test_a_document_that_nothing_applies_is_no_success(
    box: Recorder, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    started(box, guest.LINES["router"].replace("redundant_router=1", ""))
    name = f"{kind}.json.4b1f"
    box.put(f"/var/cache/cloud/{name}", json.dumps({"type": kind, "device": "eth0"}))
    assert main.main(["update-config", name], box.machine) == 1
    assert kind in capsys.readouterr().err
    assert kind in log(box)
    assert not (box.root / f"var/cache/cloud/processed/{name}.gz").exists()


def batch(*documents: str, command: str = "/opt/cloud/bin/update_config.py") -> str:
    return "<version>\n1.0\n</version>\n" + "".join(
        f'<file>\n/var/cache/cloud/{name}.json.1\n{{"type": "{name}",\n"cmd_line": {{"a": "b"}}}}\n</file>\n'
        f"<script>\n{command} {name}.json.1\n</script>\n"
        for name in documents
    )


def test_a_batch_is_merged(box: Recorder) -> None:
    started(box)
    box.put("/var/cache/cloud/VR-1.cfg", batch("cmdline"))
    assert main.main(["batch", "/var/cache/cloud/VR-1.cfg"], box.machine) == 0
    assert json.loads(box.text(setup.MERGED))["config"]["a"] == "b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (batch("firewallrules"), "firewallrules"),
        (batch("cmdline", "ips"), "ips"),
        (batch("cmdline", command="/bin/reboot -f"), "/bin/reboot -f"),
        ("", "cfg is not there"),
    ],
)
def test_a_batch_stops_at_what_nothing_applies(
    box: Recorder, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    started(box)
    if text:
        box.put("/var/cache/cloud/VR-1.cfg", text)
    assert main.main(["batch", "/var/cache/cloud/VR-1.cfg"], box.machine) == 1
    assert said in capsys.readouterr().err


def encoded(data: bytes) -> str:
    return f" userdata={base64.b64encode(data).decode()}"


def test_user_data_of_the_boot_line_start_cloud_init(box: Recorder) -> None:
    started(box, guest.LINES["router"] + encoded(gzip.compress(b"#cloud-config\nruncmd: [true]\n")))
    main.main(["preinit"], box.machine)
    assert box.text(setup.USER_DATA) == "#cloud-config\nruncmd: [true]\n"
    assert stat.S_IMODE((box.root / setup.USER_DATA[1:]).stat().st_mode) == 0o600
    assert "NoCloud" in box.text("/etc/cloud/cloud.cfg.d/cloudstack.cfg")
    main.main(["postinit"], box.machine)
    assert [line[1:] for line in box.ran if line[0] == "cloud-init"] == list(main.CLOUD_INIT_STAGES)
    # A start without brings back what the machine was.
    started(box)
    main.main(["preinit"], box.machine)
    box.ran.clear()
    main.main(["postinit"], box.machine)
    assert not box.has("cloud-init")


@pytest.mark.parametrize(
    "data",
    [b"not packed", gzip.compress(b"\xff\xfe", mtime=0), gzip.compress(bytes(2 << 20), mtime=0)],
    ids=["not packed", "no text", "too large"],
)
def test_user_data_that_are_none_are_told(box: Recorder, data: bytes) -> None:
    started(box, guest.LINES["router"] + encoded(data))
    main.main(["preinit"], box.machine)
    assert "userdata=(hidden)" in log(box)
    assert not (box.root / setup.USER_DATA[1:]).exists()


def test_the_console_port_is_let_in(box: Recorder) -> None:
    box.put("/etc/iptables/iptables-consoleproxy", guest.overlay("/etc/iptables/iptables-consoleproxy"))
    for extra, port in (("", 8080), (" vncport=9443", 9443), (" vncport=99999", 8080)):
        started(box, guest.LINES["consoleproxy"] + extra)
        main.main(["preinit"], box.machine)
        rows = [row for row in box.text(setup.RULES).splitlines() if "-i eth2" in row]
        assert {int(row.split("--dport ")[1].split()[0]) for row in rows} == {80, 443, 843, port}


# Redundancy ------------------------------------------------------------------------------------


def pair(box: Recorder, line: str = guest.ROUTER) -> None:
    box.put(CMDLINE, line)
    main.main(["preinit"], box.machine)
    main.main(["postinit"], box.machine)
    for index in range(3):
        box.put(f"/sys/class/net/eth{index}/address", f"02:00:00:00:00:0{index}\n")
    box.answers = {
        "systemctl show": (0, "LoadState=loaded\n\n" * 9),
        "ip -4 -o addr show dev eth2": (0, "4: eth2    inet 192.0.2.2/24 scope global eth2"),
    }
    box.ran.clear()


def state(box: Recorder) -> str:
    return str(json.loads(box.text("/etc/cloudstack/cmdline.json"))["config"]["redundant_state"])


def test_primary(box: Recorder) -> None:
    pair(box)
    assert main.main(["primary"], box.machine) == 0
    assert box.has("ifup", "--force", "eth2")
    assert [command[-1] for command in box.ran if command[0] == "conntrackd"] == ["-c", "-f", "-R", "-B"]
    assert box.has("systemctl", "restart", "--no-block", "dnsmasq")
    assert any(command[0] == "arping" and command[-1] == "192.0.2.2" for command in box.ran)
    assert state(box) == "PRIMARY"


def test_backup(box: Recorder) -> None:
    pair(box)
    assert main.main(["backup"], box.machine) == 0
    assert box.has("ifdown", "--force", "eth2")
    assert box.has("ip", "link", "set", "dev", "eth2", "down")
    assert box.has("systemctl", "stop", "--no-block", "dnsmasq")
    assert not box.has("ip", "link", "set", "dev", "eth0", "down")
    assert not box.has("ip", "link", "set", "dev", "eth1", "down")
    assert state(box) == "BACKUP"


def test_fault(box: Recorder) -> None:
    pair(box)
    assert main.main(["fault"], box.machine) == 0
    assert [command[-1] for command in box.ran if command[0] == "conntrackd"] == ["-s"]
    assert box.has("ip", "addr", "del", "10.1.1.1/24", "dev", "eth0")
    assert state(box) == "FAULT"


def test_a_new_boot_line_does_not_forget_the_state(box: Recorder) -> None:
    pair(box)
    main.main(["backup"], box.machine)
    box.put(
        "/var/cache/cloud/cmd_line.json",
        guest.module("boot_line").cmd_line_json(guest.module("boot_line").parse(guest.ROUTER)),
    )
    main.main(["update-config", "cmd_line.json"], box.machine)
    assert state(box) == "BACKUP"


@pytest.mark.parametrize(
    ("active", "kind", "addresses", "link", "status"),
    [
        (False, "router", 2, "UP", "FAULT"),
        (True, "router", 2, "", "PRIMARY"),
        (True, "router", 1, "", "BACKUP"),
        (True, "vpcrouter", 1, "UP", "PRIMARY"),
        (True, "vpcrouter", 1, "DOWN", "BACKUP"),
        (True, "vpcrouter", 1, "", "UNKNOWN"),
        (True, "", 0, "LOWERLAYERDOWN", "UNKNOWN"),
    ],
)
def test_check_router(
    box: Recorder,
    capsys: pytest.CaptureFixture[str],
    active: bool,
    kind: str,
    addresses: int,
    link: str,
    status: str,
) -> None:
    box.put("/etc/cloudstack/cmdline.json", json.dumps({"config": {"type": kind}}))
    box.answers = {
        "systemctl is-active": (0 if active else 3, ""),
        "ip -4": (0, "2: eth0    inet 10.1.1.2/24 brd 10.1.1.255 scope global eth0\n" * addresses),
        "ip -o link": (
            0,
            f"3: eth1: <BROADCAST> mtu 1500 qdisc noop state {link} mode DEFAULT" if link else "",
        ),
    }
    assert main.main(["check-router"], box.machine) == 0
    assert capsys.readouterr().out == f"Status: {status}\n"


TIER = {
    "device": "eth2",
    "add": True,
    "router_guest_ip": "10.1.1.2",
    "router_guest_gateway": "10.1.1.1",
    "router_guest_netmask": "255.255.255.0",
}


def test_tiers_of_a_vpc(box: Recorder) -> None:
    pair(box, guest.VPC_ROUTER)
    assert not (box.root / "etc/keepalived/keepalived.conf").exists()
    box.put("/var/cache/cloud/guest_network.json", json.dumps({**TIER, "type": "guestnetwork"}))
    assert main.main(["update-config", "guest_network.json"], box.machine) == 0
    assert "10.1.1.1/24 brd 10.1.1.255 dev eth2" in box.text("/etc/keepalived/keepalived.conf")
    assert "advert_int 2\n" in box.text("/etc/keepalived/keepalived.conf")
    assert box.has("systemctl", "restart", "--no-block", "conntrackd", "keepalived")
    second = {
        **TIER,
        "device": "eth3",
        "router_guest_ip": "10.1.2.2",
        "router_guest_gateway": "10.1.2.1",
        "type": "guestnetwork",
    }
    box.put("/var/cache/cloud/guest_network.json", json.dumps(second))
    main.main(["update-config", "guest_network.json"], box.machine)
    text = box.text("/etc/keepalived/keepalived.conf")
    assert text.index("10.1.1.1/24") < text.index("10.1.2.1/24 brd 10.1.2.255 dev eth3")
    box.ran.clear()
    for device in ("eth2", "eth3"):
        box.put(
            "/var/cache/cloud/guest_network.json",
            json.dumps({**TIER, "device": device, "add": False, "type": "guestnetwork"}),
        )
        main.main(["update-config", "guest_network.json"], box.machine)
    assert not (box.root / "etc/keepalived/keepalived.conf").exists()
    assert box.has("systemctl", "stop", "--no-block", "keepalived", "conntrackd")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"type": 5}', '{"type": "guestnetwork", "device": "eth0; id"}']
)
def test_broken_documents_do_no_harm(box: Recorder, text: str) -> None:
    pair(box)
    before = box.text("/etc/keepalived/keepalived.conf")
    box.put("/var/cache/cloud/x.json", text)
    assert main.main(["update-config", "../../../var/cache/cloud/x.json"], box.machine) in (0, 1)
    if "guestnetwork" not in text:
        assert box.text("/etc/keepalived/keepalived.conf") == before


def test_heartbeat(box: Recorder) -> None:
    pair(box)

    def stamp() -> None:
        box.put(redundancy.STAMP, f"{int(box.clock)}\n")

    stamp()
    for _ in range(4):
        main.main(["check-heartbeat"], box.machine)
        box.clock += 30
        stamp()
    assert box.text(redundancy.STRIKES) == "0\n"
    box.clock += 11
    for strikes in (1, 2, 3):
        main.main(["check-heartbeat"], box.machine)
        assert box.text(redundancy.STRIKES) == f"{strikes}\n"
        main.main(["check-heartbeat"], box.machine)  # nearer than 30 s: does not count
        assert not box.has("systemctl", "stop", "keepalived")
        box.clock += 30
    main.main(["check-heartbeat"], box.machine)
    assert box.has("systemctl", "stop", "keepalived")
    assert box.has("systemctl", "kill", "--signal=KILL", "conntrackd")
    assert state(box) == "FAULT"


def test_a_dead_keepalived_is_a_fault_and_told_once(box: Recorder) -> None:
    pair(box)
    box.answers = {"systemctl is-active": (3, "")}
    for _ in range(8):
        main.main(["check-heartbeat"], box.machine)
        box.clock += 30
    assert state(box) == "FAULT"
    assert box.text("/var/log/cloud.log").count("Status: FAULT") == 1


def test_split_pair_is_told_in_words(box: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    pair(box)
    box.answers = {"journalctl": (0, "(inside_network) advertisement interval mismatch mine=2 rcvd=1\n")}
    assert main.main(["diagnose"], box.machine) == 1
    assert "advert_int: 2 s" in capsys.readouterr().out
    assert "the other router's advert_int differs" in box.text("/var/log/cloud.log")
    box.answers = {}
    assert main.main(["diagnose"], box.machine) == 0


@pytest.mark.parametrize(("times", "anew"), [(1, False), (2, False), (3, True)])
def test_a_peer_that_counts_as_replayed_for_ever_is_heard_again(
    box: Recorder, times: int, anew: bool
) -> None:
    pair(box)
    log = "(inside_network) IPSEC-AH : sequence number 4 already processed. Packet dropped. Local(9)\n"
    box.answers = {**box.answers, "journalctl": (0, log * times)}
    main.main(["check-heartbeat"], box.machine)
    assert box.has("systemctl", "restart", "--no-block", "keepalived") == anew


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("1", 1),
        ("2", 2),
        ("255", 255),
        ("0", 1),
        ("256", 1),
        ("1.5", 1),
        ("-1", 1),
        ("", 1),
        ("2;id", 1),
        ("9" * 30, 1),
    ],
)
@pytest.mark.parametrize("line", [guest.ROUTER, guest.VPC_ROUTER])
def test_interval(line: str, text: str, interval: int) -> None:
    boot_line = guest.module("boot_line")
    params = boot_line.Params(boot_line.parse(f"{line} advert_int={text}"))
    assert redundancy.interval(params) == interval
    assert bool(params.complaints) == (bool(text) and text != str(interval))
    assert bool(guest.plan(f"{line} advert_int={text}").complaints) == bool(params.complaints)


def test_interval_without_redundancy_is_ignored(box: Recorder) -> None:
    line = " ".join(word for word in guest.ROUTER.split() if not word.startswith("redundant"))
    assert "/etc/keepalived/keepalived.conf" not in guest.plan(line).files


def test_both_routers_of_a_pair_agree() -> None:
    """What must be equal on both is equal, though they differ in everything that is their own."""

    def settled(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.strip().startswith("router_id")]

    other = (
        guest.ROUTER.replace("r-1-VM", "r-2-VM")
        .replace("10.1.1.2", "10.1.1.3")
        .replace("169.254.1.2", "169.254.1.3")
    )
    one, two = (
        guest.plan(line).files["/etc/keepalived/keepalived.conf"].text for line in (guest.ROUTER, other)
    )
    assert settled(one) == settled(two)
    assert one != two


def test_password_of_a_pair() -> None:
    boot_line = guest.module("boot_line")

    def secret(line: str) -> str:
        return str(redundancy.auth_pass(boot_line.Params(boot_line.parse(line))))

    assert secret("router_password=1234567890") == "12345678"
    assert secret("eth2ip=192.0.2.2 eth2mask=255.255.255.0") == hashlib.md5(b"192.0.2.2-1").hexdigest()[:8]
    assert secret("vpccidr=10.0.0.0/8 router_id=7") == hashlib.md5(b"10.0.0.0/8-7").hexdigest()[:8]
    assert secret("router_password=}{x") == secret("")
