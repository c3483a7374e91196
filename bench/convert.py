"""Conversion in ratios: ours and `qemu-img convert` in turn, on the same raw disk.

formats    QCOW2, VHD and VMDK in one run, read back and hashed    wanted: at most 0.22 of three qemu-img runs
bz2        outer compression of the VHD, without its read-back     wanted: at most 0.60 of bzip2 on two cores
five       CloudStack's five files in one run                      wanted: at most 0.20 of the classic tools
sizes      each file                                               wanted: at most 1.03 of qemu-img's
cpu        processor time of the first line; over the number of cores, what an idle machine would show
memory     peak of the converting process                          wanted: under 300 MiB
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from build.engine.options import Options  # noqa: E402  the path above comes first
from build.formats import FORMATS  # noqa: E402
from build.verbs.convert import UNKNOWN, descriptor  # noqa: E402

WANTED = {"formats": 0.22, "bz2": 0.60, "five": 0.20, "sizes": 1.03, "memory": 300.0}
"""At most; `cpu` has no bound of its own."""
FIVE = {"vhd": "bz2", "raw": "bz2", "qcow2": "bz2", "hyperv-vhd": "zip", "ova": ""}
"""CloudStack's formats with what is around each."""
QEMU: Mapping[str, Sequence[str]] = {
    "qcow2": ("-c", "-O", "qcow2", "-o", "compat=0.10"),
    "vhd": ("-O", "vpc"),
    "vmdk": ("-O", "vmdk", "-o", "subformat=streamOptimized,adapter_type=lsilogic"),
}
OURS = r"""
import json, re, sys, time
sys.path.insert(0, sys.argv[1])
from build.agent.verbs.convert import run
from build.wire import Convert, load
phases, started = {}, time.monotonic()
def emit(kind, **fields):
    now = time.monotonic()
    first, _ = phases.get(fields["label"], (now, now))
    phases[fields["label"]] = (first, now)
run(load(Convert, json.loads(sys.argv[2])), emit)
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())
print(json.dumps({"phases": {name: b - a for name, (a, b) in phases.items()}, "peak": int(peak[1]) / 1024}))
"""


def options(doc: str) -> argparse.Namespace:
    """Read the command line of a benchmark that works on a raw disk."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--image", type=Path, help="raw disk (default: the full image's, of 2000 MiB)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"))
    return parser.parse_args()


def main() -> int:
    asked = options(__doc__)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=asked.work) as folder:
        image = asked.image or system_vm(Path(folder))
        return report(measure(image, Path(folder), asked.pairs))


def system_vm(folder: Path) -> Path:
    """The full image's raw disk of 2000 MiB, built there: sizes say little about another content."""
    image = folder / "systemvm.img"
    line = [sys.executable, "-m", "invoke", "disk", "--set", "size=2000", "--set", f"imageloc={image}"]
    subprocess.run(line, cwd=CHECKOUT, stdout=subprocess.DEVNULL, check=True)
    return image


def measure(image: Path, folder: Path, pairs: int) -> dict[str, list[float]]:
    """Ratios of every pair: ours against theirs."""
    ratios: dict[str, list[float]] = {
        "formats": [],
        "cpu": [],
        "bz2": [],
        "five": [],
        "sizes": [],
        "memory": [],
    }
    seconds: dict[str, float] = {}
    subprocess.run(["cat", image], stdout=subprocess.DEVNULL, check=True)
    for _ in range(pairs):
        before = processor_time()
        seconds["ours"], told = timed_ours(image, folder, dict.fromkeys(QEMU, ""))
        between = processor_time()
        seconds["qemu"] = 0.0
        for name, options in QEMU.items():
            theirs = folder / f"theirs.{name}"
            seconds[name] = timed("qemu-img", "convert", "-f", "raw", *options, str(image), str(theirs))
            seconds["qemu"] += seconds[name]
            ratios["sizes"].append((folder / f"ours.{name}").stat().st_size / theirs.stat().st_size)
            theirs.unlink()
        ratios["formats"].append(seconds["ours"] / seconds["qemu"])
        ratios["cpu"].append((between - before) / (processor_time() - between))
        seconds["bzip2"] = timed("bzip2", "-k", "-f", str(folder / "ours.vhd"))
        _, wrapped = timed_ours(image, folder, {"vhd": "bz2"})
        seconds["our bz2"] = wrapped["phases"]["compress bz2"]
        seconds["verify bz2"] = wrapped["phases"]["verify bz2"]
        ratios["bz2"].append(seconds["our bz2"] / seconds["bzip2"])
        seconds["five"], packed = timed_ours(image, folder, FIVE)
        seconds["classic"] = classic(image, folder)
        ratios["five"].append(seconds["five"] / seconds["classic"])
        ratios["memory"].append(max(told["peak"], wrapped["peak"], packed["peak"]))
        print({name: round(value, 1) for name, value in seconds.items()}, flush=True)
    return ratios


def classic(image: Path, folder: Path) -> float:
    """Seconds of the same five by the tools of CloudStack's build.sh, one after the other."""
    disk = folder / "classic"
    seconds = 0.0
    for options in (QEMU["vhd"], ("-O", "qcow2", "-o", "compat=0.10"), ("-O", "raw")):
        seconds += timed("qemu-img", "convert", "-f", "raw", *options, str(image), str(disk))
        seconds += timed("bzip2", "-f", str(disk))
    seconds += timed("qemu-img", "convert", "-f", "raw", *QEMU["vhd"], str(image), str(disk))
    seconds += timed(sys.executable, "-m", "zipfile", "-c", f"{disk}.zip", str(disk))
    seconds += timed("qemu-img", "convert", "-f", "raw", *QEMU["vmdk"], str(image), str(disk))
    seconds += timed("tar", "--format=ustar", "-cf", f"{disk}.ova", str(disk))
    for path in folder.glob("classic*"):
        path.unlink()
    return seconds


def timed_ours(image: Path, folder: Path, formats: Mapping[str, str]) -> tuple[float, dict[str, Any]]:
    """Seconds of one run of the verb in a process of its own, and what it told."""
    rows = [row(name, outer) for name, outer in formats.items()]
    request = {
        "image": str(image),
        "outdir": str(folder),
        "formats": rows,
        "identity": "bench",
        "epoch": 0,
        "force": True,
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", OURS, str(CHECKOUT), json.dumps(request)],
        capture_output=True,
        text=True,
        check=True,
    )
    return time.monotonic() - started, json.loads(done.stdout.splitlines()[-1])


def row(name: str, outer: str) -> dict[str, Any]:
    """What the agent is asked for one format, with the options that the client gives."""
    chosen = FORMATS[name]
    options = {**chosen.options, **chosen.kind.options(Options().model_dump(), outer)}
    if chosen.descriptor:
        options["ovf"] = descriptor(chosen.descriptor, "ours", UNKNOWN, Options(), "ours")
    file = f"ours.{name}.{chosen.kind.suffix or name}" if name in FIVE and outer else f"ours.{name}"
    return {
        "name": name,
        "kind": chosen.kind.name,
        "file": f"{file}.{outer}" if outer else file,
        "compress": outer,
        "options": options,
    }


def processor_time() -> float:
    """Seconds that finished children have used, user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(*argv: str) -> float:
    """Seconds of one command."""
    started = time.monotonic()
    subprocess.run(argv, check=True)
    return time.monotonic() - started


def report(ratios: Mapping[str, Sequence[float]]) -> int:
    """Print medians against what is wanted; answers the exit status."""
    failed = False
    for name, values in ratios.items():
        told = max(values) if name in ("sizes", "memory") else statistics.median(values)
        missed = name in WANTED and told > WANTED[name]
        failed = failed or missed
        wanted = (
            f"wanted: at most {WANTED[name]:g}   {'MISSED' if missed else 'ok'}" if name in WANTED else ""
        )
        print(f"{name:<10} {told:8.3f}   {wanted}".rstrip())
    print(json.dumps({name: [round(value, 4) for value in values] for name, values in ratios.items()}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
