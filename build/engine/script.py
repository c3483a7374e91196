"""What bash runs for a step: the header of all steps, the step's parameters, the script in its folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from build.engine.plan import File
from build.engine.shell import quote

HEADER = Path(__file__).with_name("header.bash").read_text(encoding="utf-8")
"""Bash's strict mode, a clean environment, and six functions.

Variables set before it: ROOT FILES WORK TMPDIR SECRETS PYTHON ENTER MODE SOURCE_DATE_EPOCH (and DEBS, OUT,
SEED where a step has them).
"""
SURROUNDINGS = HEADER + (Path(__file__).parents[1] / "agent" / "enter.py").read_text(encoding="utf-8")
"""What every script runs under, and every program of a tree; part of every key."""
SHARED = Path(__file__).parents[1] / "tools"
"""Programs that several steps run."""
LIBRARY = Path(__file__).parents[1]
"""Where lies what programs import of ours; it comes along beside them."""
WIDTH = 100
"""Characters of a list of words that stands on one line."""

Parameter = str | int | bool | Iterable[str]


def render(script: str) -> str:
    """Put the header before a step's script."""
    return f"{HEADER}\n{script}"


def of(module: str, **parameters: Parameter) -> str:
    """Return `script.bash` beside a step's module, its parameters set before it, in capitals.

    Text and numbers become `NAME=value`, true and false `yes` and nothing, lists `NAME=(a b)`.
    """
    head = "".join(f"{name.upper()}={_value(value)}\n" for name, value in parameters.items())
    return head + Path(module).with_name("script.bash").read_text(encoding="utf-8")


def _value(value: Parameter) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, str | int):
        return quote(str(value)) if value != "" else ""
    rows = [quote(word) for word in value]
    if len(" ".join(rows)) <= WIDTH:
        return f"({' '.join(rows)})"
    return "".join(["(\n", *(f"    {row}\n" for row in rows), ")"])


def programs(module: str, *shared: str) -> dict[str, File]:
    """Return the programs beside a step's module and those named of build/tools, with what they import."""
    own = (path for path in sorted(Path(module).parent.glob("*.py")) if b"__main__" in path.read_bytes())
    return bundle(*own, *(SHARED / name for name in shared))


def bundle(*paths: Path) -> dict[str, File]:
    """Return programs by name, with what they import of ours; packages come along without their recipes."""
    found = {path.name: File(path.read_bytes()) for path in paths}
    left = list(found.values())
    while left:
        for module in _imported(left.pop().content):
            if module not in found:
                found[module] = File((LIBRARY.parent / module).read_bytes())
                left.append(found[module])
    packages = {above for name in found for above in Path(name).parents if above.name}
    return found | {f"{package}/__init__.py": File(b"") for package in sorted(packages)}


def _imported(content: bytes) -> Iterator[str]:
    """Files of ours that a program imports: modules of a package, or names of a module."""
    for source, names in re.findall(rb"^from (build[.\w]*) import (.+)$", content, re.M):
        place = source.decode().replace(".", "/")
        if (LIBRARY.parent / f"{place}.py").is_file():
            yield f"{place}.py"
        else:
            yield from (f"{place}/{name}.py" for name in names.decode().split(", "))
