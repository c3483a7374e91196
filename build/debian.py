"""What Debian's files say: deb822 paragraphs, relations, names. For client, agent and the steps' tools alike.

Sources: deb822(5), deb-control(5), the Debian wiki's RepositoryFormat page. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

SNAPSHOT = "%Y%m%dT%H%M%SZ"
"""How the folders of a snapshot mirror name a moment (UTC), for strptime(3)."""


def paragraphs(text: str) -> Iterator[str]:
    """Split deb822 text at its empty lines."""
    return (part for part in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")) if part.strip())


def fields(paragraph: str) -> dict[str, str]:
    """Fields of one paragraph; the lines of a folded field are kept, joined by newlines."""
    found: dict[str, str] = {}
    name = ""
    for line in paragraph.split("\n"):
        if line[:1] in (" ", "\t"):
            found[name] = f"{found.get(name, '')}\n{line.strip()}"
        elif ":" in line:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def stanzas(text: str) -> list[dict[str, str]]:
    """Fields of every paragraph that has any."""
    return [found for paragraph in paragraphs(text) if (found := fields(paragraph))]


def name_of(paragraph: str) -> str:
    """Name of the package that a paragraph describes; quicker than reading all of its fields."""
    first, _, rest = paragraph.partition("\n")
    if first.startswith("Package: "):
        return first[9:].strip()
    found = re.search(r"^Package: *(\S+)", rest, re.M)
    return found[1] if found else ""


def field_of(name: str, paragraph: str) -> str:
    """A field that stands on one line; empty where there is none. Quicker than reading all of them."""
    begin = 0 if paragraph.startswith(f"{name}: ") else paragraph.find(f"\n{name}: ") + 1
    if begin == 0 and not paragraph.startswith(f"{name}: "):
        return ""
    return paragraph[begin + len(name) + 2 :].partition("\n")[0].strip()


def names(relation: str, separators: str = ",|") -> list[str]:
    """Names in a relation field, alternatives too, without versions, architectures and qualifiers."""
    found = (re.match(r"\s*([a-z0-9][a-z0-9+.-]*)", part) for part in re.split(f"[{separators}]", relation))
    return [name[1] for name in found if name]


def base_names(texts: Iterable[str]) -> set[str]:
    """Names of what every Debian system has, of these paragraphs: essential packages and required ones."""
    return {name_of(text) for text in texts if "\nEssential: yes" in text or "\nPriority: required" in text}


def architectures(native: str, packages: Iterable[str]) -> list[str]:
    """The native architecture first, then those that packages are asked for by `name:arch`."""
    return list(dict.fromkeys([native, *(name.partition(":")[2] for name in packages if ":" in name)]))


def deb(name: str, version: str, arch: str) -> str:
    """Name of a package's file in the cache, as apt writes it."""
    return f"{name}_{version.replace(':', '%3a')}_{arch}.deb"
