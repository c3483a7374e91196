"""Bad input at the command line: one clear line, a hint, a status that is not 0, nothing left behind."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cli
from tests.disks import MIB, one, usual
from tests.images import TINY

pytestmark = pytest.mark.root


@pytest.fixture
def dead() -> Iterator[str]:
    """A URL on a port of this machine that nobody listens on, and nobody else can take meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("setting", "said", "hint"),
    [
        ("siute=bookworm", "unknown key 'siute'", "'suite'"),
        ("size=big", "size", ""),
        ("size=0", "size", ""),
        ("suite=bookwurm", "suite", ""),
        ("arch=i386 firmware=bios,uefi", "i386 boots under BIOS only", ""),
        ("arch=i386 suite=trixie", "trixie has no kernel for i386", ""),
        ("vrrp.advert_int=0", "advert_int", ""),
        ("vrrp.advert_int=1.5", "advert_int", ""),
        ("vrrp.advert_int=256", "advert_int", ""),
        ("password=geheim", "password", "--ask-password"),
        ("debian_mirror=ftp://x", "debian_mirror", ""),
        ("formats=ova names.ova={release}.ova", "would be blank", "cloudstack_release"),
        ("formats=vdh", "unknown format 'vdh'", "'vhd'"),
        ("mountpoint=/nowhere-at-all", "MOUNTPOINT", "mkdir -p"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_done(
    setting: str, said: str, hint: str, tmp_path: Path
) -> None:
    location = tmp_path / "location"
    flags = [word for part in setting.split(" ") for word in ("--set", part)]
    error = cli.refuse("build", *TINY, "--set", f"location={location}", *flags)
    assert said in error
    assert hint in error.splitlines()[-1]
    assert "geheim" not in error
    assert not list(location.glob("cache/*/*")), "something was built"


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (("params", "--type", "bridge"), "no boot line for type 'bridge'", "router, vpcrouter"),
        (
            ("params", "--type=router", "--set", "router.redundant.vrrp.intervall=2"),
            "unknown key 'router.redundant.vrrp.intervall'",
            "'router.redundant.vrrp.interval'",
        ),
        (("params", "--type=router", "--set", "vpc.cidr=10.0.0.0/8"), "unknown key 'vpc.cidr'", "vpcrouter"),
        (("params", "--type=router", "--set", "guest.ip"), "'guest.ip' has no value", "guest.ip=VALUE"),
        (("params", "--type=router", "--set", "guest.ip=10.1.1.256"), "is no address", "192.0.2.1"),
        (("render", "--params", ""), "no KEY=VALUE", "inv render --params"),
        (("render", "--params", "quiet splash"), "no KEY=VALUE", "inv render --params"),
        (("render", "--params", "type=routr"), "unknown type", "above stands"),
        (("render", "--params", "type=router advert_int=0"), "advert_int='0'", "above stands"),
        (("render", "--params", "type=router", "--hypervisor=vmwar"), "hypervisor 'vmwar'", "'vmware'"),
        (("render", "--params", "type=router", *TINY), "tiny.yaml has no guest", "rootfs"),
    ],
)
def test_a_bad_boot_line(words: tuple[str, ...], said: str, hint: str) -> None:
    error = cli.refuse(*words)
    assert said in error
    assert hint in error.splitlines()[-1]


@pytest.mark.parametrize("setting", ["debian_mirror={}/debian", "apt_proxy={}"])
def test_a_mirror_or_proxy_that_is_not_there(setting: str, dead: str, tmp_path: Path) -> None:
    error = cli.refuse("build", *TINY, "--set", f"location={tmp_path}", "--set", setting.format(dead))
    assert dead.removeprefix("http://") in error
    assert not list(tmp_path.glob("debs/*"))


def test_a_package_that_does_not_exist_is_named(tmp_path: Path) -> None:
    definition = tmp_path / "own.yaml"
    definition.write_text("packages:\n  all: [systemd-sysv, no-such-package, neither-this]\n")
    error = cli.refuse("build", "--image", str(definition), "--set", f"location={tmp_path}/location")
    assert "no-such-package" in error
    assert "neither-this" in error
    assert not list(tmp_path.glob("location/debs/*"))


def test_an_image_definition_says_file_and_line(tmp_path: Path) -> None:
    definition = tmp_path / "own.yaml"
    definition.write_text("suite: bookworm\n\nkernel_cmdlin: quiet\n")
    error = cli.refuse("config", "--image", str(definition))
    assert f"{definition}:3" in error
    assert "kernel_cmdline" in error
    assert "cannot read" in cli.refuse("config", "--image", str(tmp_path / "none.yaml"))


def test_verbs_that_need_an_image_say_how_to_get_one(tmp_path: Path) -> None:
    flags = (*TINY, "--set", f"location={tmp_path}/none")
    build = f"run: inv {' '.join(TINY)} build"
    for line in (("verify",), ("boot",), ("convert.vhd",), ("convert",), ("shell",), ("why", "tweak")):
        assert build in cli.refuse(*line, *flags)
    assert not (tmp_path / "none").exists()


def test_frozen_without_a_stored_resolution(tmp_path: Path) -> None:
    assert "without --frozen" in cli.refuse("build", *TINY, "--frozen", "--set", f"location={tmp_path}")


def test_unknown_steps_rings_formats_and_benchmarks_name_the_known() -> None:
    assert "unit, golden" in cli.refuse("test", "--ring", "all").splitlines()[-1]
    assert "build" in cli.refuse("bench", "--name", "speed").splitlines()[-1]
    assert "vhd" in cli.refuse("convert", "--formats", "vdh", *TINY).splitlines()[-1]


def test_a_plan_speaks_of_the_settings_first(tmp_path: Path) -> None:
    done = cli.inv("plan", *TINY, "--set", f"location={tmp_path}", "--set", "siute=bookworm")
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown key 'siute'" in done.stderr


HOSTILE, SPELLED = "\x1b[2J\u202e\x9b", r"\x1b[2J\u202e\x9b"


@pytest.mark.parametrize(
    ("name", "field", "value", "shown"),
    [
        ("vmdk", b"streamOptimized", b"\x1b[2J\x9b\x07stream\x7f\r\b", r"\x1b[2J\x9b\x07stream\x7f"),
        ("ova", b">lsilogic<", ">\x9b\u202ewha<".encode(), r"\x9b\u202ewha"),
    ],
)
def test_a_hostile_file_writes_nothing_but_text_to_a_terminal(
    name: str, field: bytes, value: bytes, shown: str, tmp_path: Path
) -> None:
    """Its name, its fields and what is said about them, under --debug too."""
    folder = tmp_path / HOSTILE
    made = one(usual(tmp_path / "disk.img", 8 * MIB), folder, name)
    raw = made.read_bytes()
    assert field in raw
    assert len(field) == len(value)
    made.write_bytes(raw.replace(field, value))
    for flags in ((), ("--debug",)):
        done = cli.inv("inspect", str(made), *flags)
        assert done.returncode == 1
        assert (done.stdout + done.stderr).replace("\n", "").isprintable()
        assert f"{SPELLED}/{made.name}: {name}" in done.stdout
        assert shown in done.stdout
        assert f"{SPELLED}/{made.name} would be refused" in done.stderr
    missing = cli.refuse("inspect", str(folder / "none"))
    assert f"there is no file {tmp_path}/{SPELLED}/none" in missing
    told = json.loads(cli.inv("inspect", str(made), "--json").stdout)
    assert told["file"] == str(made)


def test_an_agent_s_failure_writes_nothing_but_text(tmp_path: Path) -> None:
    """A name that is no text at all, and one that tells the terminal to clear itself."""
    name = os.fsdecode(b"\xff\x1b[2J")
    message = cli.refuse("inspect", str(tmp_path / name))
    assert message.replace("\n", "").isprintable()
    assert r"/\udcff\x1b[2J" in message
