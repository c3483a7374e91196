"""The other Debian as a build host: tools and a Python of its own, and the same bytes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.agent.debian import packages
from tests import buildhost, cli
from tests.buildhost import HOST, Buildhost
from tests.images import Built, sha256
from tests.remote.clients import FLAGS, download, provide

pytestmark = pytest.mark.remote
BROUGHT = ("openssh-server", "sudo", "python3-minimal", "iproute2", "nftables", "procps")
"""What makes a host of it; the rest is what a build wants."""


@pytest.fixture(scope="module")
def trixie(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildhost]:
    """A build host that runs Debian 13."""
    tree = tmp_path_factory.mktemp("trixie") / "tree"
    wanted = {need.package for need in packages.parse(packages.TABLE).of("build")}
    include = ",".join(sorted({*wanted, *BROUGHT}))
    line = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=apt",
        f"--include={include}",
        "trixie",
        str(tree),
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with buildhost.running(tmp_path_factory.mktemp("buildhost"), tree) as host:
        yield host


def test_a_host_of_the_next_suite_gives_the_same_bytes_without_root(
    tiny: Built, trixie: Buildhost, mac: Path, pins: Path, tmp_path: Path
) -> None:
    """It reaches no mirror: packages come from where root's builds there keep theirs."""
    shown, here = provide(tiny, trixie, "carol", "images")
    provide(tiny, trixie, "root", "systemvm")
    shutil.rmtree(here / "debs")
    (tmp_path / "wheels").mkdir()
    wheels = download(trixie, pins, tmp_path / "wheels")
    env = {**trixie.env, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    line = ("-H", f"carol@{HOST}", "--rootless", "build", "--formats", "vhd", "--to", str(tmp_path))
    own = ("--set", f"location={shown}")
    told = cli.succeed(*line, *FLAGS, *own, prefix=trixie.prefix, env=env, checkout=mac)
    assert "fetched fetch" in told
    trixie.wait_until_empty()
    assert trixie.inside("sh", "-c", ". /etc/os-release; echo $VERSION_CODENAME").strip() == "trixie"
    assert sha256(tmp_path / "tiny.img") == sha256(tiny.image)
    cli.succeed("convert.vhd", *tiny.flags)
    assert sha256(tmp_path / "tiny.vhd") == sha256(tiny.location / "tiny.vhd")
