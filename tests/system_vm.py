"""What the contract says of each type of system VM on KVM, and how a running one is asked about it.

For a booted image (`tests/boot/test_cloudstack.py`) and for its tree in a container
(`tests/root/test_system_vms.py`) alike.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build.verbs import boot_line as params
from tests import guest as lines

CMDLINE = "/var/cache/cloud/cmdline"
DONE = "until [ -e /var/cache/cloud/boot_up_done ]; do sleep 0.2; done; systemctl is-system-running --wait"
QUESTIONS = {
    "state": DONE,
    "failed": "systemctl list-units --failed --plain --no-legend --no-pager",
    "hostname": "hostname",
    "addresses": "ip -4 -o addr show | awk '{ print $2, $4 }'",
    "routes": "ip -4 route show",
    "links": "ip -o link show",
    "sshd": "ss -Hltnp | awk '/sshd/ { print $4 }'",
    "filter": "iptables -S",
    "forward": "cat /proc/sys/net/ipv4/ip_forward",
    "resolvers": "cat /etc/resolv.conf",
    "active": "systemctl list-units --type=service --state=active --plain --no-legend | awk '{ print $1 }'",
    "merged": "cat /etc/cloudstack/cmdline.json",
    "given": "cat /var/cache/cloud/cmd_line.json 2>/dev/null || "
    "zcat /var/cache/cloud/processed/cmd_line.json.gz",
    "lists": "cat /var/cache/cloud/enabled_svcs; echo --; cat /var/cache/cloud/disabled_svcs",
    "version": "/opt/cloud/bin/get_template_version.sh",
    "log": "cat /var/log/cloud.log",
    "mode": "stat -c %a /var/cache/cloud/cmdline",
    "web": "own=$(hostname -I | cut -d' ' -f1); curl -s -i -m 20 http://$own/; "
    "for asked in '-X GET http://'$own/cgi-bin/ '-X TRACE http://'$own/; do "
    "curl -s -m 20 -o /dev/null -w '%{http_code}\\n' $asked; done",
}


@dataclass(frozen=True)
class Expected:
    """What the contract says of a type, on KVM."""

    addresses: dict[str, str]
    control: int
    """Number of the NIC where sshd listens."""
    runs: tuple[str, ...] = ()
    rests: tuple[str, ...] = ()
    forwards: bool = False
    route: str = ""
    """Beginning of the line of its default route."""
    resolver: str = ""
    port: int = 3922
    lets_in: tuple[str, ...] = ()
    """Rules of the packet filter besides that of sshd."""
    merged: bool = True
    """Whether the boot line is merged into CloudStack's documents."""

    @property
    def own(self) -> str:
        """Its address on the control network."""
        return self.addresses[f"eth{self.control}"].partition("/")[0]


ROUTER = params.compose("router", {"redundant": "false"})
TYPES = {
    "router": Expected(
        {"eth0": "10.1.1.2/24", "eth1": "169.254.1.2/16", "eth2": "192.0.2.2/24"},
        1,
        ("haproxy", "apache2", "dnsmasq"),
        ("keepalived", "conntrackd"),
        True,
        "default via 192.0.2.1 dev eth2",
        "192.0.2.53",
        lets_in=(
            "-A INPUT -d 224.0.0.18/32 -j ACCEPT",
            "-A INPUT -d 225.0.0.50/32 -j ACCEPT",
            "-A INPUT -s 10.1.1.0/24 -i eth0 -p udp -m udp --dport 53 -j ACCEPT",
        ),
    ),
    "vpcrouter": Expected(
        {"eth0": "169.254.1.2/16"},
        0,
        ("haproxy", "apache2"),
        ("dnsmasq", "keepalived", "conntrackd"),  # no pair before the first tier
        True,
        lets_in=("-A INPUT -d 224.0.0.18/32 -j ACCEPT",),
    ),
    "dhcpsrvr": Expected(
        {"eth0": "10.2.0.10/16", "eth1": "169.254.3.4/16"},
        1,
        ("dnsmasq", "apache2"),
        ("haproxy", "keepalived"),
        route="default via 10.2.0.1 dev eth0",
    ),
    "elbvm": Expected(
        {"eth0": "203.0.113.20/24", "eth1": "169.254.7.7/16"},
        1,
        ("haproxy",),
        ("dnsmasq",),
        route="default via 203.0.113.1 dev eth0",
        merged=False,
    ),
    "ilbvm": Expected(
        {"eth0": "10.1.1.9/24", "eth1": "169.254.7.8/16"},
        1,
        ("haproxy",),
        ("dnsmasq",),
        route="default via 10.1.1.1 dev eth0",
        merged=False,
    ),
    "consoleproxy": Expected(
        {"eth0": "169.254.9.9/16", "eth1": "172.16.5.6/24", "eth2": "203.0.113.7/24"},
        0,
        rests=("haproxy", "apache2", "dnsmasq"),
        route="default via 203.0.113.1 dev eth2",
        resolver="192.0.2.53",
        lets_in=("-A INPUT -i eth1 -p tcp -m state --state NEW -m tcp --dport 8001 -j ACCEPT",),
        merged=False,
    ),
    "secstorage": Expected(
        {
            "eth0": "169.254.9.8/16",
            "eth1": "172.16.5.7/24",
            "eth2": "203.0.113.8/24",
            "eth3": "10.9.0.8/24",
        },
        0,
        ("apache2",),
        ("haproxy", "dnsmasq", "keepalived"),
        route="default via 203.0.113.1 dev eth2",
        merged=False,
    ),
    "sharedfsvm": Expected(
        {"eth0": "10.1.1.8/24"}, 0, route="default via 10.1.1.1 dev eth0", port=22, merged=False
    ),
    "cksnode": Expected(
        {"eth0": "10.1.1.7/24"}, 0, route="default via 10.1.1.1 dev eth0", port=22, merged=False
    ),
}
HASTE = {
    # Behind the image's own `cloudstack.cfg`.
    "/etc/cloud/cloud.cfg.d/zz-test.cfg": b"datasource: {CloudStack: {max_wait: 2, timeout: 1}}\n"
}
"""cloud-init would wait two minutes for a cloud that is not there."""


USER_DATA = base64.b64encode(
    gzip.compress(b"#!/bin/sh\necho $(id -un) $(hostname) >/run/user-data\n", mtime=0)
).decode()
"""As CloudStack 4.22 sends it to system VMs whose offering has user data."""
LATE_TIER = """cd /etc/apache2
again() { systemctl restart apache2 2>/dev/null; systemctl is-active apache2; }
rm -f sites-enabled/*
echo "Listen nowhere" >ports.conf; again
rm ports.conf; again
echo "Listen 127.0.0.1:80" >ports.conf; again
"""
"""Apache is asked for a listener that cannot be, for none, and for one that can."""


ANSWERED_LATER = {"user data": "cloud-init status --wait >/dev/null; cat /run/user-data"}
"""What only a console proxy is asked."""


def authorized(key: Path) -> str:
    """The parameter that brings a management server's key; who cuts at a second `=` loses its end."""
    return f" authorized_key={base64.b64encode(key.with_suffix('.pub').read_bytes()).decode()}"


def boot_args(kind: str, key: Path) -> str:
    """A type's boot line, with the key of a management server."""
    line = (ROUTER if kind == "router" else lines.LINES[kind]) + authorized(key)
    return line + (f" userdata={USER_DATA}" if kind == "consoleproxy" else "")


def own_name(line: str) -> str:
    """The name that a boot line gives."""
    return next(word[5:] for word in line.split() if word.startswith("name="))


def script(questions: Mapping[str, str]) -> str:
    """Several commands as one script, whose output `answers` reads."""
    return "\n".join(f"echo @@{name}; {{ {command}; }}" for name, command in questions.items())


def answers(text: str) -> dict[str, str]:
    """What each command printed, by its name."""
    parts = re.split(r"(?m)^@@([\w ]+)$", text)[1:]
    return {name: said.strip() for name, said in zip(parts[::2], parts[1::2], strict=True)}


def check(kind: str, line: str, told: Mapping[str, str], answered: str) -> None:
    """Hold a type to the contract: what it told, and what a login over SSH came to."""
    expected, name = TYPES[kind], own_name(line)
    assert (told["state"], told["failed"]) == ("running", ""), told["log"]
    assert told["hostname"] == name
    assert answered == ("denied" if expected.port == 22 else name)
    _check_network(expected, told)
    active = set(told["active"].replace(".service", "").split())
    assert set(expected.runs) <= active
    assert not active & set(expected.rests)
    if kind == "router":
        *page, cgi, trace = told["web"].splitlines()
        assert "Server: Apache" in page
        assert "Debian" not in told["web"]
        assert (cgi, trace) == ("404", "405")
    assert kind != "consoleproxy" or told["user data"].split() == ["root", name]
    assert told["mode"] == "600"
    given, raw = json.loads(told["given"]), params.guest("boot_line").parse(line)
    assert given == {"type": "cmdline", "cmd_line": raw}
    merged = json.loads(told["merged"])
    assert merged["id"] == "cmdline"
    assert merged["config"]["redundant_router"] == ("true" if kind == "vpcrouter" else "false")
    assert re.fullmatch(r"Cloudstack Release 4\.22\.0 [^&]+&[0-9a-f]{128}", told["version"])


def _check_network(expected: Expected, told: Mapping[str, str]) -> None:
    own = expected.own
    assert dict(row.split() for row in told["addresses"].splitlines()) == {
        "lo": "127.0.0.1/8",
        **expected.addresses,
    }
    routes = [row for row in told["routes"].splitlines() if row.startswith("default")]
    assert [row[: len(expected.route)] for row in routes] == ([expected.route] if expected.route else [])
    assert (
        not expected.resolver
        or told["resolvers"].split()[-1] == expected.resolver
        or (expected.resolver in told["resolvers"])
    )
    listens = {f"{own}:3922"} if expected.port == 3922 else {"0.0.0.0:22", "[::]:22"}
    assert set(told["sshd"].split()) <= listens
    assert told["sshd"]
    assert told["forward"] == str(int(expected.forwards))
    if expected.port == 3922:
        rule = f"-A INPUT -i eth{expected.control} -p tcp -m state --state NEW -m tcp --dport 3922 -j ACCEPT"
        rows = told["filter"].splitlines()
        assert {"-P INPUT DROP", "-P FORWARD DROP", "-P OUTPUT ACCEPT", rule, *expected.lets_in} <= set(rows)
        assert [row for row in rows if "3922" in row] == [rule]


# --- scripts of a management server ----------------------------------------------------------------

COPIED = ("agent.zip", "cloud-scripts.tgz", "patch-sysvms.sh")
"""What a host copies."""
QUESTIONS_OF_HEALTH = {
    "state": "/opt/cloud/bin/get_template_version.sh >/dev/null; " + DONE,
    "failed": QUESTIONS["failed"],
    "rotated": "logrotate -f /etc/logrotate.conf 2>&1 && echo rotated",
    "open": "ls -l /proc/[0-9]*/fd 2>/dev/null | grep '/var/log/.*(deleted)' || true",
    "theirs": "cat /var/log/theirs.log",
    "version": QUESTIONS["version"],
    "filter": QUESTIONS["filter"],
    "units": "systemctl show -P Description cloud-early-config cloud-postinit",
    "log": QUESTIONS["log"],
    "left": "ls -A /var/cache/cloud /usr/share/cloud /usr/local/cloud/systemvm 2>/dev/null",
    "active": QUESTIONS["active"],
    "mode": "stat -c %a /var/cache/cloud/cmdline",
}


def check_scripts(kind: str, told: Mapping[str, str], vms: Path) -> None:
    """Hold a type to what it must be once scripts from a folder were copied into it."""
    expected = TYPES[kind]
    assert (told["state"], told["failed"]) == ("running", ""), told["log"]
    assert (told["rotated"].splitlines()[-1], told["open"]) == ("rotated", "")
    assert told["units"].split() == ["theirs", "theirs"]
    ran = told["theirs"].splitlines()
    assert ran[:2] == ["theirs setup/bootstrap.sh", "theirs setup/postinit.sh"]
    assert not {"theirs setup/init.sh", "theirs setup/cloud-early-config"} & set(ran)
    assert "--comment theirs" in told["filter"]
    assert f"-i eth{expected.control} " in next(row for row in told["filter"].splitlines() if "3922" in row)
    signature = hashlib.sha512((vms / "cloud-scripts.tgz").read_bytes()).hexdigest()
    assert told["version"].endswith(f"&{signature}")
    assert "agent.zip" not in told["left"]
    agent = kind in ("consoleproxy", "secstorage")
    assert ("lib" in told["left"].split(), "cloud.service" in told["active"].split()) == (agent, agent)
    assert told["mode"] == "600"
