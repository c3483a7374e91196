"""Name packages that another one brought along: `closure.py ROOT PACKAGE REGEX`.

Follows Depends and Pre-Depends of the installed packages (dpkg's status file, deb-control(5)) and prints
each name below PACKAGE that matches REGEX, with the chain that leads to it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import debian, inside


def graph(text: str) -> dict[str, list[str]]:
    """What each installed package, or name provided by one, needs."""
    needs: dict[str, list[str]] = {}
    for fields in debian.stanzas(text):
        if not fields.get("Status", "").endswith(" installed"):
            continue
        package = fields["Package"]
        needs[package] = debian.names(fields.get("Pre-Depends", "")) + debian.names(fields.get("Depends", ""))
        for provided in debian.names(fields.get("Provides", "")):
            needs.setdefault(provided, []).append(package)
    return needs


def chains(needs: Mapping[str, list[str]], start: str) -> dict[str, str]:
    """Every installed package below `start` with the chain of names that leads to it."""
    found = {start: start}
    queue = [start]
    for name in queue:
        for needed in needs.get(name, []):
            if needed in needs and needed not in found:
                found[needed] = f"{found[name]} -> {needed}"
                queue.append(needed)
    return found


def main() -> int:
    """Print the chains that match; 0 always."""
    root, start, pattern = sys.argv[1:4]
    inside.enter(root)
    with open("/var/lib/dpkg/status", encoding="utf-8", errors="replace") as file:
        found = chains(graph(file.read()), start)
    for name, chain in sorted(found.items()):
        if re.fullmatch(pattern, name):
            print(chain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
