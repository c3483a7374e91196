"""Which tests run as whom, and what is said of their end."""

from __future__ import annotations

import pytest

from build.engine import rings
from build.engine.rings import Part

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
