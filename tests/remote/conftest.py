"""The build host of the remote ring, one for each worker."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.engine import compressors
from tests import buildhost, cli
from tests.buildhost import Buildhost
from tests.images import Built, link
from tests.remote.clients import ALL, FLAGS, pip


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildhost]:
    """A running build host."""
    with buildhost.running(tmp_path_factory.mktemp("buildhost")) as host, cli.warm(host.prefix):
        yield host


@pytest.fixture(scope="session")
def ready(tiny: Built, there: Buildhost) -> tuple[str, ...]:
    """A finished build there, linked from the shared one; answers the flags that mean it."""
    link(tiny.location, there.folder / "images/ready")
    return (*FLAGS, "--set", "location=/var/lib/images/ready")


@pytest.fixture(scope="session")
def finished(tiny: Built, tiny_of_user: Built) -> dict[str, Path]:
    """LOCATIONs of finished builds, to be linked, by the user who may have made them."""
    return {user: (tiny_of_user if user == "carol" else tiny).location for user in ALL}


SOURCES = ("build", "config", "templates", "tasks.py", "invoke.yaml", "requirements.lock")
"""What a checkout needs for a client that asks for no package."""


@pytest.fixture(scope="session")
def pins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the lock says of the compressors, as pip reads it."""
    file = tmp_path_factory.mktemp("pins") / "pins"
    file.write_text(compressors.pins((cli.CHECKOUT / "requirements.lock").read_text()))
    return file


@pytest.fixture(scope="session")
def mac(pins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose `.venv` holds the compressors that a Mac's holds; all else is of this one's."""
    checkout = tmp_path_factory.mktemp("mac")
    subprocess.run(["cp", "-a", *(cli.CHECKOUT / name for name in SOURCES), checkout], check=True)
    venv.create(checkout / ".venv", symlinks=True)
    python = str(checkout / ".venv/bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('platlib'))"
    own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    pip("install", f"--target={own}", "--platform=macosx_11_0_arm64", f"--requirement={pins}")
    Path(own, "rest.pth").write_text(sysconfig.get_path("platlib") + "\n")
    for module in ("zlib_ng.zlib_ng", "deflate"):
        loaded = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
        assert loaded.returncode == 1
    return checkout
