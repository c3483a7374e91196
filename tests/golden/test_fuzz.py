"""The fuzzer on every reader of foreign bytes: ten minutes in all, shared out between them."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.engine import venv
from tests import cli
from tests.fuzz import seeds
from tests.fuzz.targets import TARGETS
from tests.images import shared

LOCK = cli.CHECKOUT / "requirements-fuzz.lock"
SECONDS = 600 // len(TARGETS)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python with what the lock names, made once for all workers."""
    with shared(tmp_path_factory, "fuzz", lambda place: venv.fill(place / "venv", LOCK)) as place:
        yield place / "venv/bin/python"


@pytest.mark.soak(SECONDS + 20)
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_ends_a_reader_but_what_it_declares(
    name: str, python: Path, seed: int, tmp_path: Path
) -> None:
    """No other exception, no input that takes 10 s, no memory beyond the limit."""
    corpus, found = tmp_path / "corpus", tmp_path / "found"
    for folder in (corpus, found, tmp_path / "room"):
        folder.mkdir()
    for number, data in enumerate(seeds.of_all(tmp_path / "room")[name]):
        (corpus / str(number)).write_bytes(data)
    line = [str(python), "-B", "-m", "tests.fuzz", name, str(SECONDS), str(seed + 1), str(corpus), str(found)]
    done = subprocess.run(
        line,
        cwd=cli.CHECKOUT,
        env=cli.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS + 120,
        check=False,
    )
    bad = list(found.iterdir())
    again = [
        f"echo {base64.b64encode(path.read_bytes()).decode()} | base64 -d >input\n"
        f".venv/bin/python -m tests.fuzz {name} input"
        for path in bad
    ]
    told = "\n".join([done.stdout.decode(errors="replace")[-8000:], "the same again:", *again])
    assert done.returncode == 0, told
    assert not bad, told
    assert b"stat::number_of_executed_units" in done.stdout, told
