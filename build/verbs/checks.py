"""The project's own tests and benchmarks."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from build.engine import rings
from build.engine.errors import BuildError
from build.engine.hosts.host import CHECKOUT
from build.engine.remote import HostContext


def test(context: HostContext, ring: str, name: str, seconds: str, seed: str) -> None:
    """Run pytest on the asked ring, or on all but soak; of soak, with `seconds`, a slice chosen by `seed`."""
    _only_here(context, "tests run")
    if ring and ring not in (*rings.RINGS, rings.SOAK):
        raise BuildError(f"no ring {ring!r}", f"rings: {', '.join(rings.RINGS)}, {rings.SOAK}")
    soak = rings.slice_for(ring, seconds, seed)
    if ring == rings.SOAK:
        print(f"the same again: ./inv test --ring soak {soak.flags}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="systemvm-tests-"))
    folder.chmod(0o755)
    parts = rings.parts(ring, name, os.geteuid(), os.cpu_count() or 1, soak=soak, folder=str(folder))
    # Made by whoever runs the tests: sudo's part adds to it.
    seconds_file = CHECKOUT / rings.SECONDS
    seconds_file.parent.mkdir(exist_ok=True)
    seconds_file.write_text("")
    ended: list[tuple[rings.Part, int | None]] = []
    for part in parts:
        if part.sudo:
            print(rings.purpose(part, part is not parts[-1]), flush=True)
        ended.append((part, rings.status(part, context.host.show(part.line, CHECKOUT))))
        if ended[-1][1] == rings.INTERRUPTED:
            break
    with suppress(OSError):  # a part that failed has left its files
        folder.rmdir()
    if folder.exists():
        print(f"temporary files of what failed are kept: {folder}")
    if error := rings.verdict(ended, name):
        raise error


def _only_here(context: HostContext, what: str) -> None:
    if context.host.remote:
        raise BuildError(f"{what} on this machine only", "leave -H out, or log in there")


def bench(context: HostContext, name: str, pairs: str) -> None:
    """Run one of the benchmarks."""
    _only_here(context, "benchmarks run")
    known = sorted(path.stem for path in (CHECKOUT / "bench").glob("*.py"))
    if name not in known:
        raise BuildError(f"no benchmark {name!r}", f"benchmarks: {', '.join(known)}")
    line = [sys.executable, "-B", f"bench/{name}.py", "--pairs", pairs]
    if status := context.host.show(line, CHECKOUT):
        raise BuildError("below target", "run it again on a quiet machine", status)


def picture(context: HostContext) -> None:
    """Draw the picture of a build for README."""
    _only_here(context, "the picture is drawn")
    if status := context.host.show([sys.executable, "-B", "-m", "tests.picture"], CHECKOUT):
        raise BuildError("there is no new picture", "read the lines above", status)
