"""What `inv rehearse` plays against an image, and how what came of it looks to people."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from build import wire
from build.engine.errors import BuildError
from build.engine.hosts.host import CHECKOUT
from build.engine.pipeline import Build
from build.keepalived_render import failover_bound
from build.verbs import artifacts, boot_line
from build.verbs.enter import mebibytes

SERVER = Path("/usr/share/cloudstack-common/vms")
"""Where the packages of a management server and of a KVM host put the three files."""
SAMPLES = CHECKOUT / "config" / "rehearsal"
TYPES = (
    "router",
    "vpcrouter",
    "consoleproxy",
    "secstorage",
    "dhcpsrvr",
    "elbvm",
    "ilbvm",
    "sharedfsvm",
    "cksnode",
)
"""In the order in which `all` plays them."""
OWN = ("sharedfsvm", "cksnode")
"""Machines of users: no scripts come, and sshd listens at its usual port."""
ROUTING = ("router", "vpcrouter")
SERVED = ("consoleproxy", "secstorage")
VNC_PORT = "8443"
"""Not the one that the packet filters come with."""
UNSEEN = (
    "what this could not see: CloudStack's Java agent against a real management server, its keystores and "
    "certificates; other hypervisors than QEMU; traffic between networks"
)

GIVEN: Mapping[str, Mapping[str, str]] = {
    "router": {"redundant": "false", "guest.ip": "10.1.1.1"},
    "vpcrouter": {"redundant": "false"},
    "consoleproxy": {"vnc.port": VNC_PORT},
    "sharedfsvm": {"guest.ip": "10.1.1.8"},
    "cksnode": {"guest.ip": "10.1.1.9"},
}
"""What the boot line of a rehearsal has otherwise than `inv params` composes it, by type."""

MERGED = wire.Effect("boot line is merged", "cat /etc/cloudstack/cmdline.json", r'"template": "domP"')
UNPACKED = wire.Effect(
    "system VM agent is unpacked",
    "grep -hE '^(host|zone)=' /usr/local/cloud/systemvm/conf/agent.properties",
    r"^host=192\.0\.2\.8$[\s\S]*^zone=1$",
)
CHECKS: Mapping[str, tuple[wire.Effect, ...]] = {
    "router": (MERGED,),
    "vpcrouter": (MERGED,),
    "dhcpsrvr": (MERGED,),
    "consoleproxy": (
        wire.Effect(
            "packet filter lets vncport in",
            "iptables-save -t filter",
            rf"^-A INPUT -i eth2 -p tcp .*--dport {VNC_PORT} -j ACCEPT$",
        ),
    ),
    "secstorage": (
        wire.Effect(
            "apache answers",
            "curl -s -o /dev/null -m 30 -w '%{http_code}' http://192.0.2.2/",
            r"^[2345]\d\d$",
        ),
    ),
}
"""What must be seen after the start, by type."""


def rehearse(
    build: Build,
    kind: str,
    files: tuple[str, str, str],
    documents: str,
    redundant: bool,
    memory: str,
    target: str,
) -> None:
    """Play a management server's part; prints each step and writes JSON; fails if any step does.

    `files` are the paths of --scripts, --agent and --patch; `kind` is a type or `all`.
    """
    size = mebibytes(memory)
    scripts = find_scripts(*files)
    machines = pair(documents) if redundant else tuple(machine(one, documents) for one in kinds(kind))
    if redundant and kind not in ("", "router"):
        raise BuildError(f"--redundant plays routers, not {kind}", "leave --type out, or --redundant")
    artifacts.need_image(build)
    release = build.settings.cloudstack_release
    if scripts is None:
        build.console.line(
            "no --scripts: playing with what is in the image, which must refuse what it cannot apply"
        )
    elif scripts.scripts == str(SERVER / "cloud-scripts.tgz"):
        build.console.line(f"scripts: those of {SERVER}")
    with lent(build, scripts) as (there, take_back):
        request = wire.RehearseRequest(
            image=build.prospect.image,
            arch=build.settings.arch,
            memory=size,
            release=f"Cloudstack Release {release}" if release else "",
            work=f"{build.prospect.place.location}/logs",
            machines=tuple(with_agent(each) for each in machines) if scripts else machines,
            scripts=there,
            pair=duel(machines) if redundant else None,
        )
        shown = Shown(build, take_back)
        result = build.host.ask(request, shown.follow)
    build.console.done()
    for path in result.logs:
        build.console.line(f"serial log {path}")
    build.console.line(UNSEEN)
    report = Path(target) if target else artifacts.home(build) / f"{build.settings.imagename}.rehearsal.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(summary(request, result), indent=2) + "\n", encoding="utf-8")
    build.console.line(f"report {report}")
    if failed := [step for step in result.steps if step.state == "FAIL"]:
        raise BuildError(
            f"{len(failed)} of {len(result.steps)} steps failed",
            "read the steps that say FAIL and the serial logs named above",
        )


def kinds(kind: str) -> tuple[str, ...]:
    """Types that are asked for; raises BuildError for an unknown one."""
    if kind == "all":
        return TYPES
    if kind and kind not in TYPES:
        raise BuildError(f"no type {kind!r}", f"use all, or one of: {', '.join(TYPES)}")
    return (kind or "router",)


def find_scripts(scripts: str, agent: str, patch: str) -> wire.Scripts | None:
    """Find the three files, each checked; None when none is asked for and this is no management server.

    The two others are looked for beside the scripts archive unless they are named.
    """
    if not scripts and not agent and not patch and not (SERVER / "cloud-scripts.tgz").is_file():
        return None
    beside = Path(scripts).parent if scripts else SERVER
    archive = Path(scripts) if scripts else SERVER / "cloud-scripts.tgz"
    zipped = Path(agent) if agent else beside / "agent.zip"
    patcher = Path(patch) if patch else beside / "patch-sysvms.sh"
    for path, flag in ((archive, "--scripts"), (zipped, "--agent"), (patcher, "--patch")):
        if not path.is_file():
            raise BuildError(f"no file {path}", f"name it: {flag} FILE")
    if not _has_scripts(archive):
        raise BuildError(
            f"{archive} is no archive of system VM scripts", "name a management server's cloud-scripts.tgz"
        )
    if not zipfile.is_zipfile(zipped):
        raise BuildError(f"{zipped} is no zip archive", "name a management server's agent.zip")
    if not patcher.read_bytes()[:2] == b"#!":
        raise BuildError(f"{patcher} is no script", "name a management server's patch-sysvms.sh")
    return wire.Scripts(*(str(path.resolve()) for path in (archive, zipped, patcher)))


def _has_scripts(archive: Path) -> bool:
    try:
        with tarfile.open(archive, "r:gz") as opened:
            return any(entry.name.removeprefix("./").startswith("opt/cloud/bin/") for entry in opened)
    except (tarfile.TarError, OSError, EOFError):
        return False


@contextlib.contextmanager
def lent(
    build: Build, scripts: wire.Scripts | None
) -> Iterator[tuple[wire.Scripts | None, Callable[[], None]]]:
    """Have the files on the host; yields them, and what is to be called when they are open there."""
    if scripts is None or not build.host.remote:
        yield scripts, lambda: None
        return
    named = {"scripts": scripts.scripts, "agent": scripts.agent, "patch": scripts.patch}
    with build.host.lend({name: Path(path) for name, path in named.items()}) as there:
        folder = there.folder
        passing = wire.Scripts(f"{folder}/scripts", f"{folder}/agent", f"{folder}/patch", passing=folder)
        yield passing, there.take_back


def documents_of(kind: str, folder: str) -> tuple[tuple[wire.Document, ...], tuple[wire.Effect, ...]]:
    """Documents of a type in the order of their names, and what they must bring about.

    `folder` (empty: the samples) holds them, or a folder by the type's name that does. Digits and a hyphen
    before the name are for the order alone. Raises BuildError for what is none.
    """
    top = Path(folder) if folder else SAMPLES
    place = top / kind if (top / kind).is_dir() or not folder else top
    if not place.is_dir():
        raise BuildError(f"no folder {place}", "name a folder of documents: --documents DIR")
    documents = []
    for path in sorted(place.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BuildError(f"{path} is no JSON: {error}", "correct it, or take it out") from None
        if not isinstance(content, dict) or not isinstance(content.get("type"), str):
            raise BuildError(f"{path} has no type", 'write documents as a server sends them, with a "type"')
        name = re.sub(r"^\d+-", "", path.name)
        documents.append(wire.Document(name, json.dumps(content, separators=(",", ":"))))
    if not documents:
        raise BuildError(f"no documents in {place}", "name a folder of NAME.json files: --documents DIR")
    return tuple(documents), effects(place / "effects.yaml")


def effects(path: Path) -> tuple[wire.Effect, ...]:
    """Read what documents must bring about; raises BuildError for what cannot be looked for."""
    if not path.is_file():
        return ()
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8")) or []
        read = tuple(wire.load(wire.Effect, row) for row in rows)
        for effect in read:
            re.compile(effect.expect)
    except (yaml.YAMLError, ValueError, TypeError, re.error) as error:
        raise BuildError(f"{path}: {error}", "write rows of name, run and expect") from None
    return read


def machine(kind: str, documents: str = "", **given: str) -> wire.Machine:
    """One system VM of a type, as it is plugged in and told of."""
    asked = {**GIVEN.get(kind, {}), **given}
    if kind not in OWN:
        asked["authorized_key"] = wire.KEY
    values = boot_line.values_of(kind, asked)
    sent, expected = documents_of(kind, documents) if kind in ROUTING else ((), ())
    own = kind in OWN
    control = "guest" if own else "control"
    named = cards_of(sent)
    nics = []
    for number, network in enumerate(boot_line.NICS[kind]):
        address, gateway = values[f"{network}.ip"], values.get(f"{network}.gateway", "")
        nics.append(
            wire.Nic(
                mac=named.pop(number, wire.Nic("")).mac or _mac(number),
                control=address if network == control else "",
                network=str(ipaddress.IPv4Interface(f"{address}/{values[f'{network}.netmask']}").network),
                gateway=gateway if gateway != address else "",
            )
        )
    nics += [replace(nic, late=True) for _, nic in sorted(named.items())]
    return wire.Machine(
        kind=kind,
        name=values["name"],
        line=boot_line.compose(kind, asked),
        nics=tuple(nics),
        port=22 if own else 3922,
        documents=sent,
        effects=expected,
        checks=CHECKS.get(kind, ()),
        answers_state=kind in ROUTING,
    )


def with_agent(machine: wire.Machine) -> wire.Machine:
    """A machine to which the Java agent is copied, if it is one that runs it."""
    return replace(machine, checks=(*machine.checks, UNPACKED)) if machine.kind in SERVED else machine


def _mac(number: int, machine: int = 1) -> str:
    return f"0e:00:a9:fe:{machine:02x}:{number:02x}"


def cards_of(documents: Sequence[wire.Document]) -> dict[int, wire.Nic]:
    """Cards that documents name, by their number: MAC address, and who else is on the network."""
    found: dict[int, wire.Nic] = {}
    for document in documents:
        content = json.loads(document.text)
        rows = content.get("ip_address")
        for row in rows if isinstance(rows, list) else ():
            number, mac = row.get("nic_dev_id"), row.get("vif_mac_address")
            if isinstance(number, int) and mac:
                found[number] = _card(mac, row.get("public_ip"), row.get("netmask"), row.get("gateway"))
        device = re.fullmatch(r"eth(\d+)", str(content.get("device")))
        if device and content.get("mac_address"):
            found.setdefault(int(device[1]), wire.Nic(content["mac_address"]))
    return found


def _card(mac: str, address: Any, netmask: Any, gateway: Any) -> wire.Nic:
    try:
        network = str(ipaddress.IPv4Interface(f"{address}/{netmask}").network)
        return wire.Nic(mac, network=network, gateway=str(ipaddress.IPv4Address(gateway)))
    except ValueError:
        return wire.Nic(mac)


def pair(documents: str = "") -> tuple[wire.Machine, ...]:
    """Two routers that stand for each other."""
    made = []
    for number, state in ((2, "PRIMARY"), (3, "BACKUP")):
        one = machine(
            "router",
            documents,
            **{
                "name": f"r-{number}-VM",
                "redundant": "true",
                "state": state,
                "guest.ip": f"10.1.1.{number}",
                "control.ip": f"169.254.1.{number}",
            },
        )
        # Both have the public card's own address, as in a cloud; its link is down on the one that rests.
        guest = replace(one.nics[0], mac=_mac(0, number))
        addresses = tuple(each for each in one.documents if each.name == "ip_associations.json")
        made.append(replace(one, nics=(guest, *one.nics[1:]), documents=addresses, effects=()))
    return tuple(made)


def duel(machines: Sequence[wire.Machine]) -> wire.Pair:
    """What is asked of a pair."""
    values = boot_line.values_of("router", {})
    network = ipaddress.IPv4Interface(f"{values['guest.ip']}/{values['guest.netmask']}").network
    interval = int(values[boot_line.INTERVAL])
    return wire.Pair(values["guest.gateway"], str(network[250]), failover_bound(interval, 100))


class Shown:
    """Prints each step as it ends."""

    def __init__(self, build: Build, take_back: Callable[[], None]) -> None:
        self._build = build
        self._take_back = take_back
        self._machine = ""

    def follow(self, event: dict[str, Any]) -> None:
        """Take an event of the agent."""
        if event["event"] == "open":
            self._take_back()
            return
        if event["event"] != "step":
            self._build.follow(event)
            return
        step = wire.load(wire.Step, {key: value for key, value in event.items() if key != "event"})
        console = self._build.console
        console.done()
        if step.machine != self._machine:
            self._machine = step.machine
            console.line(f"{'STATE':5}  {'SECONDS':>7}  {step.machine}")
        for line in lines(step):
            console.line(console.paint(step.state, line[:5]), line[5:])


def lines(step: wire.Step) -> list[str]:
    """Write a step as a row; below a failure stand the console's last lines."""
    says = " ".join(step.says.split())
    row = f"{step.state:5}  {step.seconds:7.1f}  {step.name}{f': {says}' if says else ''}"
    return [row, *(f"{'':16}| {line}" for line in step.tail)]


def summary(request: wire.RehearseRequest, result: wire.RehearseResult) -> dict[str, Any]:
    """What the report holds."""
    return {
        "image": request.image,
        "memory": request.memory,
        "scripts": bool(request.scripts),
        "machines": [{"name": each.name, "type": each.kind} for each in request.machines],
        "passed": all(step.state != "FAIL" for step in result.steps),
        "unseen": UNSEEN,
        **wire.dump(result),
    }
