"""Where settings come from: each source read into values that know their origin."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from build.engine.errors import BuildError

PREFIX = "SYSTEMVM_"
"""Of variables in the environment and in `.env`; a bare HOSTNAME is set by every container."""

SCHEMA = 1
"""Version of the image definition's keys; grows when a file that was right would be read in another way."""
SUCCESSORS: Mapping[str, str] = {
    "architecture": "arch",
    "disk_size": "size",
    "distribution": "suite",
    "mirror": "debian_mirror",
    "name": "imagename",
    "overlays": "rootfs",
    "release": "suite",
}
"""Present name of a key by the one it has elsewhere: in an earlier schema, or in another image builder."""


@dataclass(frozen=True)
class Given:
    """A value for a key (`path` holds its parts) and who gave it.

    Text still has to be read by the type of its key. `written` is how a plain YAML value stands in the
    file: 4.20 is a number to YAML, but not where a text is wanted. `items` says where those of a list stand.
    """

    path: tuple[str, ...]
    value: Any
    origin: str
    is_text: bool = True
    written: str = ""
    items: tuple[str, ...] = ()


def from_definition(path: Path) -> list[Given]:
    """Read an image definition in YAML: every leaf, with its line.

    `schema` is the version of its keys and no setting; a file without it is one of schema 1.
    Raises BuildError with file and line when it cannot be read, has another schema or a duplicate key.
    """
    name = short(path)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise BuildError(f"{name}:1: expected keys and values", "write KEY: VALUE lines")
        return [one for one in _leaves(node, (), name) if one.path != ("schema",) or _no_schema(one)]
    except OSError as error:
        what = f"cannot read image definition {name}: {error.strerror}"
        raise BuildError(what, "give another with --image FILE") from None
    except UnicodeDecodeError:
        raise BuildError(f"{name} is not UTF-8 text", "give an image definition in YAML") from None
    except RecursionError:
        raise BuildError(f"{name}: an alias contains itself", "write the values out") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise BuildError(
            f"{where}: {getattr(error, 'problem', None) or 'not YAML'}", "correct the YAML"
        ) from None


def _leaves(mapping: yaml.MappingNode, above: tuple[str, ...], name: str) -> Iterator[Given]:
    seen: set[str] = set()
    for key, value in mapping.value:
        part, origin = str(key.value), f"{name}:{key.start_mark.line + 1}"
        if part in seen:
            raise BuildError(f"{origin}: duplicate key {part!r}", "keep one of them")
        seen.add(part)
        if isinstance(value, yaml.MappingNode):
            yield from _leaves(value, (*above, part), name)
        else:
            written = value.value if isinstance(value, yaml.ScalarNode) else ""
            rows = value.value if isinstance(value, yaml.SequenceNode) else ()
            items = tuple(f"{name}:{row.start_mark.line + 1}" for row in rows)
            yield Given((*above, part), construct(value), origin, False, written, items)


def _no_schema(given: Given) -> bool:
    """Take the version of the keys out; raises BuildError for one that this checkout cannot read."""
    if type(given.value) is not int or given.value < 1:
        raise BuildError(f"{given.origin}: schema {given.value!r} is no version", f"write schema: {SCHEMA}")
    if given.value > SCHEMA:
        what = f"{given.origin}: schema {given.value} is newer than this checkout, which knows {SCHEMA}"
        raise BuildError(what, "update the checkout")
    return False


def construct(node: yaml.Node) -> Any:
    """Make the plain value that a YAML node stands for."""
    return yaml.SafeLoader("").construct_document(node)


def from_dotenv(path: Path) -> list[Given]:
    """Read NAME=VALUE lines; quotes keep blanks and `#`, which otherwise starts a comment after a blank.

    Raises BuildError with the line of what is no such line.
    """
    name = short(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "") or "not UTF-8 text"
        raise BuildError(f"cannot read {name}: {reason}", "correct it, or move it away") from None
    return [
        _from_line(line.strip(), f"{name}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _from_line(line: str, origin: str) -> Given:
    name, separator, text = line.removeprefix("export ").partition("=")
    if not separator or not name.strip().isidentifier():
        raise BuildError(f"{origin}: not a NAME=VALUE line", f"write {PREFIX}NAME=VALUE")
    if not name.startswith(PREFIX):
        raise BuildError(f"{origin}: {name.strip()} has no prefix", f"write {PREFIX}{name.strip()}")
    return Given((name.strip().removeprefix(PREFIX).lower(),), _unquote(text, origin), origin)


def _unquote(text: str, origin: str) -> str:
    quoted = text.strip()
    mark = quoted[:1]
    if mark not in ("'", '"'):
        return re.split(r"\s#", text, maxsplit=1)[0].strip()
    value, closing, rest = quoted[1:].partition(mark)
    if not closing or not re.fullmatch(r"(\s+#.*)?", rest):
        raise BuildError(f"{origin}: the quotes do not match", f"write NAME={mark}VALUE{mark}")
    return value


def from_environment(environ: Mapping[str, str]) -> list[Given]:
    """Take the variables with our prefix."""
    return [
        Given((name.removeprefix(PREFIX).lower(),), value, f"environment {name}")
        for name, value in sorted(environ.items())
        if name.startswith(PREFIX)
    ]


def from_flags(overrides: Iterable[str]) -> list[Given]:
    """Read the values of `--set KEY=VALUE`; a dot leads into a table. Raises BuildError without a `=`."""
    given = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise BuildError(f"--set {override!r} has no '='", "write --set KEY=VALUE")
        given.append(Given(tuple(key.lower().split(".")), value, f"--set {key}"))
    return given


def nearest(word: str, known: Iterable[str]) -> str:
    """Hint at the key that a word has become, at the nearest known word, or at all of them."""
    words = sorted(known)
    if SUCCESSORS.get(word) in words:
        return f"it is called {SUCCESSORS[word]!r} here"
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(words)}" if len(words) < 20 else "see them all: inv config"


def short(path: Path) -> str:
    """Write a path as people near it would."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
