"""Who may import whom: steps describe, the engine acts, the agent needs the standard library only."""

from __future__ import annotations

import ast
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path

import pytest

import build
from build import wire
from build.agent import verbs
from build.engine.hosts import host
from build.formats import FORMATS

CHECKOUT = Path(__file__).resolve().parents[2]
ENGINE = {"plan", "resolution", "settings", "script", "shell", "render", "overlay"}
COMPRESSORS = {"zlib_ng", "deflate"}
"""Pinned, and shipped beside the agent."""
LOADERS = {"importlib.import_module", "import_module", "__import__"}
STEPS = sorted(
    path
    for path in (CHECKOUT / "build").glob("*/__init__.py")
    if "def step(" in path.read_text(encoding="utf-8")
)
PROGRAMS = sorted(path for step in STEPS for path in step.parent.glob("*.py") if path != step)
"""What steps bring along."""
WIRE = CHECKOUT / "build" / "wire.py"
DEBIAN = CHECKOUT / "build" / "debian.py"
PRINTABLE = CHECKOUT / "build" / "printable.py"
CRC32C = CHECKOUT / "build" / "crc32c.py"
PROBE = CHECKOUT / "build" / "engine" / "hosts" / "probe.py"
"""Goes to a build host as text; the client imports it for the name of a pack alone."""
VERBS = sorted((CHECKOUT / "build" / "verbs").rglob("*.py"))


def imported(source: str) -> set[str]:
    """Dotted names that a module imports; `from a import b` counts as `a.b`.

    Of a name that is put together while it runs, the part that stands there counts; `?` if none does.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS:
            names.add(constant(node.args[0]) or "?")
    return names


def constant(node: ast.expr) -> str:
    """What a string begins with, as far as it stands in the source."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    return str(first.value) if isinstance(first, ast.Constant) else ""


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
    assert not foreign(
        path.read_text(encoding="utf-8"),
        {"build.agent", "build.formats", "build.wire", "build.debian", "build.printable"},
    )


def test_all_that_the_agent_imports_is_shipped_with_it() -> None:
    for path in [path for path in modules("build") if name(path).startswith(host.SHIPPED)]:
        for used in imported(path.read_text(encoding="utf-8")):
            if used.startswith("build.") and (file := file_of(used)) != "build/__init__.py":
                assert file.startswith(host.SHIPPED), f"{name(path)} -> {used}"


LEVELS = (
    (
        *("build/debian.py", "build/inside.py", "build/wire.py", "build/printable.py", "build/crc32c.py"),
        "build/formats/lib",
    ),
    ("build/formats",),
    (
        "build/agent/events.py",
        "build/agent/debian",
        "build/agent/guest",
        "build/agent/rehearsal",
        "build/agent",
    ),
    ("build/agent/verbs",),
    ("build/agent/__main__.py",),
)
"""Whoever stands above may import what stands below, and what stands beside."""
CLIENT = (("build/formats",), ("build/engine",), ("build/verbs",), ("tasks.py",))
"""The same for the client; steps stand beside the engine."""


def level(levels: Iterable[tuple[str, ...]], file: str) -> int:
    """Where a file stands: the longest name that fits counts; -1 for one that is in none."""
    rows = [
        (len(each), number)
        for number, row in enumerate(levels)
        for each in row
        if file == each or file.startswith(f"{each}/")
    ]
    return max(rows, default=(0, -1))[1]


def file_of(dotted: str) -> str:
    """File of ours that an imported name is, or is in; empty when it is none."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[:end])
        for file in (f"{stem}.py", f"{stem}/__init__.py"):
            if (CHECKOUT / file).is_file():
                return file
    return ""


@pytest.mark.parametrize("levels", [LEVELS, CLIENT], ids=["agent", "client"])
def test_no_import_goes_up(levels: tuple[tuple[str, ...], ...]) -> None:
    up = []
    for path in [*modules("build"), CHECKOUT / "tasks.py"]:
        own = level(levels, name(path))
        for used in imported(path.read_text(encoding="utf-8")) if own >= 0 else ():
            if level(levels, file_of(used)) > own:
                up.append(f"{name(path)} -> {used}")
    assert up == []


def test_what_the_client_calls_is_a_verb_there() -> None:
    source = "".join(
        path.read_text(encoding="utf-8") for path in [*modules("build/engine"), *modules("build/verbs")]
    )
    called = set(re.findall(r"""\.(?:call|interact)\(\s*"([a-z_]+)\"""", source))
    asked = {getattr(wire, kind).verb for kind in re.findall(r"\bwire\.(\w+)\(", source) if typed(kind)}
    assert len(called | asked) > 20
    assert called | asked <= verbs.NAMES


def typed(kind: str) -> bool:
    return isinstance(getattr(wire, kind), type) and issubclass(getattr(wire, kind), wire.Request)


@pytest.mark.parametrize("verb", sorted(verbs.NAMES))
def test_every_verb_there_is_asked_in_a_class_of_wire(verb: str) -> None:
    module = verbs.load(verb)
    kind = typing.get_type_hints(getattr(module, "run", None) or module.command)["request"]
    assert kind.__module__ == "build.wire"


REQUESTS = [name for name in vars(wire) if typed(name) and name != "Request"]


@pytest.mark.parametrize("kind", REQUESTS)
def test_both_ends_of_a_verb_have_the_same_types(kind: str) -> None:
    request = getattr(wire, kind)
    hints = typing.get_type_hints(verbs.load(request.verb).run)
    assert (hints["request"], hints["return"]) == (request, wire.result_of(request))


@pytest.mark.parametrize("path", [WIRE, DEBIAN, PRINTABLE, CRC32C], ids=name)
def test_both_ends_can_import_what_they_share(path: Path) -> None:
    assert not foreign(path.read_text(encoding="utf-8"), set())


@pytest.mark.parametrize("path", modules("build/formats"), ids=name)
def test_formats_need_the_compressors_besides(path: Path) -> None:
    assert not foreign(path.read_text(encoding="utf-8"), {"build.formats", "build.crc32c", *COMPRESSORS})


def test_every_format_has_its_row_in_the_docs() -> None:
    told = (CHECKOUT / "docs/formats.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"(?m)^\| `convert\.([a-z0-9-]+)` \|", told)) == sorted(FORMATS)


def test_the_rule_sees_both_compressors() -> None:
    seen = imported((CHECKOUT / "build/formats/lib/codec.py").read_text(encoding="utf-8"))
    assert {used.partition(".")[0] for used in seen} >= COMPRESSORS


@pytest.mark.parametrize("path", [*PROGRAMS, *modules("build/tools")], ids=name)
def test_programs_of_the_sandbox_need_no_more_than_what_is_shipped_with_them(path: Path) -> None:
    assert not foreign(
        path.read_text(encoding="utf-8"), {"build.debian", "build.inside", "build.crc32c", "build.disk"}
    )


@pytest.mark.parametrize("path", STEPS, ids=name)
def test_steps_only_describe(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not foreign(source, {"build.debian", *(f"build.engine.{part}" for part in ENGINE)})
    assert not {"subprocess", "socket", "shutil", "tempfile", "random"} & imported(source)
    assert not [call for call in ("os.system", "os.popen", "os.exec", "os.spawn") if call in source]


def test_every_step_of_the_recipe_is_a_step() -> None:
    assert {path.parent.name.replace("_", "-") for path in STEPS} == {*build.STEPS, "disk"}


@pytest.mark.parametrize("path", VERBS, ids=name)
def test_the_client_side_of_a_verb_runs_nothing(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not {"subprocess", "socket"} & imported(source)
    steps = {f"build.{step.replace('-', '_')}" for step in build.STEPS}
    ours = {"build.engine", "build.formats", "build.verbs", "build.wire", "build.printable", *steps}
    own = {"register.py": {"cs"}, "boot_line.py": {"systemvm"}}
    libraries = {"jinja2", "yaml", *own.get(path.name, ())}
    assert not foreign(source, {*ours, *libraries})


def test_the_client_of_cloudstack_is_imported_by_a_call_only() -> None:
    tree = ast.parse((CHECKOUT / "build/verbs/register.py").read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {used for used in imported(ast.unparse(top)) if used.startswith("cs.")}


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
    apart = path.name in ("venv.py", PROBE.name)
    assert not starts or apart, "commands are run by build.engine.hosts.host"
    if path.name != "ssh.py":
        assert not foreign(
            source, {"build", "invoke", "pydantic", "yaml", "jinja2", "colorama", "tqdm", "passlib"}
        )


def test_the_probe_is_one_file_that_older_pythons_understand_too() -> None:
    """It tells them from one that can run the agent."""
    source = PROBE.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))
    assert imported(source) <= sys.stdlib_module_names - {"__future__"}


@pytest.mark.parametrize("library", ["colorama", "tqdm"])
def test_only_the_console_paints(library: str) -> None:
    users = [
        name(path)
        for path in modules("build")
        if any(used.partition(".")[0] == library for used in imported(path.read_text()))
    ]
    assert users == ["build/engine/console.py"]


def test_ssh_is_imported_by_a_remote_run_only() -> None:
    tree = ast.parse((CHECKOUT / "build/engine/hosts/ssh.py").read_text(encoding="utf-8"))
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
        ("def f():\n  return importlib.import_module('deflate')", {"deflate"}),
        ("importlib.import_module(f'build.agent.{name}')", set()),
        ("importlib.import_module(f'builder.{name}')", {"builder."}),
        ("importlib.import_module(f'{name}.x')", {"?"}),
        ("importlib.import_module(name)", {"?"}),
        ("__import__('yaml')", {"yaml"}),
    ],
)
def test_the_rule_sees_what_it_must(source: str, found: set[str]) -> None:
    assert foreign(source, {"build"}) == found


def test_every_step_has_its_row_in_the_docs() -> None:
    told = (CHECKOUT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `([a-z-]+)` \|", told.partition("| step |")[2].partition("\n\n")[0])
    assert rows == [*build.STEPS, "disk"]
