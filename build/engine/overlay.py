"""Files to lay over a tree, as values: what a folder of the checkout holds, and what a step writes itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from build.engine import script
from build.engine.errors import BuildError
from build.engine.plan import File

PROGRAM = Path(__file__).parents[1] / "tools" / "apply_overlay.py"

NOT_IN_AN_IMAGE = ("dev", "proc", "run", "sys", "tmp")
"""Mounted over when the image runs; what lies below would never be seen."""
_LEFT_BEHIND = ("__pycache__", "*.pyc", ".gitkeep", "*~", ".*.swp", ".DS_Store")
"""What Python, editors and git leave in a working copy."""


@dataclass(frozen=True)
class Entry:
    """One file, link or (with neither content nor link) directory of the tree; it will belong to root."""

    content: bytes | None = None
    link: str | None = None
    mode: int = 0o644


def read(folder: Path, modes: Mapping[str, int] | None = None) -> dict[str, Entry]:
    """Read an overlay folder: files with mode 0755 or 0644 after their x-bit, and links as they are.

    `modes` holds exceptions by shell pattern of the path. Folders carry no meaning of their own, as in git.
    Raises BuildError for what no image can hold.
    """
    found: dict[str, Entry] = {}
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _left_behind(name))
        links = [name for name in folders if Path(above, name).is_symlink()]
        for name in sorted([*links, *(name for name in names if not _left_behind(name))]):
            path = Path(above, name)
            inside = str(path.relative_to(folder))
            if inside.split("/")[0] in NOT_IN_AN_IMAGE:
                raise BuildError(
                    f"{str(path)!r} would be hidden when the image runs",
                    "lay it elsewhere; tmpfiles.d can make it at boot",
                )
            found[inside] = _entry(path, inside, modes or {})
    return found


def _left_behind(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _LEFT_BEHIND)


def _entry(path: Path, inside: str, modes: Mapping[str, int]) -> Entry:
    if path.is_symlink():
        return Entry(link=str(path.readlink()))
    if not path.is_file():
        raise BuildError(f"{str(path)!r} is neither a file nor a link", "take it out of the overlay folder")
    special = next((mode for pattern, mode in modes.items() if fnmatchcase(inside, pattern)), None)
    plain = 0o755 if path.stat().st_mode & 0o111 else 0o644
    try:
        return Entry(content=path.read_bytes(), mode=plain if special is None else special)
    except OSError as error:
        raise BuildError(f"cannot read {str(path)!r}: {error.strerror}", "make it readable") from None


def text_file(content: str, mode: int = 0o644) -> Entry:
    """A text file."""
    return Entry(content=content.encode(), mode=mode)


def step_files(entries: Mapping[str, Entry]) -> dict[str, File]:
    """The files of a step whose script calls `apply_overlay`: these entries, in their order."""
    contents = {
        f"tree/{path}": File(entry.content) for path, entry in entries.items() if entry.content is not None
    }
    table = json.dumps([_row(path, entry) for path, entry in entries.items()], indent=1)
    return {**script.bundle(PROGRAM), "table.json": File(table.encode()), **contents}


def _row(path: str, entry: Entry) -> dict[str, object]:
    if entry.link is not None:
        return {"path": path, "link": entry.link}
    row: dict[str, object] = {"path": path, "mode": entry.mode}
    return row if entry.content is None else {**row, "source": path}


def below(entries: Iterable[str], folder: str, suffix: str = "") -> list[str]:
    """Paths of entries right in a folder, with this ending."""
    return [path for path in entries if os.path.dirname(path) == folder and path.endswith(suffix)]
