"""A redundant pair of routers: keepalived decides who is primary, conntrackd hands connections over.

The pair works only if both routers are set up alike: interval, authentication and the list of addresses.
Everything here derives from what the management server sends to both.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from systemvm.boot_line import Params
from systemvm.roles import Role

KEEPALIVED = "/etc/keepalived/keepalived.conf"
CONNTRACKD = "/etc/conntrackd/conntrackd.conf"
CRON = "/etc/cron.d/heartbeat"
CONFIGURED = {"keepalived": KEEPALIVED, "conntrackd": CONNTRACKD}
"""Daemons that start only with their file."""
FILES = (KEEPALIVED, CONNTRACKD, CRON)
"""Deleted when redundancy is off; keepalived's unit starts only if its file is there."""

FOLDER = "/ramdisk/rrouter"
HEARTBEAT = f"{FOLDER}/heartbeat.sh"
STAMP, STRIKES, CHECKED = f"{FOLDER}/keepalived.ts", f"{FOLDER}/keepalived.strikes", f"{FOLDER}/keepalived.ct"

VRRP_GROUP, CONNTRACK_GROUP = "224.0.0.18", "225.0.0.50"
"""Destinations that the packet filter must let in; with AH the protocol is 51 and not VRRP's."""

LONGEST = 255
"""Whole seconds that VRRPv2 can say (RFC 3768, 5.3.7: one octet)."""


@dataclass(frozen=True)
class Address:
    """A gateway address that follows the primary."""

    gateway: ipaddress.IPv4Interface
    device: str
    broadcast: str = ""


@dataclass(frozen=True)
class Pair:
    """What one router needs to know of its pair."""

    addresses: tuple[Address, ...]
    own: ipaddress.IPv4Interface
    """This router's own address on the first guest network."""
    addresses6: tuple[tuple[str, str], ...] = ()
    """IPv6 gateways that follow the primary, with their devices."""
    control: str = ""
    """Address on the control network, whose connections are not handed over."""


def interval(params: Params) -> int:
    """Seconds between two advertisements; 1 when nothing or nonsense is said."""
    return params.integer("advert_int", 1, 1, LONGEST)


def auth_pass(params: Params) -> str:
    """Eight characters that both routers know: the VPC's password, else derived from what both are told."""
    seed = params.text("router_password")
    if not (seed[:8].isalnum() and seed.isascii()):
        public = params.nic(2).address
        where = str(public.ip) if public else params.text("vpccidr")
        seed = hashlib.md5(
            f"{where}-{params.text('router_id') or '1'}".encode(), usedforsecurity=False
        ).hexdigest()
    return seed[:8]


def from_params(params: Params, kind: Role) -> Pair | None:
    """The pair of a plain router, whose guest network stands in the boot line; none without redundancy."""
    if not params.redundant or kind.guest is None:
        return None
    nic, gateway = params.nic(kind.guest), params.address("guestgw")
    if not nic.address or not gateway:
        params.complain(
            "redundant_router", "no guest network to be redundant for, waiting for the management server"
        )
        return None
    size = params.integer("guestcidrsize", nic.address.network.prefixlen, 1, 32)
    network = ipaddress.IPv4Interface(f"{gateway}/{size}")
    broadcast = params.address("guestbrd") or network.network.broadcast_address
    gateway6, size6 = params.address6("guestgw6"), params.integer("guestcidr6size", 64, 1, 128)
    control = params.nic(kind.control).address
    return Pair(
        addresses=(Address(network, nic.name, str(broadcast)),),
        own=nic.address,
        addresses6=((f"{gateway6}/{size6}", nic.name),) if gateway6 else (),
        control=str(control.ip) if control else "",
    )


def from_guest_networks(document: Mapping[str, object], params: Params, control: str) -> Pair | None:
    """The pair of a VPC router, from the merged document of its tiers (guestnetwork.json)."""
    rows = sorted(_tiers(document), key=lambda row: row[0])
    if not params.redundant or not rows:
        return None
    return Pair(tuple(address for _, address, _ in rows), rows[0][2], control=control)


def _tiers(document: Mapping[str, object]) -> Iterator[tuple[int, Address, ipaddress.IPv4Interface]]:
    """Number of the NIC, gateway and own address of each tier that is not taken away."""
    for device, entries in document.items():
        if not device.startswith("eth") or not device[3:].isdecimal() or not isinstance(entries, list):
            continue
        for entry in entries:
            try:
                size = ipaddress.IPv4Network(f"0.0.0.0/{entry['router_guest_netmask']}").prefixlen
                gateway = ipaddress.IPv4Interface(f"{entry['router_guest_gateway']}/{size}")
                own = ipaddress.IPv4Interface(f"{entry['router_guest_ip']}/{size}")
            except (KeyError, TypeError, ValueError):
                continue
            if entry.get("add", True):
                yield int(device[3:]), Address(gateway, device, str(gateway.network.broadcast_address)), own


def values(pair: Pair, defaults: Mapping[str, object], params: Params) -> dict[str, object]:
    """What keepalived.conf.j2 takes: the image's defaults, and what this pair is."""
    return {
        **defaults,
        "router_id": params.name,
        "state": "BACKUP",
        "nopreempt": True,
        "interface": pair.addresses[0].device,
        "advert_int": interval(params),
        "auth_pass": auth_pass(params),
        "addresses4": [
            {
                "address": address.gateway.with_prefixlen,
                "broadcast": address.broadcast,
                "device": address.device,
            }
            for address in pair.addresses
        ],
        "addresses6": [
            {"address": text, "broadcast": "", "device": device} for text, device in pair.addresses6
        ],
        "check_script": HEARTBEAT,
        "check_interval": 5,
    }


def files(
    pair: Pair, template: str, defaults: Mapping[str, object], params: Params
) -> dict[str, tuple[str, int]]:
    """Text and mode of every file of redundancy."""
    # Jinja2 costs a small machine half a second: only pairs pay. In the checkout it lies in build/engine.
    from systemvm.render import render  # type: ignore[import-not-found]

    return {
        KEEPALIVED: (render(template, values(pair, defaults, params)), 0o600),
        CONNTRACKD: (conntrackd_conf(pair), 0o644),
        CRON: (
            "# Notices within half a minute that the heartbeat stopped; cron knows whole minutes only.\n"
            "* * * * * root /usr/local/sbin/systemvm check-heartbeat\n"
            "* * * * * root sleep 30; /usr/local/sbin/systemvm check-heartbeat\n",
            0o644,
        ),
        HEARTBEAT: (
            "#!/bin/sh\n# Run by keepalived: says that keepalived is alive.\n"
            f"date +%s >{STAMP}.new && mv {STAMP}.new {STAMP}\n",
            0o755,
        ),
    }


def gateways(text: str) -> list[tuple[str, str]]:
    """Addresses that a keepalived.conf gives to the primary, with their devices."""
    return re.findall(r"(?m)^\s+([0-9a-f.:]+/[0-9]+)(?: brd \S+)? dev (\S+)$", text)


def conntrackd_conf(pair: Pair) -> str:
    """conntrackd.conf(5): connections go to the peer by multicast on the first guest network."""
    ignored = "".join(
        f"            IPv4_address {address}\n" for address in ("127.0.0.1", pair.control) if address
    )
    return f"""\
# Written with keepalived.conf: connections of the guests survive a change of the primary.
Sync {{
    Mode FTFW {{
    }}
    Multicast {{
        IPv4_address {CONNTRACK_GROUP}
        Group 3780
        IPv4_interface {pair.own.ip}
        Interface {pair.addresses[0].device}
        SndSocketBuffer 1249280
        RcvSocketBuffer 1249280
        Checksum on
    }}
}}
General {{
    Systemd on
    Nice -20
    HashSize 32768
    HashLimit 131072
    LogFile on
    Syslog on
    LockFile /var/lock/conntrackd.lock
    UNIX {{
        Path /var/run/conntrackd.sock
        Backlog 20
    }}
    SocketBufferSize 2097152
    SocketBufferSizeMaxGrown 8388608
    NetlinkBufferSize 2097152
    NetlinkBufferSizeMaxGrowth 8388608
    Filter From Userspace {{
        Protocol Accept {{
            TCP
            SCTP
            DCCP
            UDP
            ICMP
        }}
        Address Ignore {{
{ignored}        }}
    }}
}}
"""


STRIKE_AGE, SPACING, ALLOWED = 10, 30, 3
"""A strike when the heartbeat is older (s); nearer checks do not count (s); strikes that are borne."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of one heartbeat check."""

    strikes: int
    failed: bool
    counted: bool = True


def judge(now: float, stamp: float | None, checked: float | None, strikes: int) -> Verdict:
    """Count strikes of a keepalived whose heartbeat is late; more than three mean that it hangs."""
    if checked is not None and 0 <= now - checked < SPACING:
        return Verdict(strikes, False, counted=False)
    if stamp is not None and now - stamp <= STRIKE_AGE:
        return Verdict(0, False)
    return Verdict(strikes + 1, strikes + 1 > ALLOWED)


PRIMARY, BACKUP, FAULT, NOT_KNOWN = "PRIMARY", "BACKUP", "FAULT", "UNKNOWN"


def status(active: bool, kind: str, addresses_on_guest: int, public_link: str) -> str:
    """State of this router as a management server asks for it: what is so, not what was said."""
    if not active:
        return FAULT
    if kind == "router":
        return PRIMARY if addresses_on_guest >= 2 else BACKUP
    return {"UP": PRIMARY, "DOWN": BACKUP}.get(public_link, NOT_KNOWN)


CONNTRACK_STEPS = {PRIMARY: ("-c", "-f", "-R", "-B"), BACKUP: ("-d",), FAULT: ("-s",)}
"""What conntrackd is told on each change, in this order (conntrackd(8))."""

SPLITS = (
    (
        "advertisement interval mismatch",
        "the other router's advert_int differs: restart both with the same interval",
    ),
    ("unexpected ip number count", "the other router has another list of addresses"),
    ("not present in MASTER advert", "the other router has another list of addresses"),
    ("auth, expecting", "the other router authenticates in another way"),
    ("AH header but auth type", "the other router authenticates in another way"),
    ("invalid IPSEC HMAC-MD5 value", "the other router has another password"),
    ("received an invalid passwd", "the other router has another password"),
)
"""What keepalived logs when it ignores its peer, and what that means."""


REPLAYED = "already processed"
"""What keepalived logs when AH's count of packets is behind its own. One or two catch up by themselves; after
a cut that neither router noticed both have counted on, and the one ahead would drop its peer's for ever."""
AGAIN = "the other router's advertisements count as replayed here, until keepalived is started anew"


def split_reason(log: str) -> str:
    """Why the peer is ignored, or an empty text."""
    found = next((meaning for words, meaning in SPLITS if words in log), "")
    return found or (AGAIN if log.count(REPLAYED) > 2 else "")
