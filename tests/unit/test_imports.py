"""Who may import whom: steps describe, the engine acts, the agent needs the standard library only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import build

CHECKOUT = Path(__file__).resolve().parents[2]
ENGINE = {"plan", "resolution", "settings", "shell", "render", "overlay"}
COMPRESSOR = {"zlib_ng"}
"""Pinned, and shipped beside the agent."""
STEPS = sorted(
    path for path in (CHECKOUT / "build").glob("*.py") if "def step(" in path.read_text(encoding="utf-8")
)
CLIENT = sorted(set((CHECKOUT / "build").glob("*.py")) - set(STEPS))


def imported(source: str) -> set[str]:
    """Dotted names that a module imports; `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def foreign(source: str, allowed: Iterable[str]) -> set[str]:
    """Imports that are neither of the standard library nor below an allowed name."""
    return {
        name
        for name in imported(source)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)
    }


def modules(folder: str) -> list[Path]:
    found = sorted((CHECKOUT / folder).rglob("*.py"))
    assert found, f"{folder} holds no module"
    return found


def name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


@pytest.mark.parametrize("path", modules("build/agent"), ids=name)
def test_the_agent_needs_the_standard_library_only(path: Path) -> None:
    assert not foreign(path.read_text(encoding="utf-8"), {"build.agent", "build.formats"})


@pytest.mark.parametrize("path", modules("build/formats"), ids=name)
def test_formats_need_the_compressor_besides(path: Path) -> None:
    allowed = {"build.agent", "build.formats", *COMPRESSOR}
    assert not foreign(path.read_text(encoding="utf-8"), allowed)


@pytest.mark.parametrize("path", modules("build/tools"), ids=name)
def test_tools_of_the_sandbox_stand_alone(path: Path) -> None:
    assert not foreign(path.read_text(encoding="utf-8"), set())


@pytest.mark.parametrize("path", STEPS, ids=name)
def test_steps_only_describe(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not foreign(source, {f"build.engine.{part}" for part in ENGINE})
    assert not {"subprocess", "socket", "shutil", "tempfile", "random"} & imported(source)
    assert not [call for call in ("os.system", "os.popen", "os.exec", "os.spawn") if call in source]


def test_every_step_of_the_recipe_is_a_step() -> None:
    assert {path.stem for path in STEPS} == {*build.STEPS, "disk"}


@pytest.mark.parametrize("path", CLIENT, ids=name)
def test_the_client_side_of_a_verb_runs_nothing(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not {"subprocess", "socket"} & imported(source)
    steps = {f"build.{step}" for step in build.STEPS}
    assert not foreign(source, {"build.engine", "build.convert", "build.formats", "jinja2", *steps})


@pytest.mark.parametrize("module", ["plan", "shell", "script", "handover", "venv"])
def test_the_ground_of_the_engine_stands_alone(module: str) -> None:
    path = CHECKOUT / "build" / "engine" / f"{module}.py"
    assert not foreign(path.read_text(encoding="utf-8"), {"build.engine.plan", "build.engine.shell"})


def test_the_renderer_needs_jinja2_and_nothing_of_ours() -> None:
    source = (CHECKOUT / "build" / "engine" / "render.py").read_text(encoding="utf-8")
    assert not foreign(source, {"jinja2"})


@pytest.mark.parametrize("path", modules("build/engine"), ids=name)
def test_only_the_host_runs_commands(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    starts = {"subprocess", "os.system", "os.popen"} & imported(source)
    assert not starts or path.name == "venv.py", "commands are run by build.engine.host"
    if path.name != "ssh.py":
        assert not foreign(
            source, {"build", "invoke", "pydantic", "yaml", "jinja2", "colorama", "tqdm", "passlib"}
        )


@pytest.mark.parametrize("library", ["colorama", "tqdm"])
def test_only_the_console_paints(library: str) -> None:
    users = [
        name(path)
        for path in modules("build")
        if any(used.partition(".")[0] == library for used in imported(path.read_text()))
    ]
    assert users == ["build/engine/console.py"]


def test_ssh_is_imported_by_a_remote_run_only() -> None:
    tree = ast.parse((CHECKOUT / "build" / "engine" / "ssh.py").read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {used for used in imported(ast.unparse(top)) if used.startswith(("fabric", "paramiko"))}


def test_the_way_to_the_hand_over_imports_nothing() -> None:
    for path in ("build/__init__.py", "build/engine/__init__.py"):
        assert imported((CHECKOUT / path).read_text(encoding="utf-8")) <= {"__future__.annotations"}
    assert not foreign((CHECKOUT / "build/engine/handover.py").read_text(encoding="utf-8"), set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import yaml", {"yaml"}),
        ("def f():\n  from a.b import c", {"a.b.c"}),
        ("import os.path, json", set()),
    ],
)
def test_the_rule_sees_what_it_must(source: str, found: set[str]) -> None:
    assert foreign(source, {"build"}) == found
