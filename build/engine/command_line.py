"""The command line: flags that every verb knows, wherever they stand, and errors in our own words.

`inv -H HOST build` works with the stock `inv`: while tasks.py is imported, the running program is taught
our flags and reads its command line anew. It first learns of no task without importing tasks.py: what
comes before (a bare `inv --help` and `--version`) the launcher writes as the words `help` and `version`.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import shutil
import textwrap
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invoke import Argument, Exit, Program
from invoke.exceptions import ParseError
from invoke.parser.context import to_flag

from build.engine.errors import BuildError

CHECKOUT = Path(__file__).resolve().parents[2]
NAME = "inv"
FILE = "--file"
"""A verb's own flag with this name may be left out before its value."""
USAGE = 2
"""Exit status of a command line that makes no sense, as shells have it."""

SWITCHES = (
    ("yes", "Answer yes to every question."),
    ("frozen", "Use the lock or the stored package set, ask no mirror."),
    ("offline", "The same, and no package is fetched either."),
    ("unlocked", "Build without the lock: of what the mirror has today."),
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
        # A task gives what its flags mean away once; the parser asks again.
        program.collection.to_contexts = lambda *_, **__: contexts
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
    line = Line(deque(words), core, verbs)
    while line.queue:
        word = line.queue.popleft()
        if word == "--":
            return [*line.front, word, *line.queue], line.rest
        if word.startswith("-") and word != "-":
            line.take_flag(word)
        else:
            line.take_word(word)
    if line.missing:
        raise BuildError(f"{line.verb.name} lacks {line.missing[0].upper()}", line.help_line, USAGE)
    return line.front, line.rest


@dataclass
class Line:
    """A command line that is being read: what is still to come, and what has been sorted so far."""

    queue: deque[str]
    core: Mapping[str, Argument]
    verbs: Mapping[str, Any]
    front: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    verb: Any = None
    missing: list[str] = field(default_factory=list)
    """Arguments that the verb still lacks."""
    wants_file: bool = False
    """Whether the verb takes a file that it can do without."""

    def take_word(self, word: str) -> None:
        """Take an argument of the verb, or else a verb."""
        if self.missing:
            self.missing.pop(0)
        elif word == "help":
            self._help(list(self.queue))
            return
        elif word == "version" and not self.verb:
            self._only("--version")
            return
        elif word not in self.verbs and self.verb is not None and self.wants_file:
            self.wants_file = False
            self.rest.append(f"{FILE}={word}")
            return
        elif word in self.verbs:
            self.verb = self.verbs[word]
            self.missing = [argument.name for argument in self.verb.positional_args]
            self.wants_file = FILE in self.verb.flags and "file" not in self.missing
        else:
            raise unknown_verb(word, self.verbs)
        self.rest.append(word)

    def take_flag(self, word: str) -> None:
        """Take a flag, with its value where it has one."""
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") and len(flag) > 2:  # -Hhost, or several switches in one
            flag, value = word[:2], word[2:]
            argument = self._find(flag)
            equals = "=" if argument.takes_value and not argument.optional else ""
            if not equals:
                self.queue.appendleft(f"-{value}")
        if flag in ("-h", "--help"):
            self._help([value] if equals else list(self.queue))
            return
        argument = self._find(flag)
        own = self.verb is not None and (flag in self.verb.flags or flag in self.verb.inverse_flags)
        into = self.rest if own else self.front
        if not argument.takes_value:
            if equals:
                raise BuildError(f"{flag} takes no value", f"write {flag} alone", USAGE)
            into.append(flag)
            return
        if argument.optional and not equals:
            words = []
            while self.queue and not self.queue[0].startswith("-") and self.queue[0] not in self.verbs:
                words.append(self.queue.popleft())
            into.append(f"{flag}={','.join(words)}" if words else flag)
            return
        into += [flag, value if equals else self._value(flag)]
        if own and argument.name in self.missing:
            self.missing.remove(argument.name)

    @property
    def help_line(self) -> str:
        """The command line that shows help."""
        return f"see: inv help {self.verb.name}" if self.verb else "see: inv help"

    def _value(self, flag: str) -> str:
        """Take the word behind a flag that needs one."""
        word = self.queue[0].partition("=")[0] if self.queue else ""
        if not self.queue or word in self.core or (self.verb is not None and word in self.verb.flags):
            raise BuildError(f"{flag} lacks its value", self.help_line, USAGE)
        return self.queue.popleft()

    def _find(self, flag: str) -> Any:
        """Return a flag's argument; raises BuildError for one that neither the verb nor every verb has."""
        own = self.verb.flags if self.verb else {}
        if self.verb and flag in self.verb.inverse_flags:
            return own[self.verb.inverse_flags[flag]]
        if flag in own:
            return own[flag]
        if flag in self.core:
            return self.core[flag]
        owners = [name for name, verb in self.verbs.items() if flag in verb.flags]
        hint = near(flag, [*own, *self.core]) or self.help_line
        if owners and self.verb is None:
            hint = f"write it behind its verb: {', '.join(owners)}"
        raise BuildError(f"{self.verb.name if self.verb else NAME} has no flag {flag}", hint, USAGE)

    def _help(self, words: Iterable[str]) -> None:
        """Ask for the help of the verb behind or before; for that of all without any."""
        named = next((word for word in words if not word.startswith("-")), "")
        if named and named not in self.verbs:
            raise unknown_verb(named, self.verbs)
        subject = named or (self.verb.name if self.verb else "")
        self._only("--help", *filter(None, [subject]))

    def _only(self, *words: str) -> None:
        """Let nothing else of the line count."""
        self.front, self.rest, self.missing = list(words), [], []
        self.queue.clear()


def unknown_verb(word: str, verbs: Iterable[str]) -> BuildError:
    """Say that there is no such verb, and which is near."""
    if "=" in word:
        return BuildError(f"{word!r} is no verb", f"to change a setting, write --set {word}", USAGE)
    return BuildError(f"there is no verb {word!r}", near(word, verbs) or "see them all: inv --list", USAGE)


def near(word: str, names: Iterable[str]) -> str:
    """Ask for the name that was meant, if one is near."""
    found = difflib.get_close_matches(word, list(names), 1, 0.7)
    return f"did you mean {found[0]}?" if found else ""


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
    for paragraph in (inspect.getdoc(program.collection[name]) or "").split("\n\n"):
        print(textwrap.fill(paragraph, min(shutil.get_terminal_size().columns, 100)) + "\n")
    if rows:
        print("Flags:\n")
        program.print_columns(rows)
    print("Flags of every verb: inv help")


def summary(task: Any) -> str:
    """First line of a task's documentation."""
    return (inspect.getdoc(task) or "").partition("\n")[0]
