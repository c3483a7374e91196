"""docs/guest.md tells what the code does: its tables are read and compared."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from build.keepalived_render import failover_bound
from build.verbs import boot_line as params
from tests import guest

GUIDE = (guest.CHECKOUT / "docs/guest.md").read_text(encoding="utf-8")
hypervisor, main, roles, transport = (
    guest.module(name) for name in ("hypervisor", "main", "roles", "transport")
)


def table(first: str) -> dict[str, list[str]]:
    """Rows of the table whose heading begins with this cell: the other cells by the first one."""
    found = re.search(rf"(?m)^\| {re.escape(first)} \|.*\n\| ---.*\n((?:\|.*\n)+)", GUIDE)
    assert found, first
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|\n ").split("|")]
        for line in found[1].splitlines()
    ]
    return {row[0]: row[1:] for row in rows}


def test_types() -> None:
    rows = table("type")
    assert set(rows) == set(roles.ROLES)
    for name, (control, port, starts, stops, forwards, rules) in rows.items():
        role = roles.ROLES[name]
        assert control == f"eth{role.control}"
        assert port == str(role.ssh_port)
        assert tuple(starts.split()) == role.on or (role.on == roles.CLOUD_INIT and "cloud-init" in starts)
        assert tuple(stops.split()) == role.off
        assert forwards == ("yes" if role.forwarding else "no")
        assert rules == (f"iptables-{role.rules}" if role.rules else "open")
        assert not role.rules or guest.overlay(f"/etc/iptables/iptables-{role.rules}")


FIRST_BOOT = ("systemvm-grow", "systemvm-keys", "systemvm-certificate")


def test_units() -> None:
    rows = table("unit")
    for unit, (runs, whose, survives) in rows.items():
        folder = "firstboot" if unit in FIRST_BOOT else "rootfs"
        text = (guest.CHECKOUT / "config" / folder / f"etc/systemd/system/{unit}.service").read_text()
        entry, _, verb = (part.strip() for part in runs.partition("="))
        program = f"/usr/local/sbin/{entry}" if entry.startswith("systemvm ") else entry
        assert f"ExecStart={program}\n" in text
        if verb:
            assert f"exec /usr/local/sbin/{verb}\n" in guest.overlay(program)
        assert (verb or entry).split()[-1] in (*main.VERBS, entry)
        assert (whose, survives) == (
            ("ours", "yes") if unit.startswith("systemvm-") else ("upstream's", "replaced")
        )
    units = {path.stem for path in (guest.ROOTFS / "etc/systemd/system").glob("cloud-*.service")}
    assert units | {*FIRST_BOOT, "systemvm-receive"} == set(rows)


def test_order_of_the_boot() -> None:
    picture = re.findall(r"(?m)^   \+- (\S+)", GUIDE)
    named = [name for name in picture if name in table("unit")]
    assert named == list(table("unit"))
    for before, after in pairwise(named[len(FIRST_BOOT) :]):
        text = guest.overlay(f"/etc/systemd/system/{after}.service")
        earlier = guest.overlay(f"/etc/systemd/system/{before}.service")
        assert f"After={before}.service" in text or f"Before={after}.service" in earlier, after


def test_hypervisors() -> None:
    rows = table("hypervisor")
    names = {
        "KVM": hypervisor.KVM,
        "Xen PV": hypervisor.XEN_PV,
        "Xen HVM": hypervisor.XEN_HVM,
        "VMware": hypervisor.VMWARE,
        "Hyper-V": hypervisor.HYPERV,
        "VirtualBox": hypervisor.VIRTUALBOX,
    }
    assert set(rows) == {*names, "any"}
    assert set(names.values()) == set(transport.SOURCES)
    for shown, name in names.items():
        source = transport.SOURCES[name]
        _, where, patience = rows[shown]
        assert patience.split(";")[0] == (f"{source.seconds} s" if source.seconds else "-")
        assert " ".join(source.command) in where
        for file in source.files:
            folder, _, base = file.rpartition("/")
            assert base in where
            assert folder in where
    assert f"{main.FRESH:.0f} s for a newer one" in rows["KVM"][2]
    assert transport.TEST_HOOK in rows["any"][1]


def test_bounds_of_a_failover() -> None:
    assert table("what happens to the primary")["bound"] == [
        f"{failover_bound(interval, 100):.2f} s" for interval in (1, 2, 5)
    ]
    for interval in (1, 2):
        assert f"{failover_bound(interval, 100):.2f} s with {interval}" in GUIDE


def test_files_of_the_pair() -> None:
    line = params.compose("router", {params.INTERVAL: "2"})
    written = params.render(line, guest.definition()).files
    for path in table("file"):
        assert path in written or guest.overlay(path) or (guest.ROOTFS / path[1:]).is_symlink(), path


@pytest.mark.parametrize(
    "what",
    [
        "NAT",
        "ACL",
        "load balancing",
        "VPN",
        "health checks",
        "the Java agent",
        "BGP",
        "update_config.py",
    ],
)
def test_what_is_out_of_scope_is_listed(what: str) -> None:
    section = GUIDE.split("## Left to the management server", 1)[1].split("\n## ", 1)[0]
    assert any(what in line for line in section.splitlines() if line.startswith("- "))


@pytest.mark.parametrize("command", re.findall(r"(?m)^    systemvm ([a-z-]+)", GUIDE))
def test_verbs_are_there(command: str) -> None:
    assert command in main.VERBS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:config|tests|build)/[\w./-]+)`", GUIDE))))
def test_places_are_there(name: str) -> None:
    assert (guest.CHECKOUT / name).exists() or "NAME" in name
