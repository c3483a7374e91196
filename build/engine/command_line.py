"""The command line: flags that every verb knows, wherever they stand, and errors in our own words.

`inv -H HOST build` works with the stock `inv`: while tasks.py is imported, the running program is taught
our flags and reads its command line anew. It first learns of no task without importing tasks.py: what
comes before (a bare `inv --help` and `--version`) the launcher writes as the words `help` and `version`.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from invoke import Argument, Exit, Program
from invoke.exceptions import ParseError
from invoke.parser.context import to_flag

from build.engine.errors import BuildError

CHECKOUT = Path(__file__).resolve().parents[2]
NAME = "inv"
USAGE = 2
"""Exit status of a command line that makes no sense, as shells have it."""

SWITCHES = (
    ("yes", "Answer yes to every question."),
    ("frozen", "Use the stored resolution, ask no mirror."),
    ("ask-password", "Ask for the root password of the image."),
    ("rootless", "With -H: build as the user who logs in; never ask for sudo."),
    ("detach", "Let the build go on without us; see status, attach, cancel."),
    ("no-fetch", "With -H: leave the files there."),
    ("quiet", "Print results and errors only."),
)
REPEATABLE = (
    ("image", "FILE", "Image definition (default: config/systemvm.yaml)."),
    ("set", "KEY=VALUE", "Change a setting; may be repeated."),
    ("formats", "A,B", "Convert to these (default: those of the definition)."),
)
"""Flags whose value may begin with `HOST:`, a name as it stands behind -H: it is for that host alone."""
HOSTS = ("hosts", "HOST", "Do it on this host over SSH (a,b,c: on each of them).")
TO = ("to", "DIR", "With -H: bring files here (default: dist in the checkout).")
INVOKES = frozenset(
    [
        *("collection", "complete", "debug", "help", "list", "list-depth", "list-format"),
        *("print-completion-script", "search-root", "version"),
    ]
)
"""What of Invoke's own core flags means something here."""
SHOWN = (
    ("-H HOST, --hosts=HOST", HOSTS[2]),
    *((f"--{name}={value}", text) for name, value, text in (*REPEATABLE, TO)),
    *((f"--{name}", text) for name, text in SWITCHES),
    ("-h, --help", "Show this, or the help of a verb."),
    ("-l, --list", "List the verbs."),
    ("-d, --debug", "Show what goes wrong in full."),
    ("-V, --version", "Show the version."),
)
"""Flags of every verb as help shows them."""


def core_args(stock: Sequence[Argument]) -> list[Argument]:
    """Return Invoke's core flags and ours."""
    return [
        *stock,
        Argument(names=("hosts", "H"), help=HOSTS[2]),
        *(Argument(names=(name,), kind=list, help=text) for name, _, text in REPEATABLE),
        Argument(names=("to",), help=TO[2]),
        *(Argument(names=(name,), kind=bool, default=False, help=text) for name, text in SWITCHES),
    ]


Complete = Callable[[Sequence[str], Mapping[str, Any], Mapping[str, Any]], list[str]]
"""Says what the last of some words can become, from the flags of every verb and the verbs."""


def teach(program: Program, complete: Complete) -> None:
    """Give the running `inv` our flags, our help, our errors and our completion."""
    if not program.argv or "hosts" in program.args:
        return  # imported by a test or by `fab`: no `inv` to teach
    stock, parse = program.core_args, program.parse_tasks

    def parse_tasks() -> None:
        known = (arg for arg in program.initial_context.args.values() if arg.name not in foreign)
        core = {to_flag(name): arg for arg in known for name in arg.names}
        contexts = program.collection.to_contexts()
        verbs = {name: context for context in contexts for name in (context.name, *context.aliases)}
        if "--complete" in program.argv:
            words = program.argv[program.argv.index("--") + 1 :] if "--" in program.argv else []
            print("\n".join(complete(words, core, verbs)))
            raise Exit
        front, rest = arrange(program.argv[1:], core, verbs)
        try:
            program.parse_core([program.argv[0], *front])
            program.core.unparsed = rest
            parse()
        except ParseError as error:  # what `arrange` did not see
            raise BuildError(str(error), "inv help", USAGE) from error
        # Invoke's own account of every call is not what --debug is for here.
        logging.getLogger("invoke").setLevel(logging.WARNING)

    foreign = frozenset(arg.name for arg in stock()) - INVOKES
    program.core_args = lambda: core_args(stock())
    program.parse_tasks = parse_tasks
    program.print_help = lambda: print_help(program)
    program.print_task_help = lambda name: print_verb_help(program, name)
    program.print_version = lambda: print(f"{NAME} {version()}")


def version() -> str:
    """Version of this checkout, as pyproject.toml has it."""
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["version"])


def arrange(
    words: Iterable[str], core: Mapping[str, Argument], verbs: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Sort a command line: first flags that every verb knows, then verbs, each with its own.

    Invoke takes a flag for the value of a verb's argument where that is still missing, and a verb's help
    for one more verb. Raises BuildError for what nobody knows and for what lacks its value.
    """
    front: list[str] = []
    rest: list[str] = []
    verb: Any = None
    missing: list[str] = []
    queue = deque(words)
    while queue:
        word = queue.popleft()
        if word == "--":
            return [*front, word, *queue], rest
        if not word.startswith("-") or word == "-":
            if missing:
                missing.pop(0)
            elif word == "help":
                return _help(queue, verb, verbs, core)
            elif word == "version" and not verb:
                return ["--version"], []
            elif word in verbs:
                verb = verbs[word]
                missing = [arg.name for arg in verb.positional_args]
            else:
                raise unknown_verb(word, verbs)
            rest.append(word)
            continue
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") and len(flag) > 2:  # -Hhost, or several switches in one
            flag, equals, value = word[:2], "", word[2:]
            argument = _find(flag, verb, core)
            if argument.takes_value and not argument.optional:
                equals = "="
            else:
                queue.appendleft(f"-{value}")
        if flag in ("-h", "--help"):
            return _help([value] if equals else queue, verb, verbs, core)
        argument = _find(flag, verb, core, verbs)
        own = verb is not None and (flag in verb.flags or flag in verb.inverse_flags)
        into = rest if own else front
        if not argument.takes_value:
            if equals:
                raise BuildError(f"{flag} takes no value", f"write {flag} alone", USAGE)
            into.append(flag)
            continue
        if not equals and not (argument.optional and (not queue or queue[0].startswith("-"))):
            if not queue or _is_flag(queue[0], verb, core):
                raise BuildError(f"{flag} lacks its value", help_line(verb), USAGE)
            equals, value = "=", queue.popleft()
        if own and argument.name in missing:
            missing.remove(argument.name)
        into += [flag, value] if equals else [flag]
    if missing:
        raise BuildError(f"{verb.name} lacks {missing[0].upper()}", help_line(verb), USAGE)
    return front, rest


def _find(flag: str, verb: Any, core: Mapping[str, Argument], verbs: Mapping[str, Any] | None = None) -> Any:
    """Return a flag's argument; raises BuildError for one that neither the verb nor every verb has."""
    if verb and flag in verb.inverse_flags:
        flag = verb.inverse_flags[flag]
    if verb and flag in verb.flags:
        return verb.flags[flag]
    if flag in core:
        return core[flag]
    owners = [name for name, other in (verbs or {}).items() if flag in other.flags]
    whose = verb.name if verb else "inv"
    if owners and verb is None:
        hint = f"write it behind its verb: {', '.join(owners)}"
    else:
        hint = near(flag, [*(verb.flags if verb else ()), *core]) or help_line(verb)
    raise BuildError(f"{whose} has no flag {flag}", hint, USAGE)


def _is_flag(word: str, verb: Any, core: Mapping[str, Argument]) -> bool:
    flag = word.partition("=")[0]
    return flag in core or (verb is not None and flag in verb.flags)


def _help(
    words: Iterable[str], verb: Any, verbs: Mapping[str, Any], core: Mapping[str, Argument]
) -> tuple[list[str], list[str]]:
    """Ask for the help of the verb behind or before; for that of all without any."""
    for word in words:
        if not word.startswith("-"):
            if word not in verbs:
                raise unknown_verb(word, verbs)
            return ["--help", word], []
    return (["--help", verb.name] if verb else ["--help"]), []


def unknown_verb(word: str, verbs: Iterable[str]) -> BuildError:
    """Say that there is no such verb, and which is near."""
    if "=" in word:
        return BuildError(f"{word!r} is no verb", f"to change a setting, write --set {word}", USAGE)
    return BuildError(f"there is no verb {word!r}", near(word, verbs) or "see them all: inv --list", USAGE)


def near(word: str, names: Iterable[str]) -> str:
    """Ask for the name that was meant, if one is near."""
    found = difflib.get_close_matches(word, list(names), 1, 0.7)
    return f"did you mean {found[0]}?" if found else ""


def help_line(verb: Any) -> str:
    """The command line that shows help."""
    return f"see: inv help {verb.name}" if verb else "see: inv help"


def print_help(program: Any) -> None:
    """Show what this is, its verbs in their order, and the flags that all of them know."""
    print(f"Usage: {NAME} [FLAG ...] VERB [FLAG ...] [VERB ...]\n")
    print("Verbs (without any: build):\n")
    names = [context.name for context in program.collection.to_contexts()]
    program.print_columns([(name, summary(program.collection[name])) for name in names])
    print("Flags of every verb, before or after it:\n")
    program.print_columns(SHOWN)
    print("A verb's own flags: inv help VERB. Settings: inv config. More: README.md and docs/.")


def print_verb_help(program: Any, name: str) -> None:
    """Show what a verb does and its own flags."""
    context = program.parser.contexts[name]
    positional = [f" {argument.name.upper()}" for argument in context.positional_args]
    rows = context.help_tuples()
    print(f"Usage: {NAME} {name}{''.join(positional)}{' [FLAG ...]' if rows else ''}\n")
    print(f"{inspect.getdoc(program.collection[name]) or ''}\n")
    if rows:
        print("Flags:\n")
        program.print_columns(rows)
    print("Flags of every verb: inv help")


def summary(task: Any) -> str:
    """First line of a task's documentation."""
    return (inspect.getdoc(task) or "").partition("\n")[0]
