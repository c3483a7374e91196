"""Small files: old or new, never half, and nothing is left beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from build.agent import files


def test_a_file_is_written_whole_and_anybody_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "made/x.json"
    for data in (b"old and longer", b"new"):
        files.write(file, data)
        assert file.read_bytes() == data
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "x"
    files.write(file, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_read_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\xffb\n")
    assert files.read(tmp_path / "x") == "a\N{REPLACEMENT CHARACTER}b\n"
    assert files.read(tmp_path / "none") == files.read(tmp_path) == ""
