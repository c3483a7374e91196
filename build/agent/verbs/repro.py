"""Verb: build a second time on this machine, with other surroundings, and compare what comes of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from build import wire
from build.agent import files, process, sandbox, twin
from build.agent.events import Emit, Failure
from build.agent.sandbox import BuildPaths


def run(request: wire.Repro, emit: Emit) -> wire.Reproduced:
    """Run `twin` in namespaces of its own, where we may have some; raises Failure when it cannot build."""
    emit("work", name="second build", last=None)
    words = [sys.executable, "-I", "-B", twin.__file__]
    if os.geteuid() == 0:
        words = ["unshare", "--mount", "--uts", "--propagation", "private", *words]
    with files.scratch(Path(request.place.location), ".repro-") as folder:
        try:
            text = json.dumps(wire.dump(request))
            done = process.run([*words, str(folder)], text=text, check=False, deadline=None)
        finally:
            sandbox.remove(BuildPaths.of(request.place), *folder.iterdir())
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        told = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise Failure(
            f"the second build failed: {told.removeprefix('error: ')}", "try it by hand: inv build --offline"
        )
    return wire.load(wire.Reproduced, json.loads(done.stdout))
