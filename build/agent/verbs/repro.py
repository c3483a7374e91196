"""Verb: build a second time on this machine, with other surroundings, and compare what comes of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from build import wire
from build.agent import process, twin
from build.agent.events import Emit, Failure


def run(request: wire.Repro, emit: Emit) -> wire.Reproduced:
    """Run `twin` in namespaces of its own, where we may have some; raises Failure when it cannot build."""
    emit("work", name="second build", last=None)
    words = [sys.executable, "-I", "-B", twin.__file__]
    if os.geteuid() == 0:
        words = ["unshare", "--mount", "--uts", "--propagation", "private", *words]
    try:
        done = process.run(words, text=json.dumps(wire.dump(request)), check=False, deadline=None)
    finally:
        shutil.rmtree(Path(request.folder), ignore_errors=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        told = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise Failure(
            f"the second build failed: {told.removeprefix('error: ')}", "try it by hand: inv build --offline"
        )
    return wire.load(wire.Reproduced, json.loads(done.stdout))
