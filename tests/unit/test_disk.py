"""The disk step as a value: what it asks of GRUB and of the tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from build import disk
from build.engine.plan import Step, digest
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings, load
from build.formats.lib import vhd


def step(**values: Any) -> Step:
    return disk.step(Loaded(Settings(**values), {}, Path("image.yaml")), Resolution((), 0, 0))


@pytest.mark.parametrize(
    ("cmdline", "port"),
    [
        ("console=tty0 console=ttyS0,115200n8", (0, 115200)),
        ("console=ttyS1", (1, 9600)),
        ("console=ttyS0,9600 console=ttyS2,57600", (2, 57600)),
        ("console=tty0 quiet", None),
        ("xconsole=ttyS0", None),
    ],
)
def test_grub_talks_where_the_kernel_will(cmdline: str, port: tuple[int, int] | None) -> None:
    assert disk.serial_port(cmdline) == port
    asked = f"serial --unit={port[0]} --speed={port[1]};" if port else "timeout=0"
    assert asked in disk.grub_config(cmdline)
    assert ("serial" in disk.grub_config(cmdline)) is bool(port)


def test_grub_takes_arguments_that_its_shell_would_read_otherwise() -> None:
    config = disk.grub_config("quiet  a;b {c} systemd.mask=x.service")
    assert "linux /vmlinuz @ROOT@ ro quiet 'a;b' '{c}' systemd.mask=x.service\n" in config


def test_an_image_has_what_its_firmware_needs_and_nothing_else() -> None:
    bios, uefi, both = step(firmware=("bios",)), step(firmware=("uefi",)), step()
    assert "grub.cfg" in bios.files
    assert "grub.cfg" not in uefi.files
    assert "(,gpt2)" in bios.script
    assert "(,gpt3)" in both.script
    assert [("STUB=\n" in each.script, "GRUB=\n" in each.script) for each in (bios, uefi, both)] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert step(arch="i386").script == bios.script
    assert json.loads(step(arch="i386").files["disk.json"].content)["loader"].startswith(
        "lib/i386-linux-gnu/"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 2002},
        {"imagename": "b"},
        {"kernel_cmdline": "quiet"},
        {"firmware": ("bios",)},
        {"space_headroom": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_setting_of_the_disk_is_part_of_what_runs(changed: dict[str, Any]) -> None:
    assert digest(step(**changed), {}) != digest(step(), {})


@pytest.mark.parametrize(
    ("values", "packages"),
    [
        ({}, ("e2fsprogs", "grub-pc-bin", "systemd-boot-efi")),
        ({"firmware": ("bios",)}, ("e2fsprogs", "grub-pc-bin")),
        ({"firmware": ("uefi",)}, ("e2fsprogs", "systemd-boot-efi")),
        ({"arch": "i386"}, ("e2fsprogs", "grub-pc-bin")),
    ],
    ids=["amd64", "bios", "uefi", "i386"],
)
def test_the_tree_gets_the_packages_the_disk_is_made_from(
    values: dict[str, Any], packages: tuple[str, ...]
) -> None:
    settings = Settings(**values)
    assert settings.boot_packages == packages
    assert set(packages) <= set(settings.package_list)


def test_cloudstacks_disk_is_exact_in_every_geometry_and_leaves_room_for_a_live_patch() -> None:
    shipped = load(Path(__file__).resolve().parents[2] / "config" / "systemvm.yaml", {})
    asked = json.loads(disk.step(shipped, Resolution((), 0, 0)).files["disk.json"].content)
    assert asked["size"] >= 5000
    assert asked["headroom"] >= 640
    cylinders, heads, sectors = vhd.geometry(asked["size"] << 20)
    assert cylinders * heads * sectors * 512 == asked["size"] << 20
    assert Settings().size == 2000
