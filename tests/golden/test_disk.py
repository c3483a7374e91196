"""The disk step's script, as a person reads it and as shellcheck does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from build import disk
from build.engine import script
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings

HERE = Path(__file__).resolve().parent
FIRMWARE = [("bios", "uefi"), ("bios",), ("uefi",)]


@pytest.mark.parametrize("firmware", FIRMWARE, ids="-".join)
def test_the_script_is_the_golden_one(firmware: tuple[str, ...]) -> None:
    """Write the golden files anew with `GOLDEN=write`, and read what changed."""
    loaded = Loaded(Settings.model_validate({"firmware": firmware}), {}, Path("image.yaml"))
    text = disk.step(loaded, Resolution((), 0, 0)).script
    golden = HERE / f"disk-{'-'.join(firmware)}.bash"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("firmware", FIRMWARE, ids="-".join)
def test_shellcheck_finds_nothing(firmware: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["shellcheck", "-"],
        input=script.render(disk.script(firmware)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
