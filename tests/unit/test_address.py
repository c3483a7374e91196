"""How -H reads a host, what `ssh -G` says of it, and which host keys count as known."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

import pytest

from build.engine.errors import BuildError
from build.engine.hosts import address, knownhosts, ssh
from build.engine.hosts.address import Destination

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "destination"),
    [
        ("h", Destination("h")),
        ("u@h:22", Destination("h", "u", 22)),
        ("ssh://u@h:2222/", Destination("h", "u", 2222)),
        ("u@corp@h", Destination("h", "u@corp")),
        ("::1", Destination("::1")),
        ("root@[fe80::1]:2200", Destination("fe80::1", "root", 2200)),
    ],
)
def test_a_host_is_read_as_ssh_reads_it(text: str, destination: Destination) -> None:
    assert address.read(text) == destination


@pytest.mark.parametrize(
    "text", ["", "u@", "-oProxyCommand=x", "-l@h", "h:", "h:0x1", "h:70000", "a b", "h:-1"]
)
def test_what_is_no_host_is_refused(text: str) -> None:
    if text == "h:":
        assert address.read(text) == Destination("h")
        return
    with pytest.raises(BuildError):
        address.read(text)


def test_jumps_of_a_hop_are_handed_on() -> None:
    assert address.question(Destination("h", "u", 7), ("a", "b:2")) == [
        *("ssh", "-G", "-T", "-J", "a,b:2", "-l", "u", "-p", "7", "h")
    ]


def test_the_answer_of_ssh_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "id_h").touch()
    answer = (
        "user bob\nhostname h\nport 2200\nidentitiesonly yes\nidentityfile ~/id_%h\nidentityfile ~/none\n"
        "identityagent $SOCK\nproxyjump a@b:22,c:33\nhostkeyalias known\nconnecttimeout 7\n"
        "proxycommand nc %h %p %r 100%%\nuserknownhostsfile ~/k /x/y\nglobalknownhostsfile /g\n"
    )
    found = address.parse(answer, {"SOCK": "/run/agent"}, tmp_path)
    assert (found.user, found.host, found.port, found.timeout) == ("bob", "h", 2200, 7)
    assert found.keys == (tmp_path / "id_h",)
    assert found.only_keys
    assert found.agent == "/run/agent"
    assert found.jumps == ("a@b:22", "c:33")
    assert found.proxy == "nc h 2200 bob 100%"
    assert found.known_hosts == (tmp_path / "k", Path("/x/y"), Path("/g"))
    assert found.known_as == "known"


def test_defaults_and_none_leave_nothing_set(tmp_path: Path) -> None:
    answer = "user u\nhostname h\nport 22\nproxyjump none\nproxycommand none\nidentityagent SSH_AUTH_SOCK\n"
    found = address.parse(answer, {}, tmp_path)
    assert (found.agent, found.jumps, found.proxy, found.known_as) == (None, (), "", "h")
    assert (
        address.parse(f"{answer}identityagent none".replace("SSH_AUTH_SOCK", "none"), {}, tmp_path).agent
        == ""
    )


def test_a_user_without_a_name_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    with pytest.raises(BuildError) as caught:
        ssh._reckon(Destination("h", "root"), (), tmp_path)
    assert "no name" in caught.value.what
    assert caught.value.hint.startswith("give one: LOGNAME=root")


def test_without_an_ssh_the_configuration_is_read_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "me")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text("Host x\n  HostName 192.0.2.7\n  Port 99\n  ProxyJump j\n")
    found = ssh._reckon(Destination("x"), (), tmp_path)
    assert (found.host, found.port, found.user, found.jumps) == ("192.0.2.7", 99, "me", ("j",))
    assert found.known_hosts[0] == tmp_path / ".ssh/known_hosts"


# --- host keys -------------------------------------------------------------------------------------

KEY, OTHER = b"a key", b"another"


def line(names: str, key: bytes = KEY, kind: str = "ssh-ed25519") -> str:
    return f"{names} {kind} {base64.b64encode(key).decode()} a comment\n"


def hashed(name: str) -> str:
    salt = b"salt"
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (line("[h]:7"), "known"),
        (line("h"), "known"),
        (line("x,[h]:7,y"), "known"),
        (line("[H]:7"), "known"),
        (line("*"), "known"),
        (line(hashed("[h]:7")), "known"),
        (line("[h]:7", OTHER) + line("[h]:7"), "known"),
        (line("[h]:7", OTHER), "changed"),
        (line("[h]:7", OTHER, "ssh-rsa"), "changed"),
        (line(hashed("[h]:7"), OTHER), "changed"),
        ("", "unknown"),
        (line("other"), "unknown"),
        (line("h", OTHER), "unknown"),
        (line("*,![h]:7,!h"), "unknown"),
        (line(hashed("[other]:7")), "unknown"),
        ("# " + line("[h]:7"), "unknown"),
        ("@cert-authority " + line("*"), "unknown"),
        ("[h]:7 ssh-ed25519\n|1|x y z\n", "unknown"),
        (line("[h]:7") + "@revoked " + line("*"), "revoked"),
    ],
)
def test_a_host_key_is_known_as_ssh_knows_it(text: str, verdict: str) -> None:
    entries = knownhosts.parse(text, "file")
    assert knownhosts.judge(entries, ["[h]:7", "h"], "ssh-ed25519", KEY)[0] == verdict


def test_a_fingerprint_is_what_ssh_shows() -> None:
    assert knownhosts.fingerprint(b"") == "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU"
