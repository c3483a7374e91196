"""Steps that make the guest, and the overlay they lay: values, without a tree."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from build import keepalived_render, minimize, seal, tweak
from build.engine import overlay
from build.engine.errors import BuildError
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, load
from build.verbs import boot_line as params
from tests import guest

UNRESOLVED = Resolution((), 1_700_000_000, 0)
STEPS = (tweak, minimize, keepalived_render, seal)


def loaded(folder: Path, **keys: Any) -> Loaded:
    (folder / "image.yaml").write_text(yaml.safe_dump({"rootfs": ["over"], **keys}))
    (folder / "over").mkdir(exist_ok=True)
    return load(folder / "image.yaml", {})


def put(folder: Path, name: str, text: str = "x", mode: int = 0o644) -> None:
    path = folder / "over" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def rows(step: Any) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in json.loads(step.files["table.json"].content)}


NAMES = [
    "with space",
    "quote'\"",
    "new\nline",
    "-dash",
    "ünï",
    "dollar$HOME",
    "star*",
    "back\\slash",
    "a;b",
    "tab\tx",
]


def test_names_that_bite(tmp_path: Path) -> None:
    for name in NAMES:
        put(tmp_path, f"etc/{name}", name)
    (tmp_path / "over" / "a link\n").symlink_to("/nowhere else")
    (tmp_path / "over" / os.fsdecode(b"not-utf8-\xff")).write_text("x")
    step = tweak.step(loaded(tmp_path), UNRESOLVED)
    for name in NAMES:
        assert step.files[f"tree/etc/{name}"].content.decode() == name
        assert rows(step)[f"etc/{name}"] == {"path": f"etc/{name}", "source": f"etc/{name}", "mode": 0o644}
        assert name not in step.script
    assert rows(step)["a link\n"] == {"path": "a link\n", "link": "/nowhere else"}
    assert os.fsdecode(b"not-utf8-\xff") in rows(step)


def test_modes_are_gits_and_the_tables(tmp_path: Path) -> None:
    put(tmp_path, "usr/bin/run", mode=0o700)
    put(tmp_path, "etc/plain", mode=0o666)
    put(tmp_path, "etc/sudoers.d/x", mode=0o644)
    put(tmp_path, "root/.ssh/authorized_keys", mode=0o755)
    modes = {path: row.get("mode") for path, row in rows(tweak.step(loaded(tmp_path), UNRESOLVED)).items()}
    assert modes["usr/bin/run"] == 0o755
    assert modes["etc/plain"] == 0o644
    assert modes["etc/sudoers.d/x"] == 0o440
    assert modes["root/.ssh/authorized_keys"] == 0o600


@pytest.mark.parametrize("name", ["tmp/x", "run/x/y", "proc/x", "dev/null", "sys/x"])
def test_what_would_never_be_seen_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, name)
    with pytest.raises(BuildError, match="hidden when the image runs"):
        tweak.step(loaded(tmp_path), UNRESOLVED)


def test_what_no_image_can_hold_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "etc/x")
    os.mkfifo(tmp_path / "over/etc/pipe")
    with pytest.raises(BuildError, match="neither a file nor a link"):
        tweak.step(loaded(tmp_path), UNRESOLVED)


def test_leavings_of_tools_do_not_change_the_step(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/x.py")
    before = tweak.step(loaded(tmp_path), UNRESOLVED)
    for name in ("usr/lib/__pycache__/x.pyc", "usr/lib/x.py~", "usr/lib/.x.py.swp", "opt/.gitkeep"):
        put(tmp_path, name)
    assert tweak.step(loaded(tmp_path), UNRESOLVED) == before


def test_later_overlays_win(tmp_path: Path) -> None:
    put(tmp_path, "etc/x", "first")
    (tmp_path / "second/etc").mkdir(parents=True)
    (tmp_path / "second/etc/x").write_text("second")
    step = tweak.step(loaded(tmp_path, rootfs=["over", "second"]), UNRESOLVED)
    assert step.files["tree/etc/x"].content == b"second"


def test_overlay_wins_over_what_is_said_by_default(tmp_path: Path) -> None:
    put(tmp_path, "etc/fstab", "mine\n")
    assert tweak.step(loaded(tmp_path), UNRESOLVED).files["tree/etc/fstab"].content == b"mine\n"


def test_identity(tmp_path: Path) -> None:
    step = tweak.step(loaded(tmp_path, hostname="vm.example", cloudstack_release="4.99.0"), UNRESOLVED)
    text = {name[5:]: file.content.decode() for name, file in step.files.items() if name.startswith("tree/")}
    assert text["etc/hostname"] == "vm.example\n"
    assert "127.0.1.1\tvm.example vm\n" in text["etc/hosts"]
    assert text["etc/fstab"].startswith("LABEL=ROOT\t/\text4\t")
    assert re.search(r"tmpfs\t/run\ttmpfs\t\S*size=20%,mode=755", text["etc/fstab"])
    assert text["etc/cloudstack-release"] == "Cloudstack Release 4.99.0 Tue Nov 14 22:13:20 UTC 2023\n"
    assert "etc/localtime" not in rows(step), "no zone files are asked for"


@pytest.mark.parametrize(
    ("suite", "packages", "where", "language"),
    [
        ("bookworm", [], "etc/default/locale", "C.UTF-8"),
        ("bookworm", ["locales"], "etc/default/locale", "en_US.UTF-8"),
        ("trixie", ["locales"], "etc/locale.conf", "en_US.UTF-8"),
    ],
)
def test_locale(tmp_path: Path, suite: str, packages: list[str], where: str, language: str) -> None:
    step = tweak.step(loaded(tmp_path, suite=suite, packages={"all": packages}), UNRESOLVED)
    assert step.files[f"tree/{where}"].content.decode() == f"LANG={language}\n"
    assert "\nLOCALES=\n" in f"\n{step.script}", "the bootstrap has made it"


def test_an_overlay_s_own_list_of_locales_is_followed(tmp_path: Path) -> None:
    put(tmp_path, "etc/locale.gen")
    assert "LOCALES=yes\n" in tweak.step(loaded(tmp_path), UNRESOLVED).script


def test_accounts_are_made_from_the_overlays_declarations(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/sysusers.d/my own.conf")
    put(tmp_path, "usr/lib/tmpfiles.d/x.conf")
    script = tweak.step(loaded(tmp_path), UNRESOLVED).script
    assert "SYSUSERS=('/usr/lib/sysusers.d/my own.conf')\n" in script
    assert "TMPFILES=(/usr/lib/tmpfiles.d/x.conf)\n" in script


def test_services(tmp_path: Path) -> None:
    services = {"enable": ["ssh", "x.timer"], "disable": ["a@b.service"], "mask": ["c.socket"]}
    script = tweak.step(loaded(tmp_path, services=services), UNRESOLVED).script
    assert "ENABLE=(ssh.service x.timer)\n" in script
    assert "DISABLE=(a@b.service)\n" in script
    assert "MASK=(c.socket)\n" in script


def test_an_appliance_has_no_archive_of_cloudstack(tmp_path: Path) -> None:
    assert "archive.py" not in tweak.step(loaded(tmp_path), UNRESOLVED).files
    step = tweak.step(guest.definition(), UNRESOLVED)
    assert "opt/cloud/bin/setup/init.sh" in json.loads(step.files["archive.json"].content)


def test_minimize_off_takes_nothing_out(tmp_path: Path) -> None:
    step = minimize.step(loaded(tmp_path, minimize=False), UNRESOLVED)
    assert not step.files
    assert step.script.startswith("MINIMIZE=\n")


def test_seal_is_the_same_whatever_minimize_says(tmp_path: Path) -> None:
    on, off = (seal.step(loaded(tmp_path, minimize=value), UNRESOLVED) for value in (True, False))
    assert on == off
    assert on.secrets == ("password-hash",)


def test_seal_keeps_what_the_definition_brings(tmp_path: Path) -> None:
    put(tmp_path, "etc/iptables/rules.v4")
    assert json.loads(seal.step(loaded(tmp_path), UNRESOLVED).files["kept.json"].content) == [
        "etc/iptables/rules.v4"
    ]


def test_without_keepalived_nothing_is_rendered(tmp_path: Path) -> None:
    assert not keepalived_render.step(loaded(tmp_path), UNRESOLVED).files


@pytest.mark.parametrize("enabled", [False, True])
def test_keepalived_is_live_only_when_asked(tmp_path: Path, enabled: bool) -> None:
    vrrp = {"enabled": enabled, "auth_pass": "12345678", "addresses": ["10.1.1.1/24"]}
    step = keepalived_render.step(loaded(tmp_path, packages={"all": ["keepalived"]}, vrrp=vrrp), UNRESOLVED)
    assert ("tree/etc/keepalived/keepalived.conf" in step.files) is enabled
    for name in ("keepalived.conf.j2", "keepalived.json", "render.py"):
        assert f"tree/usr/local/lib/systemvm/{name}" in step.files
    assert b"script_user root" in step.files["check.conf"].content


@pytest.mark.parametrize("module", STEPS)
def test_planning_is_pure(module: Any) -> None:
    one, two = (module.step(guest.definition(), UNRESOLVED) for _ in range(2))
    assert one == two


# The shipped definitions -----------------------------------------------------------------------


def overlay_files() -> list[tuple[str, Path]]:
    folders = [guest.CHECKOUT / "config" / name for name in ("rootfs", "firstboot", "tiny")]
    return [(f"{folder.name}/{path}", folder / path) for folder in folders for path in overlay.read(folder)]


def explains(text: str) -> bool:
    """Whether a file begins with a comment, or a docstring, of some words."""
    first = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#!")][:1]
    return bool(first) and bool(re.match(r'(#|;|//|"""|<!--)\s*\w', first[0])) and len(first[0].split()) > 3


@pytest.mark.parametrize(("name", "path"), overlay_files())
def test_every_file_says_why_it_is_there(name: str, path: Path) -> None:
    """In a comment of its own, or, where its syntax has none and for links, in a row of docs/guest.md."""
    told = (guest.CHECKOUT / "docs/guest.md").read_text()
    inside = "/" + name.split("/", 1)[1]
    assert f"`{inside}`" in told or (not path.is_symlink() and explains(path.read_text())), inside


def test_rows_of_the_guide_are_about_files_that_are_there() -> None:
    told = (guest.CHECKOUT / "docs/guest.md").read_text()
    table = told.split("## Files", 1)[1].split("\n## ", 1)[0]
    there = {"/" + name.split("/", 1)[1] for name, _ in overlay_files()}
    named = set(re.findall(r"(?m)^\| `(/[^`]+)` \|", table))
    assert named
    assert named <= there


def test_nothing_of_ours_lies_where_an_archive_of_cloudstack_writes() -> None:
    """Receiving parameters, keys and growth must survive it, so their names are not among upstream's."""
    lasting = (
        "systemvm-receive.service",
        "systemvm-grow.service",
        "systemvm-keys.service",
        "systemvm-grow",
        "systemvm-keys",
        "systemvm-certificate",
        "systemvm-swap",
        "systemvm",
    )
    names = {path.name: "/" + name.split("/", 1)[1] for name, path in overlay_files()}
    for name in lasting:
        assert not names[name].startswith(("/opt/cloud", "/root"))
    for _, path in overlay_files():
        if path.suffix == ".service" and path.name.startswith("systemvm-") and not path.is_symlink():
            assert "/opt/cloud" not in path.read_text()


def test_upstreams_names_are_where_upstream_has_them() -> None:
    there = {name for name, _ in overlay_files()}
    for name in (
        "etc/systemd/system/cloud-preinit.service",
        "etc/systemd/system/cloud-early-config.service",
        "etc/systemd/system/cloud-postinit.service",
        "opt/cloud/bin/setup/init.sh",
        "opt/cloud/bin/setup/cloud-early-config",
        "opt/cloud/bin/setup/postinit.sh",
        "opt/cloud/bin/get_template_version.sh",
        "opt/cloud/bin/checkrouter.sh",
        "opt/cloud/bin/update_config.py",
        "opt/cloud/bin/configure_router.py",
    ):
        assert f"rootfs/{name}" in there


@pytest.mark.parametrize("name", ["systemvm", "tiny"])
@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_definitions_load(name: str, suite: str) -> None:
    settings = guest.definition(name, f"suite={suite}").settings
    assert settings.kernel in settings.package_list
    assert len(set(settings.package_list)) == len(settings.package_list)


def test_tiny_boots_on_i386_too() -> None:
    assert "linux-image-686-pae" in guest.definition("tiny", "arch=i386").settings.package_list


def test_no_secret_is_in_a_step() -> None:
    settings = load(guest.CHECKOUT / "config/systemvm.yaml", {}, password="hunter2")
    for module in STEPS:
        step = module.step(settings, UNRESOLVED)
        assert b"hunter2" not in step.script.encode() + b"".join(file.content for file in step.files.values())


# Boot lines ------------------------------------------------------------------------------------


def test_pair_of_a_plain_router_repeats_as_the_server_does() -> None:
    words = guest.ROUTER.split()
    assert words.count("redundant_router=1") == 2
    assert words.count("advert_int=2") == 3
    assert words.count("redundant_state=PRIMARY") == 2
    # For the guest's NIC the interval stands once more behind the network's own arguments.
    assert words[words.index("guestcidrsize=24") + 1] == "advert_int=2"


def test_vpc_router_is_told_once_by_its_control_nic() -> None:
    words = guest.VPC_ROUTER.split()
    assert words.count("redundant_router=1") == words.count("advert_int=2") == 1
    secret = next(word for word in words if word.startswith("router_password=")).partition("=")[2]
    assert secret.isdecimal()
    assert int(secret) < 2**512
    assert not any(word.startswith(("eth1", "eth2")) for word in words)


@pytest.mark.parametrize("kind", params.DEFAULTS)
def test_the_guest_takes_every_types_line(kind: str) -> None:
    line = params.compose(kind, {})
    done = guest.plan(line)
    assert done.complaints == ()
    assert done.role.name == kind
    words = dict(word.split("=", 1) for word in line.split())
    assert words["template"] == "domP"
    nics = params.NICS[kind]
    assert [key for key in words if re.fullmatch(r"eth\d+ip", key)] == [f"eth{n}ip" for n in range(len(nics))]
    for number, network in enumerate(nics):
        assert words[f"eth{number}ip"] == params.DEFAULTS[kind][f"{network}.ip"]


@pytest.mark.parametrize("kind", params.DEFAULTS)
def test_what_is_given_is_in_the_line(kind: str) -> None:
    own = {"name": "x-9-VM", "dns2": "192.0.2.54"}
    if "authorized_key" in params.DEFAULTS[kind]:
        own["authorized_key"] = "c3NoLXJzYSBBQUFB"
    line = params.compose(kind, own)
    assert set(own.values()) <= {word.partition("=")[2] for word in line.split()}


def test_a_console_proxy_is_told_what_only_it_needs() -> None:
    words = params.compose("consoleproxy", {"vnc.port": "8443", "id": "12"}).split()
    assert {"vncport=8443", "proxy_vm=12", "guid=Proxy.12", "localgw=172.16.5.1"} <= set(words)
    assert not any(word.startswith(("keystore_password", "disable_rp_filter")) for word in words)


def test_a_storage_vm_is_told_of_its_network() -> None:
    words = params.compose("secstorage", {"ntp": "192.0.2.123", "storage.ip": "172.17.5.9"}).split()
    assert {"storageip=172.17.5.9", "eth3ip=172.17.5.9", "ntpserverlist=192.0.2.123", "guid=s-4-VM"} <= set(
        words
    )


@pytest.mark.parametrize("kind", ["router", "vpcrouter"])
def test_no_interval_without_redundancy(kind: str) -> None:
    line = params.compose(kind, {"redundant": "false", params.INTERVAL: "2"})
    assert "advert_int" not in line
    assert "redundant" not in line


@pytest.mark.parametrize(
    ("text", "sent"), [("3", "3"), ("abc", "1"), ("1.5", "1"), ("", "1"), ("300", "300"), ("-2", "-2")]
)
def test_server_does_not_check_the_interval(text: str, sent: str) -> None:
    assert f" advert_int={sent} " in params.compose("router", {params.INTERVAL: text})


@pytest.mark.parametrize(
    ("kind", "given", "what"),
    [
        ("bridge", {}, "no boot line for type 'bridge'"),
        ("router", {"router.redundant.vrrp.intervall": "2"}, "unknown key"),
        ("router", {"guest.ip": "10.1.1"}, "is no address"),
        ("vpcrouter", {"vpc.cidr": "10.1.0.0/33"}, "is no address"),
        ("router", {"name": "a b"}, "holds a blank"),
        ("router", {"redundant": "maybe"}, "redundant='maybe'"),
        ("secstorage", {"storage.ip": "x"}, "is no address"),
        ("consoleproxy", {"management.cidr": "172.16.0.1/16"}, "is no address"),
        ("consoleproxy", {"internal.dns1": "ns"}, "is no address"),
        ("cksnode", {"control.ip": "169.254.1.1"}, "it is one of type router"),
    ],
)
def test_wrong_parameters(kind: str, given: dict[str, str], what: str) -> None:
    with pytest.raises(BuildError, match=re.escape(what)):
        params.compose(kind, given)


def test_shows_what_the_guest_would_write() -> None:
    shown = params.render(guest.ROUTER, guest.definition())
    assert shown.kind == "router"
    assert "advert_int 2\n" in shown.files["/etc/keepalived/keepalived.conf"][1]
    assert shown.files["/etc/keepalived/keepalived.conf"][0] == 0o600
    assert shown.complaints == ()
    keyed = params.render(f"{guest.ROUTER} authorized_key=c3NoLXJzYSBBQUFB", guest.definition())
    assert keyed.files["/root/.ssh/authorized_keys"] == (0o600, "ssh-rsa AAAA\n")
    hostile = params.render(guest.ROUTER + " advert_int=999 name=$(id)", guest.definition())
    assert len(hostile.complaints) == 2
    assert "advert_int 1\n" in hostile.files["/etc/keepalived/keepalived.conf"][1]
