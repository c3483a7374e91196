"""A copy of the checkout that a test may change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import cli


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the checkout, which the test may change."""
    return copied(tmp_path)


def copied(parent: Path) -> Path:
    """Copy the checkout as git knows it, or would, with this one's Python packages; return the folder."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=cli.CHECKOUT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    folder = parent / "checkout"
    folder.mkdir()
    there = b"\0".join(
        name for name in names.split(b"\0") if name and (cli.CHECKOUT / name.decode()).exists()
    )
    pack = ["tar", "--create", "--null", "--files-from=-"]
    packed = subprocess.run(pack, cwd=cli.CHECKOUT, input=there, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract"], cwd=folder, input=packed, check=True)
    for argv in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *argv], cwd=folder, check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def passes(copy: Path, *tests: str) -> None:
    """Run the rules of the house and these tests in the copy; not the linters: they see little new there."""
    files = [f"tests/{name}" for name in ("golden", "unit/test_hints.py", *tests)]
    argv = [str(copy / ".venv/bin/python"), "-B", "-m", "pytest", "-q", "-m", "not soak", *files]
    argv += ["--ignore=tests/golden/test_lint.py", "--ignore=tests/golden/test_guest.py"]
    argv += ["-k", "not no_text_decides and not checker_of_types"]
    done = subprocess.run(argv, cwd=copy, env=cli.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
