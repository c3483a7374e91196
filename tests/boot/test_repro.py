"""The same inputs, everything around them changed: the same bytes, and what is told where they are not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from build.wire import SURROUNDINGS
from tests import cli, ordinary
from tests.images import Built, link
from tests.root.test_json import documented
from tests.waiting import until

pytestmark = pytest.mark.boot
FORMATS = ("--formats", "vhd,vmdk")
NEEDED = {"folder", "umask", "locale", "zone", "cpus", "host-name", "file-system", "user"}
"""What root can vary on any machine that runs the tests; another Python is not everywhere."""


@pytest.fixture
def with_user(tiny: Built, tmp_path: Path) -> list[str]:
    """A command line's beginning: root, on a machine that has an ordinary user, too."""
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, ordinary.UID, ordinary.UID)
    for path in (tmp_path, *tmp_path.parents, tiny.location, *tiny.location.parents):
        if path.name.startswith(("pytest-", tmp_path.name, "tiny", "popen-", "location")):
            path.chmod(path.stat().st_mode | 0o055)
    return ordinary.prefix(tmp_path, home, become=False)


@pytest.mark.slow(45, reason="a whole build")
def test_everything_around_a_build_may_change_at_once(tiny: Built, with_user: list[str]) -> None:
    done = cli.inv("repro", "--json", "--frozen", *FORMATS, *tiny.flags, prefix=with_user)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert set(told) == documented("repro")
    assert set(told["varied"]) >= NEEDED, told["kept"]
    assert set(told["varied"]) | set(told["kept"]) == set(SURROUNDINGS)
    assert told["differing"] == []
    assert {row["file"] for row in told["compared"]} == {
        "tiny.img",
        "tiny.vhd",
        "tiny.vmdk",
    }
    assert all(row["same"] for row in told["compared"])
    assert not list(tiny.location.glob(".repro*"))


@pytest.mark.soak(300)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_one_thing_around_a_build_may_change(name: str, tiny: Built, with_user: list[str]) -> None:
    line = ("repro", "--json", "--frozen", "--formats", "vhd", "--vary", name)
    done = cli.inv(*line, *tiny.flags, prefix=with_user)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert list(told["varied"]) == [name] or name == "python"


@pytest.fixture
def changing(tmp_path: Path, tiny: Built) -> tuple[str, ...]:
    """A build of the tiny image whose files a test may change, and a definition of its own."""
    folder = tmp_path / "config"
    shutil.copytree(cli.CHECKOUT / "config", folder, symlinks=True)
    location = tmp_path / "location"
    link(tiny.location, location)
    for path in (*location.glob("tiny.*"), *location.glob("cache/*/debootstrap-*/content")):
        own = shutil.copy2(path, path.with_name("own"))
        os.replace(own, path)
    return ("--image", str(folder / "tiny.yaml"), "--set", f"location={location}", "--frozen")


@pytest.mark.slow(35, reason="a whole build")
def test_what_differs_is_named_with_its_step_and_its_package(
    changing: tuple[str, ...], tmp_path: Path
) -> None:
    """The first build's own files are changed under its feet: one of a package, and the disk with it."""
    line = ("repro", "--formats", "vhd", "--vary", "folder", *changing)
    cli.succeed("build", "--formats", "vhd", *changing)
    location = tmp_path / "location"
    image = location / "tiny.img"
    table = json.loads(subprocess.run(["sfdisk", "--json", image], capture_output=True, check=True).stdout)
    start = table["partitiontable"]["partitions"][-1]["start"] * 512
    where = subprocess.run(
        ["debugfs", "-R", "blocks /usr/bin/dpkg", f"{image}?offset={start}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[0]
    (listed,) = location.glob("cache/*/debootstrap-*/content")
    text = listed.read_text()
    row = next(each for each in text.splitlines() if each.endswith(' "/usr/bin/dpkg"'))
    listed.write_text(text.replace(row, f"{'0' * 16} {row[17:]}"))
    status = image.stat()
    with image.open("r+b") as file:
        file.seek(start + int(where) * 4096)
        file.write(b"another")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = cli.inv(*line)
    assert done.returncode == 1, done.stdout
    assert "error: not reproducible: tiny.img" in done.stderr
    assert f"first at byte {start + int(where) * 4096:#x}" in done.stdout
    assert "step debootstrap: /usr/bin/dpkg (dpkg)" in done.stdout
    assert "/usr/bin/dpkg" in done.stdout.partition("in partition")[2]


def running(word: str) -> list[int]:
    """Processes with a word in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def test_a_killed_client_takes_the_second_build_along(changing: tuple[str, ...], tmp_path: Path) -> None:
    cli.succeed("build", "--formats", "vhd", *changing)
    location = tmp_path / "location"
    child = cli.start("repro", "--formats", "vhd", "--vary", "folder,file-system", *changing)
    try:
        until(lambda: any("build" in path for path in inside(location)), say=lambda: "no second build")
        (aside,) = location.glob(".repro-*")
    finally:
        child.kill()
        child.communicate()
    until(lambda: not running(aside.name), say=lambda: "it goes on")
    os.utime(aside, (0, 0))  # a young one may be about to be used
    cli.succeed("build", *changing)
    assert not aside.exists()


def inside(location: Path) -> list[str]:
    """Command lines that build in a folder set aside."""
    lines = []
    for process in running(f"{location}/.repro-"):
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace"))
    return [line for line in lines if "invoke" in line]


def test_what_cannot_be_done_is_said_at_once(tiny: Built) -> None:
    assert "choose of: folder" in cli.refuse("repro", "--vary", "moon", *tiny.flags, "--frozen")
    told = cli.refuse("repro", *tiny.flags, "--frozen", env={"SYSTEMVM_PASSWORD": "secret"})
    assert "password_hash" in told
