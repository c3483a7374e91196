"""The boot line: blanks between `key=value` pairs; parameters of one system VM, and typed access to them.

Whatever stands in the line comes from outside. Access by type refuses what is not what it says, notes a
complaint and goes on with a default: a bad parameter must never stop the boot, or reach a shell.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

LIMIT = 256 * 1024
"""Bytes of a boot line that are read; the longest real ones carry certificates and have some 20 KiB."""
MOST = 100
"""Complaints that are noted."""

HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
DOMAIN = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
Address = TypeVar("Address", ipaddress.IPv4Address, ipaddress.IPv6Address)
_SECRET = re.compile(r"pass|secret|key|certificate|userdata", re.IGNORECASE)


def parse(text: str) -> dict[str, str]:
    """Read a boot line: the first `=` parts a pair, the last of equal keys wins, a lone word is no pair."""
    pairs = (word.partition("=") for word in text[:LIMIT].replace("\0", " ").split())
    return {key: value for key, separator, value in pairs if separator and key}


def shown(key: str, value: str) -> str:
    """A value as a log may show it: no secrets, no control characters, not endless."""
    return "(hidden)" if _SECRET.search(key) else repr(value[:80])


def cmd_line_json(raw: Mapping[str, str]) -> str:
    """The document that CloudStack's own update_config.py takes in: every pair, unknown keys too."""
    return json.dumps({"type": "cmdline", "cmd_line": dict(raw)}, indent=4, sort_keys=True) + "\n"


def cmdline_json(raw: Mapping[str, str]) -> str:
    """The merged document, one key a line, for scripts look for lines; redundancy as "true" or "false"."""
    redundant = "true" if "redundant_router" in raw else "false"
    config = {**raw, "redundant_router": redundant}
    return json.dumps({"config": config, "id": "cmdline"}, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Nic:
    """One NIC of the boot line: `ethNip`, `ethNmask`, `ethNip6`, `ethNip6prelen`."""

    index: int
    address: ipaddress.IPv4Interface | None = None
    address6: ipaddress.IPv6Interface | None = None

    @property
    def name(self) -> str:
        """Name of the device; the kernel is told to count NICs (net.ifnames=0)."""
        return f"eth{self.index}"


@dataclass(frozen=True)
class Params:
    """Parameters with typed access; what was refused stands in `complaints`."""

    raw: Mapping[str, str]
    complaints: list[str] = field(default_factory=list)

    def complain(self, key: str, why: str) -> None:
        """Note, once, that a parameter is not used; a line of nothing but wrong ones gets MOST of them."""
        line = f"{key}={shown(key, self.raw.get(key, ''))}: {why}"
        if len(self.complaints) < MOST and line not in self.complaints:
            self.complaints.append(line)

    def text(self, key: str) -> str:
        """A value as it is, or an empty one; only for what is compared, never for what is written out."""
        return self.raw.get(key, "")

    def flag(self, key: str) -> bool:
        """Whether a value says yes."""
        return self.text(key).lower() in ("true", "1", "yes", "on")

    def matching(self, key: str, pattern: re.Pattern[str], default: str = "") -> str:
        """A value that a pattern matches as a whole, or the default."""
        value = self.text(key)
        if not value or pattern.fullmatch(value):
            return value or default
        self.complain(key, f"not understood, using {default!r}")
        return default

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number between two bounds, or the default."""
        value = self.text(key)
        if not value:
            return default
        if re.fullmatch(r"[0-9]{1,9}", value) and low <= int(value) <= high:
            return int(value)
        self.complain(key, f"not a whole number from {low} to {high}, using {default}")
        return default

    def address(self, key: str) -> ipaddress.IPv4Address | None:
        """An IPv4 address; none for an absent or wrong one and for 0.0.0.0."""
        return self._read(key, ipaddress.IPv4Address, "no IPv4 address")

    def address6(self, key: str) -> ipaddress.IPv6Address | None:
        """An IPv6 address; none for an absent or wrong one and for ::."""
        return self._read(key, ipaddress.IPv6Address, "no IPv6 address")

    def networks(self, key: str) -> list[ipaddress.IPv4Network]:
        """A list of IPv4 networks with commas between them; wrong ones are left out."""
        found = []
        for part in filter(None, self.text(key).split(",")):
            try:
                found.append(ipaddress.IPv4Network(part, strict=False))
            except ValueError:
                self.complain(key, f"{part[:40]!r} is no network")
        return found

    def _read(self, key: str, kind: Callable[[str], Address], what: str) -> Address | None:
        value = self.text(key)
        if not value or value == "null":
            return None
        try:
            address = kind(value)
        except ValueError:
            self.complain(key, what)
            return None
        return None if address.is_unspecified else address

    def base64(self, key: str) -> bytes | None:
        """Bytes of a base64 value; one without its padding is taken too."""
        value = self.text(key)
        if not value:
            return None
        try:
            return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
        except ValueError:
            self.complain(key, "not base64")
            return None

    @property
    def name(self) -> str:
        """Host name of this system VM."""
        return self.matching("name", HOST_NAME, "systemvm")

    @property
    def redundant(self) -> bool:
        """Whether this router is one of a pair: the key's presence counts, as in CloudStack's own scripts."""
        return "redundant_router" in self.raw

    @property
    def nics(self) -> tuple[Nic, ...]:
        """NICs with at least one address, in order."""
        numbers = {int(found[1]) for key in self.raw if (found := re.fullmatch(r"eth([0-9]{1,2})ip6?", key))}
        nics = (self._nic(number) for number in sorted(numbers))
        return tuple(nic for nic in nics if nic.address or nic.address6)

    def nic(self, index: int) -> Nic:
        """The NIC of that number, with or without addresses."""
        return next((nic for nic in self.nics if nic.index == index), Nic(index))

    def _nic(self, number: int) -> Nic:
        address, mask = self.address(f"eth{number}ip"), self.text(f"eth{number}mask")
        address6 = self.address6(f"eth{number}ip6")
        prefix6 = self.integer(f"eth{number}ip6prelen", 64, 1, 128)
        interface = None
        if address:
            try:
                interface = ipaddress.IPv4Interface(f"{address}/{mask}" if mask else f"{address}/24")
            except ValueError:
                self.complain(f"eth{number}mask", "no netmask, using 255.255.255.0")
                interface = ipaddress.IPv4Interface(f"{address}/24")
        return Nic(number, interface, ipaddress.IPv6Interface(f"{address6}/{prefix6}") if address6 else None)

    @property
    def macs(self) -> tuple[str, ...]:
        """MAC addresses in the order the NICs must have (`nic_macs`), or none."""
        listed = [mac.lower() for mac in self.text("nic_macs").split("|") if mac]
        if all(MAC.fullmatch(mac) for mac in listed) and len(set(listed)) == len(listed):
            return tuple(listed)
        self.complain("nic_macs", "not a list of different MAC addresses")
        return ()
