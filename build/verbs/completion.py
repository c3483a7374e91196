"""What a shell offers on Tab: verbs, flags, settings, formats, steps, and whatever else has known values."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from build.engine import recipe, rings
from build.engine.errors import BuildError
from build.engine.hosts.host import CHECKOUT
from build.engine.settings import SECRETS, kinds_by_key
from build.formats import FORMATS
from build.verbs import boot_line
from build.verbs.rehearse import TYPES

SCRIPTS = Path(__file__).parent / "shells"


def script(shell: str) -> str:
    """Return the script that teaches a shell; raises BuildError for an unknown shell."""
    known = sorted(path.name for path in SCRIPTS.iterdir())
    if shell not in known:
        raise BuildError(f"no completion for {shell!r}", f"shells: {', '.join(known)}")
    return (SCRIPTS / shell).read_text(encoding="utf-8").replace("@INV@", shlex.quote(str(CHECKOUT / "inv")))


def candidates(words: Sequence[str], core: Mapping[str, Any], verbs: Mapping[str, Any]) -> list[str]:
    """Return what the last word, begun or empty, can become; nothing means a file.

    `core` are flags of every verb, `verbs` their contexts, both as Invoke has them.
    """
    *before, last = words or [""]
    verb, flag, missing = _place(before, core, verbs)
    if flag:
        return _fitting(last, _values(flag, last))
    name, equals, value = last.partition("=")
    if equals and (argument := _argument(name, verb, core)):
        return _fitting(last, [f"{name}={each}" for each in _values(argument.name, value)])
    if last.startswith("-"):
        own = verb.flags if verb else {}
        return _fitting(last, [each for each in (*own, *core) if each.startswith("--")])
    return _fitting(last, _values(missing[0], last) if missing else [*verbs, "help"])


def _place(
    words: Iterable[str], core: Mapping[str, Any], verbs: Mapping[str, Any]
) -> tuple[Any, str, list[str]]:
    """Where a line stands: its verb, the flag that waits for a value, the arguments that are missing."""
    verb: Any = None
    flag, missing = "", list[str]()
    for word in words:
        if flag:
            flag = ""
        elif word.startswith("-"):
            argument = None if "=" in word else _argument(word, verb, core)
            flag = argument.name if argument and argument.takes_value and not argument.optional else ""
            missing = [name for name in missing if not argument or name != argument.name]
        elif missing:
            missing.pop(0)
        elif word in verbs:
            verb = verbs[word]
            missing = [argument.name for argument in verb.positional_args]
    return verb, flag, missing


def _argument(flag: str, verb: Any, core: Mapping[str, Any]) -> Any:
    return verb.flags[flag] if verb and flag in verb.flags else core.get(flag)


def _fitting(last: str, found: Iterable[str]) -> list[str]:
    return sorted({each for each in found if each.startswith(last)})


def _values(name: str, begun: str) -> list[str]:
    """What a flag or an argument of this name takes; a list with commas goes on behind the last one."""
    if name == "set":
        return _settings(begun)
    if name == "hypervisor":
        return list(boot_line.guest("transport").SOURCES)
    if name == "formats":
        front = begun[: begun.rfind(",") + 1]
        return [f"{front}{each}" for each in FORMATS]
    return {
        "step": list(recipe.STEPS),
        "at": list(recipe.STEPS),
        "type": [*TYPES, "all"],
        "ring": [*rings.RINGS, rings.SOAK],
        "name": [path.stem for path in (CHECKOUT / "bench").glob("*.py")],
        "shell": [path.name for path in SCRIPTS.iterdir()],
    }.get(name, [])


def _settings(begun: str) -> list[str]:
    """`KEY=` for every setting, `TABLE.KEY=` for those of tables; behind the `=` what has few values."""
    kinds = kinds_by_key()
    key, equals, _ = begun.partition("=")
    if not equals:
        return [f"{name}=" for name in kinds if name not in SECRETS]
    kind = kinds.get(key)
    known = ["true", "false"] if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
    return [f"{key}={value}" for value in known]
