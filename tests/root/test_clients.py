"""What we write, read by the clients that people have: Xen Orchestra, dissect, 7-Zip. None is ours to import.

Xen Orchestra's readers come from npm (github.com/vatesfr/xen-orchestra: vhd-lib, @xen-orchestra/qcow2),
dissect and Node.js from PyPI, each by a lock with hashes; 7-Zip is Debian's. XenServer's own vhd-util is in
no registry.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from build.engine import venv
from build.formats import FORMATS
from tests import cli
from tests.disks import ALL, MIB, ask, make, partition, spec
from tests.images import shared

pytestmark = pytest.mark.root
SOURCES = cli.CHECKOUT / "tests/clients"
LOCK = cli.CHECKOUT / "requirements-clients.lock"
SIZE = 1024 * MIB  # whole GiB, for Google; mostly holes


class Reader(NamedTuple):
    """A client, and the kind that it takes a format for."""

    client: str
    kind: str
    member: str = ""
    """Of an archive: the end of the disk's name in it."""


READERS: Mapping[str, tuple[Reader, ...]] = {
    "vhd": (Reader("xo", "vhd"), Reader("dissect", "vhd"), Reader("7-Zip", "VHD")),
    "hyperv-vhd": (Reader("xo", "vhd"), Reader("dissect", "vhd"), Reader("7-Zip", "VHD")),
    "azure-vhd": (Reader("dissect", "vhd"), Reader("7-Zip", "VHD")),
    "vhdx": (Reader("dissect", "vhdx"), Reader("7-Zip", "VHDX")),
    "qcow2": (Reader("dissect", "qcow2"), Reader("7-Zip", "QCOW")),
    "xcp-qcow2": (
        Reader("xo", "qcow2"),
        Reader("xo", "qcow2-stream"),
        Reader("dissect", "qcow2"),
        Reader("7-Zip", "QCOW"),
    ),
    "vmdk": (Reader("dissect", "vmdk"), Reader("7-Zip", "VMDK")),
    "vdi": (Reader("dissect", "vdi"), Reader("7-Zip", "VDI")),
    "ova": (Reader("dissect", "vmdk", ".vmdk"), Reader("7-Zip", "VMDK", ".vmdk")),
    "vagrant-libvirt": (Reader("dissect", "qcow2", "box.img"), Reader("7-Zip", "QCOW", "box.img")),
    "vagrant-virtualbox": (Reader("dissect", "vmdk", ".vmdk"), Reader("7-Zip", "VMDK", ".vmdk")),
    "gce": (Reader("sum", "raw", "disk.raw"),),
    "raw": (Reader("sum", "raw"),),
}


class Clients(NamedTuple):
    """Where they are."""

    place: Path

    def read(self, reader: Reader, file: Path, room: Path) -> str:
        """SHA-256 of what a guest would see, as a client reads it; fails with what it says."""
        if reader.member:
            file = self.extract(file, reader.member, room)
        if reader.client == "sum":
            return hashlib.sha256(file.read_bytes()).hexdigest()
        if reader.client == "7-Zip":
            with subprocess.Popen(
                ["7zz", "x", "-so", f"-t{reader.kind}", file], stdout=subprocess.PIPE
            ) as unpacking:
                assert unpacking.stdout is not None
                found = hashlib.file_digest(unpacking.stdout, "sha256").hexdigest()  # type: ignore[arg-type]
            assert unpacking.returncode == 0
            return found
        program, script = ("node", "read.mjs") if reader.client == "xo" else ("python", "read.py")
        size, found = self.run(program, str(self.place / script), reader.kind, str(file)).split()
        assert int(size) == SIZE
        return found

    def run(self, program: str, *arguments: str) -> str:
        """Output of a program of the environment that the lock names."""
        line = [str(self.place / "venv/bin" / program), *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(done.stderr[-2000:])
        return done.stdout

    def extract(self, file: Path, member: str, room: Path) -> Path:
        """The disk in an archive, by 7-Zip."""
        subprocess.run(["7zz", "x", "-y", f"-o{room}", "-ttar", file], stdout=subprocess.DEVNULL, check=True)
        (found,) = (path for path in room.iterdir() if path.name.endswith(member))
        return found


def bring(place: Path) -> None:
    """Install what the locks name."""
    venv.fill(place / "venv", LOCK)
    for path in SOURCES.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    line = [str(place / "venv/bin/npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    programs = f"{place / 'venv/bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": programs, "npm_config_cache": str(place / "cache")}
    done = subprocess.run(line, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """All of them, made once for all workers."""
    with shared(tmp_path_factory, "clients", bring) as place:
        yield Clients(place)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of a GiB with text, noise and holes, and a partition table."""
    parts = [(MIB, 3 * MIB, "text"), (40 * MIB + 123, 20 * MIB, "noise"), (700 * MIB, 5 * MIB, "text")]
    path = make(tmp_path_factory.mktemp("disk") / "disk.img", SIZE, [*parts, (SIZE - 65536, 4096, "noise")])
    partition(path)
    return path


def row(name: str) -> dict[str, object]:
    return spec(name) if name in ALL else {"name": name, "kind": name, "file": f"{name}.tar", "options": {}}


@pytest.mark.soak(60)
@pytest.mark.parametrize("name", FORMATS)
def test_clients_see_the_same_disk(name: str, clients: Clients, disk: Path, tmp_path: Path) -> None:
    wanted = hashlib.sha256(disk.read_bytes()).hexdigest()
    asked = row(name)
    ask(disk, tmp_path, [asked])
    assert READERS[name], "no client reads it"
    for number, reader in enumerate(READERS[name]):
        room = tmp_path / str(number)
        room.mkdir()
        assert clients.read(reader, tmp_path / str(asked["file"]), room) == wanted, reader


@pytest.mark.soak(30)
def test_why_xcp_ng_has_a_qcow2_of_its_own(clients: Clients, disk: Path, tmp_path: Path) -> None:
    """Xen Orchestra reads a compressed one wrong without a word, and never goes back to a table."""
    ask(disk, tmp_path, [spec("qcow2"), spec("qcow2-plain")])
    wanted = hashlib.sha256(disk.read_bytes()).hexdigest()
    assert clients.read(Reader("xo", "qcow2"), tmp_path / "qcow2.qcow2", tmp_path) != wanted
    assert clients.read(Reader("xo", "qcow2"), tmp_path / "qcow2-plain.qcow2", tmp_path) == wanted
    with pytest.raises(AssertionError, match="Can't read backward in stream"):
        clients.read(Reader("xo", "qcow2-stream"), tmp_path / "qcow2-plain.qcow2", tmp_path)
