"""Containers: what is decided without starting one."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.agent.events import Failure
from build.agent.guest import cgroup_keeper, container, container_init
from build.agent.sandbox import BuildPaths

GROUPS = [Path("/cg/user.slice/session-1.scope"), Path("/cg/user.slice"), Path("/cg"), Path("/other/top")]
SPEC = container.Spec(BuildPaths(Path("/images"), Path("/images/mnt"), "root", True), ("base-1", "seal-2"))


@pytest.mark.parametrize(("mode", "parent"), [("root", "/cg"), ("user", "/cg/user.slice/session-1.scope")])
def test_roots_groups_lie_at_the_top_and_a_users_in_his_own(mode: str, parent: str) -> None:
    assert cgroup_keeper.parent(GROUPS, mode) == Path(parent)


def test_no_group_to_make_one_in() -> None:
    with pytest.raises(ValueError, match="not enough values"):
        cgroup_keeper.parent([], "root")


@pytest.mark.parametrize(
    ("own", "given"),
    [
        ("         0          0 4294967295\n", "0 0 4294967295\n"),
        ("0 1000 1\n1 100000 65536\n", "0 0 1\n1 1 65536\n"),
    ],
    ids=["root", "an ordinary user"],
)
def test_a_container_has_the_ids_that_we_have(own: str, given: str) -> None:
    assert container_init.identity(own) == given


def test_a_nic_is_a_cable_whose_other_end_may_have_addresses() -> None:
    nic = {"mac": "02:00:00:00:00:01", "outside": ["169.254.0.1/16", "fd00::1/64"]}
    assert container_init.link(2, nic, 77) == [
        "link add name out2 type veth peer name eth2 address 02:00:00:00:00:01 netns 77",
        "address add 169.254.0.1/16 dev out2",
        "address add fd00::1/64 dev out2",
        "link set out2 up",
    ]
    assert container_init.link(0, {"mac": "", "outside": []}, 77) == [
        "link add name out0 type veth peer name eth0 netns 77",
        "link set out0 up",
    ]


def test_the_tree_is_mounted_below_a_layer_in_memory() -> None:
    lines = container.body(SPEC, (3, 4)).splitlines()
    tmpfs = next(number for number, line in enumerate(lines) if line.startswith("mount -t tmpfs"))
    (overlay,) = [number for number, line in enumerate(lines) if line.startswith("mount -t overlay")]
    assert tmpfs < overlay
    assert "lowerdir=seal-2/tree:base-1/tree,upperdir=.container/upper" in lines[overlay]
    assert lines[-1].endswith("container_init.py 3 4")


@pytest.mark.parametrize("message", [b"", b'{"error": "no way"}'])
def test_without_a_group_there_is_no_container(message: bytes) -> None:
    with pytest.raises(Failure) as failure:
        container._groups(message, ())
    assert failure.value.message.startswith("no control group for a container: ")
    assert failure.value.hint
