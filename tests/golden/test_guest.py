"""Scripts of the steps that make the guest, as a person reads them and as shellcheck does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from build import keepalived, minimize, seal, tweak
from build.engine import script
from build.engine.resolution import Resolution
from tests import guest

HERE = Path(__file__).resolve().parent
STEPS = [(name, module) for name in ("systemvm", "tiny") for module in (tweak, minimize, keepalived, seal)]
RESOLVED = Resolution((), 1_700_000_000, 0)


def step(name: str, module: Any) -> Any:
    live = (
        ("vrrp.enabled=true", "vrrp.auth_pass=12345678", "vrrp.addresses=[10.1.1.1/24]")
        if name == "systemvm"
        else ()
    )
    return module.step(guest.definition(name, *live), RESOLVED)


@pytest.mark.parametrize(("name", "module"), STEPS)
def test_script_is_the_golden_one(name: str, module: Any) -> None:
    """Write the golden files anew with `GOLDEN=write`, and read what changed."""
    planned = step(name, module)
    golden = HERE / f"{planned.name}-{name}.bash"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(planned.script, encoding="utf-8")
    assert planned.script == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "module"), STEPS)
def test_shellcheck_finds_nothing(name: str, module: Any) -> None:
    text = script.render(step(name, module).script)
    done = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_types_of_the_guests_package_hold() -> None:
    """It is not among the checkout's own packages, so it is looked at by itself, as Python 3.11 sees it."""
    argv = [sys.executable, "-m", "mypy", "--strict", "--python-version=3.11", "-p", "systemvm"]
    env = {**os.environ, "MYPYPATH": str(guest.ROOTFS / "usr/local/lib")}
    done = subprocess.run(argv, cwd=guest.CHECKOUT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
