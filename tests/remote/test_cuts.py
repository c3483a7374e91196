"""Whatever cuts a client off, and whenever: no process, no mount and no lock is left on the host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cli
from tests.boot.guest import disk, sector
from tests.buildhost import HOST, USERS, Buildhost
from tests.images import TINY, Built, link
from tests.remote.clients import ALL, FLAGS, begun, is_free, provide, start, whereabouts
from tests.waiting import LONG, until

pytestmark = [pytest.mark.remote, pytest.mark.waits]


def cut(how: str, there: Buildhost, clients: list[subprocess.Popen[str]]) -> None:
    """Cut every client off, and see that the host is empty then."""
    with contextlib.ExitStack() as stack:
        if how == "client -9":
            for client in clients:
                os.killpg(client.pid, signal.SIGKILL)
        elif how == "Ctrl-C":
            for client in clients:
                os.killpg(client.pid, signal.SIGINT)
        elif how == "session -9":
            there.kill_sessions()
        else:
            stack.enter_context(there.silence())
        there.wait_until_empty()
        for client in clients:
            said, _ = client.communicate(timeout=LONG)
            assert client.returncode != 0
            assert how != "Ctrl-C" or client.returncode == 130
            if said and how == "no network":
                assert "the network is lost" in said or "no byte came for 20 s" in said
                assert "Traceback" not in said


def end(client: subprocess.Popen[str]) -> None:
    """End one that a failure has left running."""
    if client.poll() is None:
        os.killpg(client.pid, signal.SIGKILL)
        client.communicate(timeout=LONG)


HOWS = ("client -9", "session -9", "no network")


@dataclass(frozen=True)
class Moment:
    """When a build is cut off: the verbs that lead there, what they lack, and what shows that they are there.

    Paths are patterns below LOCATION, but for `shows` of a file on its way home. `halt`: a step is too quick
    to be caught by four clients at once, so its script stands still as soon as it has begun.
    """

    verbs: tuple[str, ...]
    lacks: str
    shows: str
    halt: bool = False


MOMENTS = {
    "a first layer": Moment(
        ("debootstrap",), "cache/*/debootstrap-*", "cache/*/.debootstrap-*.part/scratch/base"
    ),
    "a layer on others": Moment(("tweak",), "cache/*/initramfs-*", "cache/*/.initramfs-*.part", halt=True),
    "the disk": Moment(("disk",), "tiny.img.json", ".tiny.img.part", halt=True),
    # With a compression around it that takes long.
    "a conversion": Moment(("convert.raw", "--set", "names.raw=tiny.bz2"), "tiny.bz2", ".tiny.bz2*.part"),
    "the way home": Moment(("build",), "", ".tiny.img.*.part"),
}
CUTS = [
    ("client -9", "a first layer"),
    ("session -9", "a layer on others"),
    ("no network", "the disk"),
    ("Ctrl-C", "a conversion"),
    ("session -9", "the way home"),
    ("no network", "a first layer"),
]
"""In every run: each way at least once, and each moment."""
PAIRS = (("bob", "carol"), ("root", "alice"))
ALL_CUTS = [*((how, moment) for how in HOWS for moment in MOMENTS), ("Ctrl-C", "a first layer"), CUTS[3]]


@pytest.mark.parametrize(
    ("how", "moment"),
    [pytest.param(*cut, marks=[] if cut in CUTS else [pytest.mark.soak(25)]) for cut in ALL_CUTS],
)
def test_nothing_is_left_of_a_build_that_is_cut_off(
    how: str, moment: str, finished: dict[str, Path], there: Buildhost, tmp_path: Path
) -> None:
    """Two at once of: root, sudo, sudo with a password, and one who builds without root."""
    wanted = MOMENTS[moment]
    chosen = PAIRS[ALL_CUTS.index((how, moment)) % len(PAIRS)]
    places = {user: whereabouts(there, user, f"{user}-cut") for user in chosen}
    with contextlib.ExitStack() as stack:
        if moment == "the way home":
            stack.enter_context(there.narrow())
        for user, (_, here) in places.items():
            link(finished[user], here)
            stack.callback(shutil.rmtree, here)
            for path in here.glob(wanted.lacks) if wanted.lacks else ():
                subprocess.run(["rm", "-r", path], check=True)
        clients = []
        for user, (shown, _) in places.items():
            own = ("--set", f"location={shown}", "--to", str(tmp_path / user))
            clients.append(start(there, user, *wanted.verbs, *FLAGS, *own))
            stack.callback(end, clients[-1])
        coming = set(places)

        def all_came() -> bool:
            for user in list(coming):
                shown, here = places[user]
                shows = any((tmp_path / user if moment == "the way home" else here).glob(wanted.shows))
                if shows and (not wanted.halt or there.halt(rf"{shown}/\.run-[^ ]*/step\.sh")):
                    coming.remove(user)
            return not coming

        until(all_came, 120, lambda: f"never came: {coming}")
        cut(how, there, clients)
        for user, (_, here) in places.items():
            assert is_free(here)
            assert not wanted.lacks or not list(here.glob(wanted.lacks))
            assert not (tmp_path / user / "tiny.img").exists()


@pytest.mark.parametrize(
    "how", [HOWS[0], *(pytest.param(how, marks=pytest.mark.soak(15)) for how in HOWS[1:])]
)
def test_nothing_is_left_of_a_shell_that_is_cut_off(
    how: str, ready: tuple[str, ...], there: Buildhost
) -> None:
    users = ("root", "alice", "bob")
    clients = [
        start(there, user, "shell", *ready, "--command", f"sleep 77{n}") for n, user in enumerate(users)
    ]
    until(lambda: all(f"sleep 77{number}" in str(there.processes()) for number in range(len(users))))
    cut(how, there, clients)
    assert not list((there.folder / "images/ready").glob(".shell-*"))


@pytest.mark.parametrize(
    ("how", "verb"),
    [
        ("session -9", "boot"),
        ("no network", "verify"),
        *(
            pytest.param(how, verb, marks=pytest.mark.soak(15))
            for how, verb in (("client -9", "boot"), ("no network", "boot"), ("client -9", "verify"))
        ),
        pytest.param("session -9", "verify", marks=pytest.mark.soak(15)),
    ],
)
def test_no_guest_outlives_who_started_it(how: str, verb: str, there: Buildhost) -> None:
    """A guest that never ends, for each of the four users."""
    clients = []
    with contextlib.ExitStack() as stack:
        for user in ALL:
            shown, here = whereabouts(there, user, f"{user}-guest")
            here.mkdir()
            disk(here / "tiny.img", sector("\nLinux version 6 (me)\n"))
            if user == "carol":
                for path in (here, *here.iterdir()):
                    os.chown(path, USERS[user], USERS[user])
            stack.callback(shutil.rmtree, here)
            # Firmware for UEFI that finds nothing to boot is never at rest.
            own = ("--set", f"location={shown}", "--set", "firmware=bios")
            clients.append(start(there, user, verb, *TINY, *own))
            stack.callback(end, clients[-1])
        until(lambda: str(there.processes()).count("qemu-system-x86_64 -") >= len(ALL))
        cut(how, there, clients)


def test_ctrl_c_ends_the_work_on_every_host(tiny: Built, there: Buildhost) -> None:
    """The two hosts are one, where the second build waits for the first."""
    shown, here = provide(tiny, there, "root", "both")
    hosts = f"root@{HOST},alice@{HOST}"
    line = ("-H", hosts, "debootstrap", *FLAGS, "--set", f"location={shown}")
    client = cli.start(*line, prefix=there.prefix, env=there.env)
    until(begun(here))
    until(lambda: str(there.processes()).count("__main__.py serve") >= 2)
    cut("Ctrl-C", there, [client])
    assert is_free(here)
    assert not list(here.glob("cache/*/debootstrap-*"))
