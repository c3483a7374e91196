"""The pinned compressors of `.venv`, as files that a build host's own Python can load.

Pure: reads what pip installed and judges by the wheels' tags (PEP 425, PEP 600).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

WHEELS = ("zlib-ng", "deflate")


def files() -> dict[str, bytes]:
    """What the wheels hold, by the path below the folder that Python imports from."""
    found: dict[str, bytes] = {}
    for wheel in WHEELS:
        for file in importlib.metadata.distribution(wheel).files or ():
            if file.suffix in (".py", ".so") and ".." not in file.parts:
                found[str(file)] = file.read_binary()
    return found


def misfit(ground: Mapping[str, Any]) -> str:
    """Say why a host's Python cannot load them; empty if it can.

    `ground`: `version` [3, 11, ...], `implementation`, `machine`, `libc` [name, "2.36"].
    """
    for wheel in WHEELS:
        text = importlib.metadata.distribution(wheel).read_text("WHEEL") or ""
        tags = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Tag:")]
        if not any(fits(tag, ground) for tag in tags):
            python = ".".join(map(str, ground["version"][:2]))
            return (
                f"its Python {python} on {ground['machine']} cannot load the compressor {wheel} of this "
                f"checkout, which is for {tags[0] if tags else 'nothing known'}"
            )
    return ""


def fits(tag: str, ground: Mapping[str, Any]) -> bool:
    """Whether a wheel with this tag loads there."""
    python, abi, platform = tag.split("-", 2)
    major, minor = ground["version"][:2]
    if ground["implementation"] != "cpython" or not python.startswith("cp"):
        return False
    since = (int(python[2:3]), int(python[3:] or 0))
    same = since == (major, minor) and abi == python
    stable = abi == "abi3" and since[0] == major and since <= (major, minor)
    return (same or stable) and _runs(platform, ground["machine"], ground["libc"])


def _runs(platform: str, machine: str, libc: Iterable[str]) -> bool:
    """Whether the platform part of a tag, `manylinux_2_17_x86_64` say, is met."""
    name, version = libc
    if not platform.endswith(f"_{machine}"):
        return False
    old = {"manylinux1": "2_5", "manylinux2010": "2_12", "manylinux2014": "2_17"}
    kind, _, needed = platform.removesuffix(f"_{machine}").partition("_")
    needed = needed or old.get(kind, "")
    if kind.startswith("manylinux") != (name == "glibc") or not needed:
        return False
    return _numbers(needed.replace("_", ".")) <= _numbers(version)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2] if part.isdigit()]
