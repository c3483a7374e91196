"""Read files of a Debian mirror over http, https or file, directly or through an apt cacher.

Nothing here trusts the server: every body has a bound, waiting has an end, and what it says is escaped
before it is told.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import IO, Any

from build.agent.events import Failure
from build.printable import printable

TIMEOUT = 30.0
"""Seconds without a byte after which a server counts as dead."""
PAUSES = (0.3, 1.0, 3.0)
"""Seconds to wait before each further attempt after a passing fault."""
PASSING = frozenset({408, 416, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may cure (RFC 9110, 15.5 and 15.6)."""
ABSENT = frozenset({403, 404, 410})
"""Statuses with which mirrors say that they do not have a file."""
MOVED = frozenset({301, 302, 303, 307, 308})
REDIRECTS = 5
CHUNK = 1 << 14
"""Bytes read at a time: what is lost of a file when its server stops within them."""
HEAD = 1 << 18
"""Bytes that status lines, headers and the marks of chunks may take, beside the body."""
DISCARD = 1 << 14
"""Bytes of a body that nobody wants; with a longer one the connection is dropped."""
FLOOR = 1024
"""Bytes a second that a server must send, on average over each WINDOW."""
WINDOW = 60.0
"""Seconds of waiting."""
PATIENCE = 300.0
"""Seconds of waiting that every file may take, and more the larger it is: a second for RATE bytes."""
RATE = 4096
QUOTED = 100
"""Characters of a server's own words that a message has."""


@dataclass(frozen=True)
class Limit:
    """What a file may cost."""

    size: int
    """Bytes of its body."""
    seconds: float
    """Of waiting for the server; our own slowness does not count."""

    @classmethod
    def of(cls, size: int) -> Limit:
        """For a file whose size is signed."""
        return cls(size, PATIENCE + size / RATE)


RELEASE = Limit(16 << 20, PATIENCE)
"""For a file whose size nobody has signed; Debian's own InRelease have some 200 KiB."""


class Absent(Exception):
    """The server works and does not have this file."""


class NotModified(Exception):
    """The file is still what the validators say (status 304)."""


class TooMuch(OSError):
    """The server sends more than the file may have."""

    def __init__(self, bound: int) -> None:
        super().__init__(f"more than {bound} bytes")


class TooSlow(OSError):
    """The server keeps us waiting for ever."""


class BadAnswer(OSError):
    """The server's answer is none to what was asked."""


class HttpStatusError(OSError):
    """The server answered with a status that is neither success nor absence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status} {reason}".strip())
        self.status = status


@dataclass(frozen=True)
class Source:
    """How a mirror is reached, and which setting to name when it is not.

    `proxy` is a URL, or empty for what the environment says; `setting` is the key that holds the mirror.
    """

    proxy: str = ""
    setting: str = "debian_mirror"

    def proxy_to(self, url: str) -> str:
        """Return the URL of the proxy on the way there, or empty.

        Without a proxy of its own that is what http_proxy, https_proxy, all_proxy and no_proxy of this
        host's environment say. Raises Failure for one that speaks another protocol than HTTP.
        """
        split = urllib.parse.urlsplit(url)
        return self.proxy or (_environments(split.scheme, split.netloc) if split.scheme != "file" else "")


@dataclass(frozen=True)
class Answer:
    """A file as a server gave it; `body` is None when the known one is still right."""

    body: bytes | None
    validators: Mapping[str, str] = field(default_factory=dict)
    """Request headers for the next conditional GET (RFC 9110, 13.1)."""


class Body:
    """A body that can be read up to its bound, in bytes; `told` is the length that its headers give."""

    def __init__(self, file: IO[bytes], bound: int, told: int | None = None) -> None:
        if told is not None and told > bound:
            raise TooMuch(bound)
        self._file, self._bound, self._told, self._came = file, bound, told, 0

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes, none at the end.

        Raises TooMuch behind the bound, IncompleteRead when the end comes early, and BadAnswer.
        """
        try:
            data = self._file.read(min(count, self._bound - self._came + 1))
        except ValueError as error:  # a chunk of a negative length
            raise BadAnswer("its body cannot be read") from error
        self._came += len(data)
        if self._came > self._bound:
            raise TooMuch(self._bound)
        if not data and self._told is not None and self._came < self._told:
            raise http.client.IncompleteRead(b"", self._told - self._came)
        return data

    def whole(self) -> bytes:
        """Read to the end."""
        return b"".join(iter(lambda: self.read(CHUNK), b""))


@dataclass(frozen=True)
class Opened:
    """A body that can be read now; `offset` is the byte of the file that it starts at."""

    body: Body
    headers: Mapping[str, str]
    offset: int = 0


def get(url: str, source: Source, limit: Limit, known: Mapping[str, str] | None = None) -> Answer:
    """Fetch a small file, conditionally when `known` validators are given.

    Raises Absent when the server does not have it, Failure when there is no sound server.
    """
    for pause in (*PAUSES, None):
        try:
            with opened(url, source, limit, {"Cache-Control": "max-age=0", **(known or {})}) as answer:
                pairs = (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified"))
                validators = {
                    ours: answer.headers[theirs] for ours, theirs in pairs if theirs in answer.headers
                }
                return Answer(answer.body.whole(), validators)
        except NotModified:
            return Answer(None, known or {})
        except (OSError, http.client.HTTPException) as error:
            if pause is None or not is_passing(error):
                raise failure(url, source, error) from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def opened(url: str, source: Source, limit: Limit, headers: Mapping[str, str]) -> Iterator[Opened]:
    """Open a URL once, over a connection that this thread keeps for the next one.

    Raises Absent, NotModified (when `headers` have a validator), TooMuch, TooSlow, BadAnswer,
    HttpStatusError, and what sockets raise.
    """
    if url.startswith("file:"):
        with _opened_file(url, limit, headers) as file:
            yield file
        return
    for _ in range(REDIRECTS):
        with _asked(url, source, limit, headers) as answer:
            if answer.status in MOVED:
                url = _redirected(url, answer.getheader("Location", ""))
                Body(answer, DISCARD).read(DISCARD)
                continue
            if answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                Body(answer, DISCARD).read(DISCARD)
                raise _no(answer, url, headers)
            offset = _offset(answer, headers)
            told = {name.lower(): value for name, value in answer.getheaders()}
            yield Opened(Body(answer, limit.size - offset, answer.length), told, offset)
            return
    raise BadAnswer(f"it redirects more than {REDIRECTS} times")


def _redirected(url: str, target: str) -> str:
    """Where an answer sends us; raises BadAnswer unless it is another place of the web.

    As apt does it, https never leads to http: who asks for https wants nobody on the way to see or to
    choose what comes.
    """
    try:
        there = urllib.parse.urlsplit(urllib.parse.urljoin(url, target))
        host, _ = (there.hostname or "").encode("idna"), there.port
        known = host and there.scheme in ("http", "https") and re.fullmatch("[!-~]+", there.geturl())
    except ValueError:
        known = None
    if not target or not known:
        raise BadAnswer(f"it redirects to {_quoted(target) or 'no address'}")
    if url.startswith("https:") and there.scheme == "http":
        raise BadAnswer("it redirects from https to http")
    return there.geturl()


def _no(answer: http.client.HTTPResponse, url: str, headers: Mapping[str, str]) -> Exception:
    """What an answer without a body means."""
    if answer.status == HTTPStatus.NOT_MODIFIED:
        asked = headers.keys() & {"If-None-Match", "If-Modified-Since"}
        return NotModified() if asked else BadAnswer("HTTP 304, to a question without a condition")
    return Absent(url) if answer.status in ABSENT else HttpStatusError(answer.status, answer.reason)


def _offset(answer: http.client.HTTPResponse, headers: Mapping[str, str]) -> int:
    """First byte of what an answer holds; raises BadAnswer for a part that was not asked for.

    Source: RFC 9110, 14.4 and 15.3.7.
    """
    if answer.status == HTTPStatus.OK:
        return 0
    part = re.match("bytes ([0-9]{1,18})-", answer.getheader("Content-Range", ""))
    if not part or headers.get("Range") != f"bytes={int(part[1])}-":
        raise BadAnswer("it sends another part of the file than was asked for")
    return int(part[1])


@contextlib.contextmanager
def _opened_file(url: str, limit: Limit, headers: Mapping[str, str]) -> Iterator[Opened]:
    path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
    start = int(headers.get("Range", "bytes=0-")[6:-1])
    try:
        file = open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise Absent(url) from None
    except IsADirectoryError:
        yield Opened(Body(io.BytesIO(), 0), {})
        return
    with file:
        file.seek(start)
        yield Opened(Body(file, limit.size - start), {}, start)


def _environments(scheme: str, netloc: str) -> str:
    """Proxy that the environment names for a host."""
    if urllib.request.proxy_bypass(netloc.rpartition("@")[2]):
        return ""
    named = urllib.request.getproxies_environment()
    proxy = named.get(scheme) or named.get("all", "")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and urllib.parse.urlsplit(proxy).scheme not in ("http", "https"):
        raise Failure(
            f"the environment's proxy {_shown(proxy)} speaks no HTTP", "unset it here, or set apt_proxy"
        )
    return proxy


# --- connections -----------------------------------------------------------------------------------

ConnectionKey = tuple[str, str, str]
"""Scheme and host of a URL, and the proxy on the way to it."""
_idle: dict[ConnectionKey, list[http.client.HTTPConnection]] = {}
_pooling = threading.Lock()
_resolving = threading.Lock()


def hang_up() -> None:
    """Close every connection that was kept for a next request."""
    with _pooling:
        kept = [connection for group in _idle.values() for connection in group]
        _idle.clear()
    for connection in kept:
        connection.close()


class PacedSocket(socket.socket):
    """A socket that bounds what comes in, and how long it is waited for.

    All of an answer passes here: status line, headers, chunk marks, body, and what a proxy says to
    CONNECT. A TLS handshake has the socket's timeout as its own end.
    """

    _room, _seconds = HEAD, PATIENCE
    _waited, _in_window, _waited_in_window = 0.0, 0, 0.0

    def expect_head(self, seconds: float) -> None:
        """Begin to count for another answer, which may be waited for as long as this."""
        self._room, self._seconds = HEAD, seconds
        self._waited, self._in_window, self._waited_in_window = 0.0, 0, 0.0

    def expect_body(self, size: int) -> None:
        """Let a body in, also in chunks of six bytes, whose marks have six; it has its own bound."""
        self._room += 2 * size

    def recv_into(self, *where: Any) -> int:
        """Receive as socket.recv_into does; raises BadAnswer and TooSlow."""
        began = time.monotonic()
        count = super().recv_into(*where)
        waited = time.monotonic() - began
        self._room -= count
        self._waited += waited
        self._in_window += count
        self._waited_in_window += waited
        if self._room < 0:
            raise BadAnswer("its headers have no end")
        if self._waited > self._seconds:
            raise TooSlow(f"the file has not come in {self._seconds:.0f} s")
        if self._waited_in_window >= WINDOW:
            if self._in_window < FLOOR * self._waited_in_window:
                raise TooSlow(f"{self._in_window} bytes in {self._waited_in_window:.0f} s")
            self._in_window, self._waited_in_window = 0, 0.0
        return count


class PacedTlsSocket(PacedSocket, ssl.SSLSocket):
    """The same behind TLS."""


@contextlib.contextmanager
def _asked(
    url: str, source: Source, limit: Limit, headers: Mapping[str, str]
) -> Iterator[http.client.HTTPResponse]:
    """Send a GET and yield the answer; the connection is kept when the answer was read to its end."""
    split = urllib.parse.urlsplit(url)
    proxy = source.proxy_to(url)
    place = (split.scheme, split.netloc, proxy)
    with _pooling:
        kept = _idle.get(place, [])
        connection = kept.pop() if kept else _connection(split, proxy)
    answer = None
    try:
        answer = _request(connection, split, proxy, limit, headers)
        yield answer
    except (OSError, http.client.HTTPException):
        # What ends a broken answer nobody knows.
        connection.close()
        raise
    finally:
        if answer is not None and answer.isclosed() and connection.sock is not None:
            with _pooling:
                _idle.setdefault(place, []).append(connection)
        else:
            # What was not read would be taken for the answer to the next request.
            if answer is not None:
                answer.close()
            connection.close()


def _request(
    connection: http.client.HTTPConnection,
    split: urllib.parse.SplitResult,
    proxy: str,
    limit: Limit,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:
    """Ask over a connection; a kept one that the server has closed meanwhile is opened again."""
    path = urllib.parse.quote(urllib.parse.unquote(split.path), safe="/+~:@!$&'()*,;=") or "/"
    through_proxy = proxy and split.scheme == "http"
    target = f"{split.scheme}://{split.netloc}{path}" if through_proxy else path
    asked = {"User-Agent": "systemvm-builder", "Host": split.netloc.rpartition("@")[2], **headers}
    asked |= _authorization(split.geturl(), "Authorization")
    if through_proxy:
        asked |= _authorization(proxy, "Proxy-Authorization")
    kept = connection.sock is not None
    try:
        return _answered(connection, target, limit, asked)
    except (ConnectionError, http.client.BadStatusLine):
        if not kept:
            raise
    connection.close()
    return _answered(connection, target, limit, asked)


def _answered(
    connection: http.client.HTTPConnection, target: str, limit: Limit, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    if connection.sock is None:
        connection.connect()
    paced = connection.sock
    assert isinstance(paced, PacedSocket)
    paced.expect_head(limit.seconds)
    connection.request("GET", target, headers=headers)
    answer = connection.getresponse()
    paced.expect_body(limit.size)
    return answer


def _connection(split: urllib.parse.SplitResult, proxy: str) -> http.client.HTTPConnection:
    through = urllib.parse.urlsplit(proxy) if proxy else split
    port = through.port or (443 if through.scheme == "https" else 80)
    connection: http.client.HTTPConnection
    if split.scheme == "https":
        context = ssl.create_default_context()
        context.sslsocket_class = PacedTlsSocket
        connection = http.client.HTTPSConnection(
            through.hostname or "", port, timeout=TIMEOUT, context=context
        )
        if proxy:
            connection.set_tunnel(
                split.hostname or "", split.port or 443, _authorization(proxy, "Proxy-Authorization")
            )
    else:
        connection = http.client.HTTPConnection(through.hostname or "", port, timeout=TIMEOUT)
    # Many lookups at the same moment are what small resolvers drop; each drop costs five seconds.
    connection._create_connection = _dial  # type: ignore[attr-defined]
    return connection


def _dial(address: tuple[str, int], timeout: float, *_: Any) -> socket.socket:
    """Connect to the first address of a host that answers."""
    with _resolving:
        found = _addresses(*address, int(time.monotonic()) // 60)
    for family, kind, protocol, _, where in found:
        connection = PacedSocket(family, kind, protocol)
        connection.settimeout(timeout)
        try:
            connection.connect(where)
        except OSError as error:
            connection.close()
            last = error
        else:
            return connection
    raise last


@functools.lru_cache(16)
def _addresses(host: str, port: int, _minute: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _authorization(url: str, header: str) -> dict[str, str]:
    """Basic credentials that stand in a URL (RFC 7617)."""
    split = urllib.parse.urlsplit(url)
    if split.username is None:
        return {}
    pair = f"{urllib.parse.unquote(split.username)}:{urllib.parse.unquote(split.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}


# --- what went wrong -------------------------------------------------------------------------------


def is_passing(error: Exception) -> bool:
    """Tell whether a fault may pass: cut or slow connections and busy servers may, refusals do not."""
    if isinstance(error, HttpStatusError):
        return error.status in PASSING
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return isinstance(
        error, TimeoutError | ConnectionResetError | BrokenPipeError | http.client.HTTPException
    )


def failure(url: str, source: Source, error: Exception) -> Failure:
    """Say who did not answer, the proxy or the mirror, and which setting to look at."""
    mirror, reason = _mirror(url), _reason(error)
    proxy = "" if url.startswith("file:") else source.proxy_to(url)
    if isinstance(error, TooMuch | TooSlow | BadAnswer):
        via = f" through proxy {_shown(proxy)}" if proxy else ""
        return _misbehaviour(url, f"mirror {mirror}{via}", source, error)
    if proxy and _is_proxys(error):
        hint = "correct apt_proxy; empty means the environment's proxy, or none"
        if not source.proxy:
            hint = (
                "correct http_proxy and https_proxy in the environment there, or name the mirror in no_proxy"
            )
        return Failure(f"proxy {_shown(proxy)} does not bring {mirror}: {reason}", hint)
    if isinstance(error, ssl.SSLError):
        return Failure(
            f"mirror {mirror} is not trusted: {reason}",
            f"correct {source.setting}, or install ca-certificates",
        )
    return Failure(f"mirror {mirror} does not answer: {reason}", f"check {source.setting} and the network")


def _misbehaviour(url: str, who: str, source: Source, error: Exception) -> Failure:
    other = f"use another mirror ({source.setting}) or proxy"
    if isinstance(error, TooSlow):
        return Failure(
            f"{who} is too slow: {_reason(error)}",
            f"run again, which goes on where packages stopped, or {other}",
        )
    if isinstance(error, TooMuch):
        return Failure(
            f"{who} sends too much for {_shown(url).rpartition('/')[2]}: {_reason(error)}",
            f"try again in some minutes, or {other}: this one hands out a wrong file",
        )
    return Failure(f"{who} answers wrongly: {_reason(error)}", other)


def _is_proxys(error: Exception) -> bool:
    return error.status in (407, 500, 502, 503, 504) if isinstance(error, HttpStatusError) else True


def _reason(error: Exception) -> str:
    """What happened, in words that may be the server's own."""
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:.0f} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return _quoted(error.verify_message)
    return _quoted(str((isinstance(error, OSError) and error.strerror) or error) or type(error).__name__)


def _quoted(text: str) -> str:
    """Words of others, as far as a line has room for them."""
    return printable(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")


def _mirror(url: str) -> str:
    """The mirror's part of a URL: all before its suites and its pool, without credentials."""
    for part in ("/dists/", "/pool/"):
        url = url.partition(part)[0]
    return _shown(url)


def _shown(url: str) -> str:
    split = urllib.parse.urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2]).geturl()
