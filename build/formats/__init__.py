"""Disk image formats: every module here is one, and says all of it in its FORMATS.

They run on the build host, too: standard library beside the pinned compressors.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from build.formats.lib.format import HEAD, Format, Kind
from build.formats.lib.reader import BoundedReader


def _rows() -> Iterator[Format]:
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            rows: tuple[Format, ...] = importlib.import_module(f"build.formats.{module.name}").FORMATS
            yield from rows


FORMATS: Mapping[str, Format] = {row.name: row for row in _rows()}
"""By name."""
KINDS: Mapping[str, Kind] = {row.kind.name: row.kind for row in FORMATS.values()}
"""By name; fewer than formats, as some share one."""


def recognize(reader: BoundedReader) -> Kind:
    """The kind that a file is of, by its head or its end; raw when nobody knows it."""
    head = reader.read(0, min(reader.size, HEAD))
    return max(KINDS.values(), key=lambda kind: kind.recognize(reader, head))
