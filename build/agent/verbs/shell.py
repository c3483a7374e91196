"""Terminal verb: a shell in a tree, at any layer; what is changed there is thrown away."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

from build import wire
from build.agent import process, sandbox, store
from build.agent.sandbox import BuildPaths, Tree


def command(request: wire.Shell) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment that open the shell."""
    place = BuildPaths.of(request.place)
    view = store.view(place, request.chain)
    store.vouch(place, request.chain)
    scratch = Path(tempfile.mkdtemp(prefix=".shell-", dir=place.location))
    enter = scratch / "enter.sh"
    tree = view
    lines = []
    if place.overlay:
        # The scratch layer lies in a tmpfs of the sandbox: it goes when the shell ends.
        upper = place.store / ".shell"
        upper.mkdir(exist_ok=True)
        lines = [
            f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(upper))}",
            f"mkdir -m 755 {shlex.quote(str(upper))}/upper {shlex.quote(str(upper))}/work",
        ]
        tree = Tree(lower=view.lower, upper=upper / "upper", work=upper / "work")
    inner = shlex.join(request.argv or ["bash", "-l"])
    fence = shlex.join([sys.executable, "-I", "-S", "-B", str(sandbox.ENTER)])
    body = [
        "set -eu",
        f"rm -r {shlex.quote(str(scratch))}",
        *sandbox.mountpoint_lines(place),
        f"export ROOT={shlex.quote(str(place.mountpoint))}",
        *lines,
        *tree.mount(place),
        f'exec {fence} "$ROOT" env -i TERM="$TERM" HOME=/root PATH={process.PATH} LC_ALL=C.UTF-8 \\',
        f"    debian_chroot={shlex.quote(request.label)} {inner}",
    ]
    enter.write_text("\n".join(body) + "\n", encoding="utf-8")
    line = process.tied([*sandbox.namespaces(place.mode), "bash", str(enter)])
    return line, {"TERM": request.term}
