"""Both ends of a boot line without a cloud: what a management server sends, what the guest makes of it."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import ipaddress
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from build import keepalived
from build.engine.errors import BuildError
from build.engine.settings import Loaded

INTERVAL = "router.redundant.vrrp.interval"
"""CloudStack's global setting: seconds between two VRRP advertisements."""

GUEST = Path(__file__).parent.parent / "config" / "rootfs" / "usr" / "local" / "lib"

DEFAULTS = {
    "router": {
        INTERVAL: "1",
        "name": "r-1-VM",
        "redundant": "true",
        "state": "PRIMARY",
        "guest.ip": "10.1.1.2",
        "guest.netmask": "255.255.255.0",
        "guest.gateway": "10.1.1.1",
        "control.ip": "169.254.1.2",
        "control.netmask": "255.255.0.0",
        "public.ip": "192.0.2.2",
        "public.netmask": "255.255.255.0",
        "public.gateway": "192.0.2.1",
        "domain": "cs1cloud.internal",
        "dns1": "192.0.2.53",
        "dns2": "",
        "disable_rp_filter": "false",
        "authorized_key": "",
    },
    "vpcrouter": {
        INTERVAL: "1",
        "name": "r-1-VM",
        "redundant": "true",
        "state": "PRIMARY",
        "control.ip": "169.254.1.2",
        "control.netmask": "255.255.0.0",
        "vpc.id": "1",
        "vpc.uuid": "00000000-0000-4000-8000-000000000001",
        "vpc.cidr": "10.1.0.0/16",
        "domain": "cs1cloud.internal",
        "dns1": "192.0.2.53",
        "dns2": "",
        "disable_rp_filter": "false",
        "authorized_key": "",
    },
}
"""What can be set for each type, and what holds if it is not."""


def compose(kind: str, given: Mapping[str, str]) -> str:
    """The boot line of a router, in the order and with the repetitions of a management server.

    Raises BuildError for a type other than router and vpcrouter, an unknown key, or what is no address.
    As in the server, an interval that is no number counts as 1 and its range is not checked.
    """
    if kind not in DEFAULTS:
        raise BuildError(f"no boot line for type {kind!r}", f"use one of: {', '.join(DEFAULTS)}")
    known = DEFAULTS[kind]
    for key in given:
        if key not in known:
            others = [other for other, keys in DEFAULTS.items() if key in keys]
            if others:
                raise BuildError(f"unknown key {key!r}", f"it is one of type {others[0]}")
            raise _unknown("key", key, known)
    values = {**known, **given}
    for key, value in values.items():
        _check(key, value)
    pairs = [("template", "domP"), ("name", values["name"])]
    if values["authorized_key"]:
        pairs.append(("authorized_key", values["authorized_key"]))
    pairs += _router(values) if kind == "router" else _vpcrouter(values)
    return " ".join(f"{key}={value}" for key, value in pairs)


def _unknown(what: str, name: str, known: Iterable[str]) -> BuildError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return BuildError(f"unknown {what} {name!r}", hint)


def _check(key: str, value: str) -> None:
    try:
        if re.fullmatch(r"[a-z]+\.(ip|gateway|netmask)|dns[12]", key) and value:
            ipaddress.IPv4Address(value)
        elif key == "vpc.cidr":
            ipaddress.IPv4Network(value)
    except ValueError:
        raise BuildError(
            f"{key}={value!r} is no address", "write it as in 192.0.2.1 (a network: 10.1.0.0/16)"
        ) from None
    if re.search(r"\s", value):
        raise BuildError(f"{key}={value!r} holds a blank, which ends a parameter", "take it out")
    if key in ("redundant", "disable_rp_filter") and value not in ("true", "false"):
        raise BuildError(f"{key}={value!r}", "write true or false")


Pairs = list[tuple[str, str]]


def _redundancy(values: Mapping[str, str]) -> Pairs:
    """What each NIC of the control and guest networks adds, only if the router is one of a pair."""
    if values["redundant"] != "true":
        return []
    pairs = [("redundant_router", "1"), ("advert_int", _interval(values))]
    if "vpc.id" in values:
        digest = hashlib.sha512(values["vpc.uuid"].encode()).digest()
        pairs += [("router_id", values["vpc.id"]), ("router_password", str(int.from_bytes(digest, "big")))]
    return [*pairs, ("redundant_state", values["state"])]


def _interval(values: Mapping[str, str]) -> str:
    text = values[INTERVAL].strip()
    return text if re.fullmatch(r"[+-]?[0-9]+", text) else "1"


def _nic(number: int, name: str, values: Mapping[str, str]) -> Pairs:
    return [(f"eth{number}ip", values[f"{name}.ip"]), (f"eth{number}mask", values[f"{name}.netmask"])]


def _router(values: Mapping[str, str]) -> Pairs:
    guest = ipaddress.IPv4Interface(f"{values['guest.ip']}/{values['guest.netmask']}")
    pairs = [*_nic(0, "guest", values), *_redundancy(values)]
    if values["redundant"] == "true":
        # The interval once more: the guest network's own arguments follow those of the pair.
        pairs += [
            ("guestgw", values["guest.gateway"]),
            ("guestbrd", str(guest.network.broadcast_address)),
            ("guestcidrsize", str(guest.network.prefixlen)),
            ("advert_int", _interval(values)),
        ]
    pairs += [
        ("domain", values["domain"]),
        ("cidrsize", str(guest.network.prefixlen)),
        ("dhcprange", str(guest.network.network_address + 1)),
        *_nic(1, "control", values),
        *_redundancy(values),
        *_nic(2, "public", values),
        ("gateway", values["public.gateway"]),
    ]
    return [*pairs, *_ending("router", values)]


def _vpcrouter(values: Mapping[str, str]) -> Pairs:
    own = [("vpccidr", values["vpc.cidr"]), ("domain", values["domain"])]
    return [*_nic(0, "control", values), *_redundancy(values), *_ending("vpcrouter", values), *own]


def _ending(kind: str, values: Mapping[str, str]) -> Pairs:
    pairs = [("type", kind)]
    if values["disable_rp_filter"] == "true":
        pairs.append(("disable_rp_filter", "true"))
    return [*pairs, *((key, values[key]) for key in ("dns1", "dns2") if values[key])]


@dataclass(frozen=True)
class Rendered:
    """What a guest makes of a boot line."""

    kind: str
    files: Mapping[str, tuple[int, str]]
    """Mode and text by absolute path."""
    removed: tuple[str, ...]
    enable: tuple[str, ...]
    disable: tuple[str, ...]
    commands: tuple[str, ...]
    complaints: tuple[str, ...]
    """Parameters that were refused, and what is used instead."""


def render(line: str, loaded: Loaded, hypervisor: str = "kvm") -> Rendered:
    """Every file that the guest of this image definition would write from a boot line; nothing is run.

    Raises BuildError for a line without a parameter, an unknown hypervisor, an image without this guest.
    """
    setup, boot_line, transport = guest("setup"), guest("boot_line"), guest("transport")
    if hypervisor not in transport.SOURCES:
        raise _unknown("hypervisor", hypervisor, transport.SOURCES)
    params = boot_line.Params(boot_line.parse(line))
    if not params.raw:
        raise BuildError(
            "no KEY=VALUE in the boot line", 'write: inv render --params "type=router name=r-1-VM"'
        )
    if GUEST.parents[2] not in loaded.overlays:
        what = f"the image of {loaded.definition.name} has no guest that reads boot lines"
        raise BuildError(what, f"put {GUEST.parents[2].name} into its rootfs, or leave out --image")
    facts = setup.Facts(
        hypervisor=hypervisor,
        present=tuple(nic.name for nic in params.nics),
        template=keepalived.TEMPLATE.read_text(encoding="utf-8"),
        defaults=keepalived.values(loaded.settings.vrrp),
    )

    def read(path: str) -> str:
        places = (folder / path.lstrip("/") for folder in reversed(loaded.overlays))
        return next((place.read_text(encoding="utf-8") for place in places if place.is_file()), "")

    done = setup.plan(params, facts, read)
    files = {path: (file.mode, file.text) for path, file in sorted(done.files.items())}
    commands = tuple(" ".join(command) for command in done.commands)
    return Rendered(done.role.name, files, done.removed, done.enable, done.disable, commands, done.complaints)


def guest(module: str) -> ModuleType:
    """A module of the guest's own package, as it lies in the overlay; its renderer is the engine's."""
    if str(GUEST) not in sys.path:
        sys.path.append(str(GUEST))
    package = importlib.import_module("systemvm")
    engine = str(Path(__file__).parent / "engine")
    if engine not in package.__path__:
        package.__path__.append(engine)
    return importlib.import_module(f"systemvm.{module}")
