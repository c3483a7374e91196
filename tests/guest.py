"""The guest's own package, as the overlay brings it, and machines to try it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from build import keepalived_render
from build.engine.settings import Loaded, load
from build.verbs import boot_line as params

CHECKOUT = Path(__file__).resolve().parents[1]
ROOTFS = CHECKOUT / "config" / "rootfs"
TEMPLATE = keepalived_render.TEMPLATE


def module(name: str) -> ModuleType:
    """One module of the package."""
    return params.guest(name)


def definition(name: str = "systemvm", *overrides: str) -> Loaded:
    """A shipped image definition."""
    return load(CHECKOUT / "config" / f"{name}.yaml", {}, overrides=overrides)


def overlay(path: str) -> str:
    """Text of a file as the image has it."""
    place = ROOTFS / path.lstrip("/")
    return place.read_text(encoding="utf-8") if place.is_file() else ""


def plan(line: str, **facts: Any) -> Any:
    """What the guest makes of a boot line."""
    boot_line, setup = module("boot_line"), module("setup")
    known = {
        "template": TEMPLATE.read_text(),
        "defaults": defaults(),
        **facts,
    }
    return setup.plan(boot_line.Params(boot_line.parse(line)), setup.Facts(**known), overlay)


def defaults(loaded: Loaded | None = None) -> dict[str, Any]:
    """Values of keepalived.json as a definition makes them, else the shipped one."""
    return keepalived_render.values((loaded or definition()).settings.vrrp)


Answer = Callable[[Sequence[str]], tuple[int, str]]


@dataclass
class Recorder:
    """Stands for this machine's commands: notes each, answers as told, and lets time pass only when slept."""

    root: Path
    answers: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Status and output by the beginning of the command line."""
    ran: list[tuple[str, ...]] = field(default_factory=list)
    typed: list[str | None] = field(default_factory=list)
    clock: float = 1_800_000_000.0
    later: Callable[[float], None] | None = None
    """Called with the time after each sleep: what happens meanwhile."""

    def execute(self, argv: Sequence[str], text: str | None, seconds: float) -> Any:
        """Note a command."""
        self.ran.append(tuple(argv))
        self.typed.append(text)
        line = " ".join(argv)
        found = next((answer for begin, answer in self.answers.items() if line.startswith(begin)), (0, ""))
        return module("machine").Result(found[0], found[1].encode())

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.clock += seconds
        if self.later:
            self.later(self.clock)

    @property
    def machine(self) -> Any:
        """The machine as the guest's verbs take it."""
        return module("machine").Machine(self.root, self.execute, lambda: self.clock, self.sleep)

    def put(self, name: str, content: str | bytes) -> Path:
        """Write a file of the machine."""
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def text(self, name: str) -> str:
        """Text of a file of the machine."""
        return (self.root / name.lstrip("/")).read_text(encoding="utf-8")

    def has(self, *words: str) -> bool:
        """Whether a command with these words, in this order, was run."""
        return any(line[: len(words)] == words for line in self.ran)


ROUTER = params.compose("router", {params.INTERVAL: "2"})
VPC_ROUTER = params.compose("vpcrouter", {params.INTERVAL: "2"})
CONTROL = "eth1mask=255.255.0.0 eth1ip=169.254"
POD = "localgw=172.16.5.1 eth1mask=255.255.255.0"
PUBLIC = "gateway=203.0.113.1 eth2mask=255.255.255.0"
GUESTS = "gateway=10.1.1.1 eth0mask=255.255.255.0"
MANAGED = "template=domP host=192.0.2.9 port=8250 zone=1 pod=1"
LINES = {
    "router": ROUTER,
    "vpcrouter": VPC_ROUTER,
    "dhcpsrvr": f"type=dhcpsrvr name=r-5-VM eth0ip=10.2.0.10 eth0mask=255.255.0.0 gateway=10.2.0.1 "
    f"{CONTROL}.3.4 dhcprange=10.2.0.1 cidrsize=16 domain=basic.internal",
    "consoleproxy": f"{MANAGED} type=consoleproxy name=v-2-VM guid=Proxy.2 proxy_vm=2 disable_rp_filter=true "
    f"eth2ip=203.0.113.7 {PUBLIC} eth0ip=169.254.9.9 eth0mask=255.255.0.0 eth1ip=172.16.5.6 {POD} "
    "mgmtcidr=172.16.0.0/16,192.0.2.0/24 internaldns1=192.0.2.53 dns1=203.0.113.53 keystore_password=s3cret",
    "secstorage": f"{MANAGED} type=secstorage name=s-1-VM guid=s-1-VM instance=SecStorage "
    f"role=templateProcessor mtu=9000 eth0ip=169.254.9.8 eth0mask=255.255.0.0 eth1ip=172.16.5.7 {POD} "
    f"mgmtcidr=172.16.0.0/16 eth2ip=203.0.113.8 {PUBLIC} "
    "eth3ip=10.9.0.8 eth3mask=255.255.255.0 nfsVersion=null",
    "elbvm": "type=elbvm name=l-1-VM eth0ip=203.0.113.20 eth0mask=255.255.255.0 gateway=203.0.113.1 "
    f"{CONTROL}.7.7",
    "ilbvm": f"type=ilbvm name=b-1-VM eth0ip=10.1.1.9 {GUESTS} {CONTROL}.7.8",
    "sharedfsvm": f"type=sharedfsvm name=f-1-VM eth0ip=10.1.1.8 {GUESTS}",
    "cksnode": f"type=cksnode name=k-1-VM eth0ip=10.1.1.7 {GUESTS}",
}
"""A boot line of every type."""
