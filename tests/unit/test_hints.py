"""Commands that messages name: they exist, and go where the failing call went."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.engine import command_line
from build.engine.errors import BuildError, again
from build.formats import FORMATS
from tests import images

CHECKOUT = Path(__file__).resolve().parents[2]
CORE = {
    "-H",
    "--to",
    "--debug",
    *(f"--{name}" for name, *_ in (*command_line.REPEATABLE, *command_line.SWITCHES)),
}


@functools.cache
def verbs() -> dict[str, set[str]]:
    """Flags by verb, as the command line has them."""
    from tasks import namespace

    contexts = namespace.to_contexts()
    return {
        str(name): set(context.flags) for context in contexts for name in (context.name, *context.aliases)
    }


def texts(source: str) -> Iterator[str]:
    """Strings of a module but for docstrings; what is filled in shows as {}."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in child.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Expr | ast.JoinedStr):
                continue
            elif isinstance(child, ast.Constant) and isinstance(child.value, str):
                yield child.value


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Verb and flags of each command line in a text."""
    for _, mark, rest in (text[at:].partition("inv ") for at in starts(text)):
        flags, verb, words = [], "", iter(rest.split() if mark else ())
        for word in words:
            plain = word.strip("`,;:.)")
            if plain.startswith("-"):
                flags.append(plain)
                if not verb and plain in ("-H", "--image", "--set"):
                    next(words, "")
            elif not verb:
                verb = plain
            else:
                break
            if plain != word:
                break
        if verb:
            yield verb, flags


def starts(text: str) -> list[int]:
    """Where command lines begin."""
    before = ("", " ", "/", "`", "(")
    return [
        at for at in range(len(text)) if text.startswith("inv ", at) and text[max(0, at - 1) : at] in before
    ]


def faults(text: str) -> list[str]:
    """Commands of a text that are no verbs, or have flags that it has not."""
    known = verbs()
    found = []
    for verb, flags in commands(text):
        if "{" in verb:
            continue
        if verb in ("help", "version"):
            continue
        if verb not in known:
            found.append(verb)
        else:
            found += [f"{verb} {flag}" for flag in flags if flag not in known[verb] | CORE]
    return found


@pytest.mark.parametrize(
    "path", sorted((CHECKOUT / "build").rglob("*.py")), ids=lambda path: str(path.relative_to(CHECKOUT))
)
def test_commands_that_messages_name_exist(path: Path) -> None:
    assert not [fault for text in texts(path.read_text(encoding="utf-8")) for fault in faults(text)]


def test_the_names_that_are_filled_in_are_verbs() -> None:
    assert set(images.STEPS) <= verbs().keys()
    assert {f"convert.{name}" for name in FORMATS} <= verbs().keys()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("run: inv build", []),
        ("run: inv clean --cache, or inv umount", []),
        ("run `inv clean --cache`, then SYSTEMVM_LOCATION=/x ./inv -H HOST build --detach", []),
        ("run: inv bild", ["bild"]),
        ("run: inv clean --cash", ["clean --cash"]),
        ("look inside with: inv shell; or ./inv nothing", ["nothing"]),
        ("inv -H HOST biuld", ["biuld"]),
    ],
)
def test_the_rule_sees_what_it_must(text: str, found: list[str]) -> None:
    assert faults(text) == found


def test_the_rule_sees_every_string_but_docstrings() -> None:
    source = (
        'def f(x):\n  """inv a"""\n  raise E("what", f"run: inv {x}" if x else "inv b")\nC = 1\n"""inv c"""'
    )
    assert sorted(texts(source)) == ["inv b", "run: inv {}", "what"]


@pytest.mark.parametrize(
    ("hint", "host", "image", "told"),
    [
        ("run: inv build", "", "", "run: inv build"),
        ("run: inv build", "bh", "", "run: inv -H bh build"),
        ("run: inv shell", "bh", "", "run: inv -H bh shell"),
        ("run: inv build", "", "my own.yaml", "run: inv --image 'my own.yaml' build"),
        ("run: inv attach, or inv cancel", "u@h", "", "run: inv -H u@h attach, or inv -H u@h cancel"),
        ("make it: ./inv convert.vhd", "bh", "x.yaml", "make it: ./inv -H bh --image x.yaml convert.vhd"),
        ("build elsewhere: inv -H HOST build", "bh", "x.yaml", "build elsewhere: inv -H HOST build"),
        ("read the log", "bh", "x.yaml", "read the log"),
    ],
)
def test_hints_lead_to_the_host_and_the_definition_of_the_call(
    hint: str, host: str, image: str, told: str
) -> None:
    assert again(hint, host, image) == told
    assert BuildError("x", hint).on(host, image).hint == told
