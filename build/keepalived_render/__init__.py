"""Render the VRRP set-up of a redundant pair, from the template that the guest fills at boot as well."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build.engine import overlay, render, script
from build.engine.overlay import Entry, text_file
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Vrrp

TEMPLATE = Path(__file__).parents[2] / "templates" / "keepalived.conf.j2"
RENDERER = Path(__file__).parents[1] / "engine" / "render.py"

LIBRARY = "usr/local/lib/systemvm"
"""Where template, defaults and renderer lie in the image: no archive of a management server writes there."""

CONFIG = "etc/keepalived/keepalived.conf"
AUTH_PASS_LENGTH = 8
"""keepalived uses the first eight characters and warns about more."""
SAME = {
    "router_id",
    "instance",
    "state",
    "interface",
    "virtual_router_id",
    "priority",
    "advert_int",
    "nopreempt",
    "auth_type",
    "check_script",
    "check_interval",
}
"""Settings that go into the template as they are."""
STAND_IN = "/usr/bin/true"
"""keepalived 2.3 calls a script insecure when its path goes through a link, as /bin does."""
SAMPLE = "192.0.2.1/24"
"""An address to check the template with when none is set (RFC 5737, documentation)."""


def failover_bound(advert_int: int, priority: int) -> float:
    """Seconds after which a backup takes over from a master that fell silent.

    VRRPv2's Master_Down_Interval (RFC 3768, 6.1): three intervals and the backup's skew time.
    """
    return 3 * advert_int + (256 - priority) / 256


def values(vrrp: Vrrp) -> dict[str, Any]:
    """What the template takes, from the settings; the guest replaces what its boot line says."""
    addresses = [ipaddress.ip_interface(text) for text in vrrp.addresses]
    return {
        **vrrp.model_dump(include=SAME),
        "auth_pass": vrrp.auth_pass[:AUTH_PASS_LENGTH],
        "addresses4": [_address(address, vrrp.interface) for address in addresses if address.version == 4],
        "addresses6": [_address(address, vrrp.interface) for address in addresses if address.version == 6],
        "notify": {"master": vrrp.notify_master, "backup": vrrp.notify_backup, "fault": vrrp.notify_fault},
    }


def _address(address: ipaddress.IPv4Interface | ipaddress.IPv6Interface, device: str) -> dict[str, str]:
    broadcast = (
        str(address.network.broadcast_address)
        if address.version == 4 and address.network.prefixlen < 31
        else ""
    )
    return {"address": address.with_prefixlen, "broadcast": broadcast, "device": device}


def sample(filled: Mapping[str, Any]) -> dict[str, Any]:
    """The same set-up with what only exists in a running router put in, for keepalived's own check."""
    return {
        **filled,
        "auth_pass": filled["auth_pass"] or "checkonly"[:AUTH_PASS_LENGTH],
        "addresses4": filled["addresses4"] or [_address(ipaddress.ip_interface(SAMPLE), filled["interface"])],
        "check_script": STAND_IN if filled["check_script"] else "",
        "notify": {event: STAND_IN if command else "" for event, command in filled["notify"].items()},
    }


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the keepalived-render layer; an empty one for an image without keepalived."""
    vrrp, keepalived = loaded.settings.vrrp, "keepalived" in loaded.settings.package_list
    template = TEMPLATE.read_text(encoding="utf-8")
    filled = values(vrrp)
    commands = [filled["check_script"], *filled["notify"].values()] if vrrp.enabled else []
    text = script.of(
        __file__,
        keepalived=keepalived,
        library=LIBRARY,
        interface=vrrp.interface,
        scripts=dict.fromkeys(command.split()[0] for command in commands if command),
    )
    remark = (
        f"failover within {failover_bound(vrrp.advert_int, vrrp.priority):.2f} s "
        f"(advert_int {vrrp.advert_int}, priority {vrrp.priority})"
    )
    files = _files(vrrp, template, filled) if keepalived else {}
    return Step("keepalived-render", text, files, remark=remark if keepalived else "")


def _files(vrrp: Vrrp, template: str, filled: Mapping[str, Any]) -> dict[str, File]:
    """Overlay, and the same file filled here and to be filled there."""
    entries: dict[str, Entry] = {
        f"{LIBRARY}/render.py": Entry(content=RENDERER.read_bytes()),
        f"{LIBRARY}/keepalived.conf.j2": text_file(template),
        f"{LIBRARY}/keepalived.json": text_file(json.dumps(filled, indent=2, sort_keys=True) + "\n"),
    }
    if vrrp.enabled:
        entries[CONFIG] = text_file(render.render(template, filled), mode=0o600)
    return {
        **overlay.step_files(entries),
        "check.json": File(json.dumps(sample(filled), indent=2, sort_keys=True).encode()),
        "check.conf": File(render.render(template, sample(filled)).encode()),
    }
