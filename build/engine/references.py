"""Settings that stand in the paths of others, as `$NAME` or `${NAME}`.

Scripts around earlier builders have `IMAGELOC=$LOCATION/$IMAGENAME.img`, and so have files that were made of
them. Where no shell reads that (an image definition, `.env`, whatever stands in single quotes), the names are
filled in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from build.engine.errors import BuildError
from build.engine.sources import PREFIX, nearest

PATHS = ("location", "mountpoint", "imageloc", "keyring")
"""Settings that are paths on the build host, where others may stand."""
NAMES = (*PATHS, "imagename", "hostname", "suite", "arch", "cloudstack_release")
"""Settings that may stand there."""
_REFERENCE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<plain>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^{}]*)\}|(?P<other>[{(]))"
)
"""A dollar sign before anything else is one, as in a shell."""


def literal(path: str) -> str:
    """A path as it is written where names are filled in."""
    return path.replace("$", "$$")


def fill_in(
    values: Mapping[str, Any], defaults: Mapping[str, Any], origins: Mapping[str, str]
) -> dict[str, Any]:
    """Return the values with every name in a path filled in; `$$` becomes a dollar sign.

    `defaults` count for what `values` lack; `origins` says where each was set. Raises BuildError for a name
    that cannot stand there, or has no value, and for paths that lead to each other.
    """
    known = {**defaults, **values}
    paths = [name for name in PATHS if isinstance(values.get(name), str)]
    return {**values, **{name: _filled(name, known, origins, ()) for name in paths}}


def _filled(name: str, values: Mapping[str, Any], origins: Mapping[str, str], above: Sequence[str]) -> str:
    """The value of a setting that stands in those `above`, the outermost first."""
    chain, text = (*above, name), str(values[name])

    def value_of(reference: re.Match[str]) -> str:
        if reference["dollar"]:
            return "$"
        if reference["other"]:
            raise refused(f"'{reference[0]}' is for a shell", "write $NAME of a setting, or $$ for a '$'")
        other = (reference["plain"] or reference["braced"]).upper().removeprefix(PREFIX).lower()
        if other not in NAMES:
            near = nearest(other, NAMES)
            hint = near if near.endswith("?") else f"{near}; write $$ for a '$'"
            raise refused(f"{reference[0]} is no setting that can stand in a path", hint)
        if other in chain:
            circle = " -> ".join((*chain[chain.index(other) :], other))
            raise refused(f"it leads back to itself: {circle}", "write one of them out")
        found = _filled(other, values, origins, chain)
        if not found:
            raise refused(f"{reference[0]} has no value", f"set {other}, or write the path out")
        return found.rstrip("/")

    def refused(what: str, hint: str) -> BuildError:
        where = origins[name]
        return BuildError(f"{where if where.endswith(name) else f'{where}: {name}'}: {what}", hint)

    return _REFERENCE.sub(value_of, text) if name in PATHS else text
