"""Which tests run as whom, and what is said of their end."""

from __future__ import annotations

import pytest

from build.engine import rings
from build.engine.errors import BuildError
from build.engine.rings import Part
from tests.soak import slice_of

BY_SUDO = Part(("root", "remote"), ["sudo"], True)
OWN = Part(("unit", "golden", "boot"), ["python"], False)


def chosen(ring: str, uid: int) -> list[tuple[bool, list[str]]]:
    parts = rings.parts(ring, "", uid, 2, {"PATH": "/bin"})
    return [(part.sudo, [word for word in part.line if word.startswith("tests/")]) for part in parts]


def test_an_ordinary_user_s_tests_begin_with_those_that_need_root() -> None:
    assert chosen("", 0) == [(False, [f"tests/{ring}" for ring in rings.RINGS])]
    assert chosen("root", 0) == [(False, ["tests/root"])]
    assert chosen("", 1000) == [
        (True, ["tests/root", "tests/remote"]),
        (False, ["tests/unit", "tests/golden", "tests/boot"]),
    ]
    assert chosen("boot", 1000) == [(False, ["tests/boot"])]
    assert chosen("remote", 1000) == [(True, ["tests/remote"])]
    for part in rings.parts("", "disk", 1000, 2):
        assert part.line[part.line.index("-k") + 1] == "disk"
        assert (part.line[0] == "sudo") is part.sudo


def test_long_cases_run_only_where_they_are_asked_for() -> None:
    for ring in ("", *rings.RINGS):
        for part in rings.parts(ring, "", 1000, 2):
            assert part.line[part.line.index("-m", part.line.index("pytest")) + 1] == "not soak"
    assert chosen(rings.SOAK, 0) == [(False, [f"tests/{ring}" for ring in rings.RINGS])]
    assert [sudo for sudo, _ in chosen(rings.SOAK, 1000)] == [True, False]
    for part in rings.parts(rings.SOAK, "", 1000, 2, soak=rings.Slice(180, 7)):
        assert part.line[part.line.index("-m", part.line.index("pytest")) + 1] == "soak"
        assert {"--soak-seconds=180", "--soak-seed=7"} <= set(part.line)
    (part,) = rings.parts(rings.SOAK, "", 0, 2)
    assert not any(word.startswith("--soak-seconds") for word in part.line)


def test_a_slice_is_one_of_the_soak_ring() -> None:
    assert rings.slice_for("soak", "180", "7") == rings.Slice(180, 7)
    assert rings.slice_for("soak", "180", "7").flags == "--seconds 180 --seed 7"
    assert rings.slice_for("soak", "", "7").flags == "--seed 7"
    assert len({rings.slice_for("soak", "180", "") for _ in range(9)}) > 1
    assert rings.slice_for("", "", "").seconds == 0
    for ring, seconds, seed in (("", "180", ""), ("soak", "much", ""), ("unit", "", "1"), ("soak", "", "-1")):
        with pytest.raises(BuildError) as caught:
            rings.slice_for(ring, seconds, seed)
        assert "write --ring soak" in caught.value.hint


def test_a_slice_fits_its_time_and_is_the_same_for_the_same_seed() -> None:
    costs = {f"case {number}": 10 * number for number in range(1, 30)}
    slices = [slice_of(costs, 180, seed) for seed in range(400)]
    assert slices == [slice_of(costs, 180, seed) for seed in range(400)]
    for one in slices:
        left = 180 - sum(costs[name] for name in one)
        assert left >= 0
        assert all(costs[name] > left for name in costs.keys() - set(one))
    assert {name for one in slices for name in one} == {name for name in costs if costs[name] <= 180}
    assert slice_of(costs, 9, 1) == []


def test_sudo_keeps_the_way_to_the_network_and_no_argument_tells_it() -> None:
    line = rings.sudo({"PATH": "/bin", "https_proxy": "http://me:secret@proxy", "PIP_INDEX_URL": "x"})
    assert line[:3] == ["sudo", "--preserve-env=https_proxy,PIP_INDEX_URL", "--"]
    assert "secret" not in " ".join(line)
    assert rings.sudo({"PATH": "/bin", "EDITOR": "ed"})[:2] == ["sudo", "--"]


@pytest.mark.parametrize(
    ("ended", "means"),
    [(0, 0), (65, 1), (69, 5), (66, 2), (64 + 137, 137), (1, None), (126, None), (127, None)],
)
def test_sudo_s_own_end_is_told_from_pytest_s(ended: int, means: int | None) -> None:
    assert rings.status(BY_SUDO, ended) == means
    assert rings.status(OWN, ended) == ended


@pytest.mark.parametrize("ended", [-2, 130])
def test_an_interrupt_is_one_whoever_ends_with_it(ended: int) -> None:
    assert rings.status(BY_SUDO, ended) == rings.status(OWN, ended) == 2


@pytest.mark.parametrize(
    ("root", "own", "code", "what"),
    [
        (0, 0, None, ""),
        (5, 0, None, ""),
        (0, 5, None, ""),
        (5, 5, 5, "no test matches 'disk'"),
        (0, 1, 1, "tests failed (root, remote: passed; unit, golden, boot: failed)"),
        (3, 0, 3, "tests failed (root, remote: failed; unit, golden, boot: passed)"),
        (None, 0, 1, "tests failed (root, remote: not run, sudo refused; unit, golden, boot: passed)"),
        (None, 4, 4, "tests failed (root, remote: not run, sudo refused; unit, golden, boot: failed)"),
        (None, 5, 1, "tests failed (root, remote: not run, sudo refused; unit, golden, boot: none chosen)"),
    ],
)
def test_the_end_names_what_ran(root: int | None, own: int | None, code: int | None, what: str) -> None:
    error = rings.verdict([(BY_SUDO, root), (OWN, own)], "disk")
    assert (error and (error.code, error.what)) == ((code, what) if what else None)
    if error and root is None:
        assert "--ring root and --ring remote as root" in error.hint
