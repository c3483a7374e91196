"""An `inv` that is not of this checkout's `.venv` (Debian's own, say) goes on in the launcher.

The first import of tasks.py. A foreign Python may be older and lacks our libraries: standard
library only, syntax of Python 3.7, nothing imported on the way here.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "INV_HANDED_OVER"


def is_foreign(prefix: str, program: str) -> bool:
    """Whether an Invoke, `program` being its argv[0], runs outside `.venv`; tests import tasks.py too."""
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.name
    return name in ("inv", "invoke") and Path(prefix).resolve() != (ROOT / ".venv").resolve()


def hand_over() -> None:
    """Replace a foreign Invoke by this checkout's launcher, with the same arguments; return in our own."""
    if not is_foreign(sys.prefix, sys.argv[0]):
        os.environ.pop(MARK, None)
        return
    launcher = str(ROOT / "inv")
    if MARK in os.environ:
        sys.exit(f"error: this `inv` is not of the checkout's .venv\n  hint: run {launcher}")
    os.environ[MARK] = "yes"
    sys.stdout.flush()
    os.execv("/bin/sh", ["sh", launcher, *sys.argv[1:]])
