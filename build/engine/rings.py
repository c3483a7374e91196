"""Which command lines run which tests, and what their ends mean."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from build.engine.errors import BuildError

RINGS = ("unit", "golden", "root", "boot", "remote")
WAITING = 2
"""Workers for tests that mostly wait, beside those that compute."""
SECONDS = "dist/test-seconds.jsonl"
"""What each test of the last run took, a line of JSON each; in the checkout."""
SOAK = "soak"
"""Long cases of all rings, which a run of all leaves out."""
PRIVILEGED = ("root", "remote")
"""Rings whose tests make users, namespaces and mounts."""
NOTHING_RAN = 5
"""What pytest ends with when no test was chosen."""
INTERRUPTED = 2
"""What it ends with after Ctrl-C."""
THROUGH_SUDO = 64
"""Is added to pytest's status under sudo: sudo's own 1 says that it ran nothing."""
NO_SUDO = (126, 127)
"""What the shell ends with where sudo cannot be executed or is not there."""
NETWORK = (
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_TRUSTED_HOST"),
    *("PIP_PROXY", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_CONFIG_FILE", "PIP_DEFAULT_TIMEOUT"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)
"""Variables that lead to the network from here; tests that fetch need them."""


class Part(NamedTuple):
    """Rings, the command line that runs them, and whether sudo runs it."""

    rings: tuple[str, ...]
    line: list[str]
    sudo: bool


class Slice(NamedTuple):
    """What of the soak ring is played, and from which seed; 0 seconds: all of it."""

    seconds: int = 0
    seed: int = 0

    @property
    def flags(self) -> str:
        """The flags of `./inv test` that play it again."""
        return f"--seconds {self.seconds} --seed {self.seed}" if self.seconds else f"--seed {self.seed}"


ALL = Slice()


def slice_for(ring: str, seconds: str, seed: str) -> Slice:
    """Return what the flags ask for, with a seed of its own where none is given; raises BuildError."""
    for flag, text in (("--seconds", seconds), ("--seed", seed)):
        if text and (ring != SOAK or not (text.isascii() and text.isdigit())):
            raise BuildError(f"{flag} {text!r} is not for this", f"write --ring {SOAK} {flag} 180")
    return Slice(int(seconds or 0), int(seed) if seed else random.SystemRandom().randrange(1 << 16))


def parts(
    ring: str,
    name: str,
    uid: int,
    cores: int,
    env: Mapping[str, str] = os.environ,
    soak: Slice = ALL,
    folder: str = "/tmp/systemvm-tests",
) -> list[Part]:
    """Command lines for a ring, or all; an ordinary user's begin with the rings that need root.

    Temporary files of each lie below `folder`, where no other run on this machine changes a mode or an owner.
    Sudo forgets a password after some minutes: behind the other rings it would ask when nobody looks.
    """
    workers = ["-n", str(min(cores, 4) + WAITING), "--dist", "loadscope", f"--clock={SECONDS}"]
    line = [sys.executable, "-B", "-m", "pytest", *workers, *(("-k", name) if name else ())]
    line += ["-m", SOAK, f"--soak-seed={soak.seed}"] if ring == SOAK else ["-m", f"not {SOAK}"]
    line += [f"--soak-seconds={soak.seconds}"] if ring == SOAK and soak.seconds else []
    asked = (ring,) if ring in RINGS else RINGS
    privileged = tuple(one for one in asked if one in PRIVILEGED and uid != 0)
    own = tuple(one for one in asked if one not in privileged)
    # Chosen by mark, tests of the other rings would be read, too, and Hypothesis keep, as root, what it saw.
    both = [
        Part(privileged, [*sudo(env), *line, f"--basetemp={folder}/root", *folders(privileged)], True),
        Part(own, [*line, f"--basetemp={folder}/own", *folders(own)], False),
    ]
    return [part for part in both if part.rings]


def folders(rings: Sequence[str]) -> list[str]:
    """Return where the tests of these rings are."""
    return [f"tests/{one}" for one in rings]


def sudo(env: Mapping[str, str]) -> list[str]:
    """What stands before a command line that is to run as root."""
    # By name: a proxy's or an index's URL may hold a password, and everybody can read an argument. Whom
    # sudo lets run every command, it lets keep variables; to another it says which it does not.
    kept = ",".join(variable for variable in NETWORK if variable in env)
    # The launcher looked for tools, and the tests look for a python3, where the user has them. A folder
    # of compiled files that root made, the checkout's owner could not remove.
    own = (f"PATH={env['PATH']}:/usr/local/sbin:/usr/sbin:/sbin", "PYTHONDONTWRITEBYTECODE=1")
    script = f'"$@" || exit $(({THROUGH_SUDO} + $?))'
    keep = [f"--preserve-env={kept}"] if kept else []
    return ["sudo", *keep, "--", "env", *own, "sh", "-c", script, "tests"]


def purpose(part: Part, more: bool) -> str:
    """What a user reads before sudo asks for the password."""
    after = "; the others follow without it" if more else ""
    return f"sudo is for the {' and '.join(part.rings)} tests: they make users, namespaces and mounts{after}"


def status(part: Part, ended: int) -> int | None:
    """Pytest's own status of what ended; None when sudo ran nothing."""
    if ended in (-signal.SIGINT, 128 + signal.SIGINT):
        return INTERRUPTED
    if not part.sudo or ended == 0:
        return ended
    return ended - THROUGH_SUDO if ended > THROUGH_SUDO and ended not in NO_SUDO else None


def verdict(ended: Sequence[tuple[Part, int | None]], name: str) -> BuildError | None:
    """Judge statuses by part: nothing, or the error to end with."""
    statuses = [status for _, status in ended]
    if set(statuses) == {NOTHING_RAN}:
        return BuildError(f"no test matches {name!r}", "choose another name for -k", NOTHING_RAN)
    bad = [status for status in statuses if status not in (0, NOTHING_RAN)]
    if not bad:
        return None
    words = {
        0: "passed",
        INTERRUPTED: "interrupted",
        NOTHING_RAN: "none chosen",
        None: "not run, sudo refused",
    }
    told = "; ".join(f"{', '.join(part.rings)}: {words.get(status, 'failed')}" for part, status in ended)
    code = next((status for status in bad if status), 1)
    if None not in statuses:
        return BuildError(f"tests failed ({told})", "read the lines above", code)
    again = " and ".join(f"--ring {ring}" for part, status in ended if status is None for ring in part.rings)
    return BuildError(
        f"tests failed ({told})", f"`./inv test` with {again} as root, or as a user whom sudo lets", code
    )
