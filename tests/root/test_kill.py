"""Whatever ends the client or the agent, and whenever: no process, no mount, no half layer."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from build.engine import plan
from build.engine.plan import Step
from tests.agent import Agent, build, layer_request, place
from tests.root.test_layers import BASE, borrowing
from tests.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.waits]

STEPS = [
    BASE,
    Step("slow", 'note started; (while :; do date >"$ROOT/tick"; done) & exec -a "$MARK" sleep 1000'),
]


def ours(mark: str) -> list[str]:
    """Processes of the step: its sleeper carries the mark in argv, its children in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in said:
            found.append(process.name)
    return found


def wait_until_gone(mark: str) -> None:
    until(lambda: not ours(mark), 30, lambda: f"still running: {ours(mark)}")


def start_slow(agent: Agent, location: Path, mark: str) -> None:
    where = place(location)
    build(agent, where, STEPS[:1])
    agent.send("layer", **layer_request(where, plan.layers(STEPS)[1], variables={"MARK": mark}))
    agent.until("note")
    assert ours(mark)


def assert_clean(location: Path, mark: str) -> None:
    wait_until_gone(mark)
    assert str(location) not in Path("/proc/self/mounts").read_text()
    present = [path.name for path in (location / "cache/root").iterdir() if not path.name.startswith(".")]
    assert present == [plan.layers(STEPS)[0].key]
    again = Agent()
    quick = [BASE, Step("slow", "true")]
    assert [answer["state"] for answer in build(again, place(location), quick)] == ["cached", "built"]
    again.call("clean", place=place(location), image="/none", what="parts")
    assert not list((location / "cache/root").glob(".*"))
    assert not [path for path in location.iterdir() if path.name.startswith(".")]
    again.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_program_of_the_tree(how: int, tmp_path: Path) -> None:
    mark = f"mark-{tmp_path.name}-{random.getrandbits(64):x}"
    begin = "(exec -a $1 setsid sleep 1000) & echo >/begun; exec -a $1 sleep 1000"
    script = f"""in_tree bash -c '{begin}' bash "$MARK" &
        until [ -e "$ROOT/begun" ]; do sleep 0.02; done; note begun; wait"""
    agent = Agent()
    (layer,) = plan.layers([borrowing("slow", script)])
    agent.send("layer", **layer_request(place(tmp_path), layer, variables={"MARK": mark}))
    agent.until("note")
    assert ours(mark)
    os.kill(agent.pid, how)
    agent.reap()
    wait_until_gone(mark)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("how", ["client closes", "agent -9", "agent -15", "supervised unshare -9"])
def test_nothing_is_left(how: str, tmp_path: Path) -> None:
    mark = f"mark-{tmp_path.name}-{random.getrandbits(64):x}"
    agent = Agent()
    start_slow(agent, tmp_path, mark)
    if how == "client closes":
        assert agent.process.stdin is not None
        agent.process.stdin.close()
    elif how == "supervised unshare -9":
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        (sandbox,) = (one for one in children if Path(f"/proc/{one}/comm").read_text() == "unshare\n")
        os.kill(int(sandbox), signal.SIGKILL)
        wait_until_gone(mark)
        agent.process.kill()
    else:
        os.kill(agent.pid, signal.SIGKILL if how.endswith("9") else signal.SIGTERM)
    agent.reap()
    assert_clean(tmp_path, mark)


SLOWLY = """
cp /usr/bin/setpriv "$0/real"
printf '#!/bin/sh\nsleep 1\nexec "%s/real" "$@"\n' "$0" >"$0/slow"
chmod 755 "$0/slow"
mount --bind "$0/slow" /usr/bin/setpriv
exec "$@"
"""
"""Runs the rest where a child takes a second before it can ask to die with its parent."""


def test_a_child_that_had_not_quite_begun_does_not_outlive_its_agent(tmp_path: Path) -> None:
    mark = f"mark-{tmp_path.name}-{random.getrandbits(64):x}"
    agent = Agent(["unshare", "--mount", "--propagation", "private", "bash", "-euc", SLOWLY, str(tmp_path)])
    (layer,) = plan.layers([Step("slow", 'exec -a "$MARK" sleep 1000', bootstrap=True)])
    location = tmp_path / "location"
    location.mkdir()
    agent.send("layer", **layer_request(place(location), layer, variables={"MARK": mark}))
    while not ours(f"{location}/.run-"):
        time.sleep(0.01)
    os.kill(agent.pid, signal.SIGKILL)
    agent.reap()
    limit = time.monotonic() + 5
    while time.monotonic() < limit:  # a second late it would begin
        assert not ours(mark)
        time.sleep(0.05)
    assert not ours(str(location))


def test_a_silent_client_counts_as_gone(tmp_path: Path) -> None:
    mark = f"mark-{tmp_path.name}-{random.getrandbits(64):x}"
    agent = Agent(beat=False)
    start_slow(agent, tmp_path, mark)
    agent.reap()  # its stdin stays open: only the silence tells
    assert_clean(tmp_path, mark)


def test_a_client_on_this_machine_may_be_stopped_and_go_on(tmp_path: Path) -> None:
    """As by Ctrl-Z and `fg`, for longer than a client behind a network may be silent."""
    mark = f"mark-{tmp_path.name}-{random.getrandbits(64):x}"
    agent = Agent(beat=False, options=("--local",))
    start_slow(agent, tmp_path, mark)
    time.sleep(12)  # the 10 s of a remote one are over
    assert ours(mark)
    agent.close()
    assert_clean(tmp_path, mark)


def test_kill_at_any_moment_of_a_chain(tmp_path: Path) -> None:
    kill(tmp_path, random.Random(7), 12)


@pytest.mark.soak(80)
def test_kill_at_many_moments_of_a_chain(seed: int, tmp_path: Path) -> None:
    kill(tmp_path, random.Random(seed), 150)


def kill(tmp_path: Path, dice: random.Random, times: int) -> None:
    """Agents die at random moments; each leaves whole layers or none."""
    steps = [
        BASE,
        *(
            Step(f"s{n}", f'head -c 3000000 /dev/urandom >"$ROOT/f{n}"; touch "$ROOT/done{n}"')
            for n in range(5)
        ),
    ]
    layers = plan.layers(steps)
    for _ in range(times):
        agent = Agent()
        for layer in layers:
            agent.send("layer", **layer_request(place(tmp_path), layer))
        time.sleep(dice.uniform(0, 0.4))  # the moment is what varies, nothing waits on it
        os.kill(agent.pid, signal.SIGKILL)
        agent.reap()
    survivor = Agent()
    for layer in layers:
        survivor.call("layer", **layer_request(place(tmp_path), layer))
    survivor.close()
    for number, layer in enumerate(layers[1:]):
        tree = tmp_path / "cache/root" / layer.key / "tree"
        assert (tree / f"done{number}").exists()
        assert (tree / f"f{number}").stat().st_size == 3_000_000
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
