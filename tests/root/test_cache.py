"""A layer that is not what was made is never used: after a power cut, a cut-off removal, or rot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build.agent import files
from build.engine import plan
from build.engine.plan import Step
from tests import cli, ordinary
from tests.agent import Agent, Refused, build, place
from tests.images import Built
from tests.root.test_layers import BASE, EDIT
from tests.waiting import Deadline, until

pytestmark = pytest.mark.root

WIDE = Step("wide", 'cd "$ROOT"; mkdir {1..4000}; touch {1..4000}/f', bootstrap=True)
STEPS = [BASE, EDIT]
BELOW, TOP = (layer.key for layer in plan.layers(STEPS))


@pytest.fixture(params=["root", "user"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], tuple[Agent, Any]]]:
    """Agents of one user, one after another, with a LOCATION of his."""
    location, tables = tmp_path / "location", tmp_path / "tables"
    location.mkdir()
    tables.mkdir()
    prefix = []
    if request.param == "user":
        os.chown(location, ordinary.UID, ordinary.UID)
        prefix = ordinary.prefix(tables, location)
    agents = []

    def begin() -> tuple[Agent, Any]:
        agents.append(Agent(prefix))
        return agents[-1], place(location, request.param)

    yield begin
    for agent in agents:
        agent.close()


def layer(where: dict[str, Any], key: str) -> Path:
    return Path(where["location"], "cache", where["mode"], key)


def settled(where: dict[str, Any], *keys: str) -> None:
    """Wait until layers are on the disk and listed."""
    until(lambda: all((layer(where, key) / "content").exists() for key in keys))


def usable(agent: Agent, where: dict[str, Any], **more: Any) -> list[str]:
    """Keys that the agent lets be built on, for a disk that is not there."""
    found: list[str] = agent.call("cached", place=where, keys=[BELOW, TOP], use=True, disk="x", **more)
    return found


def other_boot(where: dict[str, Any], key: str) -> None:
    """Make a layer's record that of a kernel that is gone."""
    file = layer(where, key) / "layer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot": "another"}))


def test_a_layer_outlives_its_boot_only_once_it_is_on_the_disk(host: Any) -> None:
    agent, where = host()
    build(agent, where, STEPS)
    settled(where, BELOW, TOP)
    for key in (BELOW, TOP):
        other_boot(where, key)
    agent.close()
    agent, where = host()
    assert usable(agent, where) == [BELOW, TOP]
    (layer(where, TOP) / "synced").unlink()
    assert usable(agent, where) == [BELOW]
    assert [answer["state"] for answer in build(agent, where, STEPS)] == ["cached", "built"]


def test_a_layer_that_is_removed_and_made_again_is_brought_to_the_disk_again(host: Any) -> None:
    agent, where = host()
    build(agent, where, STEPS)
    agent.call("clean", place=where, image="/none", what="cache", reach=[BELOW])
    assert [answer["state"] for answer in build(agent, where, STEPS)] == ["cached", "built"]
    settled(where, BELOW, TOP)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "x"}'])
def test_a_record_that_cannot_be_read_is_no_layer(host: Any, content: str) -> None:
    agent, where = host()
    build(agent, where, STEPS)
    settled(where, BELOW, TOP)
    (layer(where, TOP) / "layer.json").write_text(content)
    assert usable(agent, where) == [BELOW]
    assert agent.call("records", place=where, step="edit") == []
    assert [answer["state"] for answer in build(agent, where, STEPS)] == ["cached", "built"]


def _remove(tree: Path) -> None:
    shutil.rmtree(tree / "gone")


def _empty(tree: Path) -> None:
    os.truncate(tree / "etc/x", 0)


def _add(tree: Path) -> None:
    (tree / "etc/more").touch()


def _lay_open(tree: Path) -> None:
    (tree / "etc/x").chmod(0o4755)


def _give_away(tree: Path) -> None:
    os.chown(tree / "d/old", 9, 9)


@pytest.mark.parametrize("harm", [_remove, _empty, _add, _lay_open, _give_away])
def test_a_layer_that_was_changed_is_made_again(host: Any, harm: Callable[[Path], None]) -> None:
    agent, where = host()
    build(agent, where, STEPS)
    settled(where, BELOW, TOP)
    agent.close()
    harm(layer(where, BELOW) / "tree")
    agent, where = host()
    assert usable(agent, where) == [TOP]
    (told,) = (event["text"] for event in agent.events if event["event"] == "note")
    assert told.startswith(f"{BELOW} is built again: ")
    assert [answer["state"] for answer in build(agent, where, STEPS)] == ["built", "cached"]


def test_a_step_is_not_built_on_a_changed_layer(host: Any) -> None:
    """As without a client (--detach), where nobody looked before."""
    agent, where = host()
    build(agent, where, [BASE])
    agent.close()
    _empty(layer(where, BELOW) / "tree")
    agent, where = host()
    with pytest.raises(
        Refused, match=rf"layer {BELOW} cannot be used: entries of it were changed / run: inv"
    ):
        build(agent, where, STEPS)
    assert [answer["state"] for answer in build(agent, where, STEPS)] == ["built", "built"]


def test_nothing_is_looked_into_where_nothing_is_to_be_done(host: Any, tmp_path: Path) -> None:
    agent, where = host()
    build(agent, where, STEPS)
    settled(where, BELOW, TOP)
    agent.close()
    _empty(layer(where, BELOW) / "tree")
    agent, where = host()
    keys = [BELOW, TOP]
    assert agent.call("cached", place=where, keys=keys, use=True) == keys
    assert agent.call("cached", place=where, keys=keys) == keys


def flip(file: Path) -> None:
    """Change a byte as a disk that rots does: no time, no size tells."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_reading_in_full_finds_a_flipped_bit(host: Any) -> None:
    agent, where = host()
    build(agent, where, STEPS)
    settled(where, BELOW, TOP)
    agent.close()
    flip(layer(where, BELOW) / "tree/etc/x")
    agent, where = host()
    assert usable(agent, where) == [BELOW, TOP]
    rows = {row["name"]: (row["ok"], row["value"]) for row in agent.call("audit", place=where)}
    assert rows == {
        BELOW: (False, "taken out of use: changed: /etc/x, /etc/y"),
        TOP: (True, "as it was made"),
    }
    assert [answer["state"] for answer in build(agent, where, STEPS)] == ["built", "cached"]


def whole(where: dict[str, Any], key: str) -> bool:
    found = layer(where, key)
    return not found.exists() or len(list((found / "tree").iterdir())) == 4000


@pytest.mark.slow(40, reason="layers so wide that a removal can be caught in the midst")
def test_what_a_removal_leaves_behind_is_no_layer(tmp_path: Path) -> None:
    (only,) = plan.layers([WIDE])
    where = place(tmp_path)
    for moment in (0.0, 0.01, 0.1):
        agent = Agent()
        build(agent, where, [WIDE])
        agent.send("clean", place=where, image="/none", what="cache", reach=[])
        deadline = Deadline(30)
        while layer(where, only.key).exists() and not deadline.over():
            pass
        time.sleep(moment)
        os.kill(agent.pid, signal.SIGKILL)
        agent.reap()
        assert whole(where, only.key)
        again = Agent()
        assert [answer["state"] for answer in build(again, where, [WIDE])] == ["built"]
        assert whole(where, only.key)
        again.call("clean", place=where, image="/none", what="parts")
        assert [path.name for path in Path(tmp_path, "cache/root").iterdir()] == [only.key]
        again.call("clean", place=where, image="/none", what="cache", reach=[])
        again.close()


def locate(agent: Agent, location: Path) -> Any:
    return agent.call(
        "location", location=str(location), mountpoint="", imageloc="", imagename="x", create=True
    )


def test_layers_logs_and_jobs_are_for_our_eyes_only(tmp_path: Path) -> None:
    location = tmp_path / "location"
    for name in ("cache", "logs", "jobs"):  # as an older version made them
        (location / name).mkdir(parents=True)
        (location / name).chmod(0o755)
    agent = Agent()
    locate(agent, location)
    build(agent, place(location), STEPS)
    agent.close()
    modes = {name: stat.S_IMODE((location / name).stat().st_mode) for name in ("cache", "logs", "jobs")}
    assert modes == dict.fromkeys(modes, 0o700)
    peek = ["setpriv", "--reuid", "65534", "--clear-groups", "ls", str(location / "cache/root")]
    location.chmod(0o755)
    assert os.spawnvp(os.P_WAIT, peek[0], peek) != 0


@pytest.mark.parametrize(
    ("owner", "mode", "above", "said"),
    [
        (54321, 0o755, 0o755, "belongs to"),
        (0, 0o777, 0o755, "others may write to"),
        (0, 0o1777, 0o755, "others may write to"),
        (0, 0o755, 0o777, "others may write to"),
    ],
)
def test_a_location_that_others_can_touch_is_refused(
    tmp_path: Path, owner: int, mode: int, above: int, said: str
) -> None:
    location = tmp_path / "above" / "location"
    location.mkdir(parents=True)
    canary = tmp_path / "canary"
    canary.write_text("precious")
    (location / "lock").symlink_to(canary)
    os.chown(location, owner, owner)
    location.chmod(mode)
    location.parent.chmod(above)
    agent = Agent()
    with pytest.raises(Refused, match=said) as refused:
        locate(agent, location)
    agent.close()
    assert "SYSTEMVM_LOCATION" in refused.value.hint
    assert canary.read_text() == "precious"


def test_a_location_of_ours_in_a_sticky_folder_is_fine(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    agent = Agent()
    assert locate(agent, shared / "location")["place"]["location"] == str(shared / "location")
    agent.close()


def test_a_link_for_a_lock_empties_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("precious")
    (tmp_path / "lock").symlink_to(canary)
    agent = Agent()
    with pytest.raises(Refused, match="lock"):
        build(agent, place(tmp_path), STEPS)
    agent.close()
    assert canary.read_text() == "precious"


def test_the_next_build_sweeps_what_has_no_owner(tmp_path: Path) -> None:
    left, young = tmp_path / ".run-left", tmp_path / ".probe-young"
    nameless = [tmp_path / ".debs.0123abcd.part", tmp_path / "cache/root/.tweak-key.89abcdef.part"]
    making = tmp_path / ".tiny.img.part"
    for folder in (left, young, making, *nameless):
        (folder / "deep").mkdir(parents=True)
    long_ago = time.time() - 1000
    os.utime(left, (long_ago, long_ago))
    with files.scratch(tmp_path, ".probe-") as mine:
        os.utime(mine, (long_ago, long_ago))
        agent = Agent()
        locate(agent, tmp_path)
        agent.close()
        assert mine.is_dir()
    assert not left.exists()
    assert young.exists()
    assert making.exists()
    assert not any(folder.exists() for folder in nameless)


def test_an_image_of_rebuilt_layers_is_the_same(tiny: Built) -> None:
    """One damaged layer amid a real build: told, made again, and the same bytes come out."""
    sums = tiny.image.with_name("tiny.img.sha256")
    before = sums.read_text()
    (key,) = (key for key in tiny.manifest["layers"] if key.startswith("tweak-"))
    found = tiny.location / "cache/root" / key
    shutil.rmtree(found / "tree/etc/systemd")
    tiny.image.unlink()
    shown = cli.succeed("build", *tiny.definition, "--frozen", "--set", f"location={tiny.location}")
    assert f"{found.name} is built again: " in shown
    assert sums.read_text() == before
