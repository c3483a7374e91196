"""Disk image formats: every module here is one, and says all of it in its KIND (or KINDS) and its FORMATS.

They run on the build host, too: standard library beside the pinned compressors.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from build.formats import lib
from build.formats.lib.findings import Code, Group
from build.formats.lib.format import HEAD, Format, Kind, Options, Target
from build.formats.lib.reader import BoundedReader
from build.formats.lib.writer import Writer


def _modules() -> Iterator[Any]:
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            yield importlib.import_module(f"build.formats.{module.name}")


FORMATS: Mapping[str, Format] = {row.name: row for module in _modules() for row in module.FORMATS}
"""What is written, by name."""
FAMILIES: Mapping[str, tuple[str, ...]] = {
    family: tuple(row.name for row in FORMATS.values() if row.family == family)
    for family in dict.fromkeys(row.family for row in FORMATS.values() if row.family)
}
"""Names of formats that are asked for as one."""
KINDS: Mapping[str, Kind] = {
    kind.name: kind for module in _modules() for kind in getattr(module, "KINDS", None) or (module.KIND,)
}
"""What is known, by name: several formats may share a kind, and of some kinds we write none."""


def writer(name: str, kind: str) -> Callable[[Target, Options], Writer]:
    """What writes a format; a name that is no format's goes by its kind."""
    row = FORMATS.get(name)
    return (row and row.write) or KINDS[kind].write


def check_size(name: str, kind: str, size: int) -> None:
    """Raise Unsupported for a disk of so many bytes that the format cannot be made of."""
    row = FORMATS.get(name)
    ((row and row.check_size) or KINDS[kind].check_size)(size)


def rounded(name: str, size: int) -> int:
    """Virtual size of the file of a format that is made of a disk of so many bytes."""
    row = FORMATS.get(name)
    return row.rounded(size) if row else size


def note(name: str, size: int) -> str:
    """What is worth knowing of a disk of so many bytes in a format; empty: nothing."""
    row = FORMATS.get(name)
    return row.note(size) if row else ""


def recognize(reader: BoundedReader) -> Kind:
    """The kind that a file is of, by its head or its end; raw when nobody knows it."""
    head = reader.read(0, min(reader.size, HEAD))
    return max(KINDS.values(), key=lambda kind: kind.recognize(reader, head))


@functools.cache
def groups() -> Mapping[Group, Mapping[str, Code]]:
    """All that can be said of a file: the codes of every module, by group and id; ValueError for a clash.

    A code is a constant of its module, or in its CODES; the module's GROUP is that of its codes.
    """
    modules = [*_modules(), *(importlib.import_module(f"build.formats.lib.{each.name}") for each in _lib())]
    held = [value for module in modules for value in (*vars(module).values(), *getattr(module, "CODES", ()))]
    found = {value.prefix: value for value in held if isinstance(value, Group)}
    rows: dict[str, Code] = {}
    for code in (value for value in held if isinstance(value, Code)):
        if rows.setdefault(code.id, code) is not code or code.id[:-3] not in found:
            raise ValueError(f"{code.id} is the code of two things, or of no group")
    return {
        group: {id_: rows[id_] for id_ in sorted(rows) if id_[:-3] == prefix}
        for prefix, group in sorted(found.items())
    }


def _lib() -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(lib.__path__)


def codes() -> Mapping[str, Code]:
    """The same by id alone."""
    return {id_: code for rows in groups().values() for id_, code in rows.items()}
