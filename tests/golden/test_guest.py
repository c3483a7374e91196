"""The package that runs in the guest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import guest

pytestmark = pytest.mark.golden


def test_types_of_the_guests_package_hold() -> None:
    """It is not among the checkout's own packages, so it is looked at by itself, as Python 3.11 sees it."""
    argv = [sys.executable, "-m", "mypy", "--strict", "--python-version=3.11", "-p", "systemvm"]
    env = {**os.environ, "MYPYPATH": str(guest.ROOTFS / "usr/local/lib")}
    done = subprocess.run(argv, cwd=guest.CHECKOUT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_wanted_is_linked() -> None:
    """systemd passes over anything else there, such as what a checkout without symbolic links has."""
    wanted = list((guest.CHECKOUT / "config").glob("*/etc/systemd/system/*.wants/*"))
    assert len(wanted) >= 5
    assert [
        path.name
        for path in wanted
        if not path.is_symlink() or not path.parent.joinpath(path.readlink()).exists()
    ] == []
