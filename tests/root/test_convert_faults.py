"""Conversion that is killed, runs out of space or memory: no half file under a final name."""

from __future__ import annotations

import bz2
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.verbs import inspect
from build.formats.lib.errors import Unsupported
from tests.disks import EPOCH, MIB, ask, make, spec, usual

pytestmark = pytest.mark.root

CHECKOUT = Path(__file__).resolve().parents[2]
RUN = r"""
import json, re, sys
sys.path.insert(0, sys.argv[1])
from build.agent import verbs
from build.agent.events import Failure, emit
try:
    verbs.call("convert", json.loads(sys.argv[2]), emit)
except Failure as failure:
    emit("failure", failure=failure.message, hint=failure.hint)
emit("end", peak=int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]))
"""


def start(disk: Path, outdir: Path, specs: list[dict[str, Any]]) -> subprocess.Popen[str]:
    """Convert in a process of its own that tells its progress line by line."""
    request = {"image": str(disk), "outdir": str(outdir), "formats": specs, "identity": "x", "epoch": EPOCH}
    argv = [sys.executable, "-c", RUN, str(CHECKOUT), json.dumps(request)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def lines(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert child.stdout is not None
    return (json.loads(line) for line in child.stdout)


def finished(disk: Path, outdir: Path, specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert to the end, in a process of its own; answers all it told."""
    with start(disk, outdir, specs) as child:
        return list(lines(child))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


SPECS = [spec("vhd", "bz2"), spec("qcow2"), spec("ova"), spec("vhdx")]


@pytest.mark.parametrize("number", range(8))
def test_killed_at_any_moment(number: int, tmp_path: Path) -> None:
    kill(number, tmp_path)


@pytest.mark.soak(60)
def test_killed_at_many_moments(seed: int, tmp_path: Path) -> None:
    for number in random.Random(seed).sample(range(1 << 16), 30):
        (tmp_path / str(number)).mkdir()
        kill(number, tmp_path / str(number))


def kill(number: int, tmp_path: Path) -> None:
    """Kill a conversion at a moment drawn from the number: what has a name is whole, a second run works."""
    disk, out = usual(tmp_path / "disk.img", 64 * MIB), tmp_path / "out"
    ask(disk, out, [spec("vhdx")])
    earlier = (out / "vhdx.vhdx").read_bytes()
    with open(disk, "r+b") as file:
        file.seek(20 * MIB)
        file.write(b"another build")
    stop_after = random.Random(number).randrange(1, 60)
    with start(disk, out, SPECS) as child:
        for said, _ in enumerate(lines(child)):
            if said == stop_after:
                child.send_signal(signal.SIGKILL)
                break
    for name in (row["file"] for row in SPECS):
        path = out / str(name)
        if path.exists() and path.read_bytes() != earlier:
            assert (out / f"{name}.json").exists() or path.stat().st_size > 0
            _assert_whole(path)
    told = ask(disk, out, SPECS)
    assert {row["file"] for row in told["files"]} == {row["file"] for row in SPECS}
    assert not [name for name in names(out) if name.startswith(".")]
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)


def _assert_whole(path: Path) -> None:
    seen = inspect.run(wire.Inspect(str(path), str(path.parent)), lambda kind, **fields: None)
    assert [finding for finding in seen.findings if finding.severity == "error"] == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_no_space_left(small: Path, tmp_path: Path) -> None:
    first = usual(tmp_path / "first.img", 8 * MIB)
    ask(first, small, [spec("qcow2")])
    earlier = {name: (small / name).read_bytes() for name in names(small)}
    disk = make(tmp_path / "disk.img", 64 * MIB, [(0, 60 * MIB, "noise")])
    told = [row for row in finished(disk, small, [spec("qcow2"), spec("vhd")]) if "failure" in row]
    assert "no space left" in told[0]["failure"]
    assert "free some space" in told[0]["hint"]
    assert {name: (small / name).read_bytes() for name in names(small)} == earlier


def test_no_space_left_for_the_outer_file(small: Path, tmp_path: Path) -> None:
    disk = make(tmp_path / "disk.img", 16 * MIB, [(0, 15 * MIB, "noise")])
    told = [row for row in finished(disk, small, [spec("raw", "bz2")]) if "failure" in row]
    assert "no space left" in told[0]["failure"]
    assert names(small) == set()


def test_what_is_inside_a_compression_is_larger_than_what_is_free(small: Path, tmp_path: Path) -> None:
    """Nothing is left of it, what others need was never taken, and the error names how much it would take."""
    packed = tmp_path / "disk.raw.bz2"
    packed.write_bytes(bz2.compress(random.Random(1).randbytes(30 * MIB), 1))
    free = os.statvfs(small).f_bavail
    with pytest.raises(Unsupported, match=r"takes 30\.0 MiB, and there is room for 22\.5 MiB"):
        inspect.run(wire.Inspect(str(packed), str(small)), lambda kind, **fields: None)
    assert os.statvfs(small).f_bavail == free
    holes = tmp_path / "holes.raw.bz2"
    holes.write_bytes(bz2.compress(bytes(100 * MIB) + b"x", 1))
    assert inspect.run(wire.Inspect(str(holes), str(small)), lambda kind, **fields: None).format == "raw"


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    disk = usual(tmp_path / "disk.img", 8 * MIB)
    told = finished(disk, tmp_path / "out", [spec("raw")])
    assert any("File exists" in row.get("failure", "") for row in told)


def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    """All formats at once, of a disk with more data than the bound."""
    disk = make(
        tmp_path / "disk.img", 600 * MIB, [(MIB * 10, 500 * MIB, "text"), (520 * MIB, 40 * MIB, "noise")]
    )
    told = finished(disk, tmp_path / "out", [spec(name) for name in ("vhd", "vhdx", "qcow2", "ova")])
    assert told[-1]["peak"] < 300 * 1024
