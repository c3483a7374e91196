"""Become an ordinary user with a sub-id range, without touching the host's user table.

A private mount namespace gets its own /etc/passwd, /etc/group, /etc/subuid and /etc/subgid, and a way to
the interpreter, the checkout and the home where they lie below folders that only root may enter.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
NAME, SUBIDS = "builder", "100000:65536"
UID = CHECKOUT.stat().st_uid or 54321
"""Who cloned with umask 077 has a checkout that only he, and root, can read."""


def prefix(
    folder: Path,
    home: Path,
    subids: bool = True,
    more: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    become: bool = True,
) -> list[str]:
    """Command line that runs what follows it as the user; `folder` (root's) holds the tables.

    `more` are tables of /etc by name, and `before` lines that root runs once all is in its place. Without
    `become` the user is there, and root stays who runs it.
    """
    tables = {
        "passwd": f"{NAME}:x:{UID}:{UID}::{home}:/bin/bash\n",
        "group": f"{NAME}:x:{UID}:\n",
        "subuid": f"{NAME}:{SUBIDS}\n" if subids else "",
        "subgid": f"{NAME}:{SUBIDS}\n" if subids else "",
        **(more or {}),
    }
    lines = ["set -eu"]
    for table, own in tables.items():
        real = Path("/etc", table)
        kept = real.read_text(encoding="utf-8") if table in ("passwd", "group") else ""
        (folder / table).write_text(own + kept, encoding="utf-8")
        if not real.exists():
            continue
        lines.append(f"mount --bind {shlex.quote(str(folder / table))} {real}")
    lines += [*ways((Path(sys.base_prefix), CHECKOUT, home)), *before]
    lines.append(
        'exec "$@"'
        if not become
        else f"exec setpriv --reuid {UID} --regid {UID} --clear-groups --inh-caps -all env -i "
        f'HOME={shlex.quote(str(home))} USER={NAME} PATH="$PATH" LANG=C.UTF-8 "$@"'
    )
    script = folder / "as-user.sh"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["unshare", "--mount", "--propagation", "private", "bash", str(script)]


def ways(needed: Iterable[Path]) -> list[str]:
    """Cover each closed folder above what is needed with an open one that holds nothing but the way to it."""
    behind = {path: closed for path in needed if (closed := _closed(path))}
    saved = {path: f"/mnt/{number}" for number, path in enumerate(behind)}
    quoted = {path: shlex.quote(str(path)) for path in behind}
    return [
        "mount -t tmpfs tmpfs /mnt",
        *(f"mkdir {place} && mount --bind {quoted[path]} {place}" for path, place in saved.items()),
        *(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(cover))}" for cover in set(behind.values())),
        *(f"mkdir -p {quoted[path]} && mount --move {place} {quoted[path]}" for path, place in saved.items()),
        "umount /mnt",
    ]


def _closed(path: Path) -> Path | None:
    return next((above for above in reversed(path.parents) if not above.stat().st_mode & 0o001), None)
