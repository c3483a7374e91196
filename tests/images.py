"""The tiny image that many tests share: built once a run, by the command a user types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import cli

TINY = ("--image", "config/tiny.yaml")
STEPS = ("debootstrap", "initramfs", "tweak", "minimize", "keepalived-render", "seal")


@dataclass(frozen=True)
class Built:
    """A finished build: where it lies and what the command printed."""

    location: Path
    image: Path
    output: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Command line that builds the same again."""
        return (*TINY, "--set", f"location={self.location}")

    @property
    def manifest(self) -> dict[str, Any]:
        """The JSON beside the image."""
        told: dict[str, Any] = json.loads(self.image.with_name(f"{self.image.name}.json").read_text())
        return told


def sha256(path: Path) -> str:
    """Hash a file as it reads, holes and all."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The tiny image, built as root."""
    location = tmp_path_factory.mktemp("tiny")
    output = cli.succeed("build", *TINY, "--set", f"location={location}")
    yield Built(location, location / "tiny.img", output)
    cli.inv("clean", "--all", *TINY, "--set", f"location={location}")
