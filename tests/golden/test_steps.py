"""What each step runs: its script as it lies, the parameters before it, the programs beside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build import disk, initramfs
from build.engine import recipe, script
from build.engine.plan import Step
from build.engine.resolution import Package, Resolution
from build.engine.settings import Loaded, Settings
from tests import guest

pytestmark = pytest.mark.golden

HERE = Path(__file__).resolve().parent
RESOLUTION = Resolution(
    (
        Package("apt", "2.6~1", "amd64", "a" * 64, 1, "http://x.example/a.deb", True),
        Package("tool", "1:1+b2", "all", "b" * 64, 1, "http://x.example/b.deb"),
    ),
    1_700_000_000,
    2,
    "http://x.example/debian",
)
LIVE = ("vrrp.enabled=true", "vrrp.auth_pass=12345678", "vrrp.addresses=[10.1.1.1/24]")
DEFINITIONS = {
    "systemvm": guest.definition("systemvm", *LIVE),
    "tiny": guest.definition("tiny"),
    "i386": Loaded(Settings(arch="i386", bootstrap="debootstrap", minimize=False), {}, Path("x.yaml")),
    "uefi": Loaded(Settings(firmware=("uefi",)), {}, Path("x.yaml")),
}


def steps(name: str) -> list[Step]:
    """Every step of an image definition, the disk last."""
    return [*recipe.steps(DEFINITIONS[name], RESOLUTION), disk.step(DEFINITIONS[name], RESOLUTION)]


def own(step: Step) -> str:
    """The script in the step's folder."""
    return (guest.CHECKOUT / "build" / step.name.replace("-", "_") / "script.bash").read_text()


@pytest.mark.parametrize("golden", sorted(HERE.glob("*.bash")), ids=lambda golden: golden.stem)
def test_the_parameters_are_the_golden_ones(golden: Path) -> None:
    """Those of the first definition, and where others differ; `GOLDEN=write` writes them anew, to be read."""
    told, first = "", dict[str, str]()
    for name in DEFINITIONS:
        (step,) = [step for step in steps(name) if step.name == golden.stem]
        assert step.script.endswith(own(step))
        values = parameters(step.script.removesuffix(own(step)))
        first = first or values
        assert set(values) == set(first)
        differ = [text for key, text in values.items() if values is first or text != first[key]]
        told += f"# {name}\n{''.join(differ)}"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(told, encoding="utf-8")
    assert told == golden.read_text(encoding="utf-8")


def parameters(head: str) -> dict[str, str]:
    """Return the lines of each assignment before a script, by the parameter's name."""
    assignment = re.compile(r"^[A-Z_]+=(?:[^\n]*\(\n(?:    .*\n)+\)|.*)\n", re.M)
    texts = assignment.findall(head)
    assert "".join(texts) == head
    return {text.partition("=")[0]: text for text in texts}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_parameter_is_used_and_the_whole_is_clean(name: str, tmp_path: Path) -> None:
    """SC1128: the shebang by which each part is linted alone."""
    for step in steps(name):
        (tmp_path / step.name).write_text(script.render(step.script))
    argv = ["shellcheck", "-s", "bash", "-e", "SC1128", *map(str, tmp_path.iterdir())]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", ""),
        ("a b", "'a b'"),
        (3, "3"),
        (True, "yes"),
        (False, ""),
        ((), "()"),
        (("a", "b c"), "(a 'b c')"),
        (("x" * 60, "y" * 60), f"(\n    {'x' * 60}\n    {'y' * 60}\n)"),
    ],
)
def test_bash_reads_a_parameter_as_it_was_meant(value: script.Parameter, text: str, tmp_path: Path) -> None:
    (tmp_path / "script.bash").write_text('printf "<%s>" "${X[@]}"\n')
    told = script.of(str(tmp_path / "__init__.py"), x=value)
    assert told.startswith(f"X={text}\n")
    shown = subprocess.run(["bash", "-uc", told], capture_output=True, text=True, check=True).stdout
    words = value if isinstance(value, tuple) else ["yes" if value is True else str(value or "")]
    assert shown == ("".join(f"<{word}>" for word in words) or "<>")


def test_the_hook_is_clean(tmp_path: Path) -> None:
    file = tmp_path / "hook"
    file.write_bytes(initramfs.step(DEFINITIONS["tiny"], RESOLUTION).files["hook"].content)
    # SC1091: what it includes lies in the image.
    argv = ["shellcheck", "-e", "SC1091", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("step", steps("systemvm"), ids=lambda step: step.name)
def test_what_programs_share_comes_with_them(step: Step, tmp_path: Path) -> None:
    """Debian's python3-build, where a host has it, must not be taken for ours."""
    for name, file in step.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
    for program in sorted(tmp_path.glob("*.py")):
        assert re.search(rf"\b{program.stem}\b", step.script)
        look = f"import runpy; runpy.run_path({str(program)!r}, run_name='looked at'); import sys; " + (
            "shared = sys.modules.get('build.debian'); print(shared and shared.__file__)"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", look], cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        shared = "from build import debian" in program.read_text()
        assert done.stdout == (f"{tmp_path}/build/debian.py\n" if shared else "None\n")
