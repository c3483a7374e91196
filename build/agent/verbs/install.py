"""Verb: install the Debian packages that a build, and booting its image, lack here."""

from __future__ import annotations

import os

from build import wire
from build.agent import process
from build.agent.debian import packages
from build.agent.events import Emit, Failure


def run(request: wire.Install, emit: Emit) -> wire.Installed:
    """Run `script` with what is missing.

    Raises Failure without root, and when apt cannot. What an earlier run that was cut off left unpacked is
    set up first.
    """
    names = sorted({need.package for need in packages.missing("build", "boot", "login")})
    if not names:
        return wire.Installed(())
    line = f"apt-get install --no-install-recommends {' '.join(names)}"
    if os.getuid() != 0:
        raise Failure("only root can install packages", f"ask an administrator to run: {line}")
    emit("note", text=f"installing {', '.join(names)}")
    process.run(["dpkg", "--configure", "-a"], deadline=None)
    done = process.run(["sh", "-s", "--", *names], text=request.script, check=False, deadline=None)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Failure(f"apt cannot install them: {last}", f"run there: {line}")
    return wire.Installed(tuple(names))
