"""Read files of a Debian mirror over http, https or file, directly or through an apt cacher."""

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

TIMEOUT = 30.0
"""Seconds without a byte after which a server counts as dead."""
PAUSES = (0.3, 1.0, 3.0)
"""Seconds to wait before each further attempt after a passing fault."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may cure (RFC 9110, 15.5 and 15.6)."""
ABSENT = frozenset({403, 404, 410})
"""Statuses with which mirrors say that they do not have a file."""
REDIRECTS = 5


class Absent(Exception):
    """The server works and does not have this file."""


class NotModified(Exception):
    """The file is still what the validators say (status 304)."""


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


@dataclass(frozen=True)
class Opened:
    """A body that can be read now; `offset` is the byte of the file that it starts at."""

    body: IO[bytes]
    headers: Mapping[str, str]
    offset: int = 0


def get(url: str, source: Source, known: Mapping[str, str] | None = None) -> Answer:
    """Fetch a small file, conditionally when `known` validators are given.

    Raises Absent when the server does not have it, Failure when there is no sound server.
    """
    for pause in (*PAUSES, None):
        try:
            with opened(url, source, {"Cache-Control": "max-age=0", **(known or {})}) as answer:
                pairs = (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified"))
                validators = {
                    ours: answer.headers[theirs] for ours, theirs in pairs if theirs in answer.headers
                }
                return Answer(answer.body.read(), validators)
        except NotModified:
            return Answer(None, known or {})
        except (OSError, http.client.HTTPException) as error:
            if pause is None or not is_passing(error):
                raise failure(url, source, error) from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def opened(url: str, source: Source, headers: Mapping[str, str]) -> Iterator[Opened]:
    """Open a URL once, over a connection that this thread keeps for the next one.

    Raises Absent, NotModified, HttpStatusError, and what sockets raise.
    """
    if url.startswith("file:"):
        with _opened_file(url, headers) as file:
            yield file
        return
    for _ in range(REDIRECTS):
        with _asked(url, source, headers) as answer:
            target = answer.getheader("Location")
            if answer.status in (301, 302, 303, 307, 308) and target:
                answer.read()
                url = urllib.parse.urljoin(url, target)
                continue
            if answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                answer.read()
                raise _no(answer, url)
            told = {name.lower(): value for name, value in answer.getheaders()}
            yield Opened(answer, told, _offset(told) if answer.status == HTTPStatus.PARTIAL_CONTENT else 0)
            return
    raise HttpStatusError(HTTPStatus.LOOP_DETECTED, "redirected too often")


def _no(answer: http.client.HTTPResponse, url: str) -> Exception:
    """What an answer without a body means."""
    if answer.status == HTTPStatus.NOT_MODIFIED:
        return NotModified()
    return Absent(url) if answer.status in ABSENT else HttpStatusError(answer.status, answer.reason)


def _offset(headers: Mapping[str, str]) -> int:
    """First byte of a partial answer (RFC 9110, 14.4)."""
    first = headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if re.fullmatch("[0-9]{1,18}", first) else 0


@contextlib.contextmanager
def _opened_file(url: str, headers: Mapping[str, str]) -> Iterator[Opened]:
    path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
    start = int(headers.get("Range", "bytes=0-")[6:-1])
    try:
        file = open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise Absent(url) from None
    except IsADirectoryError:
        yield Opened(io.BytesIO(), {})
        return
    with file:
        file.seek(start)
        yield Opened(file, {}, start)


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


@contextlib.contextmanager
def _asked(url: str, source: Source, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
    """Send a GET and yield the answer; the connection is kept when the answer was read to its end."""
    split = urllib.parse.urlsplit(url)
    proxy = source.proxy_to(url)
    place = (split.scheme, split.netloc, proxy)
    with _pooling:
        kept = _idle.get(place, [])
        connection = kept.pop() if kept else _connection(split, proxy)
    answer = None
    try:
        answer = _request(connection, split, proxy, headers)
        yield answer
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
        connection.request("GET", target, headers=asked)
        return connection.getresponse()
    except (ConnectionError, http.client.BadStatusLine):
        if not kept:
            raise
    connection.close()
    connection.request("GET", target, headers=asked)
    return connection.getresponse()


def _connection(split: urllib.parse.SplitResult, proxy: str) -> http.client.HTTPConnection:
    through = urllib.parse.urlsplit(proxy) if proxy else split
    port = through.port or (443 if through.scheme == "https" else 80)
    connection: http.client.HTTPConnection
    if split.scheme == "https":
        connection = http.client.HTTPSConnection(
            through.hostname or "", port, timeout=TIMEOUT, context=ssl.create_default_context()
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
        connection = socket.socket(family, kind, protocol)
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
    if (proxy := source.proxy_to(url)) and not url.startswith("file:") and _is_proxys(error):
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


def _is_proxys(error: Exception) -> bool:
    return error.status in (407, 500, 502, 503, 504) if isinstance(error, HttpStatusError) else True


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:.0f} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return str((isinstance(error, OSError) and error.strerror) or error or type(error).__name__)


def _mirror(url: str) -> str:
    """The mirror's part of a URL: all before its suites and its pool, without credentials."""
    for part in ("/dists/", "/pool/"):
        url = url.partition(part)[0]
    return _shown(url)


def _shown(url: str) -> str:
    split = urllib.parse.urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2]).geturl()
