"""Make all that is mounted read-only, in the mount namespace that this runs in: `protect.py WRITABLE`.

WRITABLE, a mount of its own, and what is mounted later stay as they are. A step's programs work on trees that
strangers' scripts have been in: whichever of them follows a link there to the host can change nothing.

Source: mount_setattr(2). Linux has it since 5.12; an older one is told of in the log, and nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

MOUNT_SETATTR = 442  # on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY = 1


def change(path: str, flags: int, set_: int = 0, clear: int = 0) -> None:
    """mount_setattr(2); raises OSError."""
    wanted = struct.pack("4Q", set_, clear, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(path), flags, wanted, len(wanted)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def main(writable: str) -> None:
    """Change the mounts."""
    try:
        change("/", AT_RECURSIVE, set_=MOUNT_ATTR_RDONLY)
    except OSError as error:
        print(f"the host's files stay writable to this step: {error}", file=sys.stderr)
    else:
        change(writable, 0, clear=MOUNT_ATTR_RDONLY)


if __name__ == "__main__":
    main(*sys.argv[1:])
