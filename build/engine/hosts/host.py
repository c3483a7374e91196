"""A build host: run, put and get over an Invoke context, and the agent that works there.

The only module that runs commands. Nothing above it knows whether the host is this machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import shlex
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from invoke import Context, Responder
from invoke.exceptions import ThreadException

from build import wire
from build.engine import compressors, prompt
from build.engine.console import Console
from build.engine.errors import BuildError, HostError
from build.engine.hosts import probe
from build.engine.hosts.session import OnEvent, Session

Result = TypeVar("Result")

CHECKOUT = Path(__file__).resolve().parents[3]
SHIPPED = (
    *("build/agent", "build/formats", "build/wire.py", "build/debian.py", "build/printable.py"),
    "build/crc32c.py",
)
COMPRESSING = ("convert", "inspect", "repair")
"""Verbs that need the pinned compressors."""
STOCK = CHECKOUT / ".venv" / "wheels"
"""Compressors for other hosts than such as this machine; gone with the lock that `.venv` was made from."""
PIP = (
    *("download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"),
    *("--disable-pip-version-check", "--progress-bar=off"),
)
LENDER = (
    "umask 077; d=$(mktemp -d /var/tmp/systemvm-lent.XXXXXX) || exit; trap 'rm -rf \"$d\"' EXIT; "
    'trap "exit 1" HUP INT TERM PIPE; '
    'while [ $# -gt 0 ]; do head -c "$2" >"$d/$1" || exit; shift 2; done; '
    'echo "$d"; timeout 30 cat >/dev/null'
)
"""Keeps what comes in, files by name and length, until its stdin ends."""
PROMPT = "[sudo] password: "
WINDOW, PACKET = 1 << 24, 1 << 18
"""Bytes on the way unacknowledged, and in one packet; OpenSSH takes packets of up to 256 KiB."""

PROBE = Path(probe.__file__).read_text(encoding="utf-8")
PROBE_SHELL = 'command -v python3 >/dev/null || exit 0; exec python3 -I -c PROBE probe "$@"'

Files = Mapping[str, bytes]
"""Files of a pack, by path."""


class Host:
    """One build host: `name` (empty: this machine) and a `context`, Invoke's or a Fabric Connection.

    `rootless`: build as the user who logs in, even if sudo would let him be root.
    """

    def __init__(self, name: str, context: Context, debug: bool = False, rootless: bool = False) -> None:
        self.name = name
        self.context = context
        self.debug = debug
        self.rootless = rootless
        self._session: Session | None = None
        self._closed = False

    @property
    def remote(self) -> bool:
        """Whether commands go over SSH."""
        return bool(self.name)

    def run(self, command: str, check: bool = True) -> str:
        """Run a short command and give back what it printed."""
        result = self.context.run(command, hide=True, warn=True, in_stream=False)
        if check and not result.ok:
            last = (result.stderr or result.stdout).strip().splitlines()[-1:] or [
                f"exit status {result.exited}"
            ]
            raise HostError(
                f"{self.name or 'this host'}: {last[0]}", f"it was: {command.splitlines()[0][:120]}"
            )
        return str(result.stdout)

    def show(self, argv: Sequence[str], folder: Path) -> int:
        """Run a command in a folder with its output on this terminal; answers its exit status."""
        command = f"cd {shlex.quote(str(folder))} && exec {shlex.join(argv)}"
        return int(self.context.run(command, warn=True, in_stream=False).exited)

    def pipe(self, command: str) -> Any:
        """Start a command on a remote host; answers Paramiko's channel, its stdin and stdout in bytes."""
        channel = self.context.transport.open_session(WINDOW, PACKET)
        channel.exec_command(command)
        return channel

    def put(self, content: bytes, command: str) -> tuple[int, str]:
        """Give bytes to a remote command's stdin; answers its exit status and what it said."""
        channel = self.pipe(command)
        channel.set_combine_stderr(True)
        channel.sendall(content)
        channel.shutdown_write()
        with channel.makefile("rb") as output:
            said = output.read().decode("utf-8", errors="replace")
        return channel.recv_exit_status(), said

    @contextlib.contextmanager
    def lend(self, files: Mapping[str, Path]) -> Iterator[Lent]:
        """Put files into a folder of a remote host, to be opened there at once.

        A shell there removes the folder when its stdin ends, and after half a minute whatever happens.
        """
        sizes = {name: path.stat().st_size for name, path in files.items()}
        words = [word for name, length in sizes.items() for word in (name, str(length))]
        channel = self.pipe(shlex.join(["exec", "sh", "-c", LENDER, "sh", *words]))
        try:
            for path in files.values():
                with path.open("rb") as stream:
                    while chunk := stream.read(1 << 20):
                        channel.sendall(chunk)
            with channel.makefile("rb") as said:
                folder = said.readline().decode().strip()
            if not folder:
                raise OSError("no folder was made")
        except OSError as error:
            channel.close()
            what = f"{self.name}: cannot put files into /var/tmp: {error}"
            raise HostError(what, "make room there") from None
        try:
            yield Lent(folder, channel.close)
        finally:
            channel.close()

    def call(self, verb: str, on_event: OnEvent | None = None, **request: Any) -> Any:
        """Have the agent do something and wait for the result; its failure becomes a BuildError."""
        return self.session.call(
            verb, on_event or (lambda _event: None), {**request, **self.ensure_compressors(verb)}
        )

    def ask(self, request: wire.Request[Result], on_event: OnEvent | None = None) -> Result:
        """Have the agent do what a request of `build.wire` says; returns what that names as its result."""
        value = self.call(request.verb, on_event, **wire.dump(request))
        return wire.load(wire.result_of(type(request)), value)

    @property
    def session(self) -> Session:
        """The conversation with this host's agent, begun when it is first needed."""
        if self._closed:
            raise BuildError("interrupted", "run it again: finished layers are kept")
        if self._session is None:
            self._session = Session(
                self.name, self.stdin_preamble, self._start, lambda: self.context.close(), self.debug
            )
        return self._session

    def _start(self, requests: Any, output: Any, errors: Any) -> Any:
        """Start the agent of a session."""
        return self.context.run(
            f"exec {self.agent_command('serve', *(() if self.remote else ('--local',)))}",
            asynchronous=True,
            warn=True,
            in_stream=requests,
            out_stream=output,
            err_stream=errors,
            encoding="utf-8",
        )

    def interact(self, verb: str, request: wire.Shell | wire.Boot) -> int:
        """Give this terminal to a program on the host; answers its exit status.

        The session stays, and beats: the program ends with it.
        """
        token = self.ask(wire.Terminal(wire.dump(request))).token
        password = self._sudo.password if self.remote else ""
        watchers = [Responder(re.escape(PROMPT), f"{password}\n")] if password else []
        command, ended = self.agent_command("exec", verb, token), threading.Event()
        threading.Thread(target=self.session.guard, args=(ended,), daemon=True).start()
        try:
            result = self.context.run(command, pty=sys.stdin.isatty(), warn=True, watchers=watchers)
        except ThreadException:
            raise self.session.gone() from None
        finally:
            ended.set()
        if self.remote and result.exited < 0:
            raise self.session.gone()
        return int(result.exited)

    def close(self) -> None:
        """Say goodbye to the agent, for good; what it still does, it ends."""
        self._closed = True
        if self._session is not None:
            self._session.close()
            self._session = None

    def agent_command(self, *arguments: str) -> str:
        """Shell command that starts the agent on this host."""
        if not self.remote:
            return shlex.join(
                [sys.executable, "-I", "-B", str(CHECKOUT / "build/agent/__main__.py"), *arguments]
            )
        agent = [
            self._remote_python["python"],
            "-I",
            "-B",
            f"{self._folder}/build/agent/__main__.py",
            *arguments,
        ]
        return shlex.join([*self._sudo.words, *agent])

    @property
    def stdin_preamble(self) -> str:
        """What the agent's stdin begins with: what sudo wants to read."""
        return f"{self._sudo.password}\n" if self.remote and self._sudo.password else ""

    def ensure_compressors(self, verb: str) -> dict[str, str]:
        """What a request of this verb needs besides: on a remote host, the folder of the compressors.

        Brings them there. Raises BuildError: there are none that load there, or they cannot be had.
        """
        return {"compressors": self._compressors} if self.remote and verb in COMPRESSING else {}

    @cached_property
    def _remote_python(self) -> dict[str, Any]:
        """What the probe tells of a remote host and of who we are there."""
        script = PROBE_SHELL.replace("PROBE", shlex.quote(PROBE))
        packs = [("agent", self._agent), *(("compressors", files) for files in self._stock.values())]
        names = [address(kind, files) for kind, files in packs]
        ground = told(self.run(shlex.join(["exec", "sh", "-c", script, "sh", *names])))
        if tuple(ground.get("version", ())) < (3, 11):
            found = ".".join(map(str, ground.get("version", ())))
            raise HostError(
                f"{self.name} has {f'Python {found}' if found else 'no python3'}, but needs 3.11 or newer",
                "use a Debian 12 or 13 build host",
            )
        return ground

    @cached_property
    def _agent(self) -> Files:
        return agent()

    @cached_property
    def _folder(self) -> str:
        """The agent's folder on a remote host."""
        return self._bring("agent", self._agent)

    @cached_property
    def _stock(self) -> dict[str, Files]:
        """Compressors that are here, by the kind of host; the client's own are of no kind."""
        kept = {folder.name: stored(folder) for folder in sorted(STOCK.glob("cp*"))}
        return {kind: files for kind, files in {"": compressors.installed(), **kept}.items() if files}

    @cached_property
    def _compressors(self) -> str:
        """The compressors' folder on a remote host."""
        kind = "" if compressors.fit(self._remote_python) else compressors.kind(self._remote_python)
        return self._bring("compressors", self._stock.get(kind) or self._download(STOCK / kind))

    def _download(self, folder: Path) -> Files:
        """Have this machine's pip bring the wheels that load on the host to a folder; answers their files."""
        ground = self._remote_python
        python = ".".join(map(str, ground["version"][:2]))
        what = f"{self.name}: no compressors for its Python {python} on {ground['machine']}"
        if not (asked := compressors.asked(ground)):
            raise HostError(what, "use a Debian 12 or 13 build host")
        try:
            STOCK.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=STOCK, prefix=".part-") as aside:
                lock = Path(aside, "lock")
                lock.write_text(pinned(), encoding="utf-8")
                words = (*PIP, *asked, f"--requirement={lock}", f"--dest={aside}")
                line = shlex.join([sys.executable, "-I", "-m", "pip", *words])
                done = self.context.local(line, hide=True, warn=True, in_stream=False)
                if not done.ok:
                    raise HostError(
                        f"{what}: {compressors.reason(done.stderr)}",
                        "they are fetched once: go online, or name an index in PIP_INDEX_URL, "
                        "a proxy in PIP_PROXY",
                    )
                files = stored(Path(aside))
                folder.mkdir(exist_ok=True)
                for wheel in Path(aside).glob("*.whl"):
                    wheel.replace(folder / wheel.name)
            return files
        except OSError as error:
            raise HostError(f"{what}: {STOCK}: {error.strerror}", "check its owner and space") from None

    def _bring(self, kind: str, files: Files) -> str:
        """Put a pack into its folder on a remote host unless it is there, whole; answers the folder."""
        name, ground = address(kind, files), self._remote_python
        if name in ground["there"]:
            return str(ground["there"][name])
        line = shlex.join(["exec", ground["python"], "-I", "-c", PROBE, "put", name])
        status, said = self.put(pack(files), line)
        answer = told(said)
        if "path" not in answer:
            last = (said.strip().splitlines() or [f"exit status {status}"])[-1]
            raise HostError(
                f"{self.name}: cannot keep the {kind} there: {answer.get('what', last)}",
                answer.get("hint", "make room there"),
            )
        return str(answer["path"])

    @cached_property
    def _sudo(self) -> Sudo:
        """How to become root on a remote host: not at all, by a word, or by a password that is asked for."""
        ground = self._remote_python
        if ground["uid"] == 0 or self.rootless or ground["sudo"] == "none":
            return Sudo()
        if ground["sudo"] == "free":
            return Sudo(("sudo", "-k", "-n", "--"))
        asked = prompt.hidden(f"sudo password of {ground['user']} on {self.name} (empty: build without root)")
        if asked is None:
            Console(self.name, sys.stderr).line(
                "sudo wants a password and there is no terminal to ask on: going on as "
                f"{ground['user']} (--rootless says so)"
            )
        if not asked:
            return Sudo()
        status, said = self.put(f"{asked}\n".encode(), "exec env LC_ALL=C sudo -k -S -p '' -- true")
        if status:
            wrong = "incorrect password" in said or "no password was provided" in said
            what = (
                "the sudo password is wrong" if wrong else (said.strip().splitlines() or ["sudo refuses"])[-1]
            )
            raise HostError(
                f"{what} ({ground['user']} on {self.name})", "run it again; with --rootless it builds without"
            )
        return Sudo(("sudo", "-k", "-S", "-p", PROMPT, "--"), asked)


@dataclass(frozen=True)
class Lent:
    """Files that are on a remote host for a moment."""

    folder: str
    take_back: Callable[[], None]
    """To be called when they are open there."""


@dataclass(frozen=True)
class Sudo:
    """Words before a command that make it root's, and what is to be answered."""

    words: tuple[str, ...] = ()
    password: str = field(default="", repr=False)


def agent() -> Files:
    """What runs on the host, by path."""
    paths = (path for part in SHIPPED for path in _modules(CHECKOUT / part))
    files = {str(path.relative_to(CHECKOUT)): path.read_bytes() for path in paths}
    return {"build/__init__.py": b'"""What runs on the build host."""\n', **files}


def _modules(part: Path) -> list[Path]:
    return [part] if part.suffix else sorted(part.rglob("*.py"))


def pinned() -> str:
    """What the lock says of the compressors."""
    return compressors.pins((CHECKOUT / "requirements.lock").read_text(encoding="utf-8"))


def stored(folder: Path) -> dict[str, bytes]:
    """Files of the compressors whose wheels a folder keeps; none unless it is all of them, as pinned."""
    return compressors.unpacked([wheel.read_bytes() for wheel in sorted(folder.glob("*.whl"))], pinned())


def pack(files: Files) -> bytes:
    """Tar files, with nothing in it that changes from run to run or with their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def address(kind: str, files: Files) -> str:
    """Name of a pack on a host."""
    tree: dict[str, Any] = {}
    for path, content in files.items():
        *folders, name = path.split("/")
        folder = functools.reduce(lambda above, each: above.setdefault(each, {}), folders, tree)
        folder[name] = hashlib.sha256(content).hexdigest()
    return f"{kind}-{probe.digest(tree)}"


def told(said: str) -> dict[str, Any]:
    """What the probe printed last, after whatever a login shell had to say; empty if it did not run."""
    line = (said.strip().splitlines() or [""])[-1]
    return dict(json.loads(line)) if line.startswith("{") else {}
