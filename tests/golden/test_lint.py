"""Every source of the checkout is clean by its linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from build import STEPS

CHECKOUT = Path(__file__).resolve().parents[2]
SHEBANGS = ("#!/bin/sh", "#!/bin/bash", "#!/usr/bin/env bash")


def clean(*argv: str | Path) -> None:
    """Run a linter that must find nothing."""
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def tracked() -> list[Path]:
    """Files that git knows, or would take."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, check=True).stdout.split(b"\0")
    return [path for path in (CHECKOUT / name.decode() for name in names if name) if path.is_file()]


def shell_scripts() -> list[Path]:
    """Files that a shell runs, by their name or first line."""
    return [
        path
        for path in tracked()
        if path.suffix in (".sh", ".bash")
        or path.read_bytes()[:32].startswith(tuple(line.encode() for line in SHEBANGS))
    ]


def test_python_is_clean() -> None:
    clean(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_python_is_formatted() -> None:
    clean(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_types_hold() -> None:
    clean(sys.executable, "-m", "mypy", "tasks.py", "build", "tests", *(CHECKOUT / "bench").glob("*.py"))


def test_a_client_calls_nothing_that_a_mac_lacks() -> None:
    """What a host or the sandbox runs is for Linux; what a client imports of it is not looked into."""
    darwin = ("--platform", "darwin", "--follow-imports", "silent")
    views = (CHECKOUT / "build").glob("*.py")
    steps = (f"build/{name.replace('-', '_')}/__init__.py" for name in (*STEPS, "disk"))
    clean(sys.executable, "-m", "mypy", *darwin, "tasks.py", "build/engine", "build/verbs", *views, *steps)


def test_shell_is_clean() -> None:
    scripts = shell_scripts()
    assert {CHECKOUT / "inv", CHECKOUT / ".ci/run", CHECKOUT / "build/engine/install.sh"} <= set(scripts)
    assert {path.parent.name.replace("_", "-") for path in scripts if path.name == "script.bash"} == {
        *STEPS,
        "disk",
    }
    clean("shellcheck", *(path for path in scripts if path.parent.name != "golden"))
