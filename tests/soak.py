"""The soak ring: long cases beside their short siblings, and a random slice of them for every push."""

from __future__ import annotations

import random
from collections.abc import Mapping


def slice_of(costs: Mapping[str, int], seconds: int, seed: int) -> list[str]:
    """Choose cases at random, the same for the same seed, as long as their costs (seconds) fit together."""
    chosen: list[str] = []
    for name in random.Random(seed).sample(sorted(costs), len(costs)):
        if costs[name] <= seconds:
            seconds -= costs[name]
            chosen.append(name)
    return chosen
