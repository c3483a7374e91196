"""A build host: run, put and get over an Invoke context, and the agent that works there.

The only module that runs commands. Nothing above it knows whether the host is this machine.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import queue
import shlex
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from invoke import Context

from build.engine.errors import BuildError

CHECKOUT = Path(__file__).resolve().parents[2]
BEAT = 2.0
"""Seconds between two signs of life to the agent; it gives up after 10 without one."""
SHIPPED = ("build/agent", "build/formats")

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


class Host:
    """One build host: `name` (empty: this machine) and a `context`, Invoke's or a Fabric Connection."""

    def __init__(self, name: str, context: Context, debug: bool = False) -> None:
        self.name = name
        self.context = context
        self.debug = debug
        self._session: Session | None = None

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
            raise BuildError(f"{self.name or 'this host'}: {last[0]}", f"it was: {command[:120]}")
        return str(result.stdout)

    def show(self, argv: Sequence[str], folder: Path) -> int:
        """Run a command in a folder with its output on this terminal; answers its exit status."""
        command = f"cd {shlex.quote(str(folder))} && exec {shlex.join(argv)}"
        return int(self.context.run(command, warn=True, in_stream=False).exited)

    def put(self, content: bytes, target: PurePosixPath, mode: int = 0o644) -> None:
        """Write a file on the host, aside first."""
        aside = target.with_name(f".{target.name}.part")
        if self.remote:
            self.context.put(io.BytesIO(content), remote=str(aside))
        else:
            Path(aside).write_bytes(content)
        part = shlex.quote(str(aside))
        self.run(f"chmod {mode:o} {part} && mv -f {part} {shlex.quote(str(target))}")

    def get(self, source: PurePosixPath, target: Path) -> None:
        """Bring a file from the host."""
        if self.remote:
            self.context.get(str(source), local=str(target))
        else:
            target.write_bytes(Path(source).read_bytes())

    def call(self, verb: str, on_event: OnEvent | None = None, **request: Any) -> Any:
        """Have the agent do something and wait for the result; its failure becomes a BuildError."""
        if self._session is None:
            self._session = Session(self)
        return self._session.call(verb, on_event or (lambda _event: None), request)

    def interact(self, verb: str, request: Mapping[str, Any]) -> int:
        """Give this terminal to a program on the host; answers its exit status."""
        folder = self.run("mktemp -d").strip()
        self.put(json.dumps(request).encode(), PurePosixPath(folder, "request.json"), 0o600)
        command = f"trap 'rm -rf {folder}' EXIT; {self.agent_command('exec', verb, f'{folder}/request.json')}"
        result = self.context.run(command, pty=sys.stdin.isatty(), warn=True)
        return int(result.exited)

    def close(self) -> None:
        """Say goodbye to the agent; what it still does, it ends."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def agent_command(self, *arguments: str) -> str:
        """Shell command that starts the agent on this host."""
        if not self.remote:
            return shlex.join(
                [sys.executable, "-I", "-B", str(CHECKOUT / "build/agent/__main__.py"), *arguments]
            )
        return shlex.join(["python3", "-I", "-B", f"{self._ship()}/build/agent/__main__.py", *arguments])

    def _ship(self) -> str:
        """Put the agent on the host unless this very version is there; answers its folder."""
        packed = _pack()
        name = f"/var/tmp/systemvm-agent-{hashlib.sha256(packed).hexdigest()[:16]}"
        probe = (
            "python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo old; exit; }; "
            f'd={name}-$(id -u); echo "$d"; '
            'if [ -O "$d" ] && [ -e "$d/build/agent/__main__.py" ]; then echo there; fi'
        )
        said = self.run(probe).split()
        if said[:1] == ["old"]:
            raise BuildError(
                f"{self.name} has no python3 of version 3.11 or newer", "use a Debian 12 or 13 build host"
            )
        folder = said[0]
        if said[1:] != ["there"]:
            # Versions that nobody used for a week are of no use to anybody.
            mine = "/var/tmp -maxdepth 1 -name 'systemvm-agent-*' -user \"$(id -u)\" -mtime +7"
            self.run(f"find {mine} -exec rm -rf {{}} +", check=False)
            archive = PurePosixPath(f"{folder}.{time.time_ns()}.tar")
            self.put(packed, archive, 0o600)
            quoted = shlex.quote(str(archive))
            self.run(
                f"umask 077 && mkdir -p {folder}.new.$$ && "
                f"tar -xf {quoted} -C {folder}.new.$$ && rm {quoted} && "
                f"{{ mv -T {folder}.new.$$ {folder} 2>/dev/null || rm -rf {folder}.new.$$; }}"
            )
        return folder


def _pack() -> bytes:
    """Tar what runs on the host, with nothing in it that changes from run to run."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        files = {"build/__init__.py": b'"""What runs on the build host."""\n'}
        for folder in SHIPPED:
            for path in sorted((CHECKOUT / folder).rglob("*.py")):
                files[str(path.relative_to(CHECKOUT))] = path.read_bytes()
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


class Session:
    """A conversation with one agent process: requests go down its stdin, events come up its stdout."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._requests = _Outbox()
        self._events: queue.Queue[Event] = queue.Queue()
        self._errors = _Lines(lambda text: self._events.put({"event": "stderr", "text": text}))
        self._promise = host.context.run(
            f"exec {host.agent_command('serve')}",
            asynchronous=True,
            warn=True,
            in_stream=self._requests,
            out_stream=_Lines(self._take),
            err_stream=self._errors,
            encoding="utf-8",
        )
        self._stderr: list[str] = []
        self._wait_for("ready", lambda _event: None)

    def call(self, verb: str, on_event: OnEvent, request: Mapping[str, Any]) -> Any:
        """Send one request and follow its events to the result."""
        self._requests.put(json.dumps({"verb": verb, **request}) + "\n")
        return self._wait_for("result", on_event).get("value")

    def close(self) -> None:
        """End of stdin tells the agent to end, with everything it started."""
        self._requests.end()
        self._promise.runner.process_is_finished  # noqa: B018  the property polls the process
        self._promise.join()

    def _take(self, line: str) -> None:
        try:
            self._events.put(json.loads(line))
        except ValueError:
            self._events.put({"event": "stderr", "text": line})

    def _wait_for(self, kind: str, on_event: OnEvent) -> Event:
        while True:
            try:
                event = self._events.get(timeout=0.5)
            except queue.Empty:
                if self._promise.runner.process_is_finished and self._events.empty():
                    raise self._lost() from None
                continue
            if event["event"] == kind:
                return event
            if event["event"] == "failure":
                raise _explain(event, self.host)
            if event["event"] == "stderr":
                self._stderr.append(event["text"])
            else:
                on_event(event)

    def _lost(self) -> BuildError:
        where = self.host.name or "this machine"
        last = next((line for line in reversed(self._stderr) if line.strip()), "it ended without a word")
        return BuildError(f"the agent on {where} is gone: {last}", "run it again; finished layers are kept")


def _explain(event: Event, host: Host) -> BuildError:
    """Make the agent's failure ours: what, the log's last lines, hint."""
    parts = [event["message"], *(f"    {line}" for line in event.get("tail", ()))]
    if host.debug and event.get("trace"):
        parts.append(event["trace"])
    return BuildError("\n".join(parts), event.get("hint", ""))


class _Outbox:
    """The agent's stdin, as the file-like object that Invoke reads: requests, and beats between them.

    Invoke asks for one character every 10 ms; giving it more at once is what makes this quick.
    """

    def __init__(self) -> None:
        self._chunks: queue.Queue[str] = queue.Queue()
        self._beat = time.monotonic()

    def put(self, text: str) -> None:
        for start in range(0, len(text), 65536):
            self._chunks.put(text[start : start + 65536])

    def end(self) -> None:
        self._chunks.put("")

    def read(self, _count: int = -1) -> str | None:
        try:
            chunk = self._chunks.get_nowait()
        except queue.Empty:
            if time.monotonic() - self._beat < BEAT:
                return None
            chunk = "\n"
        self._beat = time.monotonic()
        return chunk


class _Lines:
    """A stream that hands whole lines on."""

    encoding = "utf-8"

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take = take
        self._pending = ""

    def write(self, text: str) -> int:
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back but half lines."""


def encode(files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write a step's files as JSON values."""
    return {
        name: {"content": base64.b64encode(file.content).decode("ascii"), "mode": file.mode}
        for name, file in files.items()
    }
