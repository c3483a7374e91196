"""Findings go by code: the table is whole, its page is true, and no text decides anything."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from build import formats
from build.engine import findings
from build.formats.lib import repair
from build.formats.lib.findings import Code, Damage
from build.formats.lib.platforms import TITLES
from tests import cli

CODES = formats.codes()
BUILD = cli.CHECKOUT / "build"
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(BUILD.rglob("*.py"))}
BEHAVIOUR = ("formats_*", "repair", "places")
"""Unit tests of what inspect, repair and convert do."""
ELSEWHERE = {"formats_convert", "formats_outer", "formats_round_trip", "formats_tar", "formats_words"}
"""Those where nothing is decided by a finding."""
SLOW = (
    "in_circles",
    "whole_gib",
    "read_forward",
    "16_tib",
    "broken_files",
    "cut_off_files",
    "noise",
    "fuzzed",
)
"""Large disks and random bytes, which say nothing about texts."""
CHOSEN = {"code", "rule.code", "OTHERS[finding.severity]", "OTHERS[first.severity]"}
"""How codes are called that are chosen while it runs: among those of a table, whose fields are the same."""


def fields(code: Code) -> set[str]:
    texts = (code.text, code.fix, *(text for each in code.affects for text in (each.platform, each.before)))
    return {name for text in texts for _, name, _, _ in Formatter().parse(text) if name}


def test_the_page_is_what_the_codes_say() -> None:
    again = "run: .venv/bin/python -m build.engine.findings"
    assert findings.FILE.read_text(encoding="utf-8") == findings.page(), again


@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.id)
def test_a_row_is_whole(code: Code) -> None:
    group = next(group for group, rows in formats.groups().items() if code.id in rows)
    assert code.id[-3:].isdecimal()
    assert code.text
    assert group.title
    assert code.source or group.source
    assert code.repair in {"", *findings.REPAIRS}
    assert {each.platform for each in code.affects} <= {*TITLES, "{platform}"}
    if isinstance(code, Damage):
        assert (code.severity, code.lossy) == ("error", True)
        assert code.fix
    if code.lossy:
        assert code.severity == "error"
        assert code.repair in ("", repair.REFUSE), "what a new archive fixes loses nothing"
    shown = findings.explain(code.id)
    assert shown.startswith(f"{code.id}: ")
    assert "{" not in shown.replace('{"provider": "libvirt"}', "")


def test_every_action_of_repair_has_a_finding() -> None:
    assert {code.repair for code in CODES.values()} - {""} == {*findings.REPAIRS}


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Every place where something is found."""
    for path, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Finding", "Damaged"):
                yield path, node


def named(path: Path, node: ast.expr) -> list[Code]:
    """The codes that an argument may be; none when it is chosen while it runs."""
    if isinstance(node, ast.IfExp):
        return [*named(path, node.body), *named(path, node.orelse)]
    words = ast.unparse(node)
    if words in CHOSEN:
        return []
    dotted = ".".join(path.relative_to(BUILD.parent).with_suffix("").parts)
    value: Any = importlib.import_module(dotted.removesuffix(".__init__"))
    for word in words.split("."):
        value = getattr(value, word)
    assert isinstance(value, Code), f"{path.name}:{node.lineno}"
    return [value]


def test_what_is_found_is_a_code_with_its_fields() -> None:
    """Texts are made when they are shown: a field that is missing would be told then, and never in a test."""
    seen = 0
    for path, call in calls():
        where = f"{path.relative_to(BUILD)}:{call.lineno}"
        assert len(call.args) == 2, where
        given = {keyword.arg for keyword in call.keywords}
        for code in named(path, call.args[0]):
            seen += 1
            if None not in given:  # else a mapping is passed on
                assert given == fields(code), where
    assert seen > 300


def test_every_code_is_used() -> None:
    used: set[str] = set()
    for source in SOURCES.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
    modules = [module for name, module in sys.modules.items() if name.startswith("build.formats")]
    constants = {
        name: value for module in modules for name, value in vars(module).items() if isinstance(value, Code)
    }
    assert len(constants) > 200
    assert {name for name in constants if name not in used} == set()


WRONG = """\
from build.formats.lib.findings import Code, Damage, Damaged, Finding
from build.formats.lib.platforms import QEMU

ROW = Code("VHD999", "error", "wrong", (QEMU,))
FATAL = Damage("VHD998", "wrong {size}")

Finding(ROW, "byte 0x0")
Finding(ROW, "byte 0x0", size=5, name="x")
Damaged(FATAL, "byte 0x0", size=5)
Finding("error", "byte 0x0")  # wrong
Finding("VHD999", "byte 0x0")  # wrong
Finding(ROW, "byte 0x0", "the text")  # wrong
Finding(ROW, "byte 0x0", size=b"x")  # wrong
Damaged("byte 0x0", "the text")  # wrong
Damaged(ROW, "byte 0x0")  # wrong
Code("VHD999", "fatal", "wrong")  # wrong
Code("VHD999", "error", "wrong", "QEMU")  # wrong
"""


def test_the_checker_of_types_holds_it(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    line = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(tmp_path / "wrong.py")]
    done = subprocess.run(
        [*line, "--cache-dir", str(tmp_path)], cwd=cli.CHECKOUT, capture_output=True, text=True, check=False
    )
    told = {int(row.split(":")[1]) for row in done.stdout.splitlines() if "wrong.py" in row}
    assert told == {number for number, row in enumerate(WRONG.splitlines(), 1) if row.endswith("# wrong")}, (
        done.stdout
    )


@pytest.mark.slow(25, reason="half of the unit ring, in other words")
def test_no_text_decides(tmp_path: Path) -> None:
    """Every finding is said in other words, at random, and all does what it did."""
    found = (path for name in BEHAVIOUR for path in cli.CHECKOUT.glob(f"tests/unit/test_{name}.py"))
    files = sorted(path for path in found if path.stem.removeprefix("test_") not in ELSEWHERE)
    assert len(files) > 14
    line = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "tests.reworded"]
    line += ["-k", " and ".join(f"not {name}" for name in ("in_words", *SLOW))]
    done = subprocess.run(
        [*line, "--basetemp", str(tmp_path / "t"), *map(str, files)],
        cwd=cli.CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(done.stdout.rpartition(" passed")[0].rpartition("\n")[2].split()[-1]) > 400


@pytest.mark.parametrize(("code", "hint"), [("OVA01", "did you mean OVA0"), ("moon", "docs/findings.md")])
def test_an_unknown_code_is_told(code: str, hint: str) -> None:
    done = cli.inv("inspect", "--explain", code)
    assert done.returncode == 2
    assert f"no finding has the code {code!r}" in done.stderr
    assert hint in done.stderr


def test_a_code_is_explained() -> None:
    shown = cli.succeed("inspect", "--explain", "mf005")
    assert shown.startswith("MF005: a blank between ALGORITHM and the bracket\n")
    for text in ("vSphere 6.5 and later", "nextcloud/vm issue 2607", "the manifest is written as"):
        assert text in shown
