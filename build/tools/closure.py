"""Name packages that another one brought along: `closure.py ROOT PACKAGE REGEX`.

Follows Depends and Pre-Depends of the installed packages (dpkg's status file, deb-control(5)) and prints
each name below PACKAGE that matches REGEX, with the chain that leads to it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Split dpkg's status file into fields by name; continuation lines are left out."""
    for block in text.split("\n\n"):
        fields = (line.partition(": ") for line in block.splitlines() if line[:1] not in (" ", "\t"))
        yield {name: value for name, _, value in fields}


def names(relation: str) -> list[str]:
    """Package names of a relation field, alternatives too, without versions and architectures."""
    return [
        re.split(r"[ (:\[]", part.strip(), maxsplit=1)[0]
        for part in re.split(r"[,|]", relation)
        if part.strip()
    ]


def graph(text: str) -> dict[str, list[str]]:
    """What each installed package, or name provided by one, needs."""
    needs: dict[str, list[str]] = {}
    for fields in stanzas(text):
        if not fields.get("Status", "").endswith(" installed"):
            continue
        package = fields["Package"]
        needs[package] = names(fields.get("Pre-Depends", "")) + names(fields.get("Depends", ""))
        for provided in names(fields.get("Provides", "")):
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
    with open(os.path.join(root, "var/lib/dpkg/status"), encoding="utf-8", errors="replace") as file:
        found = chains(graph(file.read()), start)
    for name, chain in sorted(found.items()):
        if re.fullmatch(pattern, name):
            print(chain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
