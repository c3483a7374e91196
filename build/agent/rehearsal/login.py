"""Log in to a system VM as a KVM host does: root, by a key, host keys unchecked, nobody's configuration.

The host's calls are CloudStack's SshHelper (scpTo), FileUtil.scpPatchFiles and `router_proxy.sh`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shlex
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from build.agent import process
from build.agent.events import Failure

OPTIONS = (
    "BatchMode=yes",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "GlobalKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    "ConnectTimeout=60",
)
BANNER = b"SSH-"
MODE = 0o755
"""Of everything that a host copies, whatever the mode of its own files is (FileUtil.scpPatchFiles)."""
CHUNK = 1 << 18


@dataclass(frozen=True)
class Key:
    """A throw-away RSA key pair, as a management server makes one."""

    private: str
    """Path of the private one: a file without a name, which is gone with this process."""
    encoded: str
    """The public one's line, as a boot line carries it: base64."""


@dataclass(frozen=True)
class Login:
    """A way into a system VM: the port of 127.0.0.1 that leads to its sshd, and the key."""

    port: int
    key: str


@dataclass(frozen=True)
class File:
    """An open file that is copied, and its name inside."""

    name: str
    descriptor: int

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self.descriptor).st_size

    @property
    def time(self) -> int:
        """Seconds since 1970 of its last change."""
        return int(os.fstat(self.descriptor).st_mtime)


@dataclass(frozen=True)
class Ended:
    """How a command over SSH ended. 255 is ssh's own: no connection, no entry."""

    status: int
    out: str
    err: str

    @property
    def why(self) -> str:
        """The last line it said, and its status."""
        said = [line for line in (self.err or self.out).strip().splitlines() if line.strip()]
        return f"exit status {self.status}" + (f": {said[-1].strip()}" if said else "")


@contextlib.contextmanager
def key_pair(work: Path) -> Iterator[Key]:
    """Make a key pair. RSA, since that is what management servers have."""
    with tempfile.TemporaryDirectory(prefix=".key-", dir=work) as folder:
        made = Path(folder, "id_rsa")
        process.run(
            ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-C", "rehearsal", "-f", str(made)]
        )
        private, public = made.read_bytes(), made.with_suffix(".pub").read_bytes()
    with process.nameless(private) as descriptor:
        yield Key(f"/proc/{os.getpid()}/fd/{descriptor}", base64.b64encode(public).decode("ascii"))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def greeted(port: int, limit: float) -> bool:
    """Say whether an SSH server greets at a port of 127.0.0.1 within some seconds.

    That the port takes a connection means nothing: QEMU does, whether or not the guest listens.
    """
    try:
        async with asyncio.timeout(limit):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return (await reader.readexactly(len(BANNER))) == BANNER
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False


async def run(login: Login, command: str, limit: float, *options: str) -> Ended:
    """Run a command inside; one that takes longer than `limit` seconds is ended and has status -1."""
    async with _child([*_ssh(login, *options), command]) as child:
        try:
            async with asyncio.timeout(limit):
                out, err = await child.communicate()
        except TimeoutError:
            return Ended(-1, "", f"no end within {limit:.0f} s")
        status = -1 if child.returncode is None else child.returncode
        return Ended(status, out.decode(errors="replace"), err.decode(errors="replace"))


async def copy(login: Login, files: Sequence[File], folder: str, limit: float) -> Ended:
    """Copy files into a folder inside, by the protocol of `scp -O -p`.

    It is spoken here, as CloudStack's own client does, so that a file needs no name on this host.
    """
    command = shlex.join(["scp", "-p", "-t", "-d", folder])
    async with _child([*_ssh(login), command], stdin=asyncio.subprocess.PIPE) as child:
        try:
            async with asyncio.timeout(limit):
                said = await _send(child, files)
                out, err = await child.communicate(b"")
        except TimeoutError:
            return Ended(-1, "", f"no end within {limit:.0f} s")
        status = -1 if child.returncode is None else child.returncode
        return Ended(status or bool(said), out.decode(errors="replace"), said or err.decode(errors="replace"))


async def _send(child: asyncio.subprocess.Process, files: Sequence[File]) -> str:
    """Send files to a sink; returns what it complains of.

    Each line, and the end of each file, is answered by a zero byte, or by 1 or 2 and a line that says why.
    """
    assert child.stdin
    assert child.stdout
    lines = child.stdout

    async def answer() -> str:
        code = await lines.read(1)
        if code == b"\0":
            return ""
        return (await lines.readline()).decode(errors="replace").strip() if code else "the connection ended"

    try:
        said = await answer()
        for file in files:
            size = file.size
            for line in (f"T{file.time} 0 {file.time} 0\n", f"C{MODE:04o} {size} {file.name}\n"):
                if not said:
                    child.stdin.write(line.encode())
                    said = await answer()
            for offset in range(0, 0 if said else size, CHUNK):
                child.stdin.write(os.pread(file.descriptor, min(CHUNK, size - offset), offset))
                await child.stdin.drain()
            if not said:
                child.stdin.write(b"\0")
                said = await answer()
        return said
    except ConnectionError:
        return ""  # ssh itself tells why


def _ssh(login: Login, *options: str) -> list[str]:
    words = (word for option in (*OPTIONS, *options) for word in ("-o", option))
    return ["ssh", "-F", "none", "-p", str(login.port), "-i", login.key, *words, "root@127.0.0.1"]


@contextlib.asynccontextmanager
async def _child(
    argv: Sequence[str], stdin: int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child that ends with this process, and with the block."""
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(
            *process.tied(argv),
            stdin=stdin,
            stdout=pipe,
            stderr=pipe,
            env=process.environment(),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise Failure("setpriv is missing", "install util-linux") from error
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
