"""A mirror that means harm, or is broken: one line that names it, in bounded time and memory."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests import mirror
from tests.mirror import Key, Mirror

pytestmark = pytest.mark.root
Fault = Callable[[BaseHTTPRequestHandler, bytes], None]
MEMORY = 512 << 20
"""Bytes of address space for whoever reads the mirror, and each tool that he calls."""
CHILD = """
import json, resource, sys
from build import wire
from build.agent.debian import web
from build.agent.events import Failure
from build.agent.verbs import fetch, resolve
told = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (told["memory"], told["memory"]))
for name, value in told["constants"].items():
    assert hasattr(web, name)
    setattr(web, name, web.Limit(*value) if name == "RELEASE" else value)
verb, request = {"resolve": (resolve, wire.Resolve), "fetch": (fetch, wire.Fetch)}[told["verb"]]
try:
    verb.run(wire.load(request, told["request"]), lambda kind, **fields: None)
except Failure as failure:
    print(json.dumps([failure.message, failure.hint]))
else:
    print(json.dumps(["", ""]))
"""
QUICK = {"PAUSES": [0.01]}
IMPATIENT = {**QUICK, "WINDOW": 0.5}
TIMES_OUT = {**QUICK, "TIMEOUT": 0.5}


# --- what a server may do ---------------------------------------------------------------------------


def raw(answer: bytes, then: bytes = b"", pause: float = 0.0) -> Fault:
    """Send these bytes, and then others for as long as anybody listens."""

    def fault(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.close_connection = True
        handler.wfile.write(answer)
        piece = then if pause else then * (1 + (1 << 16) // max(1, len(then)))
        while piece:
            handler.wfile.write(piece)
            time.sleep(pause)

    return fault


def ok(*headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1")


def moved(*headers: str) -> Fault:
    return raw(ok("Content-Length: 0", *headers, status="302 Found"))


def stall(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.close_connection = True
    handler.wfile.write(ok(f"Content-Length: {len(data)}") + data[:10])
    handler.connection.recv(1)


def reset(handler: BaseHTTPRequestHandler, _: bytes) -> None:
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def serves(data: bytes) -> Fault:
    """Answer with other bytes, correctly."""
    return raw(ok(f"Content-Length: {len(data)}") + data)


def instead(change: Callable[[bytes], bytes]) -> Fault:
    return lambda handler, data: serves(change(data))(handler, data)


CHUNKED = ok("Transfer-Encoding: chunked")
ESCAPES = b"\x1b]0;owned\x07\x9b31m\x7f evil"
LONG = "a" * 64
UNENDING = ok(), b"Suite: bookworm\n"
TOO_MUCH = r"mirror http://\S+/debian sends too much for InRelease: more than 16777216 bytes"
TOO_SLOW = r"mirror http://\S+ is too slow: \d+ bytes in \d+ s"
WRONGLY = r"mirror http://\S+ answers wrongly: "
NO_ANSWER = r"mirror http://\S+ does not answer: "
NOT_SIGNED = r"http://\S+/dists/bookworm/InRelease is not a signed file"

UNASKED: list[Any] = [
    pytest.param(raw(ok(status="304 Not Modified")), QUICK, WRONGLY + "HTTP 304", id="not modified"),
    pytest.param(
        raw(ok("Content-Length: 1", "Content-Range: bytes 7-7/8", status="206 Part") + b"x"),
        QUICK,
        WRONGLY + "it sends another part",
        id="a part of it",
    ),
]
"""Answers that only another question would have."""

RELEASES: list[Any] = [
    pytest.param(mirror.cut(100), QUICK, NO_ANSWER + "IncompleteRead", id="truncated"),
    pytest.param(stall, TIMES_OUT, NO_ANSWER + "no answer within", id="stalls"),
    pytest.param(raw(ok(), b"x", 0.02), IMPATIENT, TOO_SLOW, id="drips"),
    pytest.param(raw(b"", b"H", 0.02), IMPATIENT, TOO_SLOW, id="drips its status line"),
    pytest.param(raw(ok()[:-2], b"X: y\r\n", 0.02), IMPATIENT, TOO_SLOW, id="drips headers"),
    pytest.param(
        raw(ok(), b"x" * 4096, 0.05),
        {**QUICK, "RELEASE": [16 << 20, 1]},
        "is too slow: the file has not come in 1 s",
        id="takes too long",
    ),
    pytest.param(reset, QUICK, NO_ANSWER + "Connection reset by peer", id="resets"),
    pytest.param(raw(*UNENDING), QUICK, TOO_MUCH, id="has no end"),
    pytest.param(raw(CHUNKED, b"400\r\n" + bytes(1024) + b"\r\n"), QUICK, TOO_MUCH, id="endless chunks"),
    pytest.param(raw(ok("Content-Length: 99999999999999999999")), QUICK, TOO_MUCH, id="promises too much"),
    pytest.param(raw(b"", b"H"), QUICK, "got more than 65536 bytes", id="status line without end"),
    pytest.param(raw(ok()[:-2], b"X: y\r\n"), QUICK, "got more than 100 headers", id="headers without end"),
    pytest.param(raw(b"", ok(status="100 Continue")), QUICK, "headers have no end", id="goes on without end"),
    pytest.param(raw(CHUNKED + b"-5\r\n"), QUICK, WRONGLY + "its body", id="chunk of negative length"),
    pytest.param(raw(CHUNKED + b"zz\r\n"), QUICK, NO_ANSWER + "IncompleteRead", id="chunk of no length"),
    pytest.param(
        raw(ok(status="500 Broken"), b"x"), QUICK, NO_ANSWER + "HTTP 500 Broken", id="error without end"
    ),
    pytest.param(
        raw(ok("Location: /debian/dists/bookworm/InRelease", status="302 Found"), b"x"),
        QUICK,
        WRONGLY + "it redirects more than 5 times",
        id="redirects with a body without end",
    ),
    pytest.param(
        moved("Location: InRelease"), QUICK, WRONGLY + "it redirects more than 5 times", id="goes round"
    ),
    pytest.param(moved(), QUICK, WRONGLY + "it redirects to no address", id="redirects nowhere"),
    *(
        pytest.param(moved(f"Location: {target}"), QUICK, WRONGLY + told, id=f"redirects to {target[:12]}")
        for target, told in (
            ("file:///etc/passwd", "it redirects to file:///etc/passwd"),
            ("ftp://mirror.invalid/x", "it redirects to ftp://mirror.invalid/x"),
            ("http://[x/", r"it redirects to http://\[x/"),
            ("http://h:port/", "it redirects to http://h:port/"),
            (f"http://{LONG}/", "it redirects to http://aaa"),
            ("http://a\x9b31mb/", r"it redirects to http://a\\x9b31mb"),
            ("http://:80/x", "it redirects to http://:80/x"),
        )
    ),
    pytest.param(raw(ESCAPES + b"\r\n\r\n"), QUICK, NO_ANSWER + r"\\x1b\]0;owned\\x07\\x9b31m", id="garbage"),
    pytest.param(
        raw(ok("Content-Length: 0", status=f"500 {ESCAPES.decode('latin-1')}")),
        QUICK,
        NO_ANSWER + r"HTTP 500 \\x1b\]0;owned\\x07\\x9b31m",
        id="status with escapes",
    ),
    *UNASKED,
    pytest.param(serves(b"Suite: bookworm\n"), QUICK, NOT_SIGNED, id="unsigned"),
    pytest.param(instead(lambda data: b"Suite: x\n" + data), QUICK, NOT_SIGNED, id="text before"),
    pytest.param(instead(lambda data: data + b"Suite: x\n"), QUICK, NOT_SIGNED, id="text after"),
    pytest.param(instead(lambda data: data + data), QUICK, NOT_SIGNED, id="two signed texts"),
    pytest.param(
        instead(lambda data: data + data[data.index(b"-----BEGIN PGP SIGNATURE") :]),
        QUICK,
        NOT_SIGNED,
        id="concatenated signatures",
    ),
    pytest.param(
        instead(lambda data: data[data.index(b"-----BEGIN PGP SIGNATURE") :]),
        QUICK,
        NOT_SIGNED,
        id="detached",
    ),
    pytest.param(
        instead(lambda data: data.replace(b"Origin: Test", b"Origin: Evil")),
        QUICK,
        r"signature of http://\S+ fails: the content was changed",
        id="changed",
    ),
]

INDICES: list[Any] = [
    pytest.param(raw(ok(), b"x"), r"mirror http://\S+ sends too much for \S+: more than \d+", id="no end"),
    pytest.param(instead(lambda data: data + b"x"), "sends too much", id="longer"),
    pytest.param(instead(lambda data: data[:-1]), r"is not what was signed \(\d+ bytes", id="shorter"),
    pytest.param(instead(lambda data: data[:-1] + b"x"), "is not what was signed", id="wrong hash"),
    pytest.param(raw(ok(status="304 Not Modified")), WRONGLY + "HTTP 304", id="not modified"),
    pytest.param(mirror.status(404), "is missing", id="missing"),
]

DEBS: list[Any] = [
    pytest.param(raw(ok(), b"x"), QUICK, r"sends too much for tool_1_amd64\.deb: more than \d+", id="no end"),
    pytest.param(raw(CHUNKED, b"1\r\nx\r\n"), QUICK, "sends too much|no end", id="no end in chunks"),
    pytest.param(
        raw(CHUNKED, b"1;" + b"x" * 60000 + b"\r\n" + b"x\r\n"), QUICK, "headers have no end", id="long marks"
    ),
    pytest.param(raw(CHUNKED + b"0\r\n", b"X: y\r\n"), QUICK, "headers have no end", id="long trailer"),
    pytest.param(instead(lambda data: data + b"x"), QUICK, "sends too much", id="longer"),
    pytest.param(instead(lambda data: data[:-1]), QUICK, "is not what was signed", id="shorter"),
    pytest.param(instead(lambda data: bytes(len(data))), QUICK, "is not what was signed", id="wrong hash"),
    *UNASKED,
    pytest.param(
        raw(ok("Content-Length: 1", "Content-Range: \x1b[31m", status="206 Part") + b"x"),
        QUICK,
        WRONGLY + "it sends another part",
        id="odd range",
    ),
    pytest.param(
        moved("Location: file:///etc/passwd"), QUICK, "it redirects to file:///etc/passwd", id="to file"
    ),
    pytest.param(reset, QUICK, NO_ANSWER + "Connection reset by peer", id="resets"),
    pytest.param(stall, TIMES_OUT, NO_ANSWER + "no answer within", id="stalls"),
    pytest.param(raw(ESCAPES + b"\r\n"), QUICK, NO_ANSWER + r"\\x1b\]0;owned", id="garbage"),
]


# --- an honest mirror that is led astray -------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, key: Key) -> Iterator[tuple[Mirror, str]]:
    archive = Mirror(tmp_path_factory.mktemp("mirror") / "root", key)
    with archive.served() as url:
        yield archive, url


@pytest.fixture
def archive(sound: tuple[Mirror, str]) -> Iterator[Mirror]:
    yield sound[0]
    sound[0].faults.clear()


def package(sound: tuple[Mirror, str], name: str) -> dict[str, Any]:
    """A row of what `resolve` answers."""
    archive, url = sound
    path = f"debian/pool/{name}_1_amd64.deb"
    data = (archive.root / path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    told = {"name": name, "version": "1", "arch": "amd64", "size": len(data), "sha256": digest}
    return {**told, "url": f"{url}/{path}", "essential": False}


Ask = Callable[..., tuple[str, str]]


@pytest.fixture
def ask(sound: tuple[Mirror, str], key: Key, tmp_path: Path) -> Ask:
    """Ask in a process of little memory; answers message and hint, empty ones when all is well."""

    def run(
        verb: str = "resolve", constants: Any = QUICK, env: Any = None, **changes: Any
    ) -> tuple[str, str]:
        url = sound[1]
        requests: dict[str, Any] = {
            "resolve": {
                "mirrors": {
                    "suite": "bookworm",
                    "mirror": f"{url}/debian",
                    "security_mirror": f"{url}/debian-security",
                    "security": True,
                    "keyring": str(key.ring),
                    "apt_proxy": "",
                    "store": str(tmp_path / "store"),
                },
                "arch": "amd64",
                "components": ["main"],
                "packages": ["tool"],
            },
            "fetch": {"packages": [package(sound, "tool")], "debs": str(tmp_path / "debs")},
        }
        if "mirrors" in requests[verb]:
            own = requests[verb]["mirrors"].keys() & changes.keys()
            requests[verb]["mirrors"] |= {name: changes.pop(name) for name in own}
        told = {"verb": verb, "memory": MEMORY, "constants": constants}
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=json.dumps({**told, "request": {**requests[verb], **changes}}),
            capture_output=True,
            text=True,
            check=False,
            # Each thread's own arena would count as memory that it may use.
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), "MALLOC_ARENA_MAX": "1", **(env or {})},
        )
        assert done.returncode == 0, done.stderr
        message, hint = json.loads(done.stdout)
        return message, hint

    return run


def refused(answer: tuple[str, str], told: str) -> None:
    message, hint = answer
    assert re.search(told, message), message
    assert hint, "every failure says what to do"
    assert (message + hint).isprintable(), "one line, and nothing in it that acts on a terminal"
    assert len(message) < 400


def test_an_honest_mirror_is_taken_within_the_same_bounds(ask: Ask, archive: Mirror, tmp_path: Path) -> None:
    assert ask() == ("", "")
    assert ask("fetch") == ("", "")
    assert (tmp_path / "debs/tool_1_amd64.deb").is_file()


@pytest.mark.parametrize(("fault", "constants", "told"), RELEASES)
def test_a_release_file(ask: Ask, archive: Mirror, fault: Fault, constants: Any, told: str) -> None:
    archive.faults["bookworm/InRelease"] = fault
    refused(ask(constants=constants), told)


@pytest.mark.parametrize(("fault", "told"), INDICES)
def test_an_index(ask: Ask, archive: Mirror, fault: Fault, told: str) -> None:
    for file in (archive.root / "debian/dists/bookworm/main/binary-amd64").rglob("*"):
        archive.faults[f"/dists/bookworm/{file.relative_to(archive.root / 'debian/dists/bookworm')}"] = fault
    refused(ask(), told)


@pytest.mark.parametrize(("fault", "constants", "told"), DEBS)
def test_a_package(
    ask: Ask, archive: Mirror, tmp_path: Path, fault: Fault, constants: Any, told: str
) -> None:
    archive.faults["tool_1_amd64.deb"] = fault
    refused(ask("fetch", constants), told)
    assert not list((tmp_path / "debs").glob("*.deb"))
    archive.faults.clear()
    archive.asked.clear()
    while ask("fetch") != ("", ""):
        assert len(archive.asked) == 1, "what was left of the attempt costs one further run at most"


def test_what_has_come_slowly_of_a_package_is_kept(
    ask: Ask, archive: Mirror, sound: tuple[Mirror, str], tmp_path: Path
) -> None:
    whole = os.urandom(100_000)
    (archive.root / "debian/pool/big_1_amd64.deb").write_bytes(whole)
    packages = [package(sound, "big")]

    def drip(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.close_connection = True
        handler.wfile.write(ok(f"Content-Length: {len(data)}") + data[:50_000])
        for byte in data[50_000:]:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)

    archive.faults["big_1_amd64.deb"] = drip
    message, hint = ask("fetch", {**IMPATIENT, "FLOOR": 200_000}, packages=packages)
    assert re.search(TOO_SLOW, message)
    assert "run again" in hint
    (part,) = (tmp_path / "debs").glob(".*.part")
    kept = part.read_bytes()
    assert len(kept) > 30_000
    assert whole.startswith(kept)
    archive.faults.clear()
    archive.headers.clear()
    assert ask("fetch", packages=packages) == ("", "")
    assert [headers.get("Range") for headers in archive.headers] == [f"bytes={len(kept)}-"]
    assert (tmp_path / "debs/big_1_amd64.deb").read_bytes() == whole


# --- what is signed, and wrong all the same ----------------------------------------------------------


def resigned(archive: Mirror, key: Key, *changes: tuple[str, str]) -> bytes:
    """The InRelease of bookworm with changes, signed by a key."""
    signed = (archive.root / "debian/dists/bookworm/InRelease").read_text()
    text = signed.partition("\n\n")[2].partition("-----BEGIN PGP SIGNATURE")[0]
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text, flags=re.M)
        assert count
    return key.sign(text)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("^Date: .*", "Date: Sat, 01 Jan 2022 00:00:00 UTC")], "is older than what was seen before"),
        ([("^Date: .*", "Date: Fri, 01 Jan 2100 00:00:00 UTC")], "in the future"),
        ([("^Date: .*", "Date: \u202eyesterday")], "cannot be read: not a date"),
        ([("^Codename: .*", "Valid-Until: Sat, 01 Jan 2022 00:00:00 UTC\nCodename: bookworm")], "expired on"),
        ([("^Codename: .*", "Codename: trixie"), ("^Suite: .*", "Suite: stable")], "not of bookworm"),
        ([(r"\d+ main/binary-amd64/Packages$", "10 main/binary-amd64/Packages")], "more than the 10 bytes"),
    ],
    ids=["older under another name", "future", "no date", "expired", "another suite", "unpacks to more"],
)
def test_a_signed_release_file(
    ask: Ask, archive: Mirror, key: Key, sound: tuple[Mirror, str], changes: list[tuple[str, str]], told: str
) -> None:
    assert ask() == ("", "")
    archive.faults["bookworm/InRelease"] = serves(resigned(archive, key, *changes))
    elsewhere = sound[1].replace("127.0.0.1", "localhost")
    message, hint = ask(mirror=f"{elsewhere}/debian")
    assert told in message
    assert hint
    assert "\n" not in message + hint


def test_a_bomb_among_the_indices(ask: Ask, archive: Mirror, key: Key) -> None:
    bomb = lzma.compress(bytes(16 << 20), preset=0) * 128
    listed = f" {hashlib.sha256(bomb).hexdigest()} {len(bomb)} main/binary-amd64/Packages.xz"
    release = resigned(archive, key, (r"^ \S+ \d+ main/binary-amd64/Packages\.xz$", listed))
    archive.faults["bookworm/InRelease"] = serves(release)
    archive.faults[hashlib.sha256(bomb).hexdigest()] = serves(bomb)
    refused(ask(), r"Packages\.xz unpacks to more than the \d+ bytes that are signed")


def test_another_key(ask: Ask, archive: Mirror, tmp_path: Path) -> None:
    other = Key(tmp_path / "other")
    try:
        archive.faults["bookworm/InRelease"] = serves(resigned(archive, other))
    finally:
        other.close()
    refused(ask(), r"signature of http://\S+ fails: the key \w+ is not in the keyring")


def test_a_packed_message_never_reaches_gpgv(ask: Ask, archive: Mirror, key: Key) -> None:
    """gpgv unpacks before it verifies: this one is signed well, and would fill the memory."""
    packed = key._gpg("--compress-algo", "zlib", "-z", "9", "--sign", text=bytes(64 << 20))
    armoured = b"-----BEGIN PGP MESSAGE-----\n\n" + base64.encodebytes(packed)
    for message in (packed, armoured + b"-----END PGP MESSAGE-----\n"):
        archive.faults["bookworm/InRelease"] = serves(message + b"-----BEGIN PGP SIGNED MESSAGE-----\n")
        refused(ask(), NOT_SIGNED)


# --- TLS and proxies ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tls") / "both.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(made), "-out", f"{made}.crt"]
    subprocess.run(argv, check=True, capture_output=True)
    made.write_bytes(made.read_bytes() + Path(f"{made}.crt").read_bytes())
    return made


@pytest.fixture
def tls(archive: Mirror, certificate: Path) -> Iterator[str]:
    """The same mirror behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with archive.served(context) as url:
        yield url


@pytest.mark.parametrize(
    ("fault", "constants", "told"),
    [
        pytest.param(raw(ok(), b"x", 0.02), IMPATIENT, r"https://\S+ is too slow", id="drips"),
        pytest.param(raw(ok(), b"x"), QUICK, "sends too much for InRelease", id="no end"),
        pytest.param(
            moved("Location: http://127.0.0.1/x"), QUICK, "it redirects from https to http", id="downgrade"
        ),
    ],
)
def test_behind_tls(
    ask: Ask, archive: Mirror, tls: str, certificate: Path, fault: Fault, constants: Any, told: str
) -> None:
    env = {"SSL_CERT_FILE": str(certificate)}
    assert ask(env=env, mirror=f"{tls}/debian") == ("", "")
    archive.faults["bookworm/InRelease"] = fault
    refused(ask(constants=constants, env=env, mirror=f"{tls}/debian"), told)


@pytest.mark.parametrize(
    ("then", "pause", "told"),
    [(b"X: y\r\n", 0.0, "headers have no end|more than 100 headers"), (b"X: y\r\n", 0.02, "is too slow")],
    ids=["no end", "drips"],
)
def test_a_proxy_on_the_way_to_tls(ask: Ask, then: bytes, pause: float, told: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n")
                    while True:
                        connection.sendall(then if pause else then * 10000)
                        time.sleep(pause)
                except OSError:
                    pass

        threads = [threading.Thread(target=answer) for _ in ("bookworm", "bookworm-updates")]
        for thread in threads:
            thread.start()
        proxy = f"http://127.0.0.1:{listening.getsockname()[1]}"
        constants = {**IMPATIENT, "PAUSES": []}
        elsewhere = {"mirror": "https://mirror.invalid/debian", "security": False, "apt_proxy": proxy}
        refused(ask(constants=constants, **elsewhere), told)
        for thread in threads:
            thread.join()
