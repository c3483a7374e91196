"""A pytest plugin that says every finding in other words: whatever decides by a text then decides otherwise.

`python -m pytest -p tests.reworded ...`; `tests/golden/test_findings.py` does.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from string import Formatter

from build import formats
from build.formats.lib import platforms
from build.formats.lib.findings import Code
from build.formats.lib.platforms import Affected


def words(dice: random.Random, template: str) -> str:
    """Other words, with the same fields in another order; nothing for nothing."""
    if not template:
        return ""
    fields = [f"{{{name}}}" for _, name, _, _ in Formatter().parse(template) if name]
    made = ["".join(dice.choices("bcdfghjklmnpqrstvwxz", k=7)) for _ in range(dice.randint(1, 6))]
    mixed = [*made, *fields]
    dice.shuffle(mixed)
    return " ".join(mixed)


def reword(dice: random.Random, codes: Iterable[Code]) -> None:
    """Change texts, hints and names of whom it affects, everywhere at once."""
    for code in codes:
        object.__setattr__(code, "text", words(dice, code.text))
        object.__setattr__(code, "fix", words(dice, code.fix))
        for affected in code.affects:
            object.__setattr__(affected, "case", words(dice, affected.case))
    for name, value in vars(platforms).items():
        if isinstance(value, Affected):
            assert not value.case, name
    titles = {key: words(dice, title) for key, title in platforms.TITLES.items()}
    platforms.TITLES = titles


reword(random.Random(), formats.codes().values())
