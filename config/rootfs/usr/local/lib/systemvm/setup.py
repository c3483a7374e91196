"""From a boot line to everything a system VM is set up with: pure, so that it can be shown without a VM."""

from __future__ import annotations

import ipaddress
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from systemvm import redundancy
from systemvm.boot_line import DOMAIN, Nic, Params, cmd_line_json, cmdline_json
from systemvm.hypervisor import UNKNOWN
from systemvm.roles import DEFAULT, Role, control_nic, role, services

PRIVATE = [ipaddress.IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
"""RFC 1918: where a console proxy's clients inside the cloud are."""

USER_DATA = "/var/lib/cloud/seed/nocloud/user-data"
"""Where cloud-init's NoCloud source looks for what the boot line brought (cloud-init's documentation)."""
LOG_TIMES = re.compile(r"hourly|daily|monthly|[0-9*]{1,2}:[0-9*]{1,2}(:[0-9*]{1,2})?")
KEYS = "/root/.ssh/authorized_keys"
OPEN = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
"""Packet filter of machines that are a user's own: theirs to fill."""
MANY_KIB = 409600
"""With this much memory (KiB) the kernel may keep more of its caches."""


RULES = "/etc/iptables/rules.v4"
DNSMASQ = "/etc/dnsmasq.d/cloudstack.conf"
LOG_TIMER = "/etc/systemd/system/logrotate.timer.d/cloudstack.conf"
UPLOADS = "/etc/apache2/conf-enabled/cloudstack-upload.conf"
MERGED = "/etc/cloudstack/cmdline.json"
OURS_ALONE = (*redundancy.FILES, DNSMASQ, LOG_TIMER, UPLOADS, MERGED)
"""Files that our set-up writes and scripts of a management server would find standing beside their own."""


@dataclass(frozen=True)
class File:
    """A file to write: its text and its mode."""

    text: str
    mode: int = 0o644


@dataclass(frozen=True)
class Facts:
    """What the set-up depends on besides the boot line."""

    hypervisor: str = UNKNOWN
    memory_kib: int = 0
    present: tuple[str, ...] = ()
    """Names of the NICs that are there now."""
    template: str = ""
    """Text of keepalived.conf.j2."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Values of keepalived.json."""


@dataclass(frozen=True)
class Setup:
    """What to do; nothing of it is done yet."""

    role: Role
    files: Mapping[str, File]
    """By absolute path."""
    removed: tuple[str, ...] = ()
    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    """Run once the network is up; each may fail without harm."""
    hostname: str = "systemvm"
    password: str = ""
    complaints: tuple[str, ...] = ()


Read = Callable[[str], str]
"""Text of a file of the image by absolute path; empty when it is not there."""


def plan(params: Params, facts: Facts, read: Read) -> Setup:
    """Work out the set-up of one system VM."""
    kind = role(params)
    on, off = services(kind, params)
    files = {
        "/etc/network/interfaces": File(interfaces(params, kind, facts)),
        "/etc/hostname": File(f"{params.name}\n"),
        "/etc/hosts": File(hosts(params, kind)),
        "/etc/ssh/sshd_config": File(
            sshd_config(read("/etc/ssh/sshd_config"), params, kind, facts.hypervisor)
        ),
        "/etc/sysctl.conf": File(sysctl(read("/etc/sysctl.conf"), params, kind, facts)),
        "/var/cache/cloud/enabled_svcs": File("".join(f"{name}\n" for name in on)),
        "/var/cache/cloud/disabled_svcs": File("".join(f"{name}\n" for name in off)),
    }
    files |= {path: File(text) for path, text in optional(params, kind, facts, read).items() if text}
    if (keys := authorized_keys(params)) or kind.cloud_init:
        files[KEYS] = File("" if kind.cloud_init else keys, 0o600)
    if params.raw and kind != DEFAULT:
        files["/var/cache/cloud/cmd_line.json"] = File(cmd_line_json(params.raw), 0o600)
        files[MERGED] = File(cmdline_json(params.raw), 0o600)
    removed: tuple[str, ...] = ()
    if data := user_data(params, kind):
        files |= {path: File(text, 0o600) for path, text in data.items()}
    else:
        removed = (USER_DATA,)
    if kind.merged and kind.forwarding:
        redundancy.interval(params)  # a wrong one is told now, though a VPC router needs it later
        pair = redundancy.from_params(params, kind)
        written = redundancy.files(pair, facts.template, facts.defaults, params) if pair else {}
        files |= {path: File(text, mode) for path, (text, mode) in written.items()}
        removed = (*removed, *(path for path in redundancy.FILES if path not in written))
    if kind.cloud_init:
        removed = (*removed, "/etc/cloud/cloud-init.disabled")
    return Setup(
        kind,
        files,
        removed,
        on,
        off,
        kind.modules,
        commands(params, kind),
        params.name,
        password(params),
        tuple(params.complaints),
    )


def optional(params: Params, kind: Role, facts: Facts, read: Read) -> dict[str, str]:
    """Files that only some boot lines lead to; an empty text means none."""
    return {
        "/etc/resolv.conf": resolv_conf(params),
        "/etc/udev/rules.d/70-persistent-net.rules": udev_rules(params),
        RULES: rules(read(f"/etc/iptables/iptables-{kind.rules}"), params, kind, facts),
        "/etc/iptables/rules.v6": OPEN if kind.cloud_init else "",
        "/etc/ntpsec/ntp.conf": ntp_conf(read("/etc/ntpsec/ntp.conf"), params),
        LOG_TIMER: log_timer(params, kind),
        DNSMASQ: dnsmasq(params, kind),
        UPLOADS: UPLOAD if kind.name == "secstorage" else "",
        "/usr/local/cloud/systemvm/conf/agent.properties": agent_properties(
            read("/usr/local/cloud/systemvm/conf/agent.properties"), params, kind
        ),
    }


def authorized_keys(params: Params) -> str:
    """The management server's public key, as sshd(8) reads it."""
    line = (params.base64("authorized_key") or b"").decode("utf-8", errors="replace").strip()
    if line and (
        not line.isprintable()
        or not re.match(r"(?:[a-z-]+ +)?(?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+ +[A-Za-z0-9+/=]+", line)
    ):
        params.complain("authorized_key", "no public key")
        return ""
    return f"{line}\n" if line else ""


NO_CLOUD = """\
# Written by cloud-preinit: user data of a system VM come with its boot line and from nowhere else.
# Network, users, host name and SSH are the management server's.
datasource_list: [NoCloud]
network: {config: disabled}
preserve_hostname: true
manage_etc_hosts: false
users: []
disable_root: false
cloud_init_modules: [seed_random, bootcmd, write_files]
cloud_config_modules: [timezone, runcmd]
cloud_final_modules: [scripts_per_once, scripts_per_boot, scripts_per_instance, scripts_user, final_message]
"""
LARGEST = 1 << 20
"""Bytes of user data; CloudStack's own limit is 32 KiB by default, and some 1 MiB at most."""


def user_data(params: Params, kind: Role) -> dict[str, str]:
    """Files for cloud-init's NoCloud source from `userdata`, base64 of gzip (CloudStack 4.22); none without.

    Machines that are a user's own find theirs by themselves.
    """
    packed = params.base64("userdata")
    if not packed or kind.cloud_init:
        return {}
    try:
        inflater = zlib.decompressobj(wbits=31)
        text = inflater.decompress(packed, LARGEST).decode()
        if not inflater.eof:
            raise ValueError
    except (zlib.error, ValueError):
        params.complain("userdata", f"no text packed by gzip, {LARGEST >> 20} MiB at most")
        return {}
    return {
        USER_DATA: text,
        f"{USER_DATA.removesuffix('user-data')}meta-data": json.dumps(
            {"instance-id": params.name, "local-hostname": params.name}
        )
        + "\n",
        "/etc/cloud/cloud.cfg.d/cloudstack.cfg": NO_CLOUD,
    }


def password(params: Params) -> str:
    """Root's password, if the cloud gives system VMs one; what chpasswd could misread is refused."""
    text = params.text("vmpassword")
    if text and not (text.isprintable() and len(text) <= 256):
        params.complain("vmpassword", "not printable")
        return ""
    return text


# Network ----------------------------------------------------------------------------------------


def interfaces(params: Params, kind: Role, facts: Facts) -> str:
    """/etc/network/interfaces, interfaces(5): addresses, the default route and the routes to management."""
    parts = ["# Written by cloud-preinit from the boot line.\nauto lo\niface lo inet loopback\n"]
    nics = params.nics
    control = control_nic(kind, params, facts.hypervisor)
    if control not in (nic.index for nic in nics):
        # Ask in the background for an address, so that someone can log in and look.
        name = f"eth{control}"
        parts.append(f"{_when(name, facts)}\niface {name} inet manual\n    up dhclient -nw {name}\n")
    gateways = {nic.index: lines for nic in nics if (lines := _gateway(nic, params))}
    default = max(gateways, default=-1)
    for nic in nics:
        # A public NIC of a router that may be the backup comes up with the state, not with the boot.
        if not (params.redundant and kind.name == "router" and nic.index == 2):
            parts.append(f"{_when(nic.name, facts)}\n")
        dynamic = params.text("bootproto") == "dhcp" and nic.index > 0
        mtu = _mtu(nic, params, kind)
        if dynamic:
            parts.append(f"iface {nic.name} inet dhcp\n{mtu}")
        elif nic.address:
            parts.append(
                f"iface {nic.name} inet static\n"
                f"    address {nic.address.ip}\n    netmask {nic.address.netmask}\n"
                + (gateways[nic.index] if nic.index == default else "")
                + mtu
                + _routes(nic, params, kind)
            )
        if nic.address6:
            parts.append(_static6(nic, params))
    return "\n".join(parts)


def _when(name: str, facts: Facts) -> str:
    """A NIC that is there now has no event of its coming any more; one that is not must not be waited for."""
    return f"{'auto' if name in facts.present else 'allow-hotplug'} {name}"


def _gateway(nic: Nic, params: Params) -> str:
    gateway = params.address("gateway")
    return f"    gateway {gateway}\n" if gateway and nic.address and gateway in nic.address.network else ""


def _static6(nic: Nic, params: Params) -> str:
    assert nic.address6
    gateway = params.address6("ip6gateway")
    near = gateway and (gateway in nic.address6.network or (gateway.is_link_local and nic.index == 0))
    return (
        f"iface {nic.name} inet6 static\n"
        f"    address {nic.address6.ip}\n    netmask {nic.address6.network.prefixlen}\n"
        + (f"    gateway {gateway}\n" if near else "")
        + "    accept_ra 1\n    dad-attempts 0\n"
    )


def _mtu(nic: Nic, params: Params, kind: Role) -> str:
    name = (
        "mtu"
        if kind.agent
        else "publicMtu"
        if nic.index == 2
        else "privateMtu"
        if nic.index == kind.guest
        else ""
    )
    mtu = params.integer(name, 0, 576, 65535) if name else 0
    # CloudStack sends a storage network's MTU for all; control and management keep theirs.
    return f"    mtu {mtu}\n" if mtu and (not kind.agent or nic.index == 3) else ""


def _routes(nic: Nic, params: Params, kind: Role) -> str:
    """Routes through the pod's gateway: to the management servers, and to private clients of a proxy."""
    assert nic.address
    through = params.address("localgw")
    targets: list[ipaddress.IPv4Network] = []
    if through and through in nic.address.network:
        targets += params.networks("mgmtcidr")
        public = params.nic(2).address
        if kind.name == "consoleproxy" and public and not public.ip.is_private:
            targets += PRIVATE
    lines = [
        f"    up ip route replace {target} via {through} dev {nic.name} || true\n"
        for target in dict.fromkeys(targets)
    ]
    storage = params.address("storagegateway")
    if kind.name == "secstorage" and storage and storage in nic.address.network:
        lines += [
            f"    up ip route replace {target} via {storage} dev {nic.name} || true\n"
            for target in params.networks("storagecidr")
        ]
    return "".join(lines)


def hosts(params: Params, kind: Role) -> str:
    """/etc/hosts: the machine's own name at the address its clients know."""
    nic = params.nic(kind.guest if kind.guest is not None else 0)
    own = nic.address.ip if nic.address else "127.0.1.1"
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", f"{own}\t{params.name}"]
    if nic.address6:
        lines.append(f"{nic.address6.ip}\t{params.name}")
    return "\n".join(lines) + "\n"


def resolv_conf(params: Params) -> str:
    """/etc/resolv.conf, resolv.conf(5): internal servers first."""
    servers = [params.address(name) for name in ("internaldns1", "internaldns2", "dns1", "dns2")]
    servers6 = [params.address6(name) for name in ("ip6dns1", "ip6dns2")]
    lines = [f"nameserver {server}\n" for server in dict.fromkeys([*servers, *servers6]) if server]
    domain = params.matching("domain", DOMAIN)
    return (f"search {domain}\n" if domain and lines else "") + "".join(lines)


def udev_rules(params: Params) -> str:
    """Names of the NICs by MAC address, for hypervisors that do not keep their order (udev(7))."""
    return "".join(
        f'SUBSYSTEM=="net", ACTION=="add", ATTR{{type}}=="1", ATTR{{address}}=="{mac}", NAME="eth{index}"\n'
        for index, mac in enumerate(params.macs)
    )


def renames(order: tuple[str, ...], present: Mapping[str, str]) -> list[tuple[str, str]]:
    """Steps that bring NICs (name by MAC address) into an order, through names that nobody has.

    A NIC that is not in the order and stands in the way gets the next free number.
    """
    wanted = {present[mac]: f"eth{index}" for index, mac in enumerate(order) if mac in present}
    taken = set(wanted.values())
    free = (
        f"eth{number}"
        for number in range(1000)
        if f"eth{number}" not in taken | (set(present.values()) - set(wanted))
    )
    for name in sorted(set(present.values()) - set(wanted)):
        if name in taken:
            wanted[name] = next(free)
    moved = {old: new for old, new in wanted.items() if old != new}
    return [(old, f"moving{n}") for n, old in enumerate(moved)] + [
        (f"moving{n}", new) for n, new in enumerate(moved.values())
    ]


# Services ---------------------------------------------------------------------------------------


def sshd_config(text: str, params: Params, kind: Role, hypervisor: str) -> str:
    """Let sshd listen on the control network's address, or on all while that is not known."""
    nic = params.nic(control_nic(kind, params, hypervisor))
    own = nic.address and kind != DEFAULT and not kind.cloud_init
    listen = f"ListenAddress {nic.address.ip}" if nic.address and own else "#ListenAddress 0.0.0.0"
    changed, count = re.subn(r"(?m)^[# ]*ListenAddress\b.*$", listen, text, count=1)
    if not count:
        params.complain("type", "sshd_config has no ListenAddress line to change")
    return re.sub(r"(?m)^[# ]*Port\b.*$", f"Port {kind.ssh_port}", changed, count=1)


def sysctl(text: str, params: Params, kind: Role, facts: Facts) -> str:
    """/etc/sysctl.conf with the lines changed that depend on type, addresses and memory."""
    changes = {
        "net.ipv4.ip_forward": int(kind.forwarding),
        "net.ipv4.conf.default.rp_filter": int(kind.forwarding and not params.flag("disable_rp_filter")),
        "vm.vfs_cache_pressure": 100 if facts.memory_kib >= MANY_KIB else 200,
    }
    if params.nic(0).address6:
        changes |= {
            "net.ipv6.conf.all.disable_ipv6": 0,
            "net.ipv6.conf.all.forwarding": 1,
            "net.ipv6.conf.all.accept_ra": 1,
        }
    for name, value in changes.items():
        text = re.sub(rf"(?m)^{re.escape(name)}\s*=.*$", f"{name} = {value}", text)
    return text


def rules(text: str, params: Params, kind: Role, facts: Facts) -> str:
    """The type's packet filter, with SSH let in on the control NIC and DNS for the guests' network only."""
    if kind.cloud_init:
        return OPEN
    if kind.name == "consoleproxy":
        port = params.integer("vncport", 8080, 1, 65535)
        text = re.sub(r"(?m)^(-A INPUT -i eth2 .*--dport) 8080 ", rf"\g<1> {port} ", text)
    control = params.nic(control_nic(kind, params, facts.hypervisor))
    # Without its address the control NIC is not known for sure: whoever has a key may log in anywhere.
    where = f" -i {control.name}" if control.address else ""
    text = re.sub(r"(?m)^(-A INPUT) -i eth[0-9]+( .*--dport 3922 .*)$", rf"\g<1>{where}\g<2>", text)
    start, size = (
        params.text("dhcprange").split(",")[0].split(":")[0].split("-")[0],
        params.integer("cidrsize", 0, 1, 32),
    )
    if kind.guest is not None and start and size:
        try:
            network = ipaddress.IPv4Network(f"{start}/{size}", strict=False)
        except ValueError:
            params.complain("dhcprange", "no address, DNS stays open to the guests' NIC")
        else:
            text = re.sub(
                r"(?m)^(-A INPUT -i eth0)( -p (?:udp|tcp) .*--dport 53 .*)$",
                rf"\g<1> -s {network}\g<2>",
                text,
            )
    return text


def ntp_conf(text: str, params: Params) -> str:
    """The clock's servers: those of the boot line instead of Debian's."""
    servers = [part for part in params.text("ntpserverlist").split(",") if DOMAIN.fullmatch(part)]
    if not servers or not text:
        return ""
    kept = [line for line in text.splitlines() if not re.match(r"\s*(pool|server)\b", line)]
    return "\n".join([*kept, *(f"server {server} iburst" for server in servers)]) + "\n"


def log_timer(params: Params, kind: Role) -> str:
    """When logs are rotated: routers with much traffic, every hour."""
    when = params.matching("logrotatefrequency", LOG_TIMES, "hourly" if kind.hourly_logs else "")
    return f"[Timer]\nOnCalendar=\nOnCalendar={when}\nAccuracySec=5m\n" if when else ""


def dnsmasq(params: Params, kind: Role) -> str:
    """DHCP and DNS for the guests' network; who gets which address the management server sends later."""
    if kind.name not in ("router", "dhcpsrvr") or kind.guest is None:
        return ""
    nic, domain = params.nic(kind.guest), params.matching("domain", DOMAIN)
    lines = [
        f"interface={nic.name}",
        "bind-dynamic",
        "except-interface=lo",
        "no-hosts",
        "expand-hosts",
        "dhcp-hostsfile=/etc/dhcphosts.txt",
        "dhcp-leasefile=/var/lib/misc/dnsmasq.leases",
    ]
    if domain:
        lines += [f"domain={domain}", f"local=/{domain}/", f"dhcp-option=15,{domain}"]
    search = [part for part in params.text("dnssearchorder").split(",") if DOMAIN.fullmatch(part)]
    if search:
        lines.append(f"dhcp-option=119,{','.join(search)}")
    try:
        start = ipaddress.IPv4Address(re.split(r"[:,-]", params.text("dhcprange"))[0])
    except ValueError:
        start = None
    if start and nic.address and start in nic.address.network:
        gateway = params.address("guestgw") if params.redundant else nic.address.ip
        lines += [
            f"dhcp-range={start},static,{nic.address.netmask}",
            f"dhcp-option=3,{gateway or nic.address.ip}",
        ]
    if params.flag("useextdns"):
        servers = [str(server) for name in ("dns1", "dns2") if (server := params.address(name))]
        lines += [f"dhcp-option=6,{','.join(servers)}"] if servers else []
    return "# Written from the boot line.\n" + "\n".join(lines) + "\n"


UPLOAD = """\
# Browsers upload volumes and templates here; the Java agent takes them on a port of its own.
<IfModule !proxy_module>
    LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
</IfModule>
<IfModule !proxy_http_module>
    LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
</IfModule>
<IfModule !headers_module>
    LoadModule headers_module /usr/lib/apache2/modules/mod_headers.so
</IfModule>
<Location "/upload/">
    ProxyPass "http://127.0.0.1:8210/upload/"
    <LimitExcept POST OPTIONS>
        Require all denied
    </LimitExcept>
</Location>
"""


def agent_properties(text: str, params: Params, kind: Role) -> str:
    """The Java agent's properties: what the file holds, with the boot line's pairs instead of equal keys."""
    if not kind.agent:
        return ""
    own = {name: value for name, value in params.raw.items() if name not in ("vmpassword", "authorized_key")}
    kept = [line for line in text.splitlines() if line.partition("=")[0].strip() not in own]
    return "\n".join([*kept, *(f"{name}={value}" for name, value in own.items())]) + "\n"


def commands(params: Params, kind: Role) -> tuple[tuple[str, ...], ...]:
    """What must be set in the kernel and has no file: a VPC's traffic looks first at its static routes."""
    if kind.name != "vpcrouter":
        return ()
    return tuple(
        ("ip", "rule", "add", "from", str(network), "table", table)
        for network in params.networks("vpccidr")
        for table in ("static_route", "static_route_back")
    )
