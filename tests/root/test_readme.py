"""Every command of README and of the pages for a start is run: here on the tiny image, or elsewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import cli
from tests.images import Built

PAGES = (
    "README.md",
    "docs/start.md",
    "docs/appliance.md",
    "docs/settings.md",
    "docs/lock.md",
    "docs/reproducible.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
README = "\n".join((cli.CHECKOUT / page).read_text(encoding="utf-8") for page in PAGES)

ELSEWHERE = {
    "./inv build": "tests/root/test_build.py",
    "./inv verify": "tests/boot/test_system.py",
    "inv verify": "tests/boot/test_system.py",
    "inv boot": "tests/boot/test_system.py",
    "inv build": "tests/root/test_build.py",
    "inv lock": "tests/root/test_lock.py",
    "inv fetch": "tests/root/test_lock.py",
    "inv outdated": "tests/root/test_outdated.py",
    "inv repro": "tests/boot/test_repro.py",
    "inv rehearse": "tests/boot/test_rehearsal.py",
    "inv register": "tests/root/test_register.py",
    "inv -H": "tests/remote/test_builds.py",
    "./inv test": "tests/root/test_rings.py",
    "inv bench": "tests/root/test_errors.py",
    "git clone": "tests/root/test_launcher.py",
    "inv help": "tests/unit/test_cli.py",
    "inv manual": "tests/golden/test_project.py",
}
"""Commands that another test runs, by how they begin."""


def commands() -> list[str]:
    """Lines of the README's indented blocks without their comments."""
    indented = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    lines = [line.partition("  #")[0].strip() for line in indented]
    found = (line for line in lines if re.match(r"(\./)?inv |git clone", line))
    return list(dict.fromkeys(found))


SHOWN = {"params": "redundant_router=1 advert_int=2 ", "render": "    advert_int 2\n"}
"""What the verbs about boot lines print."""


def typed(line: str) -> str:
    """What a line prints that is typed into a shell."""
    shell = f'inv() {{ {shlex.join(cli.INV)} "$@"; }}; {line}'
    done = subprocess.run(
        ["bash", "-euc", shell], cwd=cli.CHECKOUT, env=cli.environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


HERE = [line for line in commands() if not line.startswith(tuple(ELSEWHERE))]


def test_the_readme_opens_with_the_two_commands() -> None:
    assert commands()[:2] == ["./inv build", "./inv verify"]
    for test in ELSEWHERE.values():
        assert (cli.CHECKOUT / test).is_file()


@pytest.mark.parametrize("line", HERE)
def test_a_command_of_the_readme_does_what_it_says(line: str, tiny: Built) -> None:
    _, verb, *rest = line.split()
    own = [] if "--image" in rest else list(tiny.flags[:2])
    if verb in ("params", "render"):
        assert SHOWN[verb] in typed(line)
        return
    if verb == "inspect":
        cli.succeed("convert.ova", *tiny.flags)
        assert "no findings" in cli.succeed(verb, str(tiny.location / "tiny.ova"))
        return
    output = cli.succeed(verb, *rest, *own, "--frozen", *tiny.flags[2:], env={"SYSTEMVM_SIZE": "1024"})
    assert output or verb == "shell"


def test_every_file_that_the_readme_names_is_there() -> None:
    for name in re.findall(r"`((?:docs|config|tests|build|bench)/[\w./-]+)`", README):
        assert "NAME" in name or Path(cli.CHECKOUT, name).exists(), name
