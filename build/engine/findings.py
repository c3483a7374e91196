"""What can be said of an image file, for people: a row for `inspect --explain`, all of them for the docs.

`python -m build.engine.findings` writes docs/findings.md anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from string import Formatter

from build import formats
from build.engine.command_line import USAGE
from build.engine.errors import BuildError
from build.formats.lib.findings import Code, Group
from build.formats.lib.repair import ACTIONS, OTHER_ACTIONS

FILE = Path(__file__).resolve().parents[2] / "docs" / "findings.md"
REPAIRS = {**ACTIONS, **OTHER_ACTIONS}
HEAD = """\
# Findings

*Made by `python -m build.engine.findings` from the codes in `build/formats`.*

What `inv inspect` can say of a file. A code keeps its meaning; texts may be reworded, and nothing decides by
them. `inv inspect --explain CODE` prints a row, and `--json` has code and fields ([json.md](json.md)). Words
in capitals are fields: what the file says stands there. "Affects" are those who refuse or misread the file;
`--for` counts those that do so in every release, or from one on. What loses data is refused by `inv convert`
and `inv repair`.
"""


def explain(code: str) -> str:
    """Return what there is to know of a code; raises BuildError for an unknown one."""
    rows = formats.codes()
    if code.upper() not in rows:
        near = get_close_matches(code.upper(), rows, n=1)
        hint = f"did you mean {near[0]}?" if near else "see them all: docs/findings.md"
        raise BuildError(f"no finding has the code {code!r}", hint, USAGE)
    row = rows[code.upper()]
    group = next(group for group, held in formats.groups().items() if row.id in held)
    facts = {
        "severity": row.severity,
        "affects": _whom(row) or "nobody that is known",
        "hint": spelled(row.fix) or "none",
        "data": "wrong or missing: convert and repair refuse it" if row.lossy else "none is lost",
        "repair": REPAIRS[row.repair] if row.repair else "inv repair leaves it as it is",
        "about": group.title,
        "source": row.source or group.source,
    }
    width = max(map(len, facts))
    lines = [
        f"{row.id}: {spelled(row.text)}",
        *(f"  {name:<{width}}  {text}" for name, text in facts.items()),
    ]
    return "\n".join(lines)


def page() -> str:
    """Return docs/findings.md."""
    return "\n".join(
        [HEAD, *(line for group, rows in formats.groups().items() for line in _table(group, rows))]
    )


def spelled(template: str) -> str:
    """A text whose fields are words in capitals."""
    return "".join(text + (name or "").upper() for text, name, _, _ in Formatter().parse(template))


def _table(group: Group, rows: Mapping[str, Code]) -> Iterator[str]:
    yield f"## {group.prefix}: {group.title}\n\nSource: {group.source}.\n"
    yield "| code | | finding | affects | hint | loses data | `inv repair` |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows.values():
        lossy = "yes" if row.lossy else ""
        yield _cells(row.id, row.severity, spelled(row.text), _whom(row), spelled(row.fix), lossy, row.repair)
    yield ""
    sources = [f"{row.id}: {row.source}." for row in rows.values() if row.source]
    if sources:
        yield "\n".join((*sources, ""))


def _cells(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def _whom(row: Code) -> str:
    return ", ".join(spelled(each.title) for each in row.affects)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
