"""Boot lines: compose one, and show what the guest makes of one."""

from __future__ import annotations

from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.verbs import boot_line


def params(build: Build, kind: str) -> None:
    """Print a router's boot line; the KEY=VALUE pairs of --set are its own keys here, no settings."""
    pairs = [text.partition("=") for text in build.flags.overrides]
    for key, separator, _ in pairs:
        if not separator:
            raise BuildError(f"--set {key!r} has no value", f"write --set {key}=VALUE")
    print(boot_line.compose(kind, {key: value for key, _, value in pairs}))


def render(build: Build, line: str, hypervisor: str) -> None:
    """Print what the guest makes of a boot line; fails when it would refuse a part of it."""
    shown = boot_line.render(line, build.loaded, hypervisor)
    for path, (mode, text) in shown.files.items():
        print(f"==== {path} {mode:04o}\n{text}")
    print(f"==== type {shown.kind}")
    for name, words in (("start", shown.enable), ("stop", shown.disable), ("remove", shown.removed)):
        print(f"{name}: {' '.join(words) or '-'}")
    for command in shown.commands:
        print(f"run: {command}")
    if shown.complaints:
        raise BuildError(
            "the guest would refuse: " + "; ".join(shown.complaints),
            "correct the boot line; above stands what the guest makes of it, defaults included",
        )
