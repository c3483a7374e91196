"""The agent's verbs: NAME is NAME.py here, with run(request, emit), or command(request) for a terminal.

Each is imported when it is asked for: an agent starts for many small requests.
"""

from __future__ import annotations

import importlib
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any

from build import wire
from build.agent.events import Emit, Failure

NAMES = frozenset(module.name for module in pkgutil.iter_modules(__path__))


def call(name: str, request: Mapping[str, Any], emit: Emit) -> Any:
    """Run a verb: JSON of its request in, JSON of its result out; raises what the verb raises."""
    run = load(name).run
    return wire.dump(run(_loaded(run, request), emit))


def command(name: str, request: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the command line of a verb that takes over the terminal, and what its environment needs."""
    describe = load(name).command
    line: tuple[list[str], dict[str, str]] = describe(_loaded(describe, request))
    return line


def _loaded(function: Callable[..., Any], request: Mapping[str, Any]) -> Any:
    kind: type[Any] = typing.get_type_hints(function)["request"]
    return wire.load(kind, request)


def load(name: str) -> Any:
    """Return the module of a verb; raises Failure when there is none."""
    if name not in NAMES:
        raise Failure(f"no verb {name!r}")
    return importlib.import_module(f"build.agent.verbs.{name}")
