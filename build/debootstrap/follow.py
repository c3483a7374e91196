"""Follow dpkg's --status-fd on stdin: true progress for the bar, and the first package that failed.

    follow.py LABEL TOTAL FOLDER

FOLDER gets `failed`, `PACKAGE: MESSAGE` of the first that fails, and `configured`, the names of all that are
through; several runs of dpkg add to it.

Source of the lines' form: dpkg(1), --status-fd.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """Read to the end."""
    label, total, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    failed, configured = folder / "failed", folder / "configured"
    done = set(configured.read_text(encoding="utf-8").split("\n") if configured.exists() else ())
    for line in sys.stdin:
        kind, _, rest = line.rstrip("\n").partition(": ")
        package, _, state = rest.partition(": ")
        if kind != "status":
            continue
        if state == "installed" and package not in done:
            done.add(package)
            os.write(3, f"progress\t{label}\t{min(len(done), total)}\t{total}\n".encode())
        elif state.startswith("error") and not failed.exists():
            failed.write_text(
                f"{package.strip()}: {state.removeprefix('error : ').strip()}\n", encoding="utf-8"
            )
    configured.write_text("\n".join(sorted(done)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
