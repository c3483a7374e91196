"""Images that many tests share: built once a run, by the command a user types."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from build import STEPS as STEPS
from tests import cli, ordinary

TINY = ("--image", "config/tiny.yaml")


@dataclass(frozen=True)
class Built:
    """A finished build: where it lies and what the command printed."""

    location: Path
    image: Path
    output: str
    definition: tuple[str, ...] = TINY

    @property
    def flags(self) -> tuple[str, ...]:
        """Command line that builds the same again."""
        return (*self.definition, "--set", f"location={self.location}")

    @property
    def manifest(self) -> dict[str, Any]:
        """The JSON beside the image."""
        told: dict[str, Any] = json.loads(self.image.with_name(f"{self.image.name}.json").read_text())
        return told


def copied_resolution(tiny: Built, location: Path) -> Path:
    """A new location that knows the same package set: what both builds must have in common."""
    location.mkdir()
    shutil.copytree(tiny.location / "resolutions", location / "resolutions")
    shutil.copytree(tiny.location / "debs", location / "debs")
    return location


def sha256(path: Path) -> str:
    """Hash a file as it reads, holes and all."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(location: Path, flags: tuple[str, ...]) -> None:
    """Remove a LOCATION; only a sandbox may remove what an ordinary user's sub-ids own in its layers."""
    cli.inv("clean", "--all", *flags, "--set", f"location={location}")
    shutil.rmtree(location)


@contextmanager
def shared(
    factory: pytest.TempPathFactory,
    name: str,
    make: Callable[[Path], None],
    unmake: Callable[[Path], None] = lambda _place: None,
) -> Iterator[Path]:
    """A folder that is filled once for all workers of a run, and removed by the last one that leaves."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with place.with_suffix(".lock").open("w") as door, place.with_suffix(".users").open("w") as users:
        fcntl.flock(door, fcntl.LOCK_EX)
        if not (place / "whole").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(exist_ok=True)
            make(place)
            (place / "whole").touch()
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield place
        finally:
            fcntl.flock(door, fcntl.LOCK_EX)
            with suppress(BlockingIOError):  # somebody still uses it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unmake(place)
                shutil.rmtree(place)


def link(source: Path, target: Path) -> None:
    """Make a LOCATION with the builds of another: its very files, but for those that are written in place."""
    subprocess.run(["cp", "-al", source, target], check=True)
    for name in ("lock", "jobs", "logs"):
        subprocess.run(["rm", "-rf", target / name], check=True)


SYSTEM = ("--image", "config/systemvm.yaml")


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The full image, built as whoever runs the tests; its layers are not kept."""

    def build(place: Path) -> None:
        location = place / "location"
        cli.succeed("build", *SYSTEM, "--set", f"location={location}")

    def clean(place: Path) -> None:
        remove(place / "location", SYSTEM)

    with shared(tmp_path_factory, "system", build, clean) as place:
        location = place / "location"
        yield Built(location, location / "systemvm.img", "", SYSTEM)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The tiny image, built as whoever runs the tests; each worker has a LOCATION of its own with it."""

    def build(place: Path) -> None:
        output = cli.succeed("build", *TINY, "--set", f"location={place / 'location'}")
        (place / "output").write_text(output)

    def clean(place: Path) -> None:
        remove(place / "location", TINY)

    with shared(tmp_path_factory, "tiny", build, clean) as place:
        location = tmp_path_factory.mktemp("tiny") / "location"
        link(place / "location", location)
        yield Built(location, location / "tiny.img", (place / "output").read_text())
        remove(location, TINY)


@pytest.fixture(scope="session")
def tiny_of_user(tiny: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The same, built by an ordinary user who is careful: what he makes is his alone."""

    def build(place: Path) -> None:
        location, tables = copied_resolution(tiny, place / "location"), place / "tables"
        tables.mkdir()
        for path in (location, *location.rglob("*")):
            os.chown(path, ordinary.UID, ordinary.UID)
        careful = ["bash", "-c", 'umask 077; exec "$@"', "careful"]
        flags = (*TINY, "--frozen", "--set", f"location={location}")
        (place / "output").write_text(
            cli.succeed("build", *flags, prefix=[*ordinary.prefix(tables, location), *careful])
        )

    with shared(tmp_path_factory, "tiny-of-user", build) as place:
        location = place / "location"
        yield Built(location, location / "tiny.img", (place / "output").read_text())
