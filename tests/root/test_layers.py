"""Layers in real sandboxes: as root, as an ordinary user, on overlayfs and as copies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build.engine import plan
from build.engine.plan import File, Step
from tests import ordinary
from tests.agent import Agent, Refused, build, layer_request, place

pytestmark = pytest.mark.root

BASE = Step(
    "base",
    """
mkdir -p "$ROOT"/{proc,sys,dev,run,tmp,etc} "$ROOT/d/sub" "$ROOT/gone"
printf one >"$ROOT/etc/x"
touch "$ROOT/d/old" "$ROOT/d/sub/deep" "$ROOT/gone/file"
ln "$ROOT/etc/x" "$ROOT/etc/y"
chown 7:8 "$ROOT/d/old"
progress base 1 2
note "base is made"
""",
    bootstrap=True,
)
EDIT = Step(
    "edit",
    r"""
rm -r "$ROOT/d" "$ROOT/gone"
mkdir "$ROOT/d"
touch "$ROOT/d/new"
cp "$FILES/with 'all'"$'\n'"that bites" "$ROOT/etc/bites"
printf two >"$ROOT/etc/x"
chmod 751 "$ROOT/etc"
""",
    {"with 'all'\nthat bites": File(b"bytes\x00\xff", 0o755)},
)
LISTING = r"find . -mindepth 1 -printf '%p %y %m %U:%G %s;' | tr ';' '\n' | sort | tr '\n' ';'"
LOOK = Step("look", f'cd "$ROOT"; note "$({LISTING})"')


ODD = "-lo'ca\"ti,o:n\\;é?%20$"
"""Name of a folder that most tools would take for more than one word, or less."""


@pytest.fixture(params=["root", "root-copy", "user", "user-copy"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Agent, dict[str, Any]]]:
    """An agent and a place of its own, of each kind."""
    mode, _, copied = str(request.param).partition("-")
    location, tables = tmp_path / ODD, tmp_path / "tables"
    location.mkdir()
    tables.mkdir()
    prefix = []
    if mode == "user":
        os.chown(location, ordinary.UID, ordinary.UID)
        prefix = ordinary.prefix(tables, location)
    agent = Agent(prefix)
    yield agent, place(location, mode, overlay=not copied)
    agent.close()


def merged(agent: Agent, where: dict[str, Any]) -> str:
    return str(build(agent, where, [BASE, EDIT, LOOK])[-1]["notes"][0])


def test_every_kind_gives_the_same_merged_view(somewhere: tuple[Agent, dict[str, Any]]) -> None:
    view = merged(*somewhere)
    paths = {line.split(" ")[0] for line in view.split(";") if line}
    assert "./d/new" in paths
    assert not paths & {"./d/old", "./d/sub", "./gone", "./gone/file"}
    assert "./etc d 751 0:0" in re.sub(r" \d+;", ";", view)
    assert "./etc/bites f" in view
    assert "./etc/x f 644 0:0 3" in view


def test_what_is_finished_is_cached(somewhere: tuple[Agent, dict[str, Any]]) -> None:
    agent, where = somewhere
    assert [answer["state"] for answer in build(agent, where, [BASE, EDIT])] == ["built", "built"]
    assert [answer["state"] for answer in build(agent, where, [BASE, EDIT])] == ["cached", "cached"]
    progress = [event for event in agent.events if event["event"] == "progress"]
    assert progress[0] == {"event": "progress", "label": "base", "done": 1, "total": 2}


def borrowing(name: str, script: str) -> Step:
    """A step in a tree whose programs are the host's."""
    begin = """
mkdir -p "$ROOT"/{proc,sys,dev,run,tmp,usr}
ln -s usr/bin usr/lib usr/lib64 "$ROOT"
mount --bind /usr "$ROOT/usr"
"""
    return Step(name, f'{begin}{script}\numount "$ROOT/usr"\n', bootstrap=True)


def test_programs_of_the_tree_are_not_told_where_the_host_keeps_it(tmp_path: Path) -> None:
    agent, where = Agent(), place(tmp_path)
    try:
        (built,) = build(agent, where, [borrowing("told", "note \"$(in_tree env | tr '\\n' ' ')\"")])
    finally:
        agent.close()
    (told,) = built["notes"]
    assert "SOURCE_DATE_EPOCH=1700000000" in told
    assert str(tmp_path) not in told
    assert where["mountpoint"] not in told


ASTRAY = Step(
    "astray",
    """
ln -s "$OUTSIDE" "$ROOT/link"
for path in "$ROOT/link" "$FILES/program" "$DEBS/new"; do
    ! echo changed >"$path" || fail "$path was changed"
done
echo mine >"$WORK/mine"
echo mine >"$ROOT/mine"
note done
""",
    {"program": File(b"as it was brought")},
)


def test_a_link_of_the_tree_that_a_step_follows_changes_nothing_of_the_host(
    somewhere: tuple[Agent, dict[str, Any]],
) -> None:
    agent, where = somewhere
    outside = Path(where["location"]) / "outside"
    outside.mkdir()
    (outside / "file").write_text("the host's")
    for path in (outside, outside / "file"):
        os.chown(path, ordinary.UID, ordinary.UID)
    variables = {"OUTSIDE": str(outside / "file"), "DEBS": str(outside)}
    for layer in plan.layers([BASE, ASTRAY]):
        told = agent.call("layer", **layer_request(where, layer, variables=variables))
    assert told["notes"] == ["done"]
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("file", "the host's")]


def test_a_failed_step_says_what_and_keeps_the_layers_below(somewhere: tuple[Agent, dict[str, Any]]) -> None:
    agent, where = somewhere
    broken = Step("broken", 'echo "some words"\nfalse "$ROOT"\n')
    with pytest.raises(Refused, match=r"broken failed \(exit 1\): false") as refused:
        build(agent, where, [BASE, broken])
    assert refused.value.event["tail"] == ["some words"]
    assert Path(refused.value.event["log"]).read_text() == "some words\n"
    named = re.search(r"the script lies in (\S+)", refused.value.hint)
    assert named is not None
    assert 'false "$ROOT"' in Path(named[1]).read_text()
    whole = Step("broken", "true")
    assert [answer["state"] for answer in build(agent, where, [BASE, whole])] == ["cached", "built"]


def test_fail_in_a_script_is_the_error_itself(somewhere: tuple[Agent, dict[str, Any]]) -> None:
    agent, where = somewhere
    with pytest.raises(Refused) as refused:
        build(agent, where, [BASE, Step("picky", 'fail "SIZE=1 MiB is too small" "set SIZE to 2"')])
    assert (refused.value.message, refused.value.hint) == ("SIZE=1 MiB is too small", "set SIZE to 2")


def test_clean_removes_parts_then_layers_then_all(somewhere: tuple[Agent, dict[str, Any]]) -> None:
    agent, where = somewhere
    location = Path(where["location"])
    with pytest.raises(Refused):
        build(agent, where, [BASE, EDIT, Step("broken", "mkdir -p $ROOT/a; chown 9:9 $ROOT/a; false")])
    image = str(location / "x.img")
    only = agent.call("clean", place=where, image=image, what="parts", dry_run=True)["removed"]
    assert [Path(row["path"]).name.split("-")[0] for row in only] == [".broken"]
    assert agent.call("clean", place=where, image=image, what="parts")["removed"] == only
    assert agent.call("clean", place=where, image=image, what="parts")["removed"] == []
    keep = plan.layers([BASE])[0].key
    gone = agent.call("clean", place=where, image=image, what="cache", reach=[keep])["removed"]
    assert [Path(row["path"]).name.split("-")[0] for row in gone] == ["edit"]
    assert agent.call("cached", place=where, keys=[keep]) == [keep]
    agent.call("clean", place=where, image=image, what="all")
    assert [path.name for path in location.iterdir()] == ["lock"]


def test_the_cache_is_kept_under_its_limit(somewhere: tuple[Agent, dict[str, Any]]) -> None:
    agent, where = somewhere

    def fat(count: int) -> Step:
        return Step("fat", f'head -c {count} /dev/zero | tr "\\0" x >"$ROOT/fat"')

    for count in (3_000_000, 2_000_000, 1_000_000):
        build(agent, where, [BASE, fat(count)])
    last = plan.layers([BASE, fat(1_000_000)])
    gone = agent.call(
        "clean",
        place=where,
        image="/none",
        what="limit",
        reach=[layer.key for layer in last],
        bytes=3_500_000,
    )
    assert [Path(row["path"]).name for row in gone["removed"]][:1] == [
        plan.layers([BASE, fat(3_000_000)])[1].key
    ]
    assert last[1].key in agent.call("cached", place=where, keys=[layer.key for layer in last])


def test_what_was_not_used_for_longest_goes_first_not_what_is_oldest(
    somewhere: tuple[Agent, dict[str, Any]],
) -> None:
    agent, where = somewhere
    chains = {
        name: plan.layers([BASE, Step(name, 'head -c 1000000 /dev/zero | tr "\\0" x >"$ROOT/fat"')])
        for name in ("first", "second", "third")
    }
    for chain in chains.values():
        for layer in chain:
            agent.call("layer", **layer_request(where, layer))

    def dropped() -> list[str]:
        request = {"place": where, "image": "/none", "what": "limit", "reach": [], "bytes": 2_500_000}
        rows = agent.call("clean", **request, dry_run=True)["removed"]
        return [Path(row["path"]).name.partition("-")[0] for row in rows]

    def ask(name: str, use: bool) -> None:
        keys = [layer.key for layer in chains[name]]
        assert agent.call("cached", place=where, keys=[*keys, "none-0"], use=use) == keys

    ask("first", use=False)
    assert dropped() == ["first"]
    ask("first", use=True)
    assert dropped() == ["second"]


def test_a_mountpoint_may_not_hide_the_location(tmp_path: Path) -> None:
    agent = Agent()
    try:
        with pytest.raises(Refused, match="would hide"):
            build(agent, place(tmp_path, mountpoint=str(tmp_path.parent)), [BASE])
        with pytest.raises(Refused, match="does not exist") as refused:
            build(agent, place(tmp_path, mountpoint="/no-such-place/x"), [BASE])
        assert refused.value.hint == "run: mkdir -p /no-such-place/x"
        assert not Path("/no-such-place").exists()
        inside = place(tmp_path, mountpoint=str(tmp_path / "root"))
        assert build(agent, inside, [BASE])[0]["state"] == "built"
    finally:
        agent.close()


def test_a_second_build_waits_and_says_who_holds_the_lock(tmp_path: Path) -> None:
    first, second = Agent(), Agent()
    where = place(tmp_path)
    build(first, where, [BASE])
    layer = plan.layers([BASE, EDIT])[1]
    second.send("layer", **layer_request(where, layer))
    note = second.until("note")
    assert f"pid {first.pid}" in note["text"]
    assert "in use by" in note["text"]
    first.close()
    assert second.until("result")["value"]["state"] == "built"
    second.close()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    location = tmp_path / "small"
    location.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(location)], check=True)
    agent = Agent()
    try:
        with pytest.raises(Refused, match="the disk is full") as refused:
            build(agent, place(location), [BASE, Step("big", 'head -c 9000000 /dev/zero >"$ROOT/big"')])
        assert "free some space" in refused.value.hint
    finally:
        agent.close()
        subprocess.run(["umount", str(location)], check=True)


def test_keep_shows_the_tree_on_the_host_until_umount(tmp_path: Path) -> None:
    agent = Agent()
    above = Path(f"/mnt/kept-{os.getpid()}")
    where = place(tmp_path, mountpoint=f"{above}/shown")
    build(agent, where, [BASE, EDIT])
    chain = [layer.key for layer in plan.layers([BASE, EDIT])]
    try:
        agent.call("keep", place=where, chain=chain, action="mount")
        assert (above / "shown/d/new").exists()
        with pytest.raises(Refused, match="still mounted"):
            agent.call("clean", place=where, image="/none", what="all")
        with pytest.raises(Refused, match="in use already"):
            agent.call("keep", place=where, chain=chain, action="mount")
        agent.call("keep", place=where, chain=[], action="umount")
        assert not above.exists()
        with pytest.raises(Refused, match="nothing of ours"):
            agent.call("keep", place=where, chain=[], action="umount")
    finally:
        agent.close()


def test_the_host_is_proved_by_a_mount(somewhere: tuple[Agent, dict[str, Any]]) -> None:
    agent, where = somewhere
    assert str(where["mountpoint"]) in agent.call("mount", place=where, chain=[])["mounted"]
    assert not Path(where["mountpoint"]).exists()


Make = Callable[[], Agent]


def test_a_location_that_is_not_writable_is_an_error(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    agent = Agent(ordinary.prefix(tables, tmp_path))
    asked = {"mountpoint": "", "imageloc": "", "imagename": "x", "create": True}
    try:
        with pytest.raises(Refused, match="not writable"):
            agent.call("location", location=str(tmp_path / "mine"), **asked)
    finally:
        agent.close()


def test_a_user_without_sub_ids_is_told_what_to_run(tmp_path: Path) -> None:
    tables, location = tmp_path / "tables", tmp_path / "location"
    tables.mkdir()
    location.mkdir()
    os.chown(location, ordinary.UID, ordinary.UID)
    agent = Agent(ordinary.prefix(tables, location, subids=False))
    try:
        with pytest.raises(Refused, match="no sub-id range") as refused:
            agent.call(
                "location", location=str(location), mountpoint="", imageloc="", imagename="x", create=True
            )
        assert "usermod --add-subuids" in refused.value.hint
    finally:
        agent.close()
        shutil.rmtree(location)
