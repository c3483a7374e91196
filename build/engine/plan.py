"""Steps and layers as values: what will run, and the key that names its result.

Planning is pure. The key of a layer is the hash of what will be run and of everything below it,
so no change of code, settings or files can be forgotten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    """A file that a step brings to the build host: its content and its mode there."""

    content: bytes
    mode: int = 0o644


@dataclass(frozen=True)
class Step:
    """One step of the recipe: text for bash, and bytes.

    The script finds the merged tree in `$ROOT`, its `files` under `$FILES` (keys are relative POSIX
    paths), a scratch directory of its own in `$WORK`, and the `secrets` it names, one file each,
    under `$SECRETS`. Secrets are not part of the step: only a keyed digest of each enters the key.
    """

    name: str
    script: str
    files: Mapping[str, File] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    bootstrap: bool = False
    """The lowest layer: built in a plain directory, not on an overlay."""
    remark: str = ""
    """What the user is told whenever the layer is there, built or cached; no part of what runs."""


@dataclass(frozen=True)
class Layer:
    """A step in its place: `key` names the result, `parents` the keys below it, lowest first."""

    step: Step
    key: str
    parents: tuple[str, ...]

    @property
    def chain(self) -> tuple[str, ...]:
        """Every key that makes up this layer's tree, lowest first."""
        return (*self.parents, self.key)


def digest(step: Step, secrets: Mapping[str, str]) -> str:
    """Hash what a step runs: script, files with modes, and the keyed digests of its secrets."""
    hashed = hashlib.sha256()

    def feed(*parts: bytes) -> None:
        for part in parts:
            hashed.update(len(part).to_bytes(8, "big") + part)

    feed(step.name.encode(), step.script.encode(), b"bootstrap" if step.bootstrap else b"overlay")
    for path, file in sorted(step.files.items()):
        feed(b"file", path.encode(errors="surrogateescape"), oct(file.mode).encode(), file.content)
    for name in step.secrets:
        feed(b"secret", name.encode(), secrets.get(name, "").encode())
    return hashed.hexdigest()


def layers(
    steps: Iterable[Step], common_prefix: str = "", secrets: Mapping[str, str] | None = None
) -> list[Layer]:
    """Chain steps into layers; `common_prefix` is the header that every script runs under."""
    planned: list[Layer] = []
    below = hashlib.sha256(common_prefix.encode()).hexdigest()
    for step in steps:
        below = hashlib.sha256(f"{below} {digest(step, secrets or {})}".encode()).hexdigest()
        planned.append(Layer(step, f"{step.name}-{below[:16]}", tuple(layer.key for layer in planned)))
    return planned
