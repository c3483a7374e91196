"""Builds on a host over SSH: the same bytes, brought home, left alone, cut off at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cli, standin
from tests.boot.guest import disk, sector
from tests.buildhost import HOST, KEPT, Buildhost
from tests.images import STEPS, TINY, Built, link, sha256
from tests.remote.clients import FLAGS, begun, is_free, provide, run, start
from tests.waiting import LONG, until

pytestmark = pytest.mark.remote


def test_a_build_that_is_left_to_the_host_comes_home_with_the_same_bytes(
    tiny: Built, there: Buildhost, tmp_path: Path
) -> None:
    """It is watched by another user, waited for by a third, attached to twice, and brought home once."""
    shown, here = provide(tiny, there, "alice", "systemvm")
    assert "no build was left" in run(there, "alice", "status", *TINY)
    left = run(there, "alice", "build", "--detach", *FLAGS)
    assert f"it goes on without us: inv -H alice@{HOST} --image {TINY[1]} status" in left
    until(begun(here))
    seen = run(there, "carol", "--rootless", "status", *TINY, "--set", f"location={shown}")
    assert "is for the owner of LOCATION to see" in seen
    assert "alice as root (pid " in seen
    assert re.search(r"debootstrap.* so far", seen)
    assert "running at debootstrap" in run(there, "alice", "status", *TINY)
    line = ("-H", f"alice@{HOST}", "build", "--detach", *FLAGS)
    again = cli.refuse(*line, prefix=there.prefix, env=there.env)
    assert "a build runs there already: alice as root" in again
    waits = cli.start("-H", f"root@{HOST}", "seal", *FLAGS, prefix=there.prefix, env=there.env)
    watcher = cli.start("-H", f"root@{HOST}", "attach", *TINY, prefix=there.prefix, env=there.env)
    until(lambda: str(there.processes()).count("__main__.py serve") >= 2)
    os.killpg(watcher.pid, signal.SIGINT)  # the lid is shut: what goes on there does not mind
    watcher.communicate(timeout=LONG)
    told = run(there, "alice", "attach", *TINY, "--to", str(tmp_path))
    states = cli.states(told.replace(f"alice@{HOST} | ", ""))
    assert {states[name] for name in (*STEPS, "disk")} == {"built"}
    other, _ = waits.communicate(timeout=LONG)
    assert waits.returncode == 0, other
    assert f"waiting: {shown} is in use by alice as root" in other
    assert "finished after" in run(there, "alice", "status", *TINY)
    there.wait_until_empty()
    assert sha256(tmp_path / "tiny.img") == sha256(tiny.image)
    assert (tmp_path / "tiny.img").stat().st_blocks <= tiny.image.stat().st_blocks * 1.1
    assert json.loads((tmp_path / "tiny.img.json").read_text())["disk"] == tiny.manifest["disk"]
    assert (tmp_path / "tiny.img.sha256").read_text() == f"{sha256(tiny.image)}  tiny.img\n"
    assert not list(tmp_path.glob(".*"))


def test_files_may_stay_there(ready: tuple[str, ...], there: Buildhost, tmp_path: Path) -> None:
    kept = run(there, "root", "build", *ready, "--no-fetch", "--to", str(tmp_path / "none"))
    assert "left there: /var/lib/images/ready/tiny.img" in kept
    assert not (tmp_path / "none").exists()


def test_a_step_costs_at_most_three_round_trips(ready: tuple[str, ...], there: Buildhost) -> None:
    """On a line of 100 ms there and back; the login, which all verbs have in common, is taken off."""

    def cost(*line: str) -> tuple[str, int]:
        told = cli.succeed("-H", "far", *line, *ready, prefix=there.prefix, env=there.env)
        return told.replace("far | ", ""), (there.folder / "turns").stat().st_size

    _, login = cost("config")
    told, all_of_it = cost("build", "--no-fetch")
    steps = cli.states(told)
    assert set(steps.values()) == {"cached"}
    assert 1 < all_of_it - login <= 3 * len(steps)


def test_a_lock_is_kept_here_and_its_packages_there(
    ready: tuple[str, ...], there: Buildhost, tmp_path: Path
) -> None:
    shutil.copytree(cli.CHECKOUT / "config", tmp_path / "config", symlinks=True)
    own = (*ready, "--image", str(tmp_path / "config/tiny.yaml"))
    run(there, "alice", "lock", *own)
    assert (tmp_path / "config/tiny.amd64.lock").is_file()
    assert run(there, "alice", "resolve", *own).count("locked ") == 1
    told = cli.inv("-H", f"alice@{HOST}", "fetch", "--check", *own, prefix=there.prefix, env=there.env).stdout
    assert " 0 damaged" in told
    told = cli.inv("-H", f"alice@{HOST}", "repro", *ready, prefix=there.prefix, env=there.env).stderr
    assert "log in there" in told


def test_every_verb_that_looks_does_so_there(ready: tuple[str, ...], there: Buildhost) -> None:
    """And leaves it as it was."""

    def lie() -> dict[Path, int]:
        # A layer's record is one file with those of other tests' links to it, whose builds touch it.
        paths = (there.folder / "images/ready").rglob("*")
        return {path: 0 if path.name == "layer.json" else path.lstat().st_mtime_ns for path in paths}

    assert " frozen " in run(there, "alice", "resolve", *ready)
    before = lie()
    assert run(there, "alice", "plan", *ready).count(" cached ") == len(STEPS)
    assert "nothing changed" in run(there, "alice", "why", "tweak", *ready)
    # Other tests of this image may have left layers that this plan does not reach.
    assert re.search(r"\b[0-9]+ items?, ", run(there, "alice", "clean", "--cache", "--dry-run", *ready))
    told = cli.inv("-H", f"alice@{HOST}", "doctor", *ready, prefix=there.prefix, env=there.env).stdout
    assert re.search(r"ok +privileges +root\n", told)
    assert re.search(r"ok +overlay +works\n", told)
    assert lie() == before


def test_hosts_build_side_by_side_what_each_is_told(
    tiny: Built, ready: tuple[str, ...], there: Buildhost, tmp_path: Path
) -> None:
    link(tiny.location, there.folder / "images/second")
    one, other = f"root@{HOST}", "included"
    own = ("--set", f"{other}:imagename=other", "--set", f"{other}:location=/var/lib/images/second")
    line = ("-H", f"{one},{other}", "build", *ready, *own, "--to", str(tmp_path))
    told = cli.succeed(*line, prefix=there.prefix, env=there.env)
    assert f"{one} | fetched fetch" in told
    assert f"{other} | built   disk" in told
    assert [row.split()[:2] for row in told.splitlines()[-2:]] == [[one, "ok"], [other, "ok"]]
    assert sha256(tmp_path / one / "tiny.img") == sha256(tiny.image)
    assert json.loads((tmp_path / other / "other.img.json").read_text())["image"] == "other"
    assert sha256(tmp_path / other / "other.img") != sha256(tiny.image)
    printed = cli.succeed(*line, "--json", prefix=there.prefix, env=there.env)
    lines = {row["host"]: row for row in map(json.loads, printed.splitlines())}
    assert {host: (row["image"], row["here"]) for host, row in lines.items()} == {
        one: ("/var/lib/images/ready/tiny.img", str(tmp_path / one / "tiny.img")),
        other: ("/var/lib/images/second/other.img", str(tmp_path / other / "other.img")),
    }
    assert all(row["sha256"] == sha256(Path(row["here"])) for row in lines.values())
    shutil.rmtree(there.folder / "images/second")


@pytest.fixture
def sector_disk(there: Buildhost) -> Iterator[tuple[str, ...]]:
    """An image there whose only sector panics as a kernel would; returns the flags that mean it."""
    folder = there.folder / "images/sector"
    folder.mkdir()
    disk(folder / "tiny.img", sector("\nLinux version 6.1 (me)\nKernel panic - not syncing: on purpose\n"))
    yield (*FLAGS, "--set", "location=/var/lib/images/sector", "--set", "firmware=bios")
    shutil.rmtree(folder)


def test_an_image_is_verified_where_it_lies(sector_disk: tuple[str, ...], there: Buildhost) -> None:
    """The guest runs there, and what it said last is told here."""
    line = ("-H", f"alice@{HOST}", "verify", *sector_disk)
    said = cli.refuse(*line, prefix=there.prefix, env=there.env)
    assert f"error: alice@{HOST}: bios: the kernel panicked (phase: kernel" in said
    assert "Kernel panic - not syncing: on purpose" in said
    log = there.folder / "images/sector/logs/serial-raw-bios.log"
    assert f"/var/lib/{log.relative_to(there.folder)}" in said
    assert b"Linux version 6.1 (me)" in log.read_bytes()
    there.wait_until_empty()


def test_an_image_is_rehearsed_where_it_lies(
    sector_disk: tuple[str, ...], there: Buildhost, tmp_path: Path
) -> None:
    """The scripts go there and have no name any more when the machine runs, the report comes home."""

    def lent() -> list[str]:
        return there.inside("find", "/var/tmp", "-name", "systemvm-lent*").split()

    scripts, logs = standin.served(tmp_path / "vms"), there.folder / "images/sector/logs"
    line = ("rehearse", "--scripts", str(scripts), *sector_disk, "--to", str(tmp_path))
    client = start(there, "alice", *line)
    until(lambda: list(logs.glob("serial-rehearse-*")))
    assert lent() == []
    os.killpg(client.pid, signal.SIGKILL)
    client.communicate(timeout=LONG)
    there.wait_until_empty()
    done = cli.inv("-H", f"alice@{HOST}", *line, prefix=there.prefix, env=there.env)
    assert done.returncode == 1
    told = json.loads((tmp_path / "tiny.rehearsal.json").read_text())
    assert [(step["name"], step["state"]) for step in told["steps"]] == [("guest agent answers", "FAIL")]
    assert "the kernel panicked" in done.stdout
    assert lent() == []
    there.wait_until_empty()


def test_fetching_goes_on_where_it_was_cut_off(
    tiny: Built, ready: tuple[str, ...], there: Buildhost, tmp_path: Path
) -> None:
    def parts(least: int) -> list[Path]:
        return [path for path in tmp_path.glob(".tiny.img.*.part") if path.stat().st_size > least]

    client = start(there, "root", "build", *ready, "--to", str(tmp_path))
    until(lambda: parts(1 << 24))
    os.killpg(client.pid, signal.SIGKILL)
    client.communicate(timeout=LONG)
    there.wait_until_empty()
    (part,) = parts(1 << 24)
    kept = part.stat()
    with part.open("r+b") as file:  # a wrong byte in what is there shows that it is used, and is found out
        file.seek(1 << 20)
        byte = file.read(1)
        file.seek(1 << 20)
        file.write(bytes([byte[0] ^ 1]))
    said = cli.refuse(
        "-H", f"root@{HOST}", "build", *ready, "--to", str(tmp_path), prefix=there.prefix, env=there.env
    )
    assert "arrived with SHA-256" in said
    assert not (tmp_path / "tiny.img").exists()
    assert part.stat().st_ino == kept.st_ino
    run(there, "root", "build", *ready, "--to", str(tmp_path))
    brought = (tmp_path / "tiny.img").stat()
    told = run(there, "root", "build", *ready, "--to", str(tmp_path)).replace(f"root@{HOST} | ", "")
    assert {cli.states(told)[name] for name in (*STEPS, "disk", "fetch")} == {"cached"}
    assert (tmp_path / "tiny.img").stat() == brought
    assert sha256(tmp_path / "tiny.img") == sha256(tiny.image)
    assert not list(tmp_path.glob(".*"))


def test_a_shell_gives_its_status_and_sees_the_tree(ready: tuple[str, ...], there: Buildhost) -> None:
    line = ("-H", f"alice@{HOST}", "shell", *ready, "--command")
    done = cli.inv(*line, "cat /etc/hostname", prefix=there.prefix, env=there.env)
    assert (done.returncode, done.stdout.strip()) == (0, "tiny")
    assert cli.inv(*line, "sh -c 'exit 7'", prefix=there.prefix, env=there.env).returncode == 7
    there.wait_until_empty()


def test_a_build_without_us_is_cancelled_at_once(tiny: Built, there: Buildhost) -> None:
    shown, here = provide(tiny, there, "carol", "cancelled")
    flags = (*FLAGS, "--set", f"location={shown}")
    run(there, "carol", "--rootless", "build", "--detach", *flags)
    until(begun(here))
    assert "cancelled" in run(there, "carol", "--rootless", "cancel", *flags)
    there.wait_until_empty(10)
    assert is_free(here)
    assert "cancelled at debootstrap" in run(there, "carol", "--rootless", "status", *flags)
    line = ("-H", f"carol@{HOST}", "--rootless", "attach", *flags)
    said = cli.refuse(*line, prefix=there.prefix, env=there.env)
    assert "the build was cancelled" in said


def test_several_hosts_work_side_by_side_and_one_that_fails_stops_none(there: Buildhost) -> None:
    hosts = [f"root@{HOST}", "nosuch.invalid", "included"]
    done = cli.inv("-H", ",".join(hosts), "config", *TINY, prefix=there.prefix, env=there.env)
    assert done.returncode == 1
    assert "cannot reach build host 'nosuch.invalid'" in done.stderr
    for name in (hosts[0], hosts[2]):
        assert f"{name} | IMAGENAME" in done.stdout
    table = [["HOST", "RESULT"], [hosts[0], "ok"], [hosts[1], "FAIL"], [hosts[2], "ok"]]
    assert [line.split()[:2] for line in done.stdout.splitlines()[-4:]] == table
    done = cli.inv("-H", ",".join(hosts), "config", "--json", *TINY, prefix=there.prefix, env=there.env)
    assert done.returncode == 1
    lines = {row["host"]: set(row) - {"host"} for row in map(json.loads, done.stdout.splitlines())}
    assert lines == {hosts[0]: {"settings"}, hosts[1]: {"error", "hint"}, hosts[2]: {"settings"}}
    assert [line.split()[:2] for line in done.stderr.splitlines()[:4]] == table


def test_a_full_disk_there_is_told_before_anything_is_done(there: Buildhost) -> None:
    there.inside(
        *("sh", "-c"),
        "mkdir -p /var/lib/images/full; mount -t tmpfs -o mode=755,size=64m full /var/lib/images/full",
    )
    try:
        flags = (*TINY, "--set", "location=/var/lib/images/full")
        said = cli.refuse("-H", f"root@{HOST}", "build", *flags, prefix=there.prefix, env=there.env)
        assert "MiB free" in said
        assert f"inv -H root@127.0.0.1 --image {TINY[1]} clean" in said
    finally:
        there.inside("umount", "/var/lib/images/full")
    kept = f"/var/lib/{KEPT}"
    there.inside("mkdir", "-p", kept)
    there.inside("mount", "-t", "tmpfs", "-o", "size=64k", "full", kept)
    try:
        said = cli.refuse("-H", f"root@{HOST}", "config", *TINY, prefix=there.prefix, env=there.env)
        assert f"cannot keep the agent there: {kept}: No space left on device" in said
        assert "make room there" in said
        assert there.inside("find", kept, "-mindepth", "1") == ""
    finally:
        there.inside("umount", kept)


def test_an_image_with_a_password_comes_home_for_its_owner_alone(
    tiny: Built, there: Buildhost, tmp_path: Path
) -> None:
    """And LOCATION's secret stays there; the password is in no argument there."""
    secret, seen = "geheim0815", set()
    link(tiny.location, there.folder / "images/closed")
    line = ("build", "--formats", "qcow2", *FLAGS, "--set", "location=/var/lib/images/closed")
    client = cli.start(
        *("-H", f"alice@{HOST}", *line, "--to", str(tmp_path)),
        prefix=there.prefix,
        env={**there.env, "SYSTEMVM_PASSWORD": secret},
    )
    while client.poll() is None:
        seen.add(str(there.processes()))
        for path in tmp_path.glob(".tiny.*.part"):
            with contextlib.suppress(FileNotFoundError):
                assert path.stat().st_mode & 0o777 == 0o600
        time.sleep(0.05)
    told, _ = client.communicate()
    assert client.returncode == 0, told
    assert "mode 0600: it holds a root password" in told
    assert any("fat.py" in each or "ext4.py" in each for each in seen)
    assert secret not in told + "".join(seen)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert (modes["tiny.img"], modes["tiny.qcow2"]) == (0o600, 0o600)
    assert modes["tiny.img.json"] == 0o644
    key = (there.folder / "images/closed/secret").read_bytes()
    texts = [path.read_bytes() for path in tmp_path.iterdir() if path.suffix not in (".img", ".qcow2")]
    assert not [text for text in texts if key in text or secret.encode() in text]
    shutil.rmtree(there.folder / "images/closed")
