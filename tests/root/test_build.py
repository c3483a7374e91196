"""The whole chain on the tiny image, by the commands that users type."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from build.engine.references import literal
from tests import cli, ordinary
from tests.images import STEPS, TINY, Built, copied_resolution, link, sha256
from tests.root.test_layers import ODD
from tests.waiting import LONG, until

pytestmark = pytest.mark.root
CHECKOUT = cli.CHECKOUT


def test_a_build_tells_each_step_and_leaves_image_manifest_and_sum(tiny: Built) -> None:
    states = cli.states(tiny.output)
    assert [name for name in states if name in (*STEPS, "disk")] == [*STEPS, "disk"]
    assert {states[name] for name in (*STEPS, "disk")} == {"built"}
    assert tiny.manifest["disk"]["sha256"] == sha256(tiny.image)
    assert tiny.image.stat().st_size == 1024 << 20
    assert tiny.image.stat().st_blocks * 512 < 800 << 20
    summed = tiny.image.with_name("tiny.img.sha256").read_text()
    assert summed == f"{sha256(tiny.image)}  tiny.img\n"
    assert {"linux-image-amd64", "openssh-server"} <= {
        package["name"] for package in tiny.manifest["packages"]
    }


@pytest.mark.slow(30, reason="a whole build with another bootstrap tool")
def test_a_location_may_have_any_name_and_the_tool_be_another(tiny: Built, tmp_path: Path) -> None:
    """The same tree by debootstrap, in a folder of an odd name; converted, shown and removed there, too."""
    place = tmp_path / "a b" / ODD
    place.parent.mkdir()
    copied_resolution(tiny, place)
    flags = (*TINY, "--set", f"location={literal(str(place))}", "--set", "bootstrap=debootstrap")
    cli.succeed("build", *flags, "--frozen", "--formats", "vhd")
    manifest = json.loads((place / "tiny.img.json").read_text())
    assert (manifest["settings"]["bootstrap"], tiny.manifest["settings"]["bootstrap"]) == (
        "debootstrap",
        "builtin",
    )
    assert listing(place, manifest["layers"]) == listing(tiny.location, tiny.manifest["layers"])
    assert (place / "tiny.vhd").exists()
    assert cli.succeed("shell", *flags, "--command", "cat /etc/hostname") == "tiny\n"
    cli.succeed("resolve", *flags)
    cli.succeed("clean", "--all", *flags)
    assert [path.name for path in place.iterdir()] == ["lock"]


def test_nothing_changed_means_all_cached(tiny: Built) -> None:
    before = tiny.image.stat().st_mtime_ns
    states = cli.states(cli.succeed("build", *tiny.flags))
    assert {states[name] for name in (*STEPS, "disk")} == {"cached"}
    assert tiny.image.stat().st_mtime_ns == before


def test_what_a_build_finds_cached_counts_as_just_used_and_what_is_looked_at_does_not(tiny: Built) -> None:
    records = [tiny.location / "cache/root" / key / "layer.json" for key in tiny.manifest["layers"]]
    for record in records:  # each worker has its own, but the file in it is of all
        own = shutil.copy(record, record.with_name("copy"))
        os.utime(own, (1, 1))
        own.rename(record)
    cli.succeed("plan", *tiny.flags)
    assert {record.stat().st_mtime for record in records} == {1}
    cli.succeed("minimize", *tiny.flags, "--frozen")
    used = [record.parent.name.rpartition("-")[0] for record in records if record.stat().st_mtime > 1]
    assert used == list(STEPS[:4])


def test_every_task_brings_what_it_needs(tiny: Built) -> None:
    states = cli.states(cli.succeed("minimize", *tiny.flags, "--frozen"))
    assert [name for name in states if name in STEPS] == list(STEPS[:4])


def test_plan_shows_keys_and_states_and_the_very_scripts(tiny: Built) -> None:
    shown = cli.succeed("plan", *tiny.flags)
    for key in tiny.manifest["layers"]:
        assert key in shown
    assert shown.count("cached") == len(STEPS)
    text = cli.succeed("plan", "--script", *tiny.flags)
    assert text.count("set -Eeuo pipefail") == len(STEPS)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image definition of one's own: a copy of the shipped ones, with room for changes."""
    folder = tmp_path_factory.mktemp("own") / "config"
    shutil.copytree(CHECKOUT / "config", folder, symlinks=True)
    return folder


def test_one_overlay_file_changed_leaves_the_layers_below(tiny: Built, own: Path) -> None:
    """Names that bite go through whole; the initramfs is not made again; `why` names the file."""
    name = "a 'b\"\n$c --"
    (own / "tiny" / "etc" / name).write_text("bites\n")
    flags = ("--image", str(own / "tiny.yaml"), "--set", f"location={tiny.location}")
    told = cli.succeed("why", "tweak", *flags)
    assert repr(f"tree/etc/{name}") in told
    assert "added" in told
    image = tiny.location / "own.img"
    states = cli.states(cli.succeed("build", *flags, "--frozen", "--set", f"imageloc={image}"))
    assert [states[step] for step in (*STEPS, "disk")] == ["cached"] * 2 + ["built"] * 5
    seen = cli.succeed("shell", *flags, "--command", 'cat "/etc/a \'b\\"\n$c --"')
    assert seen.strip().endswith("bites")
    image.unlink()


def test_a_shell_opens_at_any_layer_and_changes_nothing(tiny: Built) -> None:
    assert cli.succeed("shell", *tiny.flags, "--command", "cat /etc/hostname").strip() == "tiny"
    at = ("shell", *tiny.flags, "--at", "debootstrap", "--command")
    assert cli.inv(*at, "test -e /usr/sbin/policy-rc.d").returncode == 0
    assert cli.inv(*at, "touch /tried").returncode == 0
    assert cli.inv(*at, "test -e /tried").returncode == 1
    assert "no step 'nosuch'" in cli.refuse("shell", *tiny.flags, "--at", "nosuch")


def test_an_ordinary_user_gets_the_same_bytes(tiny: Built, tiny_of_user: Built, tmp_path: Path) -> None:
    assert sha256(tiny_of_user.image) == sha256(tiny.image)
    location, tables = tmp_path / "user", tmp_path / "tables"
    tables.mkdir()
    link(tiny_of_user.location, location)
    prefix = ordinary.prefix(tables, location)
    flags = (*TINY, "--frozen", "--set", f"location={location}")
    # To look at what is cached needs no package.
    hide = 'for tool in newuidmap newgidmap; do mount --bind /dev/null "/usr/bin/$tool"; done; exec "$@"'
    hidden = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", hide, "sh", *prefix]
    assert cli.succeed("plan", *flags, prefix=hidden).count(" cached ") == len(STEPS)
    assert cli.succeed("shell", *flags, "--command", "id -u", prefix=prefix).strip() == "0"
    assert (location / "cache/user").is_dir()
    cli.succeed("clean", "--all", *flags, prefix=prefix)
    assert [path.name for path in location.iterdir()] == ["lock"]


@pytest.mark.soak(70)
def test_where_overlayfs_cannot_stack_layers_are_copies_and_the_bytes_the_same(
    tiny: Built, tmp_path: Path
) -> None:
    """A container's own file system is an overlay: its kernel refuses an overlay's upper directory there."""
    copied_resolution(tiny, tmp_path / "lower")
    for name in ("upper", "work", "location"):
        (tmp_path / name).mkdir()
    script = (
        f"mount -t overlay -o lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work "
        f'overlay {tmp_path}/location; exec "$@"'
    )
    prefix = ("unshare", "--mount", "--propagation", "private", "bash", "-euc", script, "in-container")
    flags = (*TINY, "--frozen", "--set", f"location={tmp_path}/location")
    output = cli.succeed("build", *flags, prefix=prefix)
    assert "overlayfs does not work" in output
    assert sha256(tmp_path / "upper" / "tiny.img") == sha256(tiny.image)


def listing(location: Path, layers: list[str]) -> str:
    """Every path of the finished tree with type, mode, owner, size and content's sum."""
    place = {"location": str(location), "mountpoint": "/mnt/listing", "mode": "root", "overlay": True}
    from tests.agent import Agent

    agent = Agent()
    try:
        request = {
            "place": place,
            "key": f"listing-{hashlib.sha256(bytes(location)).hexdigest()[:8]}",
            "below": layers,
            "step": "listing",
            "script": LISTING,
            "files": {},
            "bootstrap": False,
            "epoch": 0,
            "record": {"step": "listing"},
        }
        agent.call("layer", **request)
    finally:
        agent.close()
    return (location / "logs/listing.log").read_text()


LISTING = r"""
cd "$ROOT"
find . -xdev ! -type d -printf '%p %y %m %U:%G %l\n' -o -printf '%p %y %m %U:%G\n' | LC_ALL=C sort
find . -xdev -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
"""


def test_without_minimize_the_image_is_sealed_too(tiny: Built) -> None:
    flags = (*tiny.flags, "--frozen", "--set", "minimize=false")
    cli.succeed("seal", *flags)

    def absent(*paths: str) -> None:
        for path in paths:
            assert cli.inv("shell", *flags, "--command", f"test -e {path}").returncode == 1, path

    def present(*paths: str) -> None:
        for path in paths:
            assert cli.inv("shell", *flags, "--command", f"test -e {path}").returncode == 0, path

    absent("/usr/sbin/policy-rc.d", "/etc/ssh/ssh_host_ed25519_key", "/var/lib/systemd/random-seed")
    present("/usr/share/man/man1", "/etc/machine-id")
    assert cli.succeed("shell", *flags, "--command", "cat /etc/machine-id") in ("", "uninitialized\n")
    assert cli.succeed("shell", *flags, "--command", "getent shadow root").split(":")[1] in ("*", "!", "!*")


def test_an_interrupt_ends_all_and_says_so(tiny: Built, tmp_path: Path) -> None:
    location = copied_resolution(tiny, tmp_path / "cut")
    child = cli.start("build", *TINY, "--frozen", "--set", f"location={location}")
    wait_for(location, "cache/root/.debootstrap-*.part/tree")
    os.killpg(child.pid, signal.SIGINT)
    said, _ = child.communicate(timeout=LONG)
    assert child.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    leftovers_are_clean(location)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_build_leaves_nothing_and_is_resumed(sign: int, tiny: Built, tmp_path: Path) -> None:
    location = copied_resolution(tiny, tmp_path / "cut")
    child = cli.start("build", *TINY, "--frozen", "--set", f"location={location}")
    wait_for(location, "cache/root/.debootstrap-*.part/tree")
    os.kill(child.pid, sign)
    child.communicate(timeout=LONG)
    assert child.returncode == -sign
    leftovers_are_clean(location)


def wait_for(location: Path, pattern: str) -> None:
    until(lambda: list(location.glob(pattern)), 60, lambda: f"{pattern} never came")


def leftovers_are_clean(location: Path) -> None:
    """No process works there, nothing is mounted, no layer is there by half."""

    def busy() -> list[Path]:
        return [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if mentions(entry, location)]

    until(lambda: not busy(), 30, lambda: f"still there: {busy()}")
    assert str(location) not in Path("/proc/self/mounts").read_text()
    assert not list((location / "cache/root").glob("[!.]*"))
    cli.succeed("clean", *TINY, "--set", f"location={location}")
    assert not list((location / "cache/root").glob(".*"))
    assert not [path for path in location.iterdir() if path.name.startswith(".")]


def mentions(entry: Path, location: Path) -> bool:
    try:
        return str(location).encode() in entry.read_bytes()
    except OSError:
        return False


def test_a_size_too_small_names_one_that_is_enough(tiny: Built, tmp_path: Path) -> None:
    image = tmp_path / "small.img"
    flags = (*tiny.flags, "--frozen", "--set", f"imageloc={image}")
    said = cli.refuse("disk", *flags, "--set", "size=100")
    assert "too small" in said
    assert not list(tmp_path.iterdir())
    enough = next(
        int(word) for word in said.replace("SIZE", " ").replace("=", " ").split()[::-1] if word.isdigit()
    )
    cli.succeed("disk", *flags, "--set", f"size={enough}")
    assert image.stat().st_size == enough << 20
