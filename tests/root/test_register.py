"""`inv register`: what it prints, and what reaches a server that checks each call's signature for itself."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, quote

import pytest

from build.engine.errors import BuildError
from build.verbs.register import Client, Template
from tests import cli, disks

pytestmark = pytest.mark.root
KEY, SECRET = "the-api-key-0123", "the-secret-4567"
KEYS = {"CLOUDSTACK_KEY": KEY, "CLOUDSTACK_SECRET": SECRET}
URL = "https://files.example/systemvm"
NAME = "systemvmtemplate-4.22.0-x86_64"
OS_TYPES = {"Debian GNU/Linux 12 (64-bit)": "id-debian", "Other Linux (64-bit)": "id-other"}


def signature(params: dict[str, str], secret: str) -> str:
    """As CloudStack's guide for developers says: sorted, encoded, in lower case, HMAC-SHA1, base64."""
    text = "&".join(f"{key}={quote(params[key], safe='*')}" for key in sorted(params, key=str.lower)).lower()
    return base64.b64encode(hmac.digest(secret.encode(), text.encode(), hashlib.sha1)).decode()


@dataclass
class Api:
    """A management server that knows one administrator."""

    port: int = 0
    calls: list[dict[str, str]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    answer: Callable[[dict[str, str]], tuple[int, str, str] | None] = lambda _params: None
    """Answers a call instead: status, type and text."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/client/api"

    def reply(self, params: dict[str, str]) -> tuple[int, str, str]:
        given = params.pop("signature", "")
        command = params["command"]
        if given != signature(params, SECRET) or params["apiKey"] != KEY:
            return self.error(command, 401, "unable to verify user credentials and/or request signature")
        self.calls.append(params)
        if other := self.answer(params):
            return other
        if command == "listOsTypes":
            rows = [{"id": OS_TYPES[name], "description": name} for name in OS_TYPES]
            return self.good(command, {"count": 2, "ostype": rows})
        return self.good(command, {"count": 1, "template": [{"id": f"id-of-{params['name']}"}]})

    @staticmethod
    def good(command: str, told: object) -> tuple[int, str, str]:
        return 200, "application/json", json.dumps({f"{command.lower()}response": told})

    @staticmethod
    def error(command: str, code: int, text: str) -> tuple[int, str, str]:
        told = {"uuidList": [], "errorcode": code, "cserrorcode": 9999, "errortext": text}
        return code, "application/json", json.dumps({f"{command.lower()}response": told})


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()

    class Handler(BaseHTTPRequestHandler):
        server_api: ClassVar[Api] = api

        def do_POST(self) -> None:
            api.addresses.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            status, kind, text = api.reply(dict(parse_qsl(body, strict_parsing=True)))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield api
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small disk that was converted for KVM and VMware."""
    folder = tmp_path_factory.mktemp("register")
    disks.usual(folder / "disk.img", 8 * disks.MIB)
    cli.succeed("convert", "--formats", "qcow2,ova", *flags(folder))
    return folder


def flags(folder: Path) -> tuple[str, ...]:
    """The shipped definition, which names files as CloudStack does, on a disk of the test's own."""
    values = (f"location={folder}", f"imageloc={folder}/disk.img", "cloudstack_release=4.22.0")
    return tuple(word for value in values for word in ("--set", value))


def register(location: Path, *more: str, **where: Any) -> str:
    return cli.succeed("register", "--url", URL, *more, *flags(location), **where)


def printed(output: str) -> list[tuple[str, dict[str, str]]]:
    """Commands and parameters of the lines that are calls."""
    words = [shlex.split(line) for line in output.splitlines() if line.startswith(("list", "register"))]
    return [(name, dict(word.split("=", 1) for word in rest)) for name, *rest in words]


def checksum(path: Path) -> str:
    return subprocess.run(["sha512sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_calls_are_printed_and_none_is_made(location: Path, api: Api) -> None:
    calls = printed(register(location))
    assert [name for name, _ in calls] == ["listOsTypes", "registerTemplate"] * 2
    kvm, vmware = calls[1][1], calls[3][1]
    assert calls[0][1] == {"description": "Debian GNU/Linux 12 (64-bit)"}
    assert calls[2][1] == {"description": "Other Linux (64-bit)"}
    file = f"{NAME}-kvm.qcow2.bz2"
    assert kvm == {
        "name": "systemvm-kvm-4.22.0-x86_64",
        "displaytext": "systemvm-kvm-4.22.0-x86_64",
        "hypervisor": "KVM",
        "format": "QCOW2",
        "arch": "x86_64",
        "bits": "64",
        "requireshvm": "true",
        "isextractable": "false",
        "isfeatured": "false",
        "ispublic": "false",
        "passwordenabled": "false",
        "checksum": "{SHA-512}" + checksum(location / file),
        "templatetype": "SYSTEM",
        "url": f"{URL}/{file}",
        "zoneid": "-1",
        "ostypeid": "ID",
    }
    assert (vmware["hypervisor"], vmware["format"]) == ("VMware", "OVA")
    assert vmware["url"] == f"{URL}/{NAME}-vmware.ova"
    assert api.calls == []


def test_an_upgrade_finds_ordinary_templates_by_their_names(location: Path) -> None:
    (_, params) = printed(register(location, "--upgrade", "--formats", "qcow2", "--zone", "1a-2b"))[-1]
    assert "templatetype" not in params
    assert (params["name"], params["zoneid"]) == ("systemvm-kvm-4.22.0-x86_64", "1a-2b")


def test_the_setting_says_where_files_are_served_from(location: Path) -> None:
    output = cli.succeed("register", *flags(location), "--set", "download_url=http://f.example/x/")
    assert printed(output)[1][1]["url"] == f"http://f.example/x/{NAME}-kvm.qcow2.bz2"


def test_calls_are_made_signed_and_name_the_guest_system(location: Path, api: Api) -> None:
    output = register(location, "--endpoint", api.url, env=KEYS)
    assert [call["command"] for call in api.calls] == ["listOsTypes", "registerTemplate"] * 2
    shown = [params for name, params in printed(register(location)) if name == "registerTemplate"]
    for call, params, guest in zip(api.calls[1::2], shown, ("id-debian", "id-other"), strict=True):
        assert {**params, "ostypeid": guest}.items() <= call.items()
    assert "registered systemvm-vmware-4.22.0-x86_64  id-of-systemvm-vmware-4.22.0-x86_64" in output
    assert set(api.addresses) == {"/client/api"}
    assert KEY not in output
    assert SECRET not in output


def test_a_wrong_secret(location: Path, api: Api) -> None:
    line = ("register", "--url", URL, "--endpoint", api.url, *flags(location))
    said = cli.refuse(*line, env={**KEYS, "CLOUDSTACK_SECRET": "another"})
    assert KEY not in said
    assert "another" not in said
    assert "answers 401: unable to verify user credentials" in said
    assert "check CLOUDSTACK_KEY and CLOUDSTACK_SECRET" in said
    assert api.calls == []


@pytest.mark.parametrize(
    ("status", "kind", "text", "says"),
    [
        (
            *Api.error("x", 431, f"The name {KEY} \x1b[31m is in use"),
            "answers 431: The name *** \\x1b[31m is in use",
        ),
        (*Api.error("x", 530, "Internal error"), "the server's log tells more"),
        (200, "text/html", "<html>a portal</html>", "does not answer as CloudStack's API does"),
        (502, "text/html", "<html>a proxy</html>", "does not answer as CloudStack's API does"),
        (200, "application/json", "{", "does not answer as CloudStack's API does"),
        (200, "application/json", "[]", "does not answer as CloudStack's API does"),
        (*Api.good("x", {}), "knows no guest system 'Debian GNU/Linux 12 (64-bit)'"),
        (*Api.good("x", {"ostype": "what"}), "knows no guest system"),
    ],
)
def test_answers_that_end_it(status: int, kind: str, text: str, says: str, api: Api) -> None:
    api.answer = lambda _params: (status, kind, text)
    said = failure(api.url)
    assert says in said
    assert "\x1b" not in said
    assert [call["command"] for call in api.calls] == ["listOsTypes"]


def failure(endpoint: str) -> str:
    """What is told when registering one template fails, which never holds a key."""
    with pytest.raises(BuildError) as caught:
        Client(endpoint, KEYS).register(Template({"name": "x"}, "Debian GNU/Linux 12 (64-bit)"))
    said = str(caught.value.message)
    assert KEY not in said
    assert SECRET not in said
    assert len(said.splitlines()) == 2
    return said


def test_what_was_registered_before_one_fails_is_told(location: Path, api: Api) -> None:
    def answer(params: dict[str, str]) -> tuple[int, str, str] | None:
        return Api.error("x", 431, "no") if params.get("hypervisor") == "VMware" else None

    api.answer = answer
    done = cli.inv("register", "--url", URL, "--endpoint", api.url, *flags(location), env=KEYS)
    assert done.returncode == 1
    assert "registered systemvm-kvm-4.22.0-x86_64" in done.stdout
    assert "answers 431: no" in done.stderr


def test_a_server_that_is_not_there(api: Api) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as gone:
        port = gone.server_port
    assert "cannot be reached: [Errno 111] Connection refused" in failure(
        f"http://127.0.0.1:{port}/client/api"
    )


def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    keys = {**KEYS, "CLOUDSTACK_VERIFY": str(tmp_path / "none.pem")}
    with pytest.raises(BuildError, match="cannot be reached") as caught:
        Client("https://127.0.0.1:9/client/api", keys).register(Template({}, "x"))
    assert "CLOUDSTACK_VERIFY" in caught.value.hint
