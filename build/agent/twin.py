"""The second build of `inv repro`: runs it with other surroundings, and says where its bytes differ.

Run as a program, `twin.py FOLDER`: the request of the verb as JSON on stdin, the answer as JSON on stdout. As
root it is in a mount and a UTS namespace of its own, so that whatever it changes goes with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from build import wire
from build.agent import content, memory, process
from build.wire import Repro

CHECKOUT = Path(__file__).resolve().parents[2]
ROOM = 4
"""Times an image's size that memory must have for a LOCATION in it."""
BLOCK = 4096
OTHER_MINORS = (13, 12, 14, 11)
"""Of Python 3, as they are looked for."""


@dataclass
class Second:
    """How the second build is to be run; a surrounding changes this."""

    order: Repro
    folder: Path
    python: str = sys.executable
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    umask: int = 0o022
    settings: dict[str, str] = field(default_factory=dict)


class Unchanged(Exception):
    """Why a surrounding stays as it is."""


def _folder(second: Second) -> str:
    second.settings["mountpoint"] = f"/mnt/{'other-' * 3}place"
    return f"{second.folder} and {second.settings['mountpoint']}"


def _file_system(second: Second) -> str:
    _root()
    needed = ROOM * Path(second.order.image).stat().st_size
    if memory.available() < needed:
        raise Unchanged(f"a LOCATION in memory needs {needed >> 20} MiB")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "twin", str(second.folder)], check=True)
    return "tmpfs"


def _umask(second: Second) -> str:
    before = os.umask(0o022)
    second.umask = 0o022 if before == 0o077 else 0o077
    return f"{second.umask:03o}, not {before:03o}"


def _locale(second: Second) -> str:
    known = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout.split()
    now = process.environment()["LC_ALL"]
    far = [name for name in known if name.startswith(("tr_TR", "de_", "fr_")) and "utf" in name.lower()]
    other = next(iter([*far, "C" if "utf" in now.lower() else "C.UTF-8"]))
    second.environment |= {"LC_ALL": other, "LANG": other, "LANGUAGE": "tr:de"}
    return f"{other}, not {now}"


def _zone(second: Second) -> str:
    second.environment["TZ"] = "XXX-13:45"
    return "13:45 hours ahead of UTC"


def _cpus(second: Second) -> str:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        raise Unchanged("this machine has one")
    second.prefix = ["taskset", "--cpu-list", str(max(allowed)), *second.prefix]
    return f"1, not {len(allowed)}"


def _host_name(second: Second) -> str:
    _root()
    before = socket.gethostname()
    socket.sethostname("another-host")
    return f"another-host, not {before}"


def _python(second: Second) -> str:
    found = next(_other_pythons(), None)
    if not found:
        raise Unchanged("no other minor version from 3.11 on is here")
    name, version = found
    aside, lock = second.folder / ".venv", CHECKOUT / "requirements.lock"
    fill = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "from build.engine import venv; venv.fill(Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    argv = [name, "-I", "-B", "-c", fill, str(CHECKOUT), str(aside), str(lock)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise Unchanged(f"no packages for {name}: {last[:80]}")
    second.python = str(aside / "bin/python")
    return f"{version}, not {sys.version.split()[0]}"


def _other_pythons() -> Iterator[tuple[str, str]]:
    """Interpreters of another minor version that answer, and what they say that they are."""
    places = [*os.get_exec_path(), *glob(os.path.expanduser("~/.pyenv/versions/*/bin"))]
    for minor in OTHER_MINORS:
        for name in (f"{place}/python3.{minor}" for place in places):
            if minor == sys.version_info.minor or not os.access(name, os.X_OK):
                continue
            ask = "import ensurepip, platform; print(platform.python_version())"
            done = subprocess.run([name, "-I", "-c", ask], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                yield name, done.stdout.strip()


def _user(second: Second) -> str:
    _root()
    named = [line.split(":")[0] for line in Path("/etc/subuid").read_text().splitlines() if ":" in line]
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    users = [known[name] for name in named if name in known and known[name].pw_uid]
    if not users:
        raise Unchanged("nobody but root has sub-ids here")
    user = users[0]
    become = [
        *("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"),
        *("--inh-caps=-all",),
    ]
    program = str(CHECKOUT / "build/agent/__main__.py")
    for needed in (second.python, program, f"{second.folder}/."):
        if subprocess.run([*become, "test", "-r", needed], check=False).returncode:
            raise Unchanged(f"{user.pw_name} cannot read {needed}")
    home = second.folder / "home"
    home.mkdir()
    for path in (second.folder, home):
        os.chown(path, user.pw_uid, user.pw_gid)
    second.prefix += become
    second.environment |= {"HOME": str(home), "USER": user.pw_name, "LOGNAME": user.pw_name}
    return f"{user.pw_name}, not root"


CHANGES: Mapping[str, Callable[[Second], str]] = {
    "folder": _folder,
    "file-system": _file_system,
    "umask": _umask,
    "locale": _locale,
    "zone": _zone,
    "cpus": _cpus,
    "host-name": _host_name,
    "python": _python,
    "user": _user,
}
"""Each says what it made of its surrounding, or raises Unchanged."""


def _root() -> None:
    if os.geteuid():
        raise Unchanged("only root can change it")


def surround(second: Second) -> tuple[dict[str, str], dict[str, str]]:
    """Change what is to be; returns what was made of it, and why of others nothing was."""
    varied, kept = {}, {}
    second.folder.chmod(0o755)
    for name in wire.SURROUNDINGS:
        if name not in second.order.vary:
            continue
        try:
            varied[name] = CHANGES[name](second)
        except Unchanged as why:
            kept[name] = str(why)
    return varied, kept


def build(second: Second) -> Path:
    """Run the second build; returns its LOCATION. Raises CalledProcessError."""
    location = second.folder / "location"
    location.mkdir()
    shutil.copytree(f"{second.order.place.location}/resolutions", location / "resolutions")
    debs = location / "debs"
    if os.geteuid() == 0:
        debs.mkdir()
        subprocess.run(["mount", "--bind", f"{second.order.place.location}/debs", str(debs)], check=True)
        owner = os.stat(second.folder)
        for path in (location, *location.glob("resolutions/**/*"), location / "resolutions"):
            os.chown(path, owner.st_uid, owner.st_gid)
    else:
        debs.symlink_to(f"{second.order.place.location}/debs")
    # A setting's name behind a `$` would be filled in.
    settings = {**second.settings, "location": str(location).replace("$", "$$"), "imageloc": ""}
    own = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words = process.tied([second.python, "-m", "invoke", *second.order.line, *own])
    environment = {**process.environment(second.order.environment), **second.environment}
    subprocess.run(
        [*second.prefix, *words],
        cwd=CHECKOUT,
        env=environment,
        umask=second.umask,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        check=True,
    )
    return location


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(order: Repro, location: Path) -> Iterator[wire.Compared]:
    """Each file with its SHA-256, whether it is the same, and where not."""
    image = Path(order.image)
    pairs = [
        (image, location / image.name),
        *((Path(order.place.location, n), location / n) for n in order.files),
    ]
    for ours, theirs in pairs:
        one, other = digest(ours), digest(theirs)
        why = () if one == other else tuple(explain(order, ours, theirs, location))
        yield wire.Compared(ours.name, one == other, one, why)


def explain(order: Repro, ours: Path, theirs: Path, location: Path) -> Iterator[str]:
    """Say where two files differ first, and which files of the tree are behind it."""
    if ours.stat().st_size != theirs.stat().st_size:
        yield f"{theirs.stat().st_size} bytes, not {ours.stat().st_size}"
    place = first_difference(ours, theirs)
    yield f"first at byte {place:#x}"
    if ours == Path(order.image):
        yield from layers(order, location)
        yield from structure(ours, place)
    elif digest(Path(order.image)) == digest(location / Path(order.image).name):
        yield "of the same disk: the writer of this format differs"


def first_difference(ours: Path, theirs: Path) -> int:
    """Offset of the first byte that differs, or that only one of them has."""
    place = 0
    with ours.open("rb") as one, theirs.open("rb") as other:
        while True:
            a, b = one.read(1 << 20), other.read(1 << 20)
            if a != b:
                return place + next(
                    (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
                )
            if not a:
                return place
            place += len(a)


def layers(order: Repro, location: Path) -> Iterator[str]:
    """Which files of which step differ, and the packages that they are of."""
    base = Path(order.store, order.layers[0][1], "tree")
    for step, key in order.layers:
        mine = Path(order.store, key)
        for other in location.glob(f"cache/*/{key}"):
            try:
                one, two = (content.listed(f"{layer}/content") for layer in (mine, other))
            except OSError:
                yield f"step {step}: what its layer holds is not listed yet"
                continue
            names = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
            for name in names[:10]:
                yield f"step {step}: {name}{owner(base, name)}"
                yield from deeper(mine / f"tree{name}", other / f"tree{name}")
            if names[10:]:
                yield f"step {step}: and {len(names) - 10} more"
            if names:
                return


def owner(base: Path, name: str) -> str:
    """The package that a file is of, in brackets; empty where dpkg knows none."""
    wanted = f"{name}\n"
    for file in sorted((base / "var/lib/dpkg/info").glob("*.list")):
        if wanted in file.read_text(encoding="utf-8", errors="replace"):
            return f" ({file.stem.partition(':')[0]})"
    return ""


def deeper(ours: Path, theirs: Path) -> Iterator[str]:
    """What diffoscope says of two files, where it is installed."""
    if shutil.which("diffoscope") and ours.is_file() and theirs.is_file():
        argv = ["diffoscope", "--max-diff-block-lines=10", "--max-report-size=4000", str(ours), str(theirs)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
        yield from (f"  {line}" for line in done.stdout.splitlines()[:20])


def structure(image: Path, place: int) -> Iterator[str]:
    """What of a raw disk a byte belongs to."""
    told = subprocess.run(["sfdisk", "--json", str(image)], capture_output=True, text=True, check=False)
    table = json.loads(told.stdout)["partitiontable"]["partitions"] if not told.returncode else []
    for row in table:
        start, size = row["start"] * 512, row["size"] * 512
        if not start <= place < start + size:
            continue
        yield f"in partition {row.get('name') or row['node']}, {place - start:#x} bytes behind its start"
        yield from _inode(image, start, place)
        return
    yield "outside of all partitions: boot code or partition table"


def _inode(image: Path, start: int, place: int) -> Iterator[str]:
    block = (place - start) // BLOCK
    found = _debugfs(f"icheck {block}", image, start).splitlines()
    words = found[-1].split() if found else []
    if len(words) == 2 and words[1].isdigit():
        named = _debugfs(f"ncheck {words[1]}", image, start).splitlines()
        yield f"block {block}, of {' '.join(named[-1].split()[1:]) if len(named) > 1 else 'an inode'}"
    elif found:
        yield f"block {block}: of no file, so of the file system itself"


def _debugfs(request: str, image: Path, start: int) -> str:
    argv = ["debugfs", "-R", request, f"{image}?offset={start}"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def main() -> None:
    """Do what stdin says."""
    order = wire.load(Repro, json.load(sys.stdin))
    second = Second(order, Path(sys.argv[1]))
    varied, kept = surround(second)
    try:
        location = build(second)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 1)
    print(json.dumps(wire.dump(wire.Reproduced(varied, kept, tuple(compare(order, location))))))


if __name__ == "__main__":
    main()
