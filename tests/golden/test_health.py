"""The shell lines that ask a system VM how it is, run here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from build.agent.rehearsal import health

TAKEN = "error: destination /var/log/error.log-20261126.gz already exists, skipping rotation"


@pytest.mark.parametrize(
    ("said", "status", "faults"),
    [
        ("", 0, []),
        (TAKEN, 1, []),
        ("error: duplicate log entry", 1, ["error: duplicate log entry", "status 1"]),
        (f"{TAKEN}\nerror: stat failed", 1, ["error: stat failed"]),
        ("", 3, ["status 3"]),
    ],
)
def test_a_name_that_the_day_has_taken_is_no_fault(
    said: str, status: int, faults: list[str], tmp_path: Path
) -> None:
    tool = tmp_path / "logrotate"
    tool.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit {status}\n")
    tool.chmod(0o755)
    asked = health.QUESTIONS["logrotate -f"]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", asked], env=env, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line] == faults


def test_a_deleted_file_is_a_fault_and_one_that_never_had_a_name_is_none(tmp_path: Path) -> None:
    deleted, unnamed = tmp_path / "was here", os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    with deleted.open("w"):
        deleted.unlink()
        asked = health.QUESTIONS["deleted files held open"]
        done = subprocess.run(["sh", "-c", asked], capture_output=True, text=True, check=False)
    os.close(unnamed)
    ours = [line for line in done.stdout.splitlines() if str(tmp_path) in line]
    assert [line.rpartition(": ")[2] for line in ours] == [f"{deleted} (deleted)"]
