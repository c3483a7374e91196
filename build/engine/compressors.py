"""The pinned compressors, as files that a build host's own Python can load.

The client's own, from `.venv`, where they fit; else the wheels of the same lock that do, which pip brings.
Pure: what fits, what to ask pip for, and what a wheel holds (PEP 425, 427 and 600).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

WHEELS = ("zlib-ng", "deflate")
OLD = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
"""Names from before PEP 600, and the minor version of glibc that each needs."""

Ground = Mapping[str, Any]
"""A host's Python: `version` [3, 11, ...], `implementation`, `machine`, `libc` [name, "2.36"]."""


def platforms(ground: Ground) -> list[str]:
    """Platform tags of wheels that load there, of the newest C library first; none but with glibc."""
    name, version = ground["libc"]
    if name != "glibc":
        return []
    major, minor = version.split(".")[:2]
    names = [f"manylinux_{major}_{number}" for number in range(int(minor), 4, -1)]
    names += [old for old, needed in OLD.items() if needed <= int(minor)]
    return [f"{name}_{ground['machine']}" for name in names]


def tags(ground: Ground) -> set[str]:
    """Tags of wheels with compiled modules that load there."""
    if ground["implementation"] != "cpython":
        return set()
    major, minor = ground["version"][:2]
    pairs = [f"cp{major}{minor}-cp{major}{minor}"]
    pairs += [f"cp{major}{number}-abi3" for number in range(2, minor + 1)]
    return {f"{pair}-{platform}" for pair in pairs for platform in platforms(ground)}


def fit(ground: Ground) -> bool:
    """Whether a host can load the client's own."""
    loads = tags(ground)
    told = (importlib.metadata.distribution(wheel).read_text("WHEEL") or "" for wheel in WHEELS)
    return all(loads.intersection(re.findall(r"^Tag: *(\S+)", text, re.M)) for text in told)


def installed() -> dict[str, bytes]:
    """What the client's own hold, by the path below the folder that Python imports from."""
    files = (file for wheel in WHEELS for file in importlib.metadata.distribution(wheel).files or ())
    return {str(file): file.read_binary() for file in files if _is_module(file)}


def unpacked(wheels: Iterable[bytes], pinned: str) -> dict[str, bytes]:
    """What wheels hold, likewise; nothing unless they are all of those that are pinned, and no other byte."""
    real = [wheel for wheel in wheels if hashlib.sha256(wheel).hexdigest() in pinned]
    found: dict[str, bytes] = {}
    for wheel in real if len(real) == len(WHEELS) else ():
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            modules = (name for name in archive.namelist() if _is_module(PurePosixPath(name)))
            found |= {name: archive.read(name) for name in modules}
    return found


def _is_module(file: PurePosixPath) -> bool:
    return file.suffix in (".py", ".so") and ".." not in file.parts


def pins(lock: str) -> str:
    """Lines of a lock that name the compressors, their versions and hashes."""
    entries = re.split(r"^(?=\S)", lock, flags=re.M)
    return "".join(entry for entry in entries if entry.partition("==")[0] in WHEELS)


def asked(ground: Ground) -> list[str]:
    """Options by which pip picks the wheels that a host can load; none if there can be no such wheel."""
    if not tags(ground):
        return []
    major, minor = ground["version"][:2]
    python = ("--implementation=cp", f"--python-version={major}.{minor}", f"--abi=cp{major}{minor}")
    return [*python, *(f"--platform={platform}" for platform in platforms(ground))]


def kind(ground: Ground) -> str:
    """Name of the hosts that take the same wheels as this one."""
    python = "".join(map(str, ground["version"][:2]))
    name = f"cp{python}-{ground['machine']}-{''.join(ground['libc'])}"
    return re.sub(r"[^\w.-]", "_", name)  # the host says so, and it becomes a folder's name


def reason(said: str) -> str:
    """What pip gave as its reason, of all that it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["pip said nothing"]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1].removeprefix("ERROR: ")
