"""A Debian mirror of one's own: real packages, real indices, signed with a key of the test, on 127.0.0.1."""

from __future__ import annotations

import email.utils
import hashlib
import lzma
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fields = dict[str, str]
BOOKWORM = ("bookworm", "bookworm-updates", "bookworm-security")


@dataclass
class Deb:
    """A package to be built; `extra` are control fields, `files` what it installs."""

    name: str
    version: str = "1"
    arch: str = "amd64"
    extra: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """What else it installs, not text."""


BASE = (
    Deb("base-files", extra={"Essential": "yes", "Priority": "required", "Pre-Depends": "libbase"}),
    Deb("libbase"),
    Deb("apt", extra={"Priority": "important", "Depends": "libapt"}),
    Deb("libapt", extra={"Depends": "libbase"}),
    Deb("tool", extra={"Depends": "libtool (>= 1)", "Recommends": "manual"}),
    Deb("libtool"),
    Deb("manual"),
    Deb("nfs-kernel-server", extra={"Provides": "nfs-server"}),
    Deb("exim", extra={"Provides": "mail-agent", "Conflicts": "postfix"}),
    Deb("postfix", extra={"Provides": "mail-agent (= 1)"}),
    Deb("broken", extra={"Depends": "not-there"}),
    Deb("linux-image-amd64"),
)


class Key:
    """A signing key in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700)
        self._gpg("--passphrase", "", "--quick-generate-key", "test", "ed25519", "sign", "never")
        self.ring = home / "keyring.gpg"
        self.ring.write_bytes(self._gpg("--export"))
        self.armoured = home / "keyring.asc"
        self.armoured.write_bytes(self._gpg("--armor", "--export"))

    def _gpg(self, *options: str, text: bytes = b"") -> bytes:
        argv = [
            "gpg",
            "--homedir",
            str(self.home),
            "--batch",
            "--quiet",
            "--pinentry-mode",
            "loopback",
            *options,
        ]
        return subprocess.run(
            argv, input=text, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        ).stdout

    def sign(self, text: str) -> bytes:
        """Sign a text as an InRelease is signed."""
        return self._gpg("--clearsign", text=text.encode())

    def close(self) -> None:
        """End the agent that gpg started."""
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=True)


def build(deb: Deb, folder: Path, compression: str = "xz") -> Path:
    """Build a package and answer where it lies."""
    tree = folder / f".{deb.name}"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = {
        "Package": deb.name,
        "Version": deb.version,
        "Architecture": deb.arch,
        "Maintainer": "Test <test@example.org>",
        "Priority": "optional",
        "Description": "test package",
        **deb.extra,
    }
    (tree / "DEBIAN/control").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    for name, content in deb.files.items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        if name.startswith("DEBIAN/") and name not in ("DEBIAN/conffiles", "DEBIAN/triggers"):
            target.chmod(0o755)
    for name, data in deb.blobs.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    path = folder / f"{deb.name}_{deb.version.replace(':', '%3a')}_{deb.arch}.deb"
    argv = ["dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", str(tree), str(path)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["rm", "-r", str(tree)], check=True)
    return path


class Mirror:
    """Archives `debian` and `debian-security` under one root, served over HTTP."""

    def __init__(self, root: Path, key: Key) -> None:
        self.root, self.key = root, key
        self.suites: dict[str, list[Deb]] = {name: [] for name in BOOKWORM}
        self.suites["bookworm"] = list(BASE)
        self.asked: list[str] = []
        """Paths in the order they were asked for, with the headers that matter."""
        self.headers: list[dict[str, str]] = []
        self.faults: dict[str, Callable[[BaseHTTPRequestHandler, bytes], None]] = {}
        """What to do instead of answering, by the end of a path."""
        self.now = int(time.time()) - 3600
        self._built: dict[tuple[str, str], tuple[Path, str]] = {}
        for name in BOOKWORM:
            self.publish(name)

    def archive(self, suite: str) -> Path:
        """Folder of the archive that a suite belongs to."""
        return self.root / ("debian-security" if suite.endswith("-security") else "debian")

    def publish(
        self, suite: str, *, key: Key | None = None, date: int | None = None, fields: Fields | None = None
    ) -> None:
        """Write indices and a signed InRelease, an hour newer than the last one unless `date` says when."""
        archive = self.archive(suite)
        pool = archive / "pool"
        pool.mkdir(parents=True, exist_ok=True)
        text = "".join(self._entry(deb, archive, pool) for deb in self.suites[suite])
        index = archive / "dists" / suite / "main/binary-amd64"
        (index / "by-hash/SHA256").mkdir(parents=True, exist_ok=True)
        sums = []
        for name, data in (("Packages", text.encode()), ("Packages.xz", lzma.compress(text.encode()))):
            digest = hashlib.sha256(data).hexdigest()
            (index / "by-hash/SHA256" / digest).write_bytes(data)
            sums.append(f" {digest} {len(data)} main/binary-amd64/{name}")
            if name.endswith(".xz"):
                (index / name).write_bytes(data)
        if date is None:
            self.now += 60
        told = {
            "Origin": "Test",
            "Suite": "oldstable" + suite.removeprefix("bookworm"),
            "Codename": suite,
            "Date": email.utils.formatdate(date or self.now, usegmt=True).replace("GMT", "UTC"),
            "Acquire-By-Hash": "yes",
            "Architectures": "all amd64",
            "Components": "updates/main" if suite.endswith("-security") else "main",
            "No-Support-for-Architecture-all": "Packages",
            **(fields or {}),
        }
        release = "".join(f"{name}: {value}\n" for name, value in told.items())
        release += "SHA256:\n" + "\n".join(sums) + "\n"
        (index.parents[1] / "InRelease").write_bytes((key or self.key).sign(release))

    def _entry(self, deb: Deb, archive: Path, pool: Path) -> str:
        known = (str(archive), f"{deb.name}_{deb.version}_{deb.arch} {deb.files} {list(deb.blobs)}")
        if known not in self._built:
            path = build(deb, pool)
            argv = ["dpkg-deb", "--field", str(path)]
            control = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            self._built[known] = (path, control)
        path, control = self._built[known]
        data = path.read_bytes()
        return (
            f"{control}Filename: pool/{path.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\n\n"
        )

    @contextmanager
    def served(self, tls: ssl.SSLContext | None = None) -> Iterator[str]:
        """Serve it, in the clear or behind TLS; yields the URL of the root."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(mirror: Mirror) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("://")[2].partition("/")[2] if "://" in self.path else self.path[1:]
            mirror.asked.append(path)
            mirror.headers.append({"target": self.path, **dict(self.headers.items())})
            file = mirror.root / path
            data = file.read_bytes() if file.is_file() else b""
            for end, fault in list(mirror.faults.items()):
                if path.endswith(end):
                    with suppress(OSError):  # who has heard enough hangs up
                        fault(self, data)
                    return
            if not file.is_file():
                self.answer(404 if not file.is_dir() else 200, b"")
                return
            tag = f'"{hashlib.md5(data).hexdigest()}"'
            if self.headers.get("If-None-Match") == tag:
                self.answer(304, b"")
                return
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
            self.answer(206 if start else 200, data[start:], {"ETag": tag, **ranged})

        def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def cut(after: int) -> Callable[[BaseHTTPRequestHandler, bytes], None]:
    """A fault: promise the whole file, send some bytes, and hang up."""

    def fault(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:after])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(2)

    return fault


def status(code: int) -> Callable[[BaseHTTPRequestHandler, bytes], None]:
    """A fault: answer with this status."""

    def fault(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def closed_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_tools_present() -> None:
    """Fail loudly when a tool is missing that the mirror is made with."""
    missing = [tool for tool in ("gpg", "gpgconf", "dpkg-deb", "apt-get") if not _found(tool)]
    assert not missing, f"install {' '.join(missing)} to run these tests"


def _found(tool: str) -> bool:
    return any(os.access(os.path.join(folder, tool), os.X_OK) for folder in os.environ["PATH"].split(":"))
