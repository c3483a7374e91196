"""The same tasks over a real sshd of the test's own, on 127.0.0.1."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cli
from tests.images import STEPS, TINY, Built, sha256
from tests.root.test_build import copied_resolution, leftovers_are_clean, wait_for

pytestmark = pytest.mark.remote


@dataclass(frozen=True)
class Buildhost:
    """Where the test's sshd listens, and the home of the user who calls it."""

    port: int
    home: Path
    folder: Path

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        return {"HOME": str(self.home)}


@pytest.fixture(scope="module")
def buildhost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildhost]:
    folder = tmp_path_factory.mktemp("sshd")
    ssh = folder / "home" / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    for key in (folder / "host", ssh / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    public = (folder / "host.pub").read_text().split()[:2]
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(public)}\n")
    (ssh / "config").write_text(f"Host alias\n  HostName 127.0.0.1\n  Port {port}\n")
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {ssh}/id_ed25519.pub\nPidFile none\nPermitRootLogin yes\n"
        f"Subsystem sftp internal-sftp\nSetEnv HOME=/root\n"
    )
    # sshd wants /run/sshd; it gets one in mounts of its own.
    line = (
        f'mount -t tmpfs tmpfs /run; mkdir -m 755 /run/sshd; exec /usr/sbin/sshd -D -e -f "{folder}/config"'
    )
    daemon = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "bash", "-euc", line],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert daemon.stderr is not None
    assert any("listening on 127.0.0.1" in told for told in iter(daemon.stderr.readline, ""))
    yield Buildhost(port, folder / "home", folder)
    daemon.terminate()
    daemon.wait(10)
    daemon.stderr.close()


def test_a_remote_build_is_the_same_build(tiny: Built, buildhost: Buildhost, tmp_path: Path) -> None:
    location = copied_resolution(tiny, tmp_path / "there")
    flags = ("-H", buildhost.name, *TINY, "--frozen", "--set", f"location={location}")
    first = cli.succeed("build", *flags, env=buildhost.env)
    plain = first.replace(f"{buildhost.name} | ", "")
    assert {cli.states(plain)[name] for name in (*STEPS, "disk")} == {"built"}
    assert all(line.startswith(f"{buildhost.name} | ") for line in first.splitlines())
    assert sha256(location / "tiny.img") == sha256(tiny.image)
    again = cli.succeed(*flags[:2], "build", *flags[2:], env=buildhost.env).replace(
        f"{buildhost.name} | ", ""
    )
    assert {cli.states(again)[name] for name in (*STEPS, "disk")} == {"cached"}


@pytest.mark.parametrize("form", ["-H {}", "-H{}", "--hosts={}", "-H alias"])
def test_every_form_of_the_flag_reaches_the_host(form: str, buildhost: Buildhost) -> None:
    words = form.format(buildhost.name).split()
    name = "alias" if "alias" in form else buildhost.name
    for line in ([*words, "config", *TINY], ["config", *TINY, *words]):
        assert cli.succeed(*line, env=buildhost.env).startswith(f"{name} | ")


def test_an_unknown_host_key_is_refused(buildhost: Buildhost, tmp_path: Path) -> None:
    ssh = tmp_path / ".ssh"
    ssh.mkdir()
    said = cli.refuse("-H", buildhost.name, "config", env={"HOME": str(tmp_path)})
    assert "not found in known_hosts" in said
    assert "ssh" in said.splitlines()[-1]


def test_a_changed_host_key_is_refused(buildhost: Buildhost, tmp_path: Path) -> None:
    ssh = tmp_path / ".ssh"
    ssh.mkdir()
    other = (buildhost.home / ".ssh/id_ed25519.pub").read_text().split()[1]
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{buildhost.port} ssh-ed25519 {other}\n")
    assert "does not match" in cli.refuse("-H", buildhost.name, "config", env={"HOME": str(tmp_path)})


def test_a_host_that_is_not_there_is_one_clear_line(buildhost: Buildhost) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = probe.getsockname()[1]
    assert "cannot reach build host" in cli.refuse("-H", f"127.0.0.1:{dead}", "config", env=buildhost.env)


def test_one_bad_host_does_not_stop_the_other(buildhost: Buildhost) -> None:
    done = cli.inv("-H", f"nosuch.invalid,{buildhost.name}", "config", *TINY, env=buildhost.env)
    assert done.returncode != 0
    assert "nosuch.invalid" in done.stderr
    assert f"{buildhost.name} | IMAGENAME" in done.stdout


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_the_work_there_ends_with_the_client_here(
    sign: int, tiny: Built, buildhost: Buildhost, tmp_path: Path
) -> None:
    location = copied_resolution(tiny, tmp_path / "cut")
    child = cli.start(
        "-H", buildhost.name, "build", *TINY, "--frozen", "--set", f"location={location}", env=buildhost.env
    )
    wait_for(location, "cache/root/.debootstrap-*.part/tree")
    started = time.monotonic()
    os.killpg(child.pid, sign)
    child.communicate(timeout=60)
    leftovers_are_clean(location)
    assert time.monotonic() - started < 40
