"""Runs in a guest: an agent's work on a disk whose power may be cut, and the judgment of what a cut has left.

    power_guest.py record WORK                do the work; print what each layer, image and artifact must hold
    power_guest.py judge WORK WANTED VARIANT  print what is wrong, and what was there to use

WORK is JSON: `place`, `image`, `outdir`, `chains` (requests that make a variant each, by name), and `order`
(names of chains, and requests between them).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# An image has no compressors. What is converted here needs none; a manifest names them nevertheless.
for name in ("deflate", "zlib_ng", "zlib_ng.zlib_ng"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["deflate"].__dict__["__version__"] = "none"
sys.modules["zlib_ng.zlib_ng"].__dict__["ZLIBNG_RUNTIME_VERSION"] = "none"
sys.modules["zlib_ng"].__dict__["zlib_ng"] = sys.modules["zlib_ng.zlib_ng"]

from build import wire  # noqa: E402
from build.agent import store, verbs  # noqa: E402
from build.agent.sandbox import BuildPaths  # noqa: E402
from build.agent.verbs import disk  # noqa: E402

Work = dict[str, Any]


def call(request: dict[str, Any]) -> Any:
    """Have the agent do something; what it says meanwhile is of no interest."""
    asked = dict(request)
    return verbs.call(asked.pop("verb"), asked, lambda kind, **fields: None)


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(tree: Path) -> str:
    """Digest of all that a layer holds, in the test's own words.

    Left out are what differs from build to build: times, and overlayfs' note of the inode below.
    """
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        status = path.lstat()
        held = sha256(path) if stat.S_ISREG(status.st_mode) else ""
        held = str(path.readlink()) if path.is_symlink() else held
        names = [one for one in os.listxattr(path, follow_symlinks=False) if not one.endswith(".origin")]
        marks = [(one, os.getxattr(path, one, follow_symlinks=False).hex()) for one in names]
        numbers = status.st_mode, status.st_uid, status.st_gid, status.st_rdev
        told = str(path.relative_to(tree)), numbers, held, sorted(marks)
        digest.update(f"{told}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def paths(work: Work) -> BuildPaths:
    """Where the agent builds."""
    return BuildPaths.of(wire.load(wire.BuildPaths, work["place"]))


def keys(chain: list[dict[str, Any]]) -> list[str]:
    """Keys of the layers that a chain of requests makes."""
    return [request["key"] for request in chain if request["verb"] == "layer"]


def made(work: Work, name: str) -> Iterator[tuple[str, str]]:
    """Have the agent make a variant; yield the names of what it is made of, and what they hold."""
    place = paths(work)
    for request in work["chains"][name]:
        answer = call(request)
        if request["verb"] == "layer":
            yield request["key"], listing(store.path(place, request["key"]) / "tree")
        elif request["verb"] == "disk":
            yield f"image {name}", sha256(Path(work["image"]))
        elif request["verb"] == "convert":
            for row in answer["files"]:
                yield f"{row['file']} {name}", sha256(Path(work["outdir"], row["file"]))


def record(work: Work) -> dict[str, str]:
    """Do all of the work, and give the last layer the time that the agent gives itself."""
    wanted: dict[str, str] = {}
    for item in work["order"]:
        if isinstance(item, str):
            for name, held in made(work, item):
                assert wanted.setdefault(name, held) == held, f"{name} is not the same again"
        else:
            call(item)
    place = paths(work)
    while not all((path / "content").exists() for path, _ in store.every(place.store)):
        time.sleep(0.1)
    return wanted


def judge(work: Work, wanted: dict[str, str], name: str) -> dict[str, list[str]]:
    """Look at what the agent would use, have it make a variant, and look at what came of it."""
    faults = [f"before: {fault}" for fault in lies(work)]
    found = dict(usable(work))
    faults += [f"{one} would be used, and is wrong" for one, held in found.items() if held != wanted[one]]
    faults += [f"{one} was made wrong" for one, held in made(work, name) if held != wanted[one]]
    faults += [f"after: {fault}" for fault in lies(work)]
    call(work["tidy"])
    faults += [f"audit: {row['name']}: {row['value']}" for row in call(work["audit"]) if not row["ok"]]
    place = paths(work)
    left = [path for folder in (place.location, place.store) for path in folder.glob(".*")]
    return {"faults": faults + [f"{path} is left" for path in left], "used": list(found)}


def usable(work: Work) -> Iterator[tuple[str, str]]:
    """What the agent takes for finished as it finds it, and what that holds."""
    place, image = paths(work), Path(work["image"])
    for key in sorted({key for chain in work["chains"].values() for key in keys(chain)}):
        if store.has(place, key):
            yield key, listing(store.path(place, key) / "tree")
    for name, chain in work["chains"].items():
        (request,) = (request for request in chain if request["verb"] == "disk")
        if disk.finished(image, request["key"]):
            yield f"image {name}", sha256(image)
            (request,) = (request for request in chain if request["verb"] == "convert")
            for row in call(request)["files"]:
                if row["state"] == "cached":
                    yield f"{row['file']} {name}", sha256(Path(work["outdir"], row["file"]))


def lies(work: Work) -> Iterator[str]:
    """Lines of checksums that are not those of the file they name."""
    image = Path(work["image"])
    for sums in (image.with_name(f"{image.name}.sha256"), Path(work["outdir"], "SHA256SUMS")):
        for line in sums.read_text().splitlines() if sums.exists() else []:
            told, _, name = line.partition("  ")
            file = sums.with_name(name)
            if file.exists() and sha256(file) != told:
                yield f"{sums.name} is not right about {name}"


def main(verb: str, plan: str, *more: str) -> None:
    """Do what the command line says."""
    work = json.loads(Path(plan).read_text())
    if verb == "record":
        print(json.dumps(record(work)))
    else:
        wanted, name = more
        print(json.dumps(judge(work, json.loads(Path(wanted).read_text()), name)))


if __name__ == "__main__":
    main(*sys.argv[1:])
