"""Verb: build one layer, or say that it is there."""

from __future__ import annotations

import base64
import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from build import wire
from build.agent import ending, pace, sandbox, store
from build.agent.events import Emit, Failure
from build.agent.sandbox import BuildPaths, Tree

FULL = 1 << 20
"""Bytes free below which a disk counts as full."""


def run(request: wire.Layer, emit: Emit) -> wire.Built:
    """Build it, whole or not at all."""
    place = BuildPaths.of(request.place)
    key = request.key
    store.lock(place.location, emit, request.what)
    if store.has(place, key):
        store.use(place, key)
        return wire.Built("cached", 0.0)
    with pace.work(place.location, request.step, emit) as follow:
        return _build(place, request, follow)


def _build(place: BuildPaths, request: wire.Layer, emit: Emit) -> wire.Built:
    key, started = request.key, time.monotonic()
    place.store.mkdir(parents=True, exist_ok=True)
    store.vouch(place, request.below)
    part = store.part(place, key)
    sandbox.remove(place, part)
    for name in ("tree", "work", "files", "secrets", "scratch"):
        (part / name).mkdir(parents=True, mode=0o700 if name == "secrets" else 0o755)
    (part / "tree").chmod(0o755)
    write_files(part / "files", request.files)
    for name, value in request.secrets.items():
        (part / "secrets" / name).write_text(value, encoding="utf-8")
    tree, before = _tree(place, request, part)
    log = place.location / "logs" / f"{request.step}.log"
    outcome = sandbox.run(
        place,
        tree,
        request.script,
        part=part,
        variables=variables(part, request.epoch, request.variables),
        log=log,
        emit=emit,
        label=request.step,
        before=before,
    )
    check(place, part, outcome, request.step, log, request.script)
    sandbox.remove(place, *(part / name for name in ("work", "files", "secrets", "scratch")))
    store.commit(
        place, key, {**request.record, "notes": outcome.notes, "seconds": time.monotonic() - started}
    )
    return wire.Built("built", time.monotonic() - started, tuple(outcome.notes))


def variables(part: Path, epoch: int, more: Mapping[str, str]) -> dict[str, str]:
    """Environment of a step's script."""
    return {
        "FILES": str(part / "files"),
        "SECRETS": str(part / "secrets"),
        "WORK": str(part / "scratch"),
        "TMPDIR": str(part / "scratch"),  # what a killed tool leaves goes with the part
        "PYTHON": sys.executable,
        "SOURCE_DATE_EPOCH": str(epoch),
        **more,
    }


def write_files(folder: Path, files: Mapping[str, wire.File]) -> None:
    """Lay a step's files down; names are those of the overlay and may hold any byte but NUL."""
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(base64.b64decode(file.content))
        target.chmod(file.mode)


def check(place: BuildPaths, part: Path, outcome: sandbox.Outcome, step: str, log: Path, text: str) -> None:
    """Turn a script that did not end well into a Failure with what a person needs to go on.

    One that said itself what is wrong leaves nothing; of one that broke, `part` stays to be looked at.
    """
    if outcome.status == 0 and not outcome.failed:
        return
    if outcome.failed and not outcome.starved:
        sandbox.remove(place, part)
        raise Failure(outcome.failed, outcome.hint, log=str(log), tail=[])
    script = part / "step.sh"
    with contextlib.suppress(OSError):  # on a full disk there is no room for it
        script.write_text(text, encoding="utf-8", errors="surrogateescape")
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    what = f": {outcome.command.splitlines()[0][:200]}" if outcome.command else ""
    # The log lies on the same disk: where that is full it may have had no room for the reason.
    full = "No space left on device" in "\n".join(tail) or shutil.disk_usage(log.parent).free < FULL
    killed = ending.told(step, outcome.status, outcome.starved)
    message = f"{killed or f'{step} failed (exit {outcome.status})'}{what}"
    hint = f"read {log}; the script lies in {script}"
    if outcome.starved:
        message, hint = killed, ending.MORE_MEMORY
    elif full:
        message, hint = f"{step}: the disk is full", f"free some space below {log.parent.parent}"
    raise Failure(message, hint, log=str(log), tail=tail)


def _tree(place: BuildPaths, request: wire.Layer, part: Path) -> tuple[Tree, list[str]]:
    """What the step works on, and shell lines before it."""
    if request.bootstrap:
        return Tree(upper=part / "tree"), []
    below = tuple(store.path(place, key) / "tree" for key in reversed(request.below))
    if place.overlay:
        return Tree(lower=below, upper=part / "tree", work=part / "work"), []
    source, target = shlex.quote(str(below[0])), shlex.quote(str(part / "tree"))
    return Tree(upper=part / "tree"), [f"cp -a --reflink=auto {source}/. {target}"]
