"""Fill a template: the same file at build time and inside the image, Jinja2 and the standard library only.

As a program: `render.py TEMPLATE DEFAULTS.json [NAME=VALUE...]` prints the filled template. Each VALUE
is JSON if it reads as JSON, else text, and replaces a default of that name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class InvalidValue(ValueError):
    """A value that would change the meaning of the text it is put into."""


def word(value: object) -> str:
    """Let one bare word through: no blanks, quotes, braces or comment signs can reach a daemon's parser."""
    text = str(value)
    if not text or not text.isascii() or not text.isprintable() or set(text) & set(" \"'{}#!\\;$~@"):
        raise InvalidValue(f"{text!r} is not one plain word")
    return text


def quoted(value: object) -> str:
    """Let a line of text through that is safe between double quotes."""
    text = str(value)
    if not text or not text.isascii() or not text.isprintable() or set(text) & set('"\\$~@'):
        raise InvalidValue(f"{text!r} cannot stand between double quotes")
    return f'"{text}"'


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fill a template; a name without a value is an error.

    Raises jinja2.TemplateError for a bad template or a missing name, InvalidValue for what a filter refuses.
    """
    from jinja2 import Environment, StrictUndefined  # here: it is slow to load, and most verbs do without

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(word=word, quoted=quoted)
    return environment.from_string(template).render(values)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def merged(defaults: Mapping[str, Any], facts: Sequence[str]) -> dict[str, Any]:
    """Defaults with `NAME=VALUE` facts laid over them; a fact without a default is an error (ValueError)."""
    values = dict(defaults)
    for fact in facts:
        name, separator, text = fact.partition("=")
        if not separator:
            raise ValueError(f"{fact!r} is not NAME=VALUE")
        if name not in values:
            raise ValueError(f"unknown name {name!r}; known: {', '.join(sorted(values))}")
        values[name] = _value(text)
    return values


def main(argv: Sequence[str]) -> int:
    """Print a filled template; 0 done, 1 the template or a value is wrong, 2 wrong usage."""
    from jinja2 import TemplateError

    if len(argv) < 2:
        print("usage: render.py TEMPLATE DEFAULTS.json [NAME=VALUE...]", file=sys.stderr)
        return 2
    try:
        template = Path(argv[0]).read_text(encoding="utf-8")
        defaults = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
        sys.stdout.write(render(template, merged(defaults, argv[2:])))
    except (OSError, ValueError, TemplateError) as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
