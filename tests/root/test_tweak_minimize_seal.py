"""The guest's steps on a real tree: what lies in the layers, and what a wrong definition leads to."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests import cli
from tests.guest import CHECKOUT

PASSWORD = "correct horse battery staple"
NAMES = ["with space", "quote'\"", "new\nline", "-dash", "ünï", "dollar$HOME", "star*", "back\\slash", "a;b"]
ELSEWHERE = "/srv/overlay-must-not-come-here"
DEFINITION = {
    "imagename": "steps",
    "hostname": "steps",
    "size": 1500,
    "cloudstack_release": "4.99.0",
    "firmware": ["bios"],
    "packages": {
        "all": [
            *("systemd-sysv", "udev", "kmod", "fdisk", "openssh-server", "ssl-cert", "locales", "tzdata"),
            *("keepalived", "iproute2", "python3", "python3-jinja2", "iptables-persistent", "xl2tpd"),
        ]
    },
    "rootfs": ["over", "second"],
    "services": {
        "enable": ["ssh", "mine"],
        "disable": ["e2scrub_reap", "xl2tpd", "getty@tty1"],
        "mask": ["fstrim.timer"],
    },
    "vrrp": {
        "enabled": True,
        "auth_pass": "12345678",
        "addresses": ["10.1.1.1/24", "fd00::1/64"],
        "interface": "eth7",
    },
}


@dataclass(frozen=True)
class Layers:
    """A chain of layers as directories, topmost first."""

    folders: tuple[Path, ...]
    output: str

    def find(self, name: str) -> Path | None:
        """Where a path of the merged tree lies; None when there is none, or a layer took it away."""
        for folder in self.folders:
            path = folder / name
            if os.path.lexists(path):
                return None if stat.S_ISCHR(path.lstat().st_mode) else path
            if any(_covers(folder / above) for above in Path(name).parents):
                return None
        return None

    def text(self, name: str) -> str:
        """Text of a file of the merged tree."""
        path = self.find(name)
        assert path is not None, name
        return path.read_text(encoding="utf-8")


def _covers(path: Path) -> bool:
    """Whether a layer took a folder away, or put a new one in its place (overlayfs: whiteout, opaque)."""
    if not os.path.lexists(path) or path.is_symlink():
        return False
    if stat.S_ISCHR(path.lstat().st_mode):
        return True
    return path.is_dir() and "trusted.overlay.opaque" in os.listxattr(path)


def write(folder: Path) -> Path:
    """An image definition whose overlays hold everything that bites."""
    over, second = folder / "over", folder / "second"
    for name in NAMES:
        path = over / "etc/names" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (over / "usr/local/bin").mkdir(parents=True)
    (over / "usr/local/bin/run me").write_text("#!/bin/sh\n")
    (over / "usr/local/bin/run me").chmod(0o700)
    (over / "etc/sudoers.d").mkdir()
    (over / "etc/sudoers.d/x").write_text("# nothing\n")
    (over / "etc/dangling").symlink_to("/nowhere at all")
    # A link out of the tree as the host sees it: what the second overlay lays through it stays inside.
    (over / "etc/outside").symlink_to(ELSEWHERE)
    (over / ELSEWHERE[1:]).mkdir(parents=True)
    (over / ELSEWHERE[1:] / "there").write_text("")
    (second / "etc/outside").mkdir(parents=True)
    (second / "etc/outside/file").write_text("inside")
    (second / "lib/here").mkdir(parents=True)
    (second / "lib/here/file").write_text("lib is a link to usr/lib")
    (over / "usr/lib/sysusers.d").mkdir(parents=True)
    (over / "usr/lib/sysusers.d/mine.conf").write_text('u mine 1234 "Mine" /home/mine /bin/sh\n')
    (over / "usr/lib/tmpfiles.d").mkdir()
    (over / "usr/lib/tmpfiles.d/mine.conf").write_text("d /home/mine 0750 mine mine -\n")
    (over / "etc/systemd/system").mkdir(parents=True)
    (over / "etc/systemd/system/mine.service").write_text(
        "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
    )
    definition = folder / "steps.yaml"
    definition.write_text(yaml.safe_dump(DEFINITION))
    return definition


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("steps")
    write(place)
    yield place
    cli.inv(*flags(place), "clean", "--all")


def flags(folder: Path, *more: str) -> tuple[str, ...]:
    settings = (f"location={folder}/location", *more)
    return ("--image", str(folder / "steps.yaml"), *(word for one in settings for word in ("--set", one)))


def build(folder: Path, *more: str) -> Layers:
    output = cli.succeed("seal", *flags(folder, *more), env={"SYSTEMVM_PASSWORD": PASSWORD})
    cache = folder / "location/cache/root"
    made = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)
    newest = {path.name.rsplit("-", 1)[0]: path for path in made}
    order = ("seal", "keepalived-render", "minimize", "tweak", "initramfs", "debootstrap")
    return Layers(tuple(newest[step] / "tree" for step in order), output)


@pytest.fixture(scope="module")
def layers(folder: Path) -> Layers:
    return build(folder)


# Tweak -----------------------------------------------------------------------------------------


def test_names_that_bite_arrive(layers: Layers) -> None:
    for name in NAMES:
        path = layers.find(f"etc/names/{name}")
        assert path is not None
        assert path.read_text() == name
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o644, 0, 0)


def test_modes_links_and_owners(layers: Layers) -> None:
    modes = {"usr/local/bin/run me": 0o755, "etc/sudoers.d/x": 0o440, "usr/local/bin": 0o755}
    for name, mode in modes.items():
        path = layers.find(name)
        assert path is not None
        assert stat.S_IMODE(path.stat().st_mode) == mode
    dangling = layers.find("etc/dangling")
    assert dangling is not None
    assert str(dangling.readlink()) == "/nowhere at all"


def test_nothing_is_laid_outside_the_tree(layers: Layers) -> None:
    assert not os.path.lexists(ELSEWHERE)
    assert layers.text(f"{ELSEWHERE[1:]}/file") == "inside"
    assert layers.text("usr/lib/here/file") == "lib is a link to usr/lib"


def test_what_the_machine_is(layers: Layers) -> None:
    assert layers.text("etc/hostname") == "steps\n"
    assert layers.text("etc/fstab").startswith("LABEL=ROOT\t/\text4")
    assert layers.text("etc/default/locale") == "LANG=en_US.UTF-8\n"
    assert layers.text("etc/cloudstack-release").startswith("Cloudstack Release 4.99.0 ")
    archive = layers.find("usr/lib/locale/locale-archive")
    assert archive is not None
    assert b"en_US.utf8" in archive.read_bytes()


def test_accounts_and_folders(layers: Layers) -> None:
    assert "mine:x:1234:1234:Mine:/home/mine:/bin/sh" in layers.text("etc/passwd").splitlines()
    assert (
        next(line for line in layers.text("etc/shadow").splitlines() if line.startswith("mine:")).split(":")[
            1
        ][0]
        == "!"
    )
    home = layers.find("home/mine")
    assert home is not None
    assert (stat.S_IMODE(home.stat().st_mode), home.stat().st_uid) == (0o750, 1234)


def test_services(layers: Layers) -> None:
    wants = "etc/systemd/system/multi-user.target.wants"
    assert layers.find(f"{wants}/mine.service")
    assert layers.find(f"{wants}/ssh.service")
    assert not layers.find(f"{wants}/e2scrub_reap.service")
    assert not layers.find("etc/systemd/system/getty.target.wants/getty@tty1.service")
    assert not layers.find("etc/rc2.d/S01xl2tpd")
    masked = layers.find("etc/systemd/system/fstrim.timer")
    assert masked is not None
    assert str(masked.readlink()) == "/dev/null"


# Minimize --------------------------------------------------------------------------------------


def test_bulk_is_gone_and_licences_are_not(layers: Layers) -> None:
    assert layers.find("usr/share/doc/openssh-client/copyright")
    assert not layers.find("usr/share/doc/openssh-client/changelog.Debian.gz")
    assert not layers.find("usr/share/locale/de/LC_MESSAGES/coreutils.mo")
    assert not layers.find("usr/share/man/man1/ssh.1.gz")
    assert layers.find("usr/share/man/man1")
    assert "translations" in layers.output


# Keepalived ------------------------------------------------------------------------------------


def test_redundancy_is_live_because_it_was_asked_for(layers: Layers) -> None:
    text = layers.text("etc/keepalived/keepalived.conf")
    assert "10.1.1.1/24 brd 10.1.1.255 dev eth7" in text
    assert "virtual_ipaddress_excluded {\n        fd00::1/64 dev eth7" in text
    config = layers.find("etc/keepalived/keepalived.conf")
    assert config is not None
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert (
        layers.text("usr/local/lib/systemvm/render.py") == (CHECKOUT / "build/engine/render.py").read_text()
    )
    assert not layers.find(".keepalived-check")


# Seal ------------------------------------------------------------------------------------------


def unsealed(layers: Layers) -> list[str]:
    """What must not ship and is there."""
    gone = """
usr/sbin/policy-rc.d etc/ssl/certs/ssl-cert-snakeoil.pem etc/ssl/private/ssl-cert-snakeoil.key etc/passwd-
var/lib/systemd/random-seed var/lib/dbus/machine-id etc/iptables/rules.v4 etc/iptables/rules.v6
var/lib/dpkg/status-old var/log/dpkg.log var/cache/ldconfig/aux-cache
"""
    keys = [
        f"etc/ssh/ssh_host_{kind}_key{end}" for kind in ("rsa", "ecdsa", "ed25519") for end in ("", ".pub")
    ]
    return [name for name in [*gone.split(), *keys] if layers.find(name)]


def test_what_must_never_ship_does_not(layers: Layers) -> None:
    assert unsealed(layers) == []
    for folder in ("tmp", "run", "var/tmp", "dev"):
        for layer in layers.folders:
            there = (layer / folder).iterdir() if (layer / folder).is_dir() else ()
            assert [path for path in there if layers.find(f"{folder}/{path.name}")] == []
    assert layers.text("etc/machine-id") == ""
    assert layers.text("etc/resolv.conf") == ""


def test_the_password_is_hashed_and_nowhere_else(layers: Layers, folder: Path) -> None:
    from passlib.hash import sha512_crypt

    hashed = next(line for line in layers.text("etc/shadow").splitlines() if line.startswith("root:")).split(
        ":"
    )[1]
    assert sha512_crypt.verify(PASSWORD, hashed)
    secrets = (PASSWORD.encode(), hashed.encode())
    for path in (folder / "location").rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name != "shadow":
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
    assert PASSWORD not in layers.output


def test_sealed_without_minimize_too(folder: Path, layers: Layers) -> None:
    whole = build(folder, "minimize=false")
    assert whole.find("usr/share/doc/openssh-client/changelog.Debian.gz")
    assert unsealed(whole) == []
    assert whole.text("etc/machine-id") == ""


# Wrong definitions -----------------------------------------------------------------------------


def refused(folder: Path, tmp_path: Path, **keys: object) -> str:
    """Build with other keys, on the layers that are there; answers the error."""
    for name in ("over", "second"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(folder / name)
    definition = tmp_path / "steps.yaml"
    definition.write_text(yaml.safe_dump({**DEFINITION, **keys}))
    return cli.refuse("seal", "--image", str(definition), "--set", f"location={folder}/location")


def test_a_service_that_is_not_there_is_named(layers: Layers, folder: Path, tmp_path: Path) -> None:
    said = refused(folder, tmp_path, services={"disable": ["ssh", "no-such-thing"]})
    assert "the image has no unit no-such-thing.service" in said


def test_a_file_in_place_of_a_folder_is_named(layers: Layers, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong/etc").mkdir(parents=True)
    (tmp_path / "wrong/etc/ssh").write_text("x")
    said = refused(folder, tmp_path, rootfs=["over", "wrong"])
    assert "etc/ssh" in said
    assert "directory" in said


@pytest.mark.soak(30)
def test_a_jre_with_a_desktop_is_refused(layers: Layers, folder: Path, tmp_path: Path) -> None:
    """Any package will do as the "JRE", as long as X hangs on it: this one is small."""
    said = refused(folder, tmp_path, jre="xauth", minimize=True)
    assert "desktop library" in said
    assert "xauth -> libx11-6" in said


# The tool of seal, on a tree of its own --------------------------------------------------------


def seal(tree: Path, password: str | None, kept: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    (tree.parent / "kept.json").write_text(json.dumps(kept or []))
    secret = tree.parent / "password-hash"
    secret.unlink(missing_ok=True)
    if password is not None:
        secret.write_text(password)
    argv = [
        sys.executable,
        "-m",
        "build.seal.seal",
        str(tree),
        str(tree.parent / "kept.json"),
        str(secret),
    ]
    env = {"SOURCE_DATE_EPOCH": "1700000000", "LC_ALL": "C.UTF-8"}
    return subprocess.run(argv, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in (
        "etc/ssh",
        "etc/apt/apt.conf.d",
        "etc/ssl/certs",
        "root/.ssh",
        "var/log/x",
        "tmp",
        "run",
        "dev",
        "home/u",
    ):
        (root / name).mkdir(parents=True)
    (root / "etc/shadow").write_text("root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n")
    (root / "etc/shadow").chmod(0o640)
    os.chown(root / "etc/shadow", 0, 42)
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    return root


def test_root_is_locked_or_gets_the_hash(tree: Path) -> None:
    for password, field in ((None, "*"), ("", "*"), ("$6$salt$hash", "$6$salt$hash")):
        assert seal(tree, password).returncode == 0
        lines = (tree / "etc/shadow").read_text().splitlines()
        assert lines == [f"root:{field}:19675:0:99999:7:::", "daemon:*:19000:0:99999:7:::"]
    status = (tree / "etc/shadow").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o640, 42)


def test_a_password_in_the_clear_is_refused_without_a_word_of_it(tree: Path) -> None:
    done = seal(tree, "hunter2")
    assert done.returncode == 1
    assert "crypt(3)" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert "hunter2" not in (tree / "etc/shadow").read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("root/.ssh/id_rsa", "-----BEGIN OPENSSH PRIVATE KEY-----\n", "holds a private key"),
        ("etc/ssl/mine.pem", "x\n-----BEGIN PRIVATE KEY-----\n", "holds a private key"),
        ("home/u/k", "-----BEGIN RSA PRIVATE KEY-----\n", "holds a private key"),
    ],
)
def test_a_key_that_some_package_made_stops_the_build(tree: Path, name: str, content: str, said: str) -> None:
    (tree / name).write_text(content)
    done = seal(tree, None)
    assert done.returncode == 1
    assert f"{name} {said}" in done.stderr
    assert seal(tree, None, kept=[name]).returncode == 0, "unless the image definition brought it"


def test_a_socket_cannot_ship(tree: Path) -> None:
    os.mkfifo(tree / "var/pipe")
    done = seal(tree, None)
    assert done.returncode == 1
    assert "var/pipe is neither file, folder nor link" in done.stderr


def test_traces_are_removed(tree: Path) -> None:
    (tree / "etc/apt/apt.conf.d/01proxy").write_text('Acquire::http::Proxy "http://cache:3142";\n')
    (tree / "etc/apt/apt.conf.d/02keep").write_text('APT::Install-Recommends "false";\n')
    (tree / "etc/ssl/certs/ssl-cert-snakeoil.pem").write_text("x")
    (tree / "etc/ssl/certs/12345678.0").symlink_to("ssl-cert-snakeoil.pem")
    (tree / "etc/ssl/certs/87654321.0").symlink_to("other.pem")
    (tree / "var/log/x/a.log").write_text("x")
    os.chown(tree / "var/log/x", 7, 7)
    (tree / "tmp/.hidden").mkdir()
    os.mknod(tree / "dev/console", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    assert seal(tree, None).returncode == 0
    assert names(tree / "etc/apt/apt.conf.d") == ["02keep"]
    assert names(tree / "etc/ssl/certs") == ["87654321.0"]
    assert names(tree / "var/log/x") == []
    assert (tree / "var/log/x").stat().st_uid == 7
    assert names(tree / "tmp") == names(tree / "dev") == []
    assert (tree / "etc/machine-id").read_text() == ""


def test_a_resolver_that_is_there_gets_its_link(tree: Path) -> None:
    unit = tree / "usr/lib/systemd/system/systemd-resolved.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("")
    assert seal(tree, None).returncode == 0
    assert str((tree / "etc/resolv.conf").readlink()) == "../run/systemd/resolve/stub-resolv.conf"


def test_links_of_the_tree_do_not_lead_out(tree: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tree / "var/tmp").symlink_to(precious)
    (tree / "root/.cache").symlink_to(precious)
    (tree / "var/log/link").symlink_to(precious / "file")
    before = hashlib.sha256((precious / "file").read_bytes()).hexdigest()
    seal(tree, None)
    assert hashlib.sha256((precious / "file").read_bytes()).hexdigest() == before
