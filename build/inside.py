"""A tree as the root of a program of ours: the links in it lead where they lead in the image.

Shared by programs of steps, which bring it along.
"""

from __future__ import annotations

import os
import sys


def enter(root: str) -> None:
    """Make the tree the root of this program's files; needs root's right to chroot(2)."""
    os.chroot(root)
    os.chdir("/")
    # What were imported from now on would be the tree's, and run as root of the build host.
    sys.path.clear()
