"""Makes `.venv` from a lock, aside and whole: `venv.py CHECKOUT LOCK`.

Run by the launcher under the Python that the environment is for; standard library only.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PIP = (
    "install",
    "-qq",
    "--require-hashes",
    "--no-deps",
    "--only-binary=:all:",
    "--no-user",
    "--no-input",
)


def fill(aside: Path, lock: Path) -> None:
    """Make an environment with pip and install what the lock names; every hash is checked.

    Raises CalledProcessError when pip cannot.
    """
    venv.create(aside, with_pip=True, symlinks=True)
    python = aside / "bin" / "python"
    options = ("--disable-pip-version-check", "--progress-bar=off", "--requirement", str(lock))
    subprocess.run([python, "-I", "-m", "pip", *PIP, *options], check=True)


def readdress(aside: Path, place: Path) -> None:
    """Write the final path into the scripts, which hold the path that they were made at."""
    for script in [*(aside / "bin").iterdir(), aside / "pyvenv.cfg"]:
        if script.is_file() and not script.is_symlink():
            text = script.read_bytes()
            script.write_bytes(text.replace(os.fsencode(aside), os.fsencode(place)))


def publish(aside: Path, place: Path, old: Path) -> None:
    """Give the environment its name; the one that had it goes away."""
    if os.path.lexists(place):
        place.rename(old)
    aside.rename(place)
    discard(old)


def discard(path: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def made_from(place: Path, lock: Path) -> bool:
    """Whether the environment is whole and was made from this lock: its copy is written last."""
    copy = place / "lock"
    return (place / "bin" / "python").exists() and copy.is_file() and copy.read_bytes() == lock.read_bytes()


def make(root: Path, lock: Path) -> None:
    """Make `.venv` unless another launcher has just done so; the kernel drops the lock with the process."""
    place, aside, old = root / ".venv", root / ".venv.part", root / ".venv.old"
    checkout = os.open(root, os.O_RDONLY)
    fcntl.flock(checkout, fcntl.LOCK_EX)
    discard(old)
    if made_from(place, lock):
        return
    first = not os.path.lexists(place)
    print(f"making .venv from {lock.name} with {sys.executable} ...", flush=True)
    discard(aside)
    fill(aside, lock)
    readdress(aside, place)
    shutil.copyfile(lock, aside / "lock")
    publish(aside, place, old)
    if first:
        print(f'to call it as plain `inv` from anywhere: export PATH={shlex.quote(str(root))}:"$PATH"')


def main(root: Path, lock: Path) -> None:
    """Make the environment; ends with one line of what and one of `hint:` when it cannot."""
    real = os.path.realpath(sys.executable)
    if real != sys.executable and not sys.argv[3:]:
        # Named with its version, a Python that the host replaces leaves a dangling link, which is seen. Once:
        # not every Python says that it is the file which was executed.
        os.execv(real, [real, "-I", *sys.argv, "real"])
    try:
        make(root, lock)
    except subprocess.CalledProcessError:
        discard(root / ".venv.part")
        sys.exit(
            f"error: the Python packages of {lock.name} could not be installed\n"
            "  hint: see pip's lines above; PIP_PROXY and PIP_INDEX_URL name a proxy and an index"
        )
    except OSError as error:
        sys.exit(
            f"error: cannot make {root}/.venv: {error.strerror}\n  hint: check owner and space of {root}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[1], sys.argv[2]))
