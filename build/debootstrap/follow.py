"""Follow dpkg's --status-fd on stdin: true progress for the bar, and the first package that failed.

    follow.py LABEL TOTAL FAILED    FAILED is a file that gets `PACKAGE: MESSAGE` when one fails

Source of the lines' form: dpkg(1), --status-fd.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """Read to the end."""
    label, total, failed = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    done: set[str] = set()
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
