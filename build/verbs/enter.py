"""Verbs that take over the terminal: a shell in the tree, the image as a machine."""

from __future__ import annotations

import shlex

from build import wire
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.verbs import artifacts


def shell(build: Build, at: str, command: str) -> int:
    """Open the shell; answers its exit status."""
    resolution = build.stored_resolution()
    if resolution is None:
        raise BuildError("there is no tree yet", "run: inv build")
    layers = build.plan(resolution, build.digests(build.prospect))
    layer = build.layer(at or layers[-1].step.name, layers)
    missing = [
        link.step.name
        for link in layers[: len(layer.chain)]
        if link.key not in build.present(layers, build.prospect)
    ]
    if missing:
        raise BuildError(f"{missing[0]} is not in the cache", f"run: inv {missing[-1]}")
    chain, argv = tuple(layer.chain), tuple(shlex.split(command))
    return build.host.interact("shell", wire.Shell(build.prospect.place, chain, layer.step.name, argv))


def boot(build: Build, uefi: bool, memory: str) -> int:
    """Boot the image on this terminal; answers QEMU's exit status."""
    artifacts.need_image(build)
    request = wire.Boot(
        image=build.prospect.image,
        firmware="uefi" if uefi else "bios",
        memory=mebibytes(memory),
        arch=build.settings.arch,
        work=f"{build.prospect.place.location}/logs",
    )
    return build.host.interact("boot", request)


def mebibytes(text: str) -> int:
    """Read the size of a machine's memory, in MiB."""
    if not text.isascii() or not text.isdigit() or not 64 <= int(text) <= 1 << 20:
        raise BuildError(f"--memory {text!r} is not a number of MiB", "write --memory 256")
    return int(text)
