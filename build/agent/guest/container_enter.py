"""Run a command in a container, behind the same fence as its init: container_enter.py PID COMMAND...

PID is the init's. Unlike nsenter(1) this gives up what the init has given up, enters as root of whatever
user namespace it is, and does not stop when the command is stopped: a container that powers off stops all
its processes, and waits for those that nobody reaps. Ends as the command does; 128 and the signal's number
when one killed it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from build.agent import enter
from build.agent.guest import container_init

SPACES = ("user", "mnt", "pid", "net", "uts", "ipc", "cgroup")
"""The user namespace first: it gives the right to enter the others."""


def _join(pid: str) -> None:
    """Enter the namespaces of a process and take its root."""
    enter.close_descriptors(())  # those of ours end with the command's beginning
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY)
    for space in [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in SPACES]:
        enter.call("setns", space, 0)
    os.fchdir(root)
    os.chroot(".")


def _become(command: Sequence[str]) -> NoReturn:
    try:
        os.setgroups(())
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        container_init.give_up()
        os.execvp(command[0], list(command))
    except OSError as error:
        print(f"container_enter.py: {error}", file=sys.stderr, flush=True)
    os._exit(enter.CANNOT)


def main(pid: str, command: Sequence[str]) -> int:
    """Run the command and return its status."""
    try:
        sys.path.clear()  # what were imported now would be the tree's
        _join(pid)
    except OSError as error:
        print(f"container_enter.py: {error}", file=sys.stderr, flush=True)
        return enter.CANNOT
    child = os.fork()
    if not child:
        _become(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
