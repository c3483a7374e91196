"""Fuzz one reader, or play again what a run has found.

python -m tests.fuzz TARGET FILE ...                     plays inputs; needs nothing
python -m tests.fuzz TARGET SECONDS SEED CORPUS FOUND    fuzzes with atheris, keeps in FOUND what fails
"""

from __future__ import annotations

import sys
from pathlib import Path

LONGEST = 1 << 16
"""Bytes of an input."""
TIMEOUT = 10
"""Seconds that one input may take."""
MEMORY = 1024
"""MiB that the process may hold: a table of 64 MiB, twice, and what the fuzzer itself keeps."""


def fuzz(name: str, seconds: str, seed: str, corpus: str, found: str) -> None:
    """Feed a target with mutations of a corpus until the time is over; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["build", "systemvm"]):
        from tests.fuzz import targets
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-timeout={TIMEOUT}",
            f"-rss_limit_mb={MEMORY}",
            f"-max_len={LONGEST}",
            f"-artifact_prefix={found}/",
            "-print_final_stats=1",
            corpus,
        ],
        lambda data: targets.play(name, data),
        enable_python_coverage=True,
    )
    atheris.Fuzz()


def main(name: str, *words: str) -> None:
    """Do what the command line says."""
    if words[0].isascii() and words[0].isdigit():
        fuzz(name, *words)
        return
    from tests.fuzz import targets

    for file in words:
        targets.play(name, Path(file).read_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
