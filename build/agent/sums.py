"""Sums of the files in a folder, for `sha256sum -c` and its like, and texts that are replaced in one go."""

from __future__ import annotations

import contextlib
from pathlib import Path

from build.agent import files

SUMS = {"MD5SUMS": "md5", "SHA256SUMS": "sha256", "SHA512SUMS": "sha512"}
"""Names of the files, and hashlib's of what is in them."""


def replace(path: Path, text: str) -> None:
    """Give a small file its content in one go; leave it alone if it has it."""
    with contextlib.suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    files.write(path, text.encode())


def kept(folder: Path, sums: str, replaced: set[str]) -> dict[str, str]:
    """Lines of a sum file for the files that are still there and stay."""
    try:
        text = (folder / sums).read_text(encoding="utf-8")
    except OSError:
        return {}
    rows = (line.partition("  ") for line in text.splitlines())
    return {
        name: value for value, _, name in rows if name and name not in replaced and (folder / name).exists()
    }


def write(folder: Path, sums: str, lines: dict[str, str]) -> None:
    """Write the lines of a sum file, by file name; without any it goes."""
    if not lines:
        (folder / sums).unlink(missing_ok=True)
        return
    replace(folder / sums, "".join(f"{value}  {name}\n" for name, value in sorted(lines.items())))
