"""A new step is one folder, one word in STEPS and one row in the docs: done to a copy of the tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cli
from tests.checkout import copy as copy
from tests.checkout import passes, replace
from tests.images import TINY, Built, link

pytestmark = pytest.mark.root

MODULE = '''"""Write the message of the day."""

from __future__ import annotations

from build.engine import script
from build.engine.plan import Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the layer with /etc/motd."""
    text = script.of(__file__, text=f"This is {loaded.settings.hostname}.")
    return Step("motd", text, script.programs(__file__))
'''
SCRIPT = """\
#!/bin/bash
# Parameters: TEXT
"$PYTHON" -I "$FILES/motd.py" "$ROOT/etc/motd" "$TEXT"
note "$(in_tree cat /etc/motd)"
"""
PROGRAM = '''"""Write a line into a file: `motd.py FILE TEXT`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(f"{sys.argv[2]}\\n")
'''


@pytest.mark.slow(30, reason="tests in a copy of the checkout")
def test_a_step_is_a_folder_a_word_and_a_row(copy: Path, tiny: Built, tmp_path: Path) -> None:
    step = copy / "build/motd"
    step.mkdir()
    (step / "__init__.py").write_text(MODULE)
    (step / "script.bash").write_text(SCRIPT)
    (step / "motd.py").write_text(PROGRAM)
    replace(copy / "build/__init__.py", '"tweak", ', '"tweak", "motd", ')
    replace(copy / "docs/design.md", "| `minimize` |", "| `motd` | writes /etc/motd |\n| `minimize` |")

    link(tiny.location, tmp_path / "location")
    flags = (*TINY, "--frozen", "--set", f"location={tmp_path / 'location'}")
    assert "Write the message of the day." in cli.succeed("--list", checkout=copy)
    told = cli.states(cli.succeed("motd", *flags, checkout=copy))
    assert told == {**dict.fromkeys(["debootstrap", "initramfs", "tweak"], "cached"), "motd": "built"}
    shown = cli.succeed("shell", "--at", "motd", "--command", "cat /etc/motd", *flags, checkout=copy)
    assert shown == "This is tiny.\n"
    rows = cli.succeed("plan", *flags, checkout=copy).splitlines()
    assert [row.split()[0] for row in rows][3:5] == ["tweak", "motd"]
    cli.succeed("clean", "--all", *flags, checkout=copy)

    passes(copy, "unit/test_imports.py", "unit/test_setup.py", "unit/test_guest_guide.py")
