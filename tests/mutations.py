"""Ten faults put into a copy of the product, each of which the tests named beside it must catch.

    .venv/bin/python -m tests.mutations                 all of them; minutes each
    .venv/bin/python -m tests.mutations fence sealed    some of them

One a kind of fault that the rings are there for (docs/tests.md). Ends with 1 when a fault goes unnoticed, or
when its place in the code is not found any more.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests import checkout


class Mutation(NamedTuple):
    """A fault: what of a file becomes what, and the tests that catch it (arguments of pytest)."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = {
    "fence": Mutation(
        "build/agent/enter.py",
        '    "SETFCAP": 31,',
        '    "SYS_ADMIN": 21,\n    "SETFCAP": 31,',
        ("tests/root/test_hostile_package.py", "-k", "no_script_gets_out and root and builtin"),
    ),
    "other tool": Mutation(
        "build/debootstrap/unpack.py",
        "        os.utime(target, (int(info.mtime), int(info.mtime)), follow_symlinks=False)\n",
        "        os.utime(target, (0, 0), follow_symlinks=False)\n",
        ("tests/root/test_bootstrap.py", "-k", "same_tree"),
    ),
    "killed": Mutation(
        "build/agent/process.py",
        '["setpriv", "--pdeathsig", "KILL", "--", "sh"',
        '["setpriv", "--", "sh"',
        ("tests/root/test_kill.py", "-k", "nothing_is_left"),
    ),
    "sealed": Mutation(
        "build/seal/seal.py",
        '    _write("etc/machine-id", b"", 0o444)\n',
        '    _write("etc/machine-id", os.urandom(16).hex().encode(), 0o444)\n',
        ("tests/root/test_build.py", "-k", "without_minimize"),
    ),
    "same bytes": Mutation(
        "build/disk/inodes.py",
        "    (now, now_extra), (then, then_extra) = _time(epoch), _time(changed)\n",
        "    (now, now_extra), (then, then_extra) = _time(entry.changed), _time(changed)\n",
        ("tests/root/test_disk.py", "-k", "built_otherwise or hard_to_keep"),
    ),
    "trusted": Mutation(
        "build/agent/store.py",
        '        elif (now["entries"], now["digest"]) != (told["entries"], told["digest"]):\n',
        '        elif now["entries"] != told["entries"]:\n',
        ("tests/root/test_cache.py", "-k", "was_changed_is_made_again"),
    ),
    "format": Mutation(
        "build/formats/lib/vhd.py",
        "    track = 17\n",
        "    track = 18\n",
        ("tests/unit/test_formats_vhd.py", "tests/root/test_convert.py", "-k", "vhd"),
    ),
    "cut off": Mutation(
        "build/agent/__main__.py",
        "            if time.monotonic() - heard > patience:\n",
        "            if time.monotonic() - heard > 100 * patience:\n",
        ("tests/remote/test_cuts.py", "-k", "no_network or network"),
    ),
    "planted": Mutation(
        "build/engine/hosts/probe.py",
        "    if status.st_uid not in (os.getuid(), 0 if roots_too else os.getuid()):\n",
        "    if status.st_uid < 0:\n",
        ("tests/remote/test_packs.py", "-k", "somebody"),
    ),
    "guest": Mutation(
        "config/rootfs/usr/local/lib/systemvm/setup.py",
        'listen = f"ListenAddress {nic.address.ip}" if nic.address and own else',
        'listen = "" if nic.address and own else',
        ("tests/root/test_system_vms.py", "-k", "comes_up and consoleproxy"),
    ),
}


def is_caught(name: str, mutation: Mutation) -> bool:
    """Whether the tests fail on a copy of the checkout with the fault in it."""
    with tempfile.TemporaryDirectory(prefix="systemvm-mutation-") as folder:
        Path(folder).chmod(0o755)
        copy = checkout.copied(Path(folder))
        checkout.replace(copy / mutation.file, mutation.old, mutation.new)
        argv = [str(copy / ".venv/bin/python"), "-B", "-m", "pytest", "-q", "-x", "-m", "not soak"]
        done = subprocess.run([*argv, *mutation.tests], cwd=copy, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        print(f"{name:12} {'caught' if done.returncode == 1 else 'NOT CAUGHT'}: {last}", flush=True)
        return done.returncode == 1


def main(names: list[str]) -> int:
    """Try the faults of these names, or all."""
    caught = [is_caught(name, MUTATIONS[name]) for name in names or MUTATIONS]
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
