from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import guest

roles, setup, hypervisor = (guest.module(name) for name in ("roles", "setup", "hypervisor"))

OTHERS = """
vmpassword nic_macs eth0ip6 eth0ip6prelen ip6gateway storagegateway storagecidr ntpserverlist
logrotatefrequency useextdns dnssearchorder guestgw6 privateMtu publicMtu bootproto vpccidr authorized_key
"""
KEYS = sorted(
    {word.partition("=")[0] for line in guest.LINES.values() for word in line.split()} | set(OTHERS.split())
)


def lines(done: Any, path: str) -> list[str]:
    return [line.strip() for line in done.files[path].text.splitlines() if line.strip()]


def stanza(done: Any, nic: str) -> list[str]:
    text = done.files["/etc/network/interfaces"].text
    found = re.search(rf"(?m)^iface {nic} inet .*\n((?:    .*\n)*)", text)
    return [line.strip() for line in found[1].splitlines()] if found else []


@pytest.mark.parametrize("kind", list(guest.LINES))
def test_every_type_is_understood_without_complaint(kind: str) -> None:
    done = guest.plan(guest.LINES[kind], hypervisor="kvm", present=("eth0", "eth1", "eth2", "eth3"))
    assert done.role.name == kind
    assert done.complaints == ()
    assert done.files["/var/cache/cloud/enabled_svcs"].text.split() == list(done.enable)
    assert done.files["/var/cache/cloud/disabled_svcs"].text.split() == list(done.disable)
    assert not set(done.enable) & set(done.disable)


def test_all_types_have_a_line_here() -> None:
    assert set(guest.LINES) == set(roles.ROLES)


@pytest.mark.parametrize(
    ("kind", "port", "address"),
    [
        ("router", 3922, "169.254.1.2"),
        ("vpcrouter", 3922, "169.254.1.2"),
        ("dhcpsrvr", 3922, "169.254.3.4"),
        ("elbvm", 3922, "169.254.7.7"),
        ("ilbvm", 3922, "169.254.7.8"),
        ("consoleproxy", 3922, "169.254.9.9"),
        ("secstorage", 3922, "169.254.9.8"),
        ("sharedfsvm", 22, None),
        ("cksnode", 22, None),
    ],
)
def test_sshd_listens_on_the_control_network(kind: str, port: int, address: str | None) -> None:
    done = guest.plan(guest.LINES[kind])
    found = lines(done, "/etc/ssh/sshd_config")
    wanted = [f"ListenAddress {address}"] if address else []
    assert [line for line in found if line.startswith("Port")] == [f"Port {port}"]
    assert [line for line in found if line.startswith("ListenAddress")] == wanted
    assert len(found) == len(
        [line for line in guest.overlay("/etc/ssh/sshd_config").splitlines() if line.strip()]
    )


@pytest.mark.parametrize(
    ("kind", "extra", "system", "nic", "address"),
    [
        ("consoleproxy", "", "vmware", "eth1", "172.16.5.6"),
        ("secstorage", "", "hyperv", "eth1", "172.16.5.7"),
        ("secstorage", "", "kvm", "eth0", "169.254.9.8"),
        ("dhcpsrvr", " sshonguest=true", "kvm", "eth0", "10.2.0.10"),
        ("dhcpsrvr", " sshonguest=false", "vmware", "eth1", "169.254.3.4"),
    ],
)
def test_control_nic_follows_hypervisor_and_zone(
    kind: str, extra: str, system: str, nic: str, address: str
) -> None:
    done = guest.plan(guest.LINES[kind] + extra, hypervisor=system)
    assert f"ListenAddress {address}" in lines(done, "/etc/ssh/sshd_config")
    rules = [line for line in lines(done, "/etc/iptables/rules.v4") if "3922" in line]
    assert [line.split()[3] for line in rules if line.startswith("-A")] == [nic]


def test_nothing_known_still_lets_someone_in() -> None:
    done = guest.plan("")
    assert done.role.name == "default"
    assert "Port 3922" in lines(done, "/etc/ssh/sshd_config")
    assert not any(line.startswith("ListenAddress") for line in lines(done, "/etc/ssh/sshd_config"))
    assert "/etc/iptables/rules.v4" not in done.files
    assert "/etc/cloudstack/cmdline.json" not in done.files
    assert "--dport 3922 -j ACCEPT" in guest.overlay("/etc/iptables/rules.v4")
    assert "up dhclient -nw eth0" in stanza(done, "eth0")


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        (guest.ROUTER.replace("169.254.1.2", "169.254.1.256"), "eth1"),
        (guest.LINES["consoleproxy"].replace("eth0ip=169.254.9.9", "eth0ip=0.0.0.0"), "eth0"),
        (guest.LINES["secstorage"].replace("eth0ip=", "eth0ipp="), "eth0"),
        (guest.ROUTER.replace("type=router", ""), ""),
        (guest.ROUTER.replace("type=router", "type=$(reboot)"), ""),
    ],
)
def test_a_router_whose_control_nic_is_not_known_is_still_reached(line: str, asks: str) -> None:
    """sshd on every address, its port open on every NIC, and the NIC without an address asks for one."""
    done = guest.plan(line, hypervisor="kvm", present=("eth0", "eth1", "eth2"))
    assert done.complaints or "0.0.0.0" in line or "ipp=" in line
    assert not any(line.startswith("ListenAddress") for line in lines(done, "/etc/ssh/sshd_config"))
    filters = done.files.get("/etc/iptables/rules.v4")
    text = filters.text if filters else guest.overlay("/etc/iptables/rules.v4")
    assert re.search(r"(?m)^-A INPUT -p tcp .*--dport 3922 -j ACCEPT$", text)
    assert (f"up dhclient -nw {asks}" in stanza(done, asks)) if asks else ("dhclient" not in str(done.files))
    assert not asks or f"auto {asks}\n" in done.files["/etc/network/interfaces"].text


def test_router() -> None:
    done = guest.plan(guest.ROUTER, present=("eth0", "eth1", "eth2"))
    text = done.files["/etc/network/interfaces"].text
    assert stanza(done, "eth0") == ["address 10.1.1.2", "netmask 255.255.255.0"]
    assert "gateway 192.0.2.1" in stanza(done, "eth2")
    assert text.count("gateway") == 1
    # A backup must not bring up the public address that the primary has.
    assert "auto eth1" in text
    assert "auto eth2" not in text
    assert done.enable == ("haproxy", "apache2", "keepalived", "conntrackd")
    assert "dnsmasq" in done.disable
    found = lines(done, "/etc/iptables/rules.v4")
    assert "-A INPUT -d 224.0.0.18/32 -j ACCEPT" in found
    assert "-A INPUT -d 225.0.0.50/32 -j ACCEPT" in found
    assert "-A INPUT -i eth0 -s 10.1.1.0/24 -p udp -m udp --dport 53 -j ACCEPT" in found
    assert "net.ipv4.ip_forward = 1" in lines(done, "/etc/sysctl.conf")
    assert done.modules == ("nf_nat_pptp",)


def test_single_router() -> None:
    line = " ".join(word for word in guest.ROUTER.split() if not word.startswith(("redundant", "guestgw")))
    done = guest.plan(line, present=("eth0", "eth1", "eth2"))
    assert "auto eth2" in done.files["/etc/network/interfaces"].text
    assert done.enable == ("haproxy", "apache2", "dnsmasq")
    assert {"keepalived", "conntrackd"} <= set(done.disable)
    assert "/etc/keepalived/keepalived.conf" in done.removed
    assert "dhcp-range=10.1.1.1,static,255.255.255.0" in lines(done, "/etc/dnsmasq.d/cloudstack.conf")


def test_vpc_router_looks_at_its_static_routes_first() -> None:
    done = guest.plan(guest.VPC_ROUTER + " vpccidr=10.1.0.0/16")
    assert ("ip", "rule", "add", "from", "10.1.0.0/16", "table", "static_route") in done.commands
    assert "static_route" in guest.overlay("/etc/iproute2/rt_tables.d/cloudstack.conf")


def test_console_proxy_routes() -> None:
    done = guest.plan(guest.LINES["consoleproxy"])
    routes = [line.split()[4] for line in stanza(done, "eth1") if line.startswith("up ip route")]
    # A documentation address counts as private: no way to private clients is needed.
    assert routes == ["172.16.0.0/16", "192.0.2.0/24"]
    public = guest.plan(
        guest.LINES["consoleproxy"].replace("203.0.113.7", "8.8.4.4").replace("gateway=203.0.113.1", "")
    )
    routes = [line.split()[4] for line in stanza(public, "eth1") if line.startswith("up ip route")]
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} < set(routes)
    properties = lines(done, "/usr/local/cloud/systemvm/conf/agent.properties")
    assert "guid=Proxy.2" in properties
    assert "8001" in done.files["/etc/iptables/rules.v4"].text
    assert "net.ipv4.ip_forward = 0" in lines(done, "/etc/sysctl.conf")


def test_secondary_storage_network() -> None:
    done = guest.plan(guest.LINES["secstorage"] + " storagegateway=10.9.0.1 storagecidr=10.10.0.0/16")
    assert "mtu 9000" in stanza(done, "eth3")
    assert 'ProxyPass "http://127.0.0.1:8210/upload/"' in lines(
        done, "/etc/apache2/conf-enabled/cloudstack-upload.conf"
    )
    assert "mtu 9000" not in stanza(done, "eth0")
    assert "up ip route replace 10.10.0.0/16 via 10.9.0.1 dev eth3 || true" in stanza(done, "eth3")


@pytest.mark.parametrize("kind", ["sharedfsvm", "cksnode"])
def test_a_users_own_machine_is_left_to_its_cloud_init(kind: str) -> None:
    done = guest.plan(guest.LINES[kind] + " authorized_key=c3NoLXJzYSBBQUFB")
    assert done.files["/root/.ssh/authorized_keys"].text == ""
    assert "/etc/cloud/cloud-init.disabled" in done.removed
    assert ":INPUT ACCEPT [0:0]" in lines(done, "/etc/iptables/rules.v4")
    assert "cloud-final" in done.enable


def test_ipv6() -> None:
    line = (
        guest.LINES["dhcpsrvr"] + " eth0ip6=fd00:1::5 eth0ip6prelen=64 ip6gateway=fd00:1::1 ip6dns1=fd00::53"
    )
    done = guest.plan(line)
    assert "net.ipv6.conf.all.disable_ipv6 = 0" in lines(done, "/etc/sysctl.conf")
    text = done.files["/etc/network/interfaces"].text
    assert "iface eth0 inet6 static\n    address fd00:1::5\n    netmask 64\n    gateway fd00:1::1\n" in text
    assert "nameserver fd00::53" in lines(done, "/etc/resolv.conf")


def test_sysctl_changes_lines_and_adds_none() -> None:
    before = guest.overlay("/etc/sysctl.conf").splitlines()
    after = guest.plan(guest.ROUTER, memory_kib=500_000).files["/etc/sysctl.conf"].text.splitlines()
    changed = {new for old, new in zip(before, after, strict=True) if old != new}
    assert changed == {"net.ipv4.conf.default.rp_filter = 1", "vm.vfs_cache_pressure = 100"}


def test_resolvers_internal_first() -> None:
    line = "type=consoleproxy dns1=9.9.9.9 dns2=8.8.8.8 internaldns1=10.0.0.53 domain=a.b"
    assert lines(guest.plan(line), "/etc/resolv.conf") == [
        "search a.b",
        "nameserver 10.0.0.53",
        "nameserver 9.9.9.9",
        "nameserver 8.8.8.8",
    ]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("", "hourly"),
        ("daily", "daily"),
        ("*:00:00", "*:00:00"),
        ("23:30", "23:30"),
        ("hourly\nExecStart=/bin/sh", "hourly"),
        ("`id`", "hourly"),
    ],
)
def test_log_rotation(given_: str, expected: str) -> None:
    boot_line = guest.module("boot_line")
    text = setup.log_timer(boot_line.Params({"logrotatefrequency": given_}), roles.ROLES["router"])
    assert f"OnCalendar={expected}\n" in text
    assert "ExecStart" not in text


def test_time_servers_replace_the_default_ones() -> None:
    boot_line = guest.module("boot_line")
    text = "driftfile /x\npool 0.debian.pool iburst\nserver a\nrestrict default\n"
    done = setup.ntp_conf(text, boot_line.Params({"ntpserverlist": "10.0.0.1,ntp.example.org,$(id)"}))
    assert done == "driftfile /x\nrestrict default\nserver 10.0.0.1 iburst\nserver ntp.example.org iburst\n"
    assert setup.ntp_conf(text, boot_line.Params({})) == ""


@pytest.mark.parametrize(
    ("order", "present", "after"),
    [
        (("a", "b"), {"a": "eth0", "b": "eth1"}, {"a": "eth0", "b": "eth1"}),
        (("b", "a"), {"a": "eth0", "b": "eth1"}, {"a": "eth1", "b": "eth0"}),
        (("c", "a", "b"), {"a": "eth0", "b": "eth1", "c": "eth2"}, {"c": "eth0", "a": "eth1", "b": "eth2"}),
        (("b", "gone"), {"a": "eth0", "b": "eth1"}, {"b": "eth0", "a": "eth1"}),
        (("b",), {"a": "eth0", "b": "eth5"}, {"b": "eth0", "a": "eth1"}),
        ((), {"a": "eth0"}, {"a": "eth0"}),
    ],
)
def test_renames(order: tuple[str, ...], present: dict[str, str], after: dict[str, str]) -> None:
    names = {name: mac for mac, name in present.items()}
    for old, new in setup.renames(order, present):
        assert new not in names, "a name is taken"
        names[new] = names.pop(old)
    assert {mac: name for name, mac in names.items()} == after


NASTY = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["a\nb", "$(reboot)", "`id`", "';rm -rf /;'", "a\0b", "../../etc/x", "%s%n", "\x1b[2J", "9" * 400]
    ),
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([*guest.LINES, "", "nonsense"]), st.dictionaries(st.sampled_from(KEYS), NASTY, max_size=8)
)
def test_hostile_values_change_no_file_but_the_documents(kind: str, nasty: dict[str, str]) -> None:
    """What is no address, name or number appears nowhere, whatever file it would have gone to."""
    boot_line = guest.module("boot_line")
    raw = {
        **boot_line.parse(guest.LINES.get(kind, "")),
        **{key: value for key, value in nasty.items() if key != "type"},
    }
    params = boot_line.Params(raw)
    known = setup.Facts(
        hypervisor="kvm",
        template=(guest.CHECKOUT / "templates/keepalived.conf.j2").read_text(),
        defaults=guest.defaults(),
    )
    done = setup.plan(params, known, guest.overlay)
    assert set(done.files) <= PATHS
    for path, file in done.files.items():
        if path.endswith((".json", "agent.properties")):
            continue
        assert "\0" not in file.text
        for value in nasty.values():
            if (
                set(value) & set("\n\0`$;'\x1b") and len(value.strip()) > 1
            ):  # one alone is in our own words, too
                assert value not in re.sub("; (mv|systemvm|it must stay)", "", file.text)
    for command in done.commands:
        assert command[0] == "ip"
    assert boot_line.HOST_NAME.fullmatch(done.hostname)


PATHS = {
    "/root/.ssh/authorized_keys",
    "/etc/network/interfaces",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/ssh/sshd_config",
    "/etc/sysctl.conf",
    "/etc/resolv.conf",
    "/etc/udev/rules.d/70-persistent-net.rules",
    "/etc/iptables/rules.v4",
    "/etc/iptables/rules.v6",
    "/etc/ntpsec/ntp.conf",
    "/etc/systemd/system/logrotate.timer.d/cloudstack.conf",
    "/etc/dnsmasq.d/cloudstack.conf",
    "/usr/local/cloud/systemvm/conf/agent.properties",
    "/var/cache/cloud/enabled_svcs",
    "/var/cache/cloud/disabled_svcs",
    "/var/cache/cloud/cmd_line.json",
    "/etc/cloudstack/cmdline.json",
    "/etc/keepalived/keepalived.conf",
    "/etc/conntrackd/conntrackd.conf",
    "/etc/cron.d/heartbeat",
    "/etc/apache2/conf-enabled/cloudstack-upload.conf",
    "/ramdisk/rrouter/heartbeat.sh",
}


@pytest.mark.parametrize(
    ("signs", "name"),
    [
        ({"xen_type": "xen", "xen_guest_type": "PV", "vendor": ""}, "xen-pv"),
        ({"xen_type": "xen", "xen_guest_type": "HVM", "vendor": "Xen"}, "xen-hvm"),
        # Viridian: everything but Xen's own file says Hyper-V.
        ({"xen_type": "xen", "detected": "microsoft", "vendor": "Xen"}, "xen-hvm"),
        ({"vendor": "VMware, Inc.", "detected": "vmware"}, "vmware"),
        ({"vendor": "Microsoft Corporation", "detected": "microsoft"}, "hyperv"),
        ({"vendor": "innotek GmbH", "detected": "oracle"}, "virtualbox"),
        ({"vendor": "QEMU", "detected": "qemu"}, "kvm"),
        (
            {
                "vendor": "Apache Software Foundation",
                "product": "CloudStack KVM Hypervisor",
                "detected": "kvm",
            },
            "kvm",
        ),
        ({"vendor": "Somebody Else", "virtual_ports": ("org.qemu.guest_agent.0",)}, "kvm"),
        ({"cpu": "QEMU Virtual CPU version 2.5+"}, "kvm"),
        ({"vendor": "Dell Inc.", "cpu": "Intel(R) Xeon(R)", "detected": "none"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_hypervisors(signs: dict[str, Any], name: str) -> None:
    assert hypervisor.detect(hypervisor.Signs(**signs)) == name
