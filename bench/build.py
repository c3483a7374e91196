"""Whole builds in ratios: ours and the classic recipe in turn, on the same package list and mirror.

cold       nothing cached, to the raw disk                     wanted: at most 0.27 of the classic recipe
small      the same in 1 GiB of memory                         wanted: at most 1.6 of the plain one
nothing    nothing changed                                     wanted: under 0.35 s beside the mirror's answer
overlay    one file of the overlay changed, to the raw disk    wanted: at most 0.06 of the classic recipe
update     one package of the lock is a newer one              wanted: at most 0.17 of the classic recipe
start      `./inv --help`                                      wanted: under 0.4 s
mkosi      the same packages into a folder, with --mkosi       wanted: cold is at most 0.32 of it
Beside the seconds stand the memory that a run took at its peak, and what it wrote (MiB).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from build.engine.settings import Settings, load  # noqa: E402  the path above comes first

WANTED = {"cold": 0.27, "overlay": 0.06, "update": 0.17}
"""Of the classic recipe."""
SIZE = "size=2000"
"""MiB of the disk; the definition's own is larger, and a larger disk takes the classic recipe longer only."""
RENEWED = "openssl"
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--mkosi", help="mkosi of Debian 13 or newer, or of its own repository")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        return report(measure(Path(folder), asked.pairs, asked.mkosi))


def measure(folder: Path, pairs: int, mkosi: str | None) -> dict[str, list[float]]:
    """Seconds of each run, ours and the classic one in turn.

    Each turn has a LOCATION of its own, and nothing is removed in between: where many files were removed,
    ext4 makes new ones slowly for minutes.
    """
    seconds: dict[str, list[float]] = {}
    for turn in range(pairs):
        place = folder / str(turn)
        config = place / "config"
        shutil.copytree(CHECKOUT / "config", config, symlinks=True)
        settings = load(config / "systemvm.yaml", {}, overrides=[SIZE]).settings
        location = place / "location"
        flags = ("--image", str(config / "systemvm.yaml"), "--set", f"location={location}", "--set", SIZE)
        told = {"start": started(), "cold": inv("build", *flags)}
        told["nothing"] = inv("build", *flags)
        told["mirror"] = inv("resolve", *flags)
        (config / "rootfs/etc/bench").write_text(f"{turn}\n", encoding="utf-8")
        told["overlay"] = inv("build", *flags)
        inv("lock", *flags)
        renew(config / "systemvm.amd64.lock", location / "debs", place)
        told["update"] = inv("build", "--frozen", *flags)
        (config / "systemvm.amd64.lock").unlink()
        with little_memory() as prefix:
            if prefix:
                small = ("--set", f"location={place}/small")
                told["small"] = inv("build", *flags, *small, prefix=prefix)
        told["classic"] = classic(settings, sources(location), place / "classic")
        if mkosi:
            told["mkosi"] = with_mkosi(mkosi, settings, location, place / "mkosi")
        print({name: round(value, 2) for name, value in told.items()}, flush=True)
        for name, value in told.items():
            seconds.setdefault(name, []).append(value)
    return seconds


def inv(*arguments: str, prefix: Sequence[str] = ()) -> float:
    """Run one command line; returns its wall time in seconds, and says what else it took."""
    lowest, ended = [available()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            lowest[0] = min(lowest[0], available())

    before, written = available(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    line = [*prefix, sys.executable, "-m", "invoke", *arguments]
    done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    ended.set()
    watcher.join()
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    written = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock - written
    took = f"memory {(before - lowest[0]) // MIB} MiB, written {written * 512 // MIB} MiB"
    print(f"{arguments[0]:<9} {seconds:6.2f} s  {took}", flush=True)
    return seconds


def started() -> float:
    """Seconds until the launcher has shown its help."""
    begin = time.monotonic()
    subprocess.run([CHECKOUT / "inv", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - begin


def available() -> int:
    """Bytes of memory that are to be had."""
    found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.M)
    return int(found[1]) * 1024 if found else 0


@contextmanager
def little_memory() -> Iterator[list[str]]:
    """A command line's beginning that leaves it 1 GiB; nothing where no control group can be made."""
    for base, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(base, f"bench-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / limit).exists():
                continue
            (group / limit).write_text(str(1 << 30), encoding="ascii")
            yield ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh"]
            return
        finally:
            group.rmdir()
    print("small: no control group can be made here")
    yield []


def renew(lock: Path, debs: Path, folder: Path) -> None:
    """Put a package into the lock and the store that has another version, and is the same otherwise."""
    text = lock.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"package {RENEWED} ")).split()
    version = row[2]
    (old,) = debs.glob(f"{RENEWED}_*")
    tree = folder / "renewed"
    subprocess.run(["dpkg-deb", "--raw-extract", old, tree], check=True)
    control = tree / "DEBIAN/control"
    newer = f"{version}+bench1"
    control.write_text(
        control.read_text(encoding="utf-8").replace(f"Version: {version}\n", f"Version: {newer}\n"),
        encoding="utf-8",
    )
    made = debs / f"{RENEWED}_{newer.replace(':', '%3a')}_{row[3]}.deb"
    subprocess.run(["dpkg-deb", "--build", tree, made], check=True, stdout=subprocess.DEVNULL)
    data = made.read_bytes()
    path = f"{row[8].rpartition('/')[0]}/{made.name}"
    fresh = [
        *row[:2],
        newer,
        *row[3:5],
        str(len(data)),
        hashlib.sha256(data).hexdigest(),
        row[7],
        path,
        *row[9:],
    ]
    lock.write_text(text.replace(" ".join(row), " ".join(fresh)), encoding="utf-8")


def sources(location: Path) -> tuple[str, str]:
    """Mirror and security mirror as the finished image's own sources list names them."""
    lines = sources_file(location).read_text(encoding="utf-8").splitlines()
    found = [line.split()[1] for line in lines if line[:5] == "URIs:"]
    return found[0], found[-1]


def sources_file(location: Path) -> Path:
    """The image's own sources list."""
    return next(location.glob("cache/*/debootstrap-*/tree/etc/apt/sources.list.d/debian.sources"))


def classic(settings: Settings, mirrors: Sequence[str], folder: Path) -> float:
    """Run the classic recipe; answers its own count of seconds."""
    folder.mkdir()
    script = CHECKOUT / "bench" / "classic.sh"
    given = (settings.suite, settings.arch, *mirrors, str(max(settings.size, 4000)), str(folder))
    line = ["bash", str(script), *given, *settings.package_list]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return float(json.loads(done.stdout)["total"])


def with_mkosi(program: str, settings: Settings, location: Path, folder: Path) -> float:
    """Have mkosi install the same packages from the same mirror; returns its wall time in seconds.

    It stops where the tree is done: no disk, no initramfs.
    """
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    print(version.strip(), flush=True)
    sources_list = folder / "sandbox/etc/apt/sources.list.d/mkosi.sources"
    for part in (sources_list.parent, *(folder / name for name in ("empty", "out", "work", "cache"))):
        part.mkdir(parents=True)
    shutil.copy(sources_file(location), sources_list)
    line = [program, "--distribution=debian", f"--release={settings.suite}", "--format=directory"]
    line += ["--bootable=no", f"--sandbox-tree={folder}/sandbox", f"--output-directory={folder}/out"]
    line += [f"--workspace-directory={folder}/work", f"--package-cache-directory={folder}/cache"]
    line += [*(f"--package={name}" for name in settings.package_list), "build"]
    started = time.monotonic()
    done = subprocess.run(line, cwd=folder / "empty", capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return time.monotonic() - started


def report(seconds: dict[str, list[float]]) -> int:
    """Print the median of the pairs' ratios; the status tells whether all are within what is wanted."""
    rows = [(name, "classic", wanted, "of the classic recipe") for name, wanted in WANTED.items()]
    if "mkosi" in seconds:
        rows.append(("cold", "mkosi", 0.32, "of mkosi's tree"))
    if "small" in seconds:
        rows.append(("small", "cold", 1.6, "of the plain build"))
    good = True
    for name, other, wanted, of in rows:
        pairs = zip(seconds[name], seconds[other], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        good &= ratio <= wanted
        print(f"{name:<8} {ratio:.3f} {of} (wanted: at most {wanted})")
    pairs = zip(seconds["nothing"], seconds["mirror"], strict=True)
    beside = statistics.median(whole - mirror for whole, mirror in pairs)
    start = statistics.median(seconds["start"])
    print(f"nothing  {beside:.2f} s beside the mirror's answer (wanted: under 0.35)")
    print(f"start    {start:.2f} s (wanted: under 0.4)")
    return not (good and beside < 0.35 and start < 0.4)


if __name__ == "__main__":
    sys.exit(main())
