"""Run a script in mounts and processes of its own, with the tree at MOUNTPOINT.

The kernel cleans up: everything lives in a private mount namespace and a PID namespace whose first
process dies with the agent (process.tied, `unshare --kill-child`). An ordinary user gets the
same through a user namespace that maps his sub-id range.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from build import wire
from build.agent import files, memory, process
from build.agent.events import Emit, Failure

ENTER = Path(__file__).with_name("enter.py")
"""Runs whatever belongs to a tree, in the tree; scripts find it as `$ENTER`."""
PROTECT = Path(__file__).with_name("protect.py")
ROOT_OPTIONS = "redirect_dir=off,metacopy=off,index=off"
USER_OPTIONS = "userxattr"
_NEVER_HIDDEN = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/etc",
    "/dev",
    "/proc",
    "/sys",
    "/run",
    "/tmp",
    "/var",
    "/opt",
)


@dataclass(frozen=True)
class BuildPaths:
    """Where and how trees are built on this host.

    `mode` is `root` or `user` (a user namespace); `overlay` says whether layers stack or are copied.
    """

    location: Path
    mountpoint: Path
    mode: str
    overlay: bool
    keep_visible: tuple[Path, ...] = ()

    @classmethod
    def of(cls, place: wire.BuildPaths) -> BuildPaths:
        """Read the place of a request."""
        visible = tuple(Path(path) for path in place.keep_visible)
        return cls(Path(place.location), Path(place.mountpoint), place.mode, place.overlay, visible)

    @property
    def store(self) -> Path:
        """Layers of this kind; root's, a user's and copied ones never mix."""
        return self.location / "cache" / (self.mode if self.overlay else f"{self.mode}-copy")


@dataclass(frozen=True)
class Tree:
    """What is mounted at MOUNTPOINT: layers (top first), and an upper directory if it may be changed.

    Without layers the upper directory itself is the tree.
    """

    lower: tuple[Path, ...] = ()
    upper: Path | None = None
    work: Path | None = None
    options: str = ""

    def mount(self, place: BuildPaths) -> list[str]:
        """Shell lines that mount it at `$ROOT`."""
        if not self.lower or not place.overlay:
            only = self.upper or self.lower[0]
            lines = [f'mount --bind {shlex.quote(str(only))} "$ROOT"']
            return lines if self.upper else [*lines, 'mount -o remount,bind,ro "$ROOT"']
        # Overlay's option string has no safe way to write ':' and ','; relative names of ours have neither.
        parts = [f"lowerdir={':'.join(os.path.relpath(path, place.store) for path in self.lower)}"]
        if self.upper and self.work:
            parts += [
                f"{kind}={os.path.relpath(path, place.store)}"
                for kind, path in (("upperdir", self.upper), ("workdir", self.work))
            ]
        parts.append(ROOT_OPTIONS if place.mode == "root" else USER_OPTIONS)
        if not self.upper and len(self.lower) == 1:
            return [
                f'mount --bind {shlex.quote(str(self.lower[0]))} "$ROOT"',
                'mount -o remount,bind,ro "$ROOT"',
            ]
        return [
            f"cd {shlex.quote(str(place.store))}",
            f'mount -t overlay -o {shlex.quote(",".join(parts))} overlay "$ROOT"',
            "cd /",
        ]


@dataclass
class Outcome:
    """How a script ended: its status, and what it said on descriptor 3.

    `starved`: meanwhile the kernel killed for lack of memory.
    """

    status: int
    starved: bool = False
    failed: str = ""
    hint: str = ""
    command: str = ""
    notes: list[str] = field(default_factory=list)


USER_NAMESPACE = ("--user", "--map-root-user", "--map-auto")
"""Options of unshare(1) that make this user root over his range of sub-ids."""


def as_owner(place: BuildPaths) -> list[str]:
    """The command line under which this user owns what is in layers; an argv follows."""
    return ["unshare", *USER_NAMESPACE, "--"] if place.mode == "user" else []


def namespaces(mode: str) -> list[str]:
    """The command line that opens the namespaces; a script's argv follows."""
    user = USER_NAMESPACE if mode == "user" else ()
    return [
        "unshare",
        *user,
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--propagation",
        "private",
        "--",
    ]


def mountpoint_lines(place: BuildPaths) -> list[str]:
    """Shell lines that make MOUNTPOINT inside the private namespace; the host never sees it."""
    target = place.mountpoint
    quoted = shlex.quote(str(target))
    visible = [place.location, Path(sys.executable), Path(sys.prefix), Path(__file__), *place.keep_visible]

    def hides(folder: Path) -> Path | None:
        return next((path for path in visible if path == folder or folder in path.parents), None)

    if hidden := hides(target):
        raise Failure(
            f"MOUNTPOINT {target} would hide {hidden}",
            "set MOUNTPOINT to another folder, for example below /mnt",
        )
    if target.is_dir() or place.location in target.parents:
        return [f"mkdir -p {quoted}"]
    above = next(folder for folder in target.parents if folder.is_dir())
    if above == Path("/") or str(above) in _NEVER_HIDDEN or hides(above):
        raise Failure(
            f"MOUNTPOINT {target} does not exist and {above} may not be covered to make it",
            f"run: mkdir -p {quoted}",
        )
    return [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(above))}", f"mkdir -p {quoted}"]


def run(
    place: BuildPaths,
    tree: Tree,
    script: str,
    *,
    part: Path,
    variables: Mapping[str, str],
    log: Path,
    emit: Emit,
    label: str,
    before: Sequence[str] = (),
) -> Outcome:
    """Mount the tree, run the script as the first process of its namespaces, and gather what it says.

    Of the host's files, those below `part` can be changed in there. stdout and stderr go to `log`. `before`
    are shell lines ahead of the script, in the same mounts.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(place.location, ".run-") as folder:
        inner = folder / "step.sh"
        inner.write_text(script, encoding="utf-8", errors="surrogateescape")
        outer = folder / "enter.sh"
        outer.write_text(
            _enter(
                place,
                tree,
                inner,
                part,
                {**variables, "ENTER": str(ENTER), "MODE": place.mode},
                before,
            ),
            encoding="utf-8",
        )
        log.write_bytes(b"")
        with log.open("ab") as sink:  # several write to it, each at its end
            killed = memory.kills()
            read, write = os.pipe()
            child = process.start(
                [*namespaces(place.mode), "bash", str(outer), str(write)],
                stdout=sink,
                stderr=sink,
                pass_fds=(write,),
            )
            os.close(write)
            said = _follow(read, emit, label)
            said.status = process.finish(child)
            said.starved = memory.kills() > killed
    return said


def _enter(
    place: BuildPaths,
    tree: Tree,
    script: Path,
    part: Path,
    variables: Mapping[str, str],
    before: Sequence[str],
) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(
        [
            "set -eu",
            'exec 3>&"$1"',
            "echo >&3  # nobody listens: the agent died before unshare could ask to be told",
            *exports,
            *mountpoint_lines(place),
            f"export ROOT={shlex.quote(str(place.mountpoint))}",
            *_protected(part),
            *tree.mount(place),
            *before,
            f"bash {shlex.quote(str(script))}",
            "",
        ]
    )


def _protected(part: Path) -> list[str]:
    """Shell lines that make the host's files read-only but for `part`, and in there what a step brings."""
    quoted = shlex.quote(str(part))
    return [
        f"mount --bind {quoted} {quoted}",
        f"{shlex.join([sys.executable, '-I', '-S', '-B', str(PROTECT)])} {quoted}",
        '[ -z "${FILES:-}" ] || mount -o bind,ro "$FILES" "$FILES"',
        "mount -t tmpfs -o mode=1777 tmpfs /dev/shm  # where processes of Python share their locks",
    ]


def _follow(pipe: int, emit: Emit, label: str) -> Outcome:
    """Read descriptor 3 to its end and pass on progress and notes."""
    said = Outcome(0)
    with os.fdopen(pipe, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            kind, _, rest = line.rstrip("\n").partition("\t")
            fields = rest.split("\t")
            if kind == "progress" and len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
                emit("progress", label=fields[0], done=int(fields[1]), total=int(fields[2]))
            elif kind == "note":
                said.notes.append(rest)
                emit("note", text=rest, step=label)
            elif kind == "fail":
                said.failed, said.hint = fields[0], "\t".join(fields[1:])
            elif kind == "error" and not said.command:
                said.command = "\t".join(fields[1:])
    return said


def remove(place: BuildPaths, *paths: Path) -> None:
    """Remove trees, also those whose files belong to a sub-id of this user."""
    present = [str(path) for path in paths if os.path.lexists(path)]
    if not present:
        return
    process.run([*as_owner(place), "rm", "-rf", "--one-file-system", "--", *present], deadline=None)


def disk_usage(place: BuildPaths, path: Path) -> int:
    """Bytes that a file or tree takes on the disk; 0 for one that went away."""
    done = process.run(
        [*as_owner(place), "du", "-s", "--block-size=1", "--", str(path)], check=False, deadline=None
    )
    return int(done.stdout.split()[0]) if done.stdout.strip() else 0


def overlay_works(location: Path, mode: str) -> bool:
    """Try a real overlay mount on LOCATION's file system, with a whiteout and an opaque directory."""
    with files.scratch(location, ".probe-") as probe:
        for name in ("lower/d", "upper", "work", "root"):
            (probe / name).mkdir(parents=True)
        (probe / "lower/f").touch()
        options = ROOT_OPTIONS if mode == "root" else USER_OPTIONS
        lines = (
            f"set -e; cd {shlex.quote(str(probe))}",
            f"mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work,{options} overlay root",
            "rm root/f; rm -r root/d; mkdir root/d; test ! -e root/f",
        )
        done = process.run([*namespaces(mode), "bash", "-c", "\n".join(lines)], check=False)
        place = BuildPaths(location, location, mode, True)
        remove(place, *(probe / name for name in ("upper", "work")))
        return done.returncode == 0
