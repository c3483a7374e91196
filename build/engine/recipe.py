"""The steps' modules, found by the names that build/__init__.py lists."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from build import STEPS as STEPS
from build.engine.plan import Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded


def steps(loaded: Loaded, resolution: Resolution) -> list[Step]:
    """Describe every step of the recipe for these settings and this resolution."""
    return [_describe(name)(loaded, resolution) for name in STEPS]


def summary(name: str) -> str:
    """Return what a step does, in the words that its module begins with."""
    return (_module(name).__doc__ or name).partition("\n")[0]


def _describe(name: str) -> Callable[[Loaded, Resolution], Step]:
    return cast("Callable[[Loaded, Resolution], Step]", _module(name).step)


def _module(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"build.{name.replace('-', '_')}")
