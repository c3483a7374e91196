"""Both ends of a boot line without a cloud: what a management server sends, what the guest makes of it."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import ipaddress
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from build import keepalived_render
from build.engine import render as renderer
from build.engine.errors import BuildError
from build.engine.settings import Loaded

INTERVAL = "router.redundant.vrrp.interval"
"""CloudStack's global setting: seconds between two VRRP advertisements."""

GUEST = Path(__file__).parents[2] / "config" / "rootfs" / "usr" / "local" / "lib"

_DNS = {"dns1": "192.0.2.53", "dns2": ""}
_INTERNAL_DNS = {"internal.dns1": "192.0.2.53", "internal.dns2": ""}
_CONTROL = {"control.ip": "169.254.1.2", "control.netmask": "255.255.0.0"}
_GUEST = {"guest.ip": "10.1.1.2", "guest.netmask": "255.255.255.0", "guest.gateway": "10.1.1.1"}
_PUBLIC = {"public.ip": "192.0.2.2", "public.netmask": "255.255.255.0", "public.gateway": "192.0.2.1"}
_MANAGEMENT = {
    "management.ip": "172.16.5.6",
    "management.netmask": "255.255.255.0",
    "management.gateway": "172.16.5.1",
    "management.cidr": "172.16.0.0/16",
}
_KEYS = {"authorized_key": "", "userdata": ""}
_REDUNDANT = {INTERVAL: "1", "redundant": "true", "state": "PRIMARY"}
_SERVED = {"host": "192.0.2.8", "port": "8250", "zone": "1", "pod": "1", "disable_rp_filter": "false"}
_OWN = {**_GUEST, **_INTERNAL_DNS, **_DNS}

DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "router": {
        "name": "r-1-VM",
        **_REDUNDANT,
        **_GUEST,
        **_CONTROL,
        **_PUBLIC,
        "domain": "cs1cloud.internal",
        **_DNS,
        "disable_rp_filter": "false",
        **_KEYS,
    },
    "vpcrouter": {
        "name": "r-1-VM",
        **_REDUNDANT,
        **_CONTROL,
        "vpc.id": "1",
        "vpc.uuid": "00000000-0000-4000-8000-000000000001",
        "vpc.cidr": "10.1.0.0/16",
        "domain": "cs1cloud.internal",
        **_DNS,
        "disable_rp_filter": "false",
        **_KEYS,
    },
    "dhcpsrvr": {
        "name": "r-2-VM",
        **_GUEST,
        **_CONTROL,
        "domain": "cs1cloud.internal",
        **_DNS,
        "disable_rp_filter": "false",
        **_KEYS,
    },
    "consoleproxy": {
        "name": "v-3-VM",
        "id": "3",
        **_SERVED,
        **_CONTROL,
        **_MANAGEMENT,
        **_PUBLIC,
        **_INTERNAL_DNS,
        **_DNS,
        "vnc.port": "8080",
        "keystore_password": "",
        **_KEYS,
    },
    "secstorage": {
        "name": "s-4-VM",
        **_SERVED,
        "workers": "5",
        "resource": "org.apache.cloudstack.storage.resource.NfsSecondaryStorageResource",
        "sslcopy": "false",
        "role": "templateProcessor",
        "mtu": "1500",
        "ntp": "",
        **_CONTROL,
        **_MANAGEMENT,
        **_PUBLIC,
        "storage.ip": "172.17.5.6",
        "storage.netmask": "255.255.255.0",
        "storage.gateway": "172.17.5.1",
        **_INTERNAL_DNS,
        **_DNS,
        "nfs.version": "null",
        "keystore_password": "",
        **_KEYS,
    },
    "elbvm": {"name": "l-5-VM", **_GUEST, **_CONTROL, **_DNS, "authorized_key": ""},
    "ilbvm": {"name": "b-6-VM", **_GUEST, **_CONTROL, **_DNS, "authorized_key": ""},
    "sharedfsvm": {"name": "sharedfs-7", **_OWN},
    "cksnode": {"name": "node-8", **_OWN},
}
"""What can be set for each type, and what holds if it is not."""

NICS: Mapping[str, tuple[str, ...]] = {
    "router": ("guest", "control", "public"),
    "vpcrouter": ("control",),
    "dhcpsrvr": ("guest", "control"),
    "consoleproxy": ("control", "management", "public"),
    "secstorage": ("control", "management", "public", "storage"),
    "elbvm": ("guest", "control"),
    "ilbvm": ("guest", "control"),
    "sharedfsvm": ("guest",),
    "cksnode": ("guest",),
}
"""Networks of eth0, eth1 ... by type, as a KVM host plugs them before the first start."""


def compose(kind: str, given: Mapping[str, str]) -> str:
    """The boot line of a system VM, in the order and with the repetitions of a management server.

    Raises BuildError for an unknown type, an unknown key, or what is no address. As in the server, an
    interval that is no number counts as 1 and its range is not checked.
    """
    values = values_of(kind, given)
    head = [("template", "domP"), ("name", values["name"])]
    key = _given(values, "authorized_key")
    match kind:
        case "router":
            pairs = [*head, *key, *_router(values)]
        case "vpcrouter":
            pairs = [*head, *key, *_vpcrouter(values)]
        case "dhcpsrvr":
            pairs = [*head, *key, *_dhcpsrvr(values)]
        case "consoleproxy":
            pairs = _consoleproxy(values)
        case "secstorage":
            pairs = _secstorage(values)
        case "elbvm" | "ilbvm":
            balancer = [*_nic(0, "guest", values), ("gateway", values["guest.gateway"])]
            pairs = [*head, ("type", kind), *key, *balancer, *_nic(1, "control", values), *_dns(values)]
        case _:
            own = [*_nic(0, "guest", values), ("gateway", values["guest.gateway"])]
            pairs = [*head, ("type", kind), *own, *_dns(values)]
    return " ".join(f"{key}={value}" for key, value in [*pairs, *_given(values, "userdata")])


def values_of(kind: str, given: Mapping[str, str]) -> dict[str, str]:
    """Every value that a line of this type is composed from, checked; raises as `compose` does."""
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
    return values


def _unknown(what: str, name: str, known: Iterable[str]) -> BuildError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return BuildError(f"unknown {what} {name!r}", hint)


def _check(key: str, value: str) -> None:
    try:
        if re.fullmatch(r"[a-z]+\.(ip|gateway|netmask)|(internal\.)?dns[12]", key) and value:
            ipaddress.IPv4Address(value)
        elif key in ("vpc.cidr", "management.cidr"):
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
    return [*pairs, *_given(values, "dns1", "dns2")]


def _given(values: Mapping[str, str], *keys: str) -> Pairs:
    """Those of the keys that have a value."""
    return [(key, values[key]) for key in keys if values.get(key)]


def _dns(values: Mapping[str, str]) -> Pairs:
    internal = [(f"internaldns{n}", values.get(f"internal.dns{n}", "")) for n in (1, 2)]
    return [*((key, value) for key, value in internal if value), *_given(values, "dns1", "dns2")]


def _dhcpsrvr(values: Mapping[str, str]) -> Pairs:
    guest = ipaddress.IPv4Interface(f"{values['guest.ip']}/{values['guest.netmask']}")
    return [
        *_nic(0, "guest", values),
        ("gateway", values["guest.gateway"]),
        ("domain", values["domain"]),
        ("cidrsize", str(guest.network.prefixlen)),
        ("dhcprange", str(guest.network.network_address + 1)),
        *_nic(1, "control", values),
        *_ending("dhcpsrvr", values),
    ]


def _served(kind: str, values: Mapping[str, str], guid: str) -> Pairs:
    """What the lines of VMs with CloudStack's Java agent begin with."""
    keys = [(key, values[key]) for key in ("host", "port", "name", "zone", "pod")]
    return [("template", "domP"), ("type", kind), *keys, ("guid", guid)]


def _managed(values: Mapping[str, str]) -> Pairs:
    """The management NIC of such a VM."""
    return [
        *_nic(1, "management", values),
        ("mgmtcidr", values["management.cidr"]),
        ("localgw", values["management.gateway"]),
    ]


def _consoleproxy(values: Mapping[str, str]) -> Pairs:
    filtered = [("disable_rp_filter", "true")] if values["disable_rp_filter"] == "true" else []
    return [
        *_served("consoleproxy", values, f"Proxy.{values['id']}"),
        ("proxy_vm", values["id"]),
        *filtered,
        *_given(values, "authorized_key"),
        *_nic(0, "control", values),
        *_managed(values),
        *_nic(2, "public", values),
        ("gateway", values["public.gateway"]),
        *_dns(values),
        ("vncport", values["vnc.port"]),
        *_given(values, "keystore_password"),
    ]


def _secstorage(values: Mapping[str, str]) -> Pairs:
    ntp = [("ntpserverlist", values["ntp"])] if values["ntp"] else []
    return [
        *_served("secstorage", values, values["name"]),
        ("workers", values["workers"]),
        ("resource", values["resource"]),
        ("instance", "SecStorage"),
        *((key, values[key]) for key in ("sslcopy", "role", "mtu")),
        *_given(values, "authorized_key"),
        *ntp,
        *_nic(0, "control", values),
        *_managed(values),
        ("private.network.device", "eth1"),
        *_nic(2, "public", values),
        ("gateway", values["public.gateway"]),
        ("public.network.device", "eth2"),
        *_nic(3, "storage", values),
        *((f"storage{key}", values[f"storage.{key}"]) for key in ("ip", "netmask", "gateway")),
        *_dns(values),
        ("nfsVersion", values["nfs.version"]),
        *_given(values, "keystore_password"),
    ]


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
        template=keepalived_render.TEMPLATE.read_text(encoding="utf-8"),
        defaults=keepalived_render.values(loaded.settings.vrrp),
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
    _load_package()
    return importlib.import_module(f"systemvm.{module}")


@functools.cache
def _load_package() -> None:
    """Load the guest's package by the name that its own modules use, and the renderer into it."""
    init = GUEST / "systemvm" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "systemvm", init, submodule_search_locations=[str(init.parent)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{init} cannot be loaded")
    package = importlib.util.module_from_spec(spec)
    sys.modules.update({"systemvm": package, "systemvm.render": renderer})
    spec.loader.exec_module(package)
