"""Chaos: signals at random moments to any process of a run, full disks, disks that turn read-only.

After each: no process, no mount, no lock; every layer is what was made; and the bytes of an undisturbed run
that follows are those of a run that was never disturbed. CHAOS_ROUNDS asks for more rounds than 60.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from build.agent import store
from build.agent.sandbox import BuildPaths
from tests import cli
from tests.buildhost import Buildhost
from tests.images import Built, link, sha256
from tests.remote.clients import FLAGS, is_free, start
from tests.waiting import LONG, Deadline

pytestmark = pytest.mark.remote

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "60"))
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSTOP)
PR_SET_CHILD_SUBREAPER = 36
STEPS = ("debootstrap", "initramfs", "tweak", "minimize", "keepalived-render", "seal")


@pytest.fixture
def reaper() -> Iterator[None]:
    """Processes whose parent ends become ours, so that nothing of a run can hide from `below`."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def parents() -> dict[int, int]:
    """Parent of each process that lives."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(folder.name)] = int(parent)
    return found


def below(root: int, but: Sequence[int] = ()) -> list[int]:
    """Processes below one, those below `but` left out."""
    known, found, level = parents(), [], [root]
    while level:
        level = [pid for pid, parent in known.items() if parent in level and pid not in but]
        found += level
    return found


@dataclass(frozen=True)
class Site:
    """Where a round takes place: LOCATION as the client and as we see it, and what to compare with."""

    location: str
    here: Path
    image: str
    artifact: str
    there: Buildhost | None = None

    def run(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a client."""
        own = (*arguments, *FLAGS, "--set", f"location={self.location}")
        if self.there:
            return start(self.there, "root", *own, "--to", str(self.here.parent / "home"))
        return cli.start(*own)

    def undisturbed(self, *arguments: str) -> str:
        """Run one to its good end."""
        client = self.run(*arguments)
        said, _ = client.communicate(timeout=LONG)
        assert client.returncode == 0, said
        return said


def harm(site: Site, dice: random.Random) -> tuple[tuple[str, ...], float]:
    """Choose what is run, see to it that there is something to do, and tell about how long that takes."""
    what = dice.choice(("build", "build", "build", "convert.qcow2", "clean"))
    if what == "clean":
        return ("clean", "--all"), 1.0
    if what == "convert.qcow2":
        (site.here / "tiny.qcow2").unlink(missing_ok=True)
        return (what,), 6.0
    first = dice.randrange(len(STEPS))
    for step in STEPS[first:]:
        for layer in site.here.glob(f"cache/*/{step}-*"):
            shutil.rmtree(layer)
    (site.here / "tiny.img").unlink(missing_ok=True)
    return ("build",), 22.0 if first == 0 else 9.0


def strike(client: subprocess.Popen[str], dice: random.Random) -> str:
    """Send a signal to a process of a run, if it still runs; one that is stopped goes on after a while."""
    victims = [client.pid, *below(client.pid)]
    victim, sign = dice.choice(victims), dice.choice(SIGNALS)
    try:
        name = Path(f"/proc/{victim}/comm").read_text().strip()
        os.kill(victim, sign)
        if sign == signal.SIGSTOP:
            time.sleep(dice.uniform(0.2, 3))
            os.kill(victim, signal.SIGCONT)
    except (ProcessLookupError, FileNotFoundError):
        return "too late"
    return f"{sign.name} to {name}"


def assert_nothing_left(site: Site, before: Sequence[int]) -> None:
    deadline = Deadline(40)
    while left := below(os.getpid(), before):
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        assert not deadline.over(), [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.1)
    if site.there:
        site.there.wait_until_empty()
    assert str(site.here) not in Path("/proc/self/mounts").read_text()
    # A process of several threads is a zombie before the last of them has let go of its files.
    while (site.here / "lock").exists() and not is_free(site.here):
        assert not deadline.over(), "somebody holds LOCATION"
        time.sleep(0.1)


def assert_layers(site: Site) -> None:
    """Every layer is what was made, read in full."""
    place = BuildPaths(site.here, Path("/mnt/none"), "root", True)
    for folder, _ in store.every(place.store):
        store.settle(place, folder.name)
        assert not store.changed(place, folder.name)


@pytest.mark.soak(1800)
@pytest.mark.usefixtures("reaper")
def test_chaos(seed: int, tiny: Built, there: Buildhost, tmp_path: Path) -> None:
    dice = random.Random(seed)
    stock = tmp_path / "stock"
    link(tiny.location, stock)
    here, far = tmp_path / "here", there.folder / "images/chaos"
    for place in (here, far):
        link(tiny.location, place)
    cli.succeed("convert.qcow2", *FLAGS, "--set", f"location={here}")
    image, artifact = sha256(here / "tiny.img"), sha256(here / "tiny.qcow2")
    sites = [Site(str(here), here, image, artifact)] * 3
    sites.append(Site("/var/lib/images/chaos", far, image, artifact, there))
    before = below(os.getpid())
    struck = 0
    for number in range(ROUNDS):
        site = dice.choice(sites)
        line, seconds = harm(site, dice)
        client = site.run(*line)
        time.sleep(dice.uniform(0, seconds))  # the moment is what varies
        what = strike(client, dice)
        said, _ = client.communicate(timeout=LONG)
        struck += what != "too late"
        print(f"{number}: {site.location} {line[0]}: {what}: exit {client.returncode}", flush=True)
        if "SIGINT" not in what:  # Python itself shows one that comes while it starts
            assert "Traceback" not in said, said
        assert "defect" not in said, said
        assert_nothing_left(site, before)
        for folder in ("debs", "resolutions"):  # which `clean --all` takes
            if len(list((site.here / folder).glob("*"))) < len(list((stock / folder).glob("*"))):
                shutil.rmtree(site.here / folder, ignore_errors=True)
                shutil.copytree(stock / folder, site.here / folder)
        site.undisturbed("build", "--no-fetch")
        site.undisturbed("convert.qcow2", "--no-fetch")
        assert sha256(site.here / "tiny.img") == image
        assert sha256(site.here / "tiny.qcow2") == artifact
        assert_layers(site)
        left = [path.name for path in site.here.iterdir() if path.name.startswith(".")]
        assert all(name.startswith((".run-", ".probe-")) for name in left), left
    assert struck > ROUNDS // 2
    shutil.rmtree(far)


FULL = """
set -u
mount -t tmpfs -o mode=755,size="$SIZE"m tmpfs "$LOCATION"
cp -a "$STOCK/debs" "$STOCK/resolutions" "$LOCATION"
"$@" build; echo "status $?"
mount -o remount,size=4g "$LOCATION"
"$@" build || exit
sha256sum "$LOCATION/tiny.img"
"""

READ_ONLY = """
set -u
mount -t tmpfs -o mode=755,size=4g tmpfs "$LOCATION"
cp -a "$STOCK/debs" "$STOCK/resolutions" "$LOCATION"
"$@" build & client=$!
sleep "$MOMENT"
while kill -0 $client 2>/dev/null && ! mount -o remount,ro "$LOCATION" 2>/dev/null; do :; done
wait $client; echo "status $?"
mount -o remount,rw "$LOCATION"
"$@" build || exit
sha256sum "$LOCATION/tiny.img"
"""


@pytest.mark.soak(150)
@pytest.mark.parametrize("script", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_disk_that_takes_no_more(script: str, seed: int, tiny: Built, tmp_path: Path) -> None:
    dice = random.Random(seed)
    wanted = sha256(tiny.image)
    for _ in range(3):
        (tmp_path / "location").mkdir(exist_ok=True)
        variables = {
            "LOCATION": str(tmp_path / "location"),
            "STOCK": str(tiny.location),
            "SIZE": str(dice.randrange(150, 1250)),
            "MOMENT": str(round(dice.uniform(0.5, 18), 2)),
        }
        line = [sys.executable, "-m", "invoke", *FLAGS, "--set", f"location={tmp_path / 'location'}"]
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", script, "bash", *line],
            cwd=cli.CHECKOUT,
            env=cli.environment(variables),
            capture_output=True,
            text=True,
            check=False,
        )
        shown = done.stdout + done.stderr
        assert done.returncode == 0, shown
        assert f"{wanted}  " in done.stdout, shown
        assert "Traceback" not in shown, shown
        assert "defect" not in shown, shown
        if "status 0" not in done.stdout:
            assert "error: " in shown
            assert "  hint: " in shown
