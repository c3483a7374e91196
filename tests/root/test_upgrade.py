"""What a version before left behind: its layers, its records and a build that it left to itself."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import cli
from tests.images import Built, remove

pytestmark = pytest.mark.root

BEFORE = "38c1bbf"
"""Commit of the version before; its code comes from the project's history."""


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A checkout of the version before, with this one's Python packages."""
    packed = subprocess.run(["git", "archive", BEFORE], cwd=cli.CHECKOUT, capture_output=True, check=False)
    assert packed.returncode == 0, f"this test needs the project's history: {packed.stderr.decode()}"
    checkout = tmp_path / "before"
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(checkout, filter="tar")
    (checkout / ".venv").symlink_to(sys.prefix)
    return checkout


@pytest.mark.soak(40)
def test_nothing_old_is_trusted_and_an_old_build_is_seen_and_ended(
    before: Path, tiny: Built, tmp_path: Path
) -> None:
    location = tmp_path / "location"
    flags = (*tiny.definition, "--set", f"location={location}")
    store = location / "cache" / "root"
    cli.succeed("debootstrap", *flags, checkout=before)
    (old,) = [entry.name for entry in store.iterdir()]

    told = cli.states(cli.succeed("build", "--detach", *flags, checkout=before))
    assert told["debootstrap"] == "cached"
    assert "running at " in cli.succeed("status", *flags)
    assert "cancelled" in cli.succeed("cancel", *flags)
    assert "cancelled at " in cli.succeed("status", *flags)

    assert "cached" not in cli.succeed("plan", "--frozen", *flags)
    assert f"{old} -> " in cli.succeed("why", "debootstrap", *flags)
    cli.succeed("clean", "--frozen", *flags)
    assert list(store.iterdir()) == []
    assert not [name for name in location.iterdir() if name.name.startswith(".")]
    remove(location, flags)
