"""A build host on loopback: fetching beside `rsync -S` over ssh, of the same file from the same sshd in turn.

raw      a sparse raw disk                       wanted: at least 0.7 of rsync's speed
packed   a compressed file                       wanted: at least 0.7 of rsync's speed
cached   a build of which everything is there    wanted: at most 2 s, with the start of Python and the login

The first two are timed with the opening of their connection, ours without the start of Python.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from bench.convert import options, system_vm  # noqa: E402  found through the line above
from tests import buildhost, cli  # noqa: E402
from tests.buildhost import HOST, Buildhost  # noqa: E402
from tests.images import TINY, link  # noqa: E402

WANTED = 0.7
CACHED = 2.0
OURS = r"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fabric
from invoke import Config
from build.engine.fetch import Artifact, fetch
from build.engine.hosts.host import Host
from build.engine.hosts.ssh import connect
started = time.monotonic()
with connect(sys.argv[2], Config()) as inner:
    host = Host(sys.argv[2], inner)
    fetch(host, Artifact(**json.loads(sys.argv[3])), Path(sys.argv[4]), lambda done, total: None)
    host.close()
print(time.monotonic() - started)
"""


def main() -> int:
    asked = options(__doc__)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=asked.work) as folder:
        top = Path(folder)
        files = {"raw": asked.image or system_vm(top), "packed": top / "disk.gz"}
        with files["packed"].open("wb") as out:
            subprocess.run(["gzip", "-1", "-c", files["raw"]], stdout=out, check=True)
        (top / "host").mkdir()
        with buildhost.running(top / "host") as there:
            ratios = {
                name: [pair(there, file, top) for _ in range(asked.pairs)] for name, file in files.items()
            }
            seconds = cached(there, top, asked.pairs)
    missed = statistics.median(seconds) > CACHED
    for name, values in ratios.items():
        told = statistics.median(values)
        missed = missed or told < WANTED
        verdict = "MISSED" if told < WANTED else "ok"
        print(f"{name:<8} {told:8.2f}   wanted: at least {WANTED:g}   {verdict}")
    verdict = "MISSED" if statistics.median(seconds) > CACHED else "ok"
    print(f"cached   {statistics.median(seconds):8.2f} s wanted: at most {CACHED:g}   {verdict}")
    rows = {**ratios, "cached": seconds}
    print(json.dumps({name: [round(value, 3) for value in values] for name, values in rows.items()}))
    return int(missed)


def cached(there: Buildhost, top: Path, times: int) -> list[float]:
    """Seconds of builds over SSH that find all of the tiny image there."""
    cli.succeed("build", *TINY, "--set", f"location={top / 'tiny'}")
    link(top / "tiny", there.folder / "images/tiny")
    line = ("-H", f"root@{HOST}", "build", *TINY, "--frozen", "--no-fetch")
    seconds = []
    for _ in range(times + 1):  # the first one brings the agent
        started = time.monotonic()
        cli.succeed(*line, "--set", "location=/var/lib/images/tiny", prefix=there.prefix, env=dict(there.env))
        seconds.append(time.monotonic() - started)
    return seconds[1:]


def pair(there: Buildhost, file: Path, top: Path) -> float:
    """Our speed in parts of rsync's."""
    source = there.folder / "images" / file.name
    if not source.exists():
        subprocess.run(["cp", "--sparse=always", file, source], check=True)
    target = top / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    remote, status = f"/var/lib/images/{file.name}", source.stat()
    started = time.monotonic()
    subprocess.run(
        [*there.prefix, "rsync", "-S", f"root@{HOST}:{remote}", target],
        env={**there.env, "PATH": "/usr/bin:/bin"},
        check=True,
    )
    theirs = time.monotonic() - started
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    shutil.rmtree(target)
    artifact = {
        "path": remote,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": digest,
        "manifest": {},
    }
    done = subprocess.run(
        [*there.prefix, sys.executable, "-c", OURS, CHECKOUT, f"root@{HOST}", json.dumps(artifact), target],
        env={**there.env, "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    ours = float(done.stdout.split()[-1])
    print({"rsync": round(theirs, 2), "ours": round(ours, 2)}, flush=True)
    return theirs / ours


if __name__ == "__main__":
    sys.exit(main())
