"""The verbs of `systemvm`: what units, cron, keepalived and a management server call."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from systemvm import boot_line, hypervisor, patch, redundancy, roles, setup, transport
from systemvm.boot_line import Params
from systemvm.hypervisor import Signs
from systemvm.machine import Machine, complain

LIBRARY = "/usr/local/lib/systemvm"
STATE = "/run/systemvm"
CACHE = "/var/cache/cloud"
DOCUMENTS = "/etc/cloudstack"
DONE = f"{CACHE}/boot_up_done"


# Facts ------------------------------------------------------------------------------------------


def signs(machine: Machine) -> Signs:
    """What this machine says about its hypervisor."""
    ports = machine.path("/sys/class/virtio-ports").glob("*/name")
    cpu = (
        line.partition(":")[2].strip()
        for line in machine.read("/proc/cpuinfo").splitlines()
        if "model name" in line
    )
    return Signs(
        xen_type=machine.read("/sys/hypervisor/type").strip(),
        xen_guest_type=machine.read("/sys/hypervisor/guest_type").strip(),
        vendor=machine.read("/sys/class/dmi/id/sys_vendor").strip(),
        product=machine.read("/sys/class/dmi/id/product_name").strip(),
        virtual_ports=tuple(
            sorted(port.read_text(encoding="ascii", errors="replace").strip() for port in ports)
        ),
        detected=machine.run("systemd-detect-virt", "--vm", quiet=True)
        .output.decode(errors="replace")
        .strip(),
        cpu=next(cpu, ""),
    )


def nics(machine: Machine) -> dict[str, str]:
    """Names of the NICs that are there, by MAC address; those that no hardware backs do not count."""
    found = {}
    for device in sorted(machine.path("/sys/class/net").glob("*/device")):
        name = device.parent.name
        found[machine.read(f"/sys/class/net/{name}/address").strip()] = name
    return found


def memory_kib(machine: Machine) -> int:
    """MemTotal of proc(5)."""
    lines = (line.split() for line in machine.read("/proc/meminfo").splitlines())
    return next((int(words[1]) for words in lines if words[:1] == ["MemTotal:"]), 0)


def params(machine: Machine) -> Params:
    """The boot line as it was received."""
    return Params(boot_line.parse(machine.read(transport.FILE)))


def facts(machine: Machine) -> setup.Facts:
    """What the set-up depends on besides the boot line."""
    return setup.Facts(
        hypervisor=machine.read(f"{STATE}/hypervisor").strip() or hypervisor.detect(signs(machine)),
        memory_kib=memory_kib(machine),
        present=tuple(nics(machine).values()),
        template=machine.read(f"{LIBRARY}/keepalived.conf.j2"),
        defaults=document(machine, f"{LIBRARY}/keepalived.json"),
    )


def document(machine: Machine, name: str) -> dict[str, object]:
    """A JSON object from a file; empty when it is missing or broken."""
    text = machine.read(name)
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        machine.log(f"{name} is not JSON")
        return {}
    return found if isinstance(found, dict) else {}


# Boot -------------------------------------------------------------------------------------------


ORIGIN = f"{STATE}/boot-line"
"""Where the boot line of this start comes from: one of the three below; empty when there is none."""
STARTED, REBOOTED, GIVEN = "started", "rebooted", "given"
"""A host has just sent it; it is of an earlier start; this hypervisor has it ready at every start."""


def receive(machine: Machine) -> int:
    """Get the boot line from the hypervisor and put it where CloudStack's scripts look for it."""
    machine.remove(DONE)
    kind = hypervisor.detect(signs(machine))
    machine.write(f"{STATE}/hypervisor", f"{kind}\n")
    source = transport.SOURCES.get(kind)
    if source is None:
        machine.log(f"hypervisor: {kind}, no way to get a boot line")
        return 0
    machine.log(f"hypervisor: {kind}")
    if source.units:
        machine.switch("start", *source.units)
    if source.stopped:
        machine.switch("stop", *source.stopped)
    origin = GIVEN
    if kind == hypervisor.KVM:
        origin = _await_agent(machine, source.seconds)
    else:
        text = _ask(machine, source)
        if text:
            machine.write(transport.FILE, f"{text}\n", 0o600)
    hook = machine.read(transport.TEST_HOOK).strip()
    if hook:
        machine.write(transport.FILE, f"{hook}\n", 0o600)
    size = len(machine.read_bytes(transport.FILE))
    machine.write(ORIGIN, f"{origin if size else ''}\n")
    if origin == REBOOTED and patch.in_place(machine):
        _keep_from_waiting(machine)
    if not roles.role(params(machine)).cloud_init:
        machine.run("systemctl", "start", "--no-block", "systemvm-swap")
    machine.log(
        f"boot line: {size} bytes" if size else f"no boot line came from {kind}: going on without parameters"
    )
    return 0


def _ask(machine: Machine, source: transport.Source) -> str:
    """Read a source until it has something or its time is over."""
    end = machine.now() + source.seconds
    while True:
        if source.command:
            answer = machine.run(*source.command, quiet=True)
            data = answer.output if answer.ok else b""
        else:
            data = next(filter(None, map(machine.read_bytes, source.files)), b"")
        text = transport.decode(source.form, data)
        if text or machine.now() >= end:
            return text
        machine.sleep(0.5)


def _keep_from_waiting(machine: Machine) -> None:
    """Let the scripts in place see that they need not wait for others: they look into the agent's folder.

    Nobody copies anything after a reboot from inside; without this a router would wait for two minutes.
    """
    home = machine.path(patch.AGENT_HOME)
    if not home.is_dir() or not any(home.iterdir()):
        machine.write(f"{patch.AGENT_HOME}/.rebooted", "")


FRESH = 5.0
"""Seconds to wait for a newer boot line when one of an earlier start is there."""
USED = "/var/lib/systemvm/boot-line"
"""Size and time of the boot line of the start before: a host that sends the same words still writes anew."""


def _await_agent(machine: Machine, seconds: float) -> str:
    """Wait until the host has written the boot line through the guest agent; says where it comes from.

    The file is first made, empty, and then filled: its size counts, and that it no longer changes. The agent
    may have been there before us. After a reboot from inside the host writes nothing, so what an earlier
    start has used is taken after a while.
    """
    if hypervisor.AGENT_PORT not in signs(machine).virtual_ports:
        machine.log("no channel of a guest agent: nothing can come through it")
        return REBOOTED
    used = machine.read(USED).strip()
    started = machine.now()
    last = ""
    while (waited := machine.now() - started) < seconds:
        current = _written(machine.path(transport.FILE))
        if current and current == last and (current != used or waited >= FRESH):
            for stale in machine.path(DOCUMENTS).glob("*.json"):
                machine.remove(f"{DOCUMENTS}/{stale.name}")
            machine.write(USED, f"{current}\n")
            return STARTED if current != used else REBOOTED
        last = current
        machine.sleep(0.2)
    return REBOOTED


def _written(path: Path) -> str:
    """Size and time of a file, or nothing while it holds nothing."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}" if status.st_size else ""


def preinit(machine: Machine) -> int:
    """Set up what must be there before any network is brought up."""
    line = params(machine)
    machine.run("udevadm", "settle", "--timeout=10", quiet=True)
    for old, new in setup.renames(line.macs, nics(machine)):
        machine.run("ip", "link", "set", "dev", old, "down", quiet=True)
        machine.run("ip", "link", "set", "dev", old, "name", new)
    done = setup.plan(line, facts(machine), machine.read)
    for complaint in done.complaints:
        machine.log(f"parameter {complaint}")
    machine.log(f"type: {done.role.name}, name: {done.hostname}")
    reload = any(
        name.startswith("/etc/systemd/") and machine.read(name) != file.text
        for name, file in done.files.items()
    )
    for name, file in done.files.items():
        machine.write(name, file.text, file.mode)
    for name in done.removed:
        machine.remove(name)
    if machine.root == Path("/"):
        socket.sethostname(done.hostname)
    if done.password:
        machine.run("chpasswd", text=f"root:{done.password}\n")
    _load_rules(machine)
    for module in done.modules:
        machine.run("modprobe", module)
    machine.run("sysctl", "--quiet", "--ignore", "--load", "/etc/sysctl.conf")
    if reload:  # takes a small machine a second or more
        machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "--no-block", "ssh")
    return 0


def _load_rules(machine: Machine) -> None:
    for program, name in (("iptables-restore", "rules.v4"), ("ip6tables-restore", "rules.v6")):
        if machine.read(f"/etc/iptables/{name}"):
            machine.run(program, f"/etc/iptables/{name}")


WAIT = "SYSTEMVM_SCRIPTS_WAIT"
"""Environment variable of cloud-early-config.service: seconds to wait for a management server's scripts."""


def early_config(machine: Machine) -> int:
    """Take in the scripts that a management server brings, and leave the rest to them if they can do it."""
    line = params(machine)
    kind = roles.role(line)
    if not kind.cloud_init and line.raw and _scripts(machine):
        if ours := not machine.path(patch.BOOTSTRAP).exists():
            machine.log(f"the scripts have no {patch.BOOTSTRAP}: the image's own set-up goes on")
        else:
            _give_way(machine, line)
            patch.bootstrap(machine)
        patch.clean_up(machine, kind.agent)
        if not ours:
            return 0
    for command in setup.commands(line, kind):
        machine.run(*command)
    return 0


def _give_way(machine: Machine, line: Params) -> None:
    """Take away what would stand beside the files of scripts that came, and use their packet filter."""
    for name in setup.OURS_ALONE:
        machine.remove(name)
    if filtered := setup.optional(line, roles.role(line), facts(machine), machine.read)[setup.RULES]:
        machine.write(setup.RULES, filtered)


def _scripts(machine: Machine) -> bool:
    """Wait for scripts if some can come; says whether a management server's are in place."""
    origin = machine.read(ORIGIN).strip()
    there = patch.in_place(machine)
    if origin == REBOOTED or (origin == GIVEN and there):
        machine.log("a reboot: no scripts are waited for")
        return there
    seconds = float(os.environ.get(WAIT, "120"))
    machine.log(f"waiting for {patch.COPIED}, {seconds:g} s at most")
    signature = patch.wait(machine, seconds)
    if not signature:
        machine.log(f"no scripts of a management server came within {seconds:g} s; the boot goes on")
    return patch.take_in(machine, signature) if signature else there


CLOUD_INIT_STAGES = (
    ("init", "--local"),
    ("init",),
    ("modules", "--mode=config"),
    ("modules", "--mode=final"),
)
"""What cloud-init's units run, one after another; on a system VM they are switched off."""


def postinit(machine: Machine) -> int:
    """Merge the boot line, switch services, load the packet filter, and say that the boot is done."""
    line = params(machine)
    kind = roles.role(line)
    if kind.merged and machine.path(f"{CACHE}/cmd_line.json").exists():
        update_config(machine, "cmd_line.json")
    for verb, name in (("stop", "disabled_svcs"), ("start", "enabled_svcs")):
        # A VPC router has no pair to keep before its first tier; without a file conntrackd fails.
        idle = {unit for unit, path in redundancy.CONFIGURED.items() if not machine.path(path).exists()}
        names = [
            unit for unit in machine.read(f"{CACHE}/{name}").split() if verb == "stop" or unit not in idle
        ]
        if names:
            machine.switch(verb, *names)
    _load_rules(machine)
    if machine.path(setup.USER_DATA).exists():
        for stage in CLOUD_INIT_STAGES:
            machine.run("cloud-init", *stage, seconds=300)
    machine.write(DONE, "")
    machine.log("boot is done")
    return 0


# Documents --------------------------------------------------------------------------------------


def update_config(machine: Machine, name: str) -> int:
    """Merge one document of the management server into /etc/cloudstack, and keep it, packed, as processed."""
    source = f"{CACHE}/{Path(name).name}"
    new = document(machine, source)
    kind = new.get("type", Path(name).name.split(".")[0])
    if not new:
        complain(f"{source} is not there, or holds nothing")
        return 1
    if kind == "cmdline":
        merge_cmdline(machine, new)
    elif kind not in ("guestnetwork", "guest_network") or not merge_guest_network(machine, new):
        # A server that is told 0 takes its rules for being in force.
        complain(
            f"{source}: nothing in this image applies documents of type {str(kind)[:40]!r}; the management "
            "server's own scripts do, and they have not come"
        )
        machine.log(f"{source}: not applied, its type is {str(kind)[:40]!r}")
        return 1
    packed = gzip.compress(machine.read_bytes(source), mtime=0)
    machine.write(f"{CACHE}/processed/{Path(name).name}.gz", packed, 0o600)
    machine.remove(source)
    return 0


def apply_batch(machine: Machine, name: str) -> int:
    """Do what a batch of the management server says: write its documents, merge each; 1 at the first failure.

    A batch is lines: `<version>`, `<file>` (a path, then lines up to `</file>`) and `<script>` (one command).
    """
    lines = iter(machine.read(name).splitlines())
    if not machine.path(name).exists():
        complain(f"{name} is not there")
        return 1
    for line in lines:
        if line == "<file>":
            path = next(lines, "")
            content = takewhile(lambda text: text != "</file>", lines)
            machine.write(path, "".join(f"{text}\n" for text in content))
        elif line == "<script>":
            command = next(lines, "")
            words = command.split()
            if len(words) != 2 or Path(words[0]).name != "update_config.py":
                complain(f"{name}: nothing in this image runs {command[:80]!r}")
                return 1
            if update_config(machine, words[1]):
                return 1
    return 0


def _config(machine: Machine) -> dict[str, object]:
    """What the boot line said, as it is merged now."""
    config = document(machine, setup.MERGED).get("config")
    return config if isinstance(config, dict) else {}


def merge_cmdline(machine: Machine, new: Mapping[str, object]) -> None:
    """The boot line's pairs over what is merged already; the state of the pair is not forgotten."""
    pairs = new.get("cmd_line")
    old = _config(machine)
    raw = {str(key): str(value) for key, value in pairs.items()} if isinstance(pairs, dict) else {}
    if "redundant_state" in old and "redundant_router" in raw:
        raw["redundant_state"] = str(old["redundant_state"])
    machine.write(setup.MERGED, boot_line.cmdline_json(raw), 0o600)


def merge_guest_network(machine: Machine, new: Mapping[str, object]) -> bool:
    """A tier of a VPC came or went: the pair's list of addresses follows, on both routers alike.

    Says whether that is so: of a router that has no pair nothing here sets up a tier.
    """
    if not params(machine).redundant:
        return False
    device = str(new.get("device", ""))
    name = f"{DOCUMENTS}/guestnetwork.json"
    merged = {**document(machine, name), "id": "guestnetwork"}
    if new.get("add", True):
        merged[device] = [dict(new)]
    else:
        merged.pop(device, None)
    machine.write(name, json.dumps(merged, indent=2, sort_keys=True) + "\n", 0o600)
    apply_pair(machine, merged)
    return True


def apply_pair(machine: Machine, tiers: Mapping[str, object]) -> None:
    """Write the files of redundancy and let the daemons take them; a pair without addresses is stopped."""
    line = params(machine)
    control = line.nic(0).address
    pair = redundancy.from_guest_networks(tiers, line, str(control.ip) if control else "")
    known = facts(machine)
    written = redundancy.files(pair, known.template, known.defaults, line) if pair else {}
    before = {name: machine.read(name) for name in redundancy.FILES}
    for name, (text, mode) in written.items():
        machine.write(name, text, mode)
    for name in redundancy.FILES:
        if name not in written:
            machine.remove(name)
    if not written:
        machine.switch("stop", "keepalived", "conntrackd")
        return
    primary = check_router(machine, quiet=True) == redundancy.PRIMARY
    if before[redundancy.CONNTRACKD] != machine.read(redundancy.CONNTRACKD):
        machine.switch("restart", "conntrackd", "keepalived")
    elif before[redundancy.KEEPALIVED] != machine.read(redundancy.KEEPALIVED):
        machine.switch("reload" if primary else "restart", "keepalived")


# Redundancy -------------------------------------------------------------------------------------


@contextmanager
def _alone(machine: Machine) -> Iterator[None]:
    """One change of state at a time: keepalived calls again before an earlier call has ended."""
    path = machine.path(f"{STATE}/state.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def public_nics(machine: Machine, kind: str) -> list[str]:
    """NICs in the public network: the second of a VPC router, the third and later ones of a plain one."""
    present = sorted(path.name for path in machine.path("/sys/class/net").glob("eth*"))
    if kind == "vpcrouter":
        return [name for name in present if name == "eth1"]
    return [name for name in present if name[3:].isdecimal() and int(name[3:]) >= 2]


FOLLOWERS = ("strongswan-starter", "xl2tpd", "dnsmasq")
"""Services that run on the primary only."""


def change_state(machine: Machine, state: str) -> int:
    """Do what being primary, backup or in fault means, and note it."""
    with _alone(machine):
        kind = roles.role(params(machine)).name
        machine.log(f"redundancy: this router is {state}")
        public = public_nics(machine, kind)
        if state == redundancy.PRIMARY:
            for name in public:
                machine.run("ip", "link", "set", "dev", name, "up")
                if f"iface {name} " in machine.read("/etc/network/interfaces"):
                    machine.run("ifup", "--force", name, seconds=30)
        for step in redundancy.CONNTRACK_STEPS[state]:
            machine.run("conntrackd", "-C", redundancy.CONNTRACKD, step, quiet=True, seconds=10)
        if followers := _followers(machine):
            machine.switch("restart" if state == redundancy.PRIMARY else "stop", *followers)
        for name in public if state == redundancy.PRIMARY else ():
            _announce(machine, name)
        for name in public if state != redundancy.PRIMARY else ():
            if f"iface {name} " in machine.read("/etc/network/interfaces"):
                machine.run("ifdown", "--force", name, seconds=30, quiet=True)
            machine.run("ip", "link", "set", "dev", name, "down")
        # A keepalived that was killed has not given up the gateway, and the peer has it by now.
        for address, device in redundancy.gateways(machine.read(redundancy.KEEPALIVED)):
            if state == redundancy.FAULT:
                machine.run("ip", "addr", "del", address, "dev", device, quiet=True)
        merged = {"config": {**_config(machine), "redundant_state": state}, "id": "cmdline"}
        machine.write(setup.MERGED, json.dumps(merged, indent=2, sort_keys=True) + "\n", 0o600)
    return 0


def _followers(machine: Machine) -> list[str]:
    """Those that this router has something to do for."""
    states = zip(FOLLOWERS, machine.units("UnitFileState", *FOLLOWERS), strict=False)
    wanted = {unit for unit, state in states if state == "enabled"}
    if machine.path(setup.DNSMASQ).exists():
        wanted.add("dnsmasq")
    return [unit for unit in FOLLOWERS if unit in wanted]


def _announce(machine: Machine, name: str) -> None:
    """Tell the neighbours of a public NIC who has its addresses now (gratuitous ARP)."""
    shown = machine.run("ip", "-4", "-o", "addr", "show", "dev", name).output.decode(errors="replace")
    for line in shown.splitlines():
        words = line.split()
        if "inet" in words:
            address = words[words.index("inet") + 1].split("/")[0]
            machine.run("arping", "-q", "-c", "2", "-w", "2", "-A", "-I", name, address, quiet=True)


def check_heartbeat(machine: Machine) -> int:
    """Give keepalived a strike when its heartbeat is late; after more than three it is out of order."""
    if machine.run("systemctl", "is-active", "--quiet", "keepalived", quiet=True).ok:
        if report_split(machine) == redundancy.AGAIN:
            machine.switch("restart", "keepalived")
            return 0
    elif _config(machine).get("redundant_state") == redundancy.FAULT:
        return 0  # said and done already
    now = machine.now()
    verdict = redundancy.judge(
        now,
        _number(machine, redundancy.STAMP),
        _number(machine, redundancy.CHECKED),
        int(_number(machine, redundancy.STRIKES) or 0),
    )
    if not verdict.counted:
        return 0
    machine.write(redundancy.CHECKED, f"{int(now)}\n")
    machine.write(redundancy.STRIKES, f"{verdict.strikes}\n")
    if verdict.failed:
        machine.log(f"keepalived gave no sign of life {verdict.strikes} times: Status: FAULT")
        for unit in ("keepalived", "conntrackd"):
            machine.run("systemctl", "stop", unit, seconds=20)
        change_state(machine, redundancy.FAULT)
        for unit in ("keepalived", "conntrackd"):
            machine.run("systemctl", "kill", "--signal=KILL", unit, quiet=True)
    return 0


def _number(machine: Machine, name: str) -> float | None:
    try:
        return float(machine.read(name))
    except ValueError:
        return None


def check_router(machine: Machine, quiet: bool = False) -> str:
    """State of this router: PRIMARY, BACKUP, FAULT or UNKNOWN."""
    kind = str(_config(machine).get("type", ""))
    active = machine.run("systemctl", "is-active", "--quiet", "keepalived", quiet=True).ok
    inet = machine.run("ip", "-4", "-o", "addr", "show", "dev", "eth0", quiet=True).output.decode(
        errors="replace"
    )
    link = (
        machine.run("ip", "-o", "link", "show", "dev", "eth1", quiet=True)
        .output.decode(errors="replace")
        .split()
    )
    state = redundancy.status(
        active, kind, inet.count(" inet "), link[link.index("state") + 1] if "state" in link else ""
    )
    if not quiet:
        print(f"Status: {state}")
    return state


def diagnose(machine: Machine) -> int:
    """Print how this router stands to its pair; 1 when the pair is split."""
    check_router(machine)
    print(f"advert_int: {redundancy.interval(params(machine))} s")
    return 1 if report_split(machine) else 0


def report_split(machine: Machine) -> str:
    """Say in words what keepalived's log says in passing: why it ignores its peer; nothing if it does not."""
    shown = machine.run(
        "journalctl", "--unit=keepalived", "--since=-90s", "--output=cat", "--no-pager", quiet=True
    ).output.decode("utf-8", errors="replace")
    found = redundancy.split_reason(shown)
    if found:
        machine.log(f"redundancy: the pair is split, both routers are primary: {found}")
    return found


# Answers ----------------------------------------------------------------------------------------


def template_version(machine: Machine) -> int:
    """Print `<release>&<signature>`, once the boot is done or 240 s are over."""
    end = machine.now() + 240
    while not machine.path(DONE).exists() and machine.now() < end:
        machine.sleep(0.1)
    release = machine.read("/etc/cloudstack-release").splitlines()[:1] or [""]
    print(f"{release[0]}&{machine.read(patch.SIGNATURE).strip()}")
    return 0


VERBS: dict[str, tuple[Callable[..., int], int, str]] = {
    "receive": (receive, 0, "get the boot line (systemvm-receive.service)"),
    "preinit": (preinit, 0, "interfaces, sshd, packet filter (cloud-preinit.service)"),
    "early-config": (early_config, 0, "scripts that are brought, routes (cloud-early-config.service)"),
    "postinit": (postinit, 0, "services (cloud-postinit.service)"),
    "update-config": (update_config, 1, "FILE: merge a document of the management server"),
    "batch": (apply_batch, 1, "FILE: merge a batch of documents of the management server"),
    "primary": (lambda machine: change_state(machine, redundancy.PRIMARY), 0, "become primary (keepalived)"),
    "backup": (lambda machine: change_state(machine, redundancy.BACKUP), 0, "become backup (keepalived)"),
    "fault": (lambda machine: change_state(machine, redundancy.FAULT), 0, "be out of order (keepalived)"),
    "check-heartbeat": (check_heartbeat, 0, "is keepalived alive? (cron)"),
    "check-router": (lambda machine: 0 if check_router(machine) else 1, 0, "print the state of the pair"),
    "diagnose": (diagnose, 0, "print how this router stands to its pair"),
    "template-version": (template_version, 0, "print release and signature"),
}
"""What is run, how many arguments it takes, and what it is for."""

BOOT = ("receive", "preinit", "early-config", "postinit")


def main(argv: Sequence[str], machine: Machine | None = None) -> int:
    """Run a verb. A verb of the boot never fails: what goes wrong is logged, and SSH stays reachable."""
    verb, *arguments = argv or [""]
    if verb not in VERBS or len(arguments) != VERBS[verb][1]:
        print(
            "\n".join(["usage: systemvm VERB", *(f"  {name:16} {row[2]}" for name, row in VERBS.items())]),
            file=sys.stderr,
        )
        return 2
    machine = machine or Machine()
    os.umask(0o022)
    try:
        return VERBS[verb][0](machine, *arguments)
    except Exception:
        machine.log(f"{verb}: {traceback.format_exc().strip()}")
        return 0 if verb in BOOT else 1
