"""Whole builds in ratios: ours and the classic recipe in turn, on the same package list and mirror.

cold       nothing cached, to the raw disk                     wanted: at most 0.45 of the classic recipe
nothing    nothing changed                                     wanted: under 1 s beside the mirror's answer
overlay    one file of the overlay changed, to the raw disk    wanted: at most 0.08 of the classic recipe
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from build.engine.settings import Settings, load  # noqa: E402  the path above comes first

WANTED = {"cold": 0.45, "overlay": 0.08}
SIZE = "size=2000"
"""MiB of the disk; the definition's own is larger, and a larger disk takes the classic recipe longer only."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        return report(measure(Path(folder), asked.pairs))


def measure(folder: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds of each run, ours and the classic one in turn."""
    config = folder / "config"
    shutil.copytree(CHECKOUT / "config", config, symlinks=True)
    settings = load(config / "systemvm.yaml", {}, overrides=[SIZE]).settings
    seconds: dict[str, list[float]] = {"classic": [], "cold": [], "overlay": [], "nothing": [], "mirror": []}
    for turn in range(pairs):
        location = folder / "location"
        flags = ("--image", str(config / "systemvm.yaml"), "--set", f"location={location}", "--set", SIZE)
        seconds["cold"].append(inv("build", *flags))
        seconds["nothing"].append(inv("build", *flags))
        seconds["mirror"].append(inv("resolve", *flags))
        (config / "rootfs/etc/bench").write_text(f"{turn}\n", encoding="utf-8")
        seconds["overlay"].append(inv("build", *flags))
        mirrors = sources(location)
        inv("clean", "--all", *flags)
        (config / "rootfs/etc/bench").unlink()
        seconds["classic"].append(classic(settings, mirrors, folder / "classic"))
        print({name: round(values[-1], 1) for name, values in seconds.items()}, flush=True)
    return seconds


def inv(*arguments: str) -> float:
    """Run one command line; answers its wall time in seconds."""
    started = time.monotonic()
    line = [sys.executable, "-m", "invoke", *arguments]
    done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - started


def sources(location: Path) -> tuple[str, str]:
    """Mirror and security mirror as the finished image's own sources list names them."""
    (listed,) = location.glob("cache/*/debootstrap-*/tree/etc/apt/sources.list.d/debian.sources")
    found = [
        line.split()[1] for line in listed.read_text(encoding="utf-8").splitlines() if line[:5] == "URIs:"
    ]
    return found[0], found[-1]


def classic(settings: Settings, mirrors: Sequence[str], folder: Path) -> float:
    """Run the classic recipe; answers its own count of seconds."""
    folder.mkdir()
    script = CHECKOUT / "bench" / "classic.sh"
    given = (settings.suite, settings.arch, *mirrors, str(max(settings.size, 4000)), str(folder))
    line = ["bash", str(script), *given, *settings.package_list]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    shutil.rmtree(folder)
    return float(json.loads(done.stdout)["total"])


def report(seconds: dict[str, list[float]]) -> int:
    """Print the median of the pairs' ratios; the status tells whether all are within what is wanted."""
    good = True
    for name, wanted in WANTED.items():
        ratio = statistics.median(
            ours / theirs for ours, theirs in zip(seconds[name], seconds["classic"], strict=True)
        )
        good &= ratio <= wanted
        print(f"{name:<8} {ratio:.3f} of the classic recipe (wanted: at most {wanted})")
    beside = statistics.median(
        whole - mirror for whole, mirror in zip(seconds["nothing"], seconds["mirror"], strict=True)
    )
    good &= beside < 1
    print(f"nothing  {beside:.2f} s beside the mirror's answer (wanted: under 1)")
    return not good


if __name__ == "__main__":
    sys.exit(main())
