"""Conversion on a host: the compressors that suit it come along, and the bytes are the same as here."""

from __future__ import annotations

import configparser
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import cli
from tests.buildhost import HOST, Buildhost
from tests.images import TINY, sha256
from tests.remote.clients import download

pytestmark = pytest.mark.remote
MADE = ("tiny.vmdk", "tiny.qcow2")
VERBS = ("convert.vmdk", "convert.qcow2")
ABROAD = "/var/lib/images/small"


def flags(folder: str | Path) -> tuple[str, ...]:
    return (*TINY, "--set", f"location={folder}", "--set", f"imageloc={folder}/disk.img")


@pytest.fixture(scope="module")
def here(there: Buildhost, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small disk, on both sides, and what it is converted to on this machine."""
    folder = tmp_path_factory.mktemp("small")
    with (folder / "disk.img").open("wb") as disk:
        for number in range(64):
            disk.write(bytes(range(256)) * number)
            disk.seek(1 << 18, os.SEEK_CUR)
        disk.truncate(1 << 26)
    os.utime(folder / "disk.img", ns=(1 << 60, 1 << 60))
    shutil.rmtree(there.folder / "images/small", ignore_errors=True)
    (there.folder / "images/small").mkdir()
    subprocess.run(["cp", "-a", folder / "disk.img", there.folder / "images/small"], check=True)
    cli.succeed(*VERBS, *flags(folder))
    return folder


@pytest.fixture
def bare(there: Buildhost) -> Buildhost:
    """The host without what earlier tests had it make and keep."""
    for path in (*there.kept("alice").glob("*"), *there.folder.glob("images/small/*tiny.*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return there


@pytest.fixture(scope="module")
def wheels(pins: Path, there: Buildhost, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an index holds that suits the host; the client is in a network namespace and reaches none."""
    return download(there, pins, tmp_path_factory.mktemp("wheels"))


def convert(there: Buildhost, here: Path, to: Path, *more: str, **where: Any) -> str:
    """Convert on the host, by whatever client, and see that the bytes are those of this machine."""
    line = ("-H", f"alice@{HOST}", *VERBS, *flags(ABROAD), "--to", str(to), *more)
    said = cli.succeed(*line, **{"prefix": there.prefix, "env": there.env, **where})
    if not more:
        assert [sha256(to / name) for name in MADE] == [sha256(here / name) for name in MADE]
    return said


def inspect(there: Buildhost, **where: Any) -> str:
    line = ("-H", f"alice@{HOST}", "inspect", f"{ABROAD}/tiny.vmdk", *flags(ABROAD))
    return cli.succeed(*line, **{"prefix": there.prefix, "env": there.env, **where}).lower()


def test_conversion_there_gives_the_same_bytes(bare: Buildhost, here: Path, tmp_path: Path) -> None:
    """The host has no compressor of ours but the one that comes along, and that stays for the next verb."""
    convert(bare, here, tmp_path)
    sent = {path: path.stat().st_ino for path in bare.kept("alice").iterdir()}
    assert sorted(path.name.partition("-")[0] for path in sent) == ["agent", "compressors"]
    assert "vmdk" in inspect(bare)
    assert {path: path.stat().st_ino for path in bare.kept("alice").iterdir()} == sent


def test_a_client_whose_own_do_not_load_there_fetches_those_that_do(
    bare: Buildhost, here: Path, mac: Path, wheels: Path, tmp_path: Path
) -> None:
    """Once, and not for what needs none; then they are at hand, for what is left to the host, too."""
    shutil.rmtree(mac / ".venv/wheels", ignore_errors=True)
    (tmp_path / "none").mkdir()
    offline = {**bare.env, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "none")}
    client = {"checkout": mac, "env": offline}
    cli.succeed("-H", f"alice@{HOST}", "config", *TINY, prefix=bare.prefix, **client)
    for verbs in (VERBS, ("build", "--formats", "vmdk")):
        line = ("-H", f"alice@{HOST}", *verbs, *flags(ABROAD))
        said = cli.refuse(*line, prefix=bare.prefix, **client)
        assert f"alice@{HOST}: no compressors for its Python 3." in said
        assert "No matching distribution found for" in said
        assert "PIP_INDEX_URL" in said.splitlines()[-1]
    assert [path.name.partition("-")[0] for path in bare.kept("alice").iterdir()] == ["agent"]
    assert not list((mac / ".venv/wheels").iterdir())
    bare.wait_until_empty()

    convert(bare, here, tmp_path / "fetched", checkout=mac, env={**offline, "PIP_FIND_LINKS": str(wheels)})
    (came,) = bare.kept("alice").glob("compressors-*")
    born = came.stat().st_ino
    for path in bare.folder.glob("images/small/*tiny.*"):
        path.unlink()
    convert(bare, here, tmp_path / "unused", "--detach", **client)
    attach = ("-H", f"alice@{HOST}", "attach", *flags(ABROAD), "--to", str(tmp_path / "kept"))
    cli.succeed(*attach, prefix=bare.prefix, **client)
    assert [sha256(tmp_path / "kept" / name) for name in MADE] == [sha256(here / name) for name in MADE]
    assert "vmdk" in inspect(bare, **client)
    assert [path.stat().st_ino for path in bare.kept("alice").glob("compressors-*")] == [born]


def test_what_cloudstack_wants_comes_home_with_its_files(bare: Buildhost, here: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"prefix": bare.prefix, "env": bare.env}
    more = (*flags(ABROAD), "--set", "cloudstack_release=4.22.0", "-H", f"alice@{HOST}")
    cli.succeed("convert.ova", "--to", str(tmp_path), *more, **where)
    checksum = hashlib.sha512((tmp_path / "tiny.ova").read_bytes()).hexdigest()
    described = configparser.ConfigParser()
    described.read(tmp_path / "metadata.ini")
    assert described["vmware"]["checksum"] == checksum
    assert (tmp_path / "sha512sum.txt").read_text() == f"{checksum}  tiny.ova\n"
    assert (tmp_path / "md5sum.txt").read_text().endswith("  tiny.ova\n")
    shown = cli.succeed("register", "--url", "https://files.example", *more, **where)
    assert f"checksum={{SHA-512}}{checksum}" in shown


def test_a_file_of_somebody_on_the_host_is_converted_there(
    bare: Buildhost, here: Path, tmp_path: Path
) -> None:
    """With nothing built there; what comes home is what this machine makes of it, and it is judged there."""
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", here / "disk.img", tmp_path / "vm.qcow2"],
        check=True,
    )
    shutil.copy(tmp_path / "vm.qcow2", bare.folder / "images/small")
    where: dict[str, Any] = {"prefix": bare.prefix, "env": bare.env}
    there = ("-H", f"alice@{HOST}", "--to", str(tmp_path / "home"))
    cli.succeed("convert", "--from", f"{ABROAD}/vm.qcow2", "--formats", "vhd,raw", *there, **where)
    cli.succeed("convert", "--from", str(tmp_path / "vm.qcow2"), "--formats", "vhd,raw")
    for name in ("vm.vhd", "vm.raw"):
        assert sha256(tmp_path / "home" / name) == sha256(tmp_path / name)
    assert sha256(tmp_path / "vm.raw") == sha256(here / "disk.img")
    line = ("inspect", f"{ABROAD}/vm.qcow2", "--for", "kvm,azure", "-H", f"alice@{HOST}")
    assert "would be refused by Azure\n" in cli.refuse(*line, **where)


def test_files_of_another_content_are_never_sent(
    bare: Buildhost, here: Path, mac: Path, wheels: Path, tmp_path: Path
) -> None:
    """pip checks them against the lock."""
    shutil.rmtree(mac / ".venv/wheels", ignore_errors=True)
    shutil.copytree(wheels, tmp_path / "wheels")
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.write_bytes(wheel.read_bytes() + b"\0")
    env = {**bare.env, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    line = ("-H", f"alice@{HOST}", *VERBS, *flags(ABROAD))
    said = cli.refuse(*line, prefix=bare.prefix, env=env, checkout=mac)
    assert "DO NOT MATCH THE HASHES" in said
    assert not list(bare.kept("alice").glob("compressors-*"))
