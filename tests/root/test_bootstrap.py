"""The lowest layer for real: Debian's packages from a real mirror, both tools, root and an ordinary user."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build import debootstrap, initramfs, wire
from build.agent.verbs import fetch, resolve
from build.debootstrap import unpack
from build.engine import plan
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings
from tests import mirror, ordinary
from tests.agent import Agent, Refused, layer_request, place

pytestmark = pytest.mark.root
ASKED = ("iputils-arping", "iptables-persistent", "netbase", "openssh-server", "runc", "sysstat", "udev")
"""One of them is unpacked late, some ask questions."""
DIVERTS = "molly-guard"
LISTING = """
import hashlib, os, sys
for folder, folders, files in os.walk(".", topdown=True):
    for name in sorted(folders + files):
        path = os.path.join(folder, name)
        s = os.lstat(path)
        kind = os.readlink(path) if os.path.islink(path) else ""
        if os.path.isfile(path) and not kind:
            kind = hashlib.sha256(open(path, "rb").read()).hexdigest()[:16]
        names = sorted(os.listxattr(path, follow_symlinks=False))
        attributes = [(n, os.getxattr(path, n, follow_symlinks=False).hex()) for n in names]
        print(path, oct(s.st_mode), s.st_uid, s.st_gid, int(s.st_mtime), s.st_nlink, kind, attributes)
"""
LOOK = Step(
    "look",
    """
cd "$ROOT"
"$PYTHON" -I "$FILES/listing" | sort >"$WORK/listing"
cd /
in_tree sh -c 'apt-mark showmanual; echo; dpkg --audit; dpkg -V' >"$WORK/told" 2>&1
in_tree dpkg-divert --list | sed /dash/d >>"$WORK/told"
cp "$WORK/listing" "$WORK/told" "$ROOT/"
""",
    {"listing": File(LISTING.encode())},
)


def resolved(folder: Path, *asked: str) -> Resolution:
    """The set of these packages at the tools' own mirror, fetched into `folder`/debs."""
    request = {
        "mirrors": {
            "suite": "bookworm",
            "mirror": "",
            "security_mirror": "",
            "security": True,
            "keyring": "",
            "apt_proxy": "",
            "store": str(folder / "store"),
        },
        "arch": "amd64",
        "components": ["main"],
        "packages": list(asked),
    }
    answer = resolve.run(wire.load(wire.Resolve, request), lambda kind, **fields: None)
    fetch.run(wire.Fetch(tuple(answer["packages"]), str(folder / "debs")), lambda kind, **fields: None)
    return Resolution.from_json(answer)


@pytest.fixture(scope="module")
def resolution(cache: Path) -> Resolution:
    return resolved(cache, *ASKED)


def described(resolution: Resolution, tool: str = "builtin", asked: tuple[str, ...] = ASKED) -> Step:
    settings = Settings.model_validate({"bootstrap": tool, "packages": {"all": asked}})
    return debootstrap.step(Loaded(settings, {}, Path("tiny.yaml")), resolution)


class Somewhere:
    """An agent and its place, and what it built there."""

    def __init__(self, folder: Path, cache: Path, *, user: bool) -> None:
        location, tables = folder / "location", folder / "tables"
        location.mkdir(parents=True)
        tables.mkdir()
        prefix = []
        if user:
            os.chown(location, ordinary.UID, ordinary.UID)
            prefix = ordinary.prefix(tables, location)
        self.agent = Agent(prefix)
        self.where = place(location, "user" if user else "root")
        self.more = {"epoch": 1_700_000_000, "variables": {"DEBS": str(cache / "debs")}}

    def build(self, *steps: Step) -> Path:
        """Build the layers and answer the tree of the last one."""
        for layer in plan.layers(steps):
            self.agent.call("layer", **layer_request(self.where, layer, **self.more))
        kind = self.where["mode"]
        return Path(str(self.where["location"]), "cache", str(kind), layer.key, "tree")

    def remove(self) -> None:
        self.agent.call("clean", place=self.where, image="", what="all", reach=[], bytes=0)
        self.agent.close()


@pytest.fixture(scope="module")
def as_root(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Somewhere]:
    made = Somewhere(tmp_path_factory.mktemp("root"), cache, user=False)
    yield made
    made.agent.close()


@pytest.fixture(scope="module")
def reference(as_root: Somewhere, resolution: Resolution) -> Path:
    """What is made as root: the folder with `listing` and `told`."""
    return as_root.build(described(resolution), LOOK)


def lines(folder: Path) -> set[str]:
    return set((folder / "listing").read_text().splitlines())


def paths(folder: Path) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in lines(folder))


def test_the_tree_holds_the_set_and_knows_what_was_asked_for(reference: Path, resolution: Resolution) -> None:
    manual, _, rest = (reference / "told").read_text().partition("\n\n")
    assert {*ASKED, "apt", "base-files"} <= set(manual.split())
    assert "libc6" not in manual.split()
    assert rest == "", "dpkg --audit and -V have nothing to say, and nothing is diverted"
    seen = paths(reference)
    for package in resolution.packages:
        names = (f"./var/lib/dpkg/info/{package.name}.list", f"./var/lib/dpkg/info/{package.name}:amd64.list")
        assert any(name in seen for name in names)


def test_nothing_of_the_build_or_its_host_is_left(reference: Path) -> None:
    seen = paths(reference)
    for folder in (
        "./dev",
        "./run",
        "./tmp",
        "./proc",
        "./sys",
        "./var/log/apt",
        "./.stage",
        "./.repository",
        "./.later",
    ):
        assert not [path for path in seen if path.startswith(f"{folder}/")]
    for path in (
        "./etc/resolv.conf",
        "./etc/hostname",
        "./etc/apt/sources.list",
        "./var/log/dpkg.log",
        "./.answers",
        "./.stage",
    ):
        assert path not in seen
    assert not [path for path in seen if path.startswith("./etc/ssh/ssh_host_")]
    assert not [path for path in seen if path.endswith((".dpkg-new", ".dpkg-tmp"))]
    assert "./etc/iptables/rules.v4" not in seen, "the host's firewall must not be saved into the image"
    assert seen["./usr/sbin/policy-rc.d"].startswith("0o100755 0 0")
    assert all(int(about.split()[3]) <= 1_700_000_000 for about in seen.values())


def test_capabilities_and_special_modes_are_kept(reference: Path) -> None:
    seen = paths(reference)
    assert "security.capability" in seen["./usr/bin/arping"]
    assert seen["./usr/bin/passwd"].startswith("0o104755 0 0")
    assert seen["./usr/bin/chage"].startswith("0o102755 0 42")


@pytest.mark.parametrize("tool", ["debootstrap", pytest.param("mmdebstrap", marks=pytest.mark.soak(40))])
def test_others_give_the_same_tree(
    reference: Path, as_root: Somewhere, resolution: Resolution, tool: str
) -> None:
    assert lines(as_root.build(described(resolution, tool), LOOK)) == lines(reference)


@pytest.mark.parametrize(
    "tool",
    ["builtin", *(pytest.param(tool, marks=pytest.mark.soak(40)) for tool in ("mmdebstrap", "debootstrap"))],
)
def test_an_ordinary_user_gets_the_same_tree(
    reference: Path, tmp_path: Path, cache: Path, resolution: Resolution, tool: str
) -> None:
    tmp_path.chmod(0o755)
    user = Somewhere(tmp_path, cache, user=True)
    try:
        assert lines(user.build(described(resolution, tool), LOOK)) == lines(reference)
    finally:
        user.remove()


def test_what_diverts_files_is_left_to_dpkg(as_root: Somewhere, cache: Path) -> None:
    """A set that may not be unpacked in parallel is installed by apt, and says so."""
    asked = ("netbase", DIVERTS)
    resolution = resolved(cache, *asked)
    tree = as_root.build(described(resolution, asked=asked), LOOK)
    notes = [event["text"] for event in as_root.agent.events if event["event"] == "note"]
    assert any("left to dpkg" in note for note in notes)
    assert "by molly-guard" in (tree / "told").read_text()
    seen = paths(tree)
    assert f"./var/lib/dpkg/info/{DIVERTS}.list" in seen
    assert "./.repository" not in seen
    manual = (tree / "told").read_text().partition("\n\n")[0]
    assert set(asked) <= set(manual.split())


def test_a_base_that_may_not_be_unpacked_by_us_is_left_to_mmdebstrap(
    as_root: Somewhere, reference: Path, resolution: Resolution
) -> None:
    step = described(resolution)
    ours = """def main() -> int:
    \"\"\"Do what the command line says.\"\"\"
"""
    text = step.files["unpack.py"].content.decode()
    assert ours in text
    refusing = text.replace(
        ours, f'{ours}    if sys.argv[1] == "base":\n        return int(os.environ["REFUSED"])\n'
    )
    files = {**step.files, "unpack.py": File(refusing.encode())}
    tree = as_root.build(Step(step.name, step.script, files, bootstrap=True), LOOK)
    assert lines(tree) == lines(reference)


def test_progress_is_true_and_ends_at_its_total(reference: Path, as_root: Somewhere) -> None:
    for label in ("unpack", "configure"):
        told = [e for e in as_root.agent.events if e["event"] == "progress" and e["label"] == label]
        assert told
        assert all(0 < event["done"] <= event["total"] for event in told)
        assert any(event["done"] == event["total"] for event in told)


def test_a_package_that_is_not_in_the_cache_fails_by_name(
    as_root: Somewhere, resolution: Resolution, tmp_path: Path
) -> None:
    (layer,) = plan.layers([described(resolution)], "elsewhere")
    more = {**as_root.more, "variables": {"DEBS": str(tmp_path)}}
    with pytest.raises(Refused) as caught:
        as_root.agent.call("layer", **layer_request(as_root.where, layer, **more))
    assert re.search(r"package \S+\.deb is not in the cache", caught.value.message)


def swapped(folder: Path) -> tuple[Path, Path]:
    """A set of two packages in a cache, of which one changes after it was checked: the set, and the cache."""
    debs = folder / "debs"
    debs.mkdir()
    told = []
    for name, base in (("base-files", True), ("netbase", False)):
        path = mirror.build(mirror.Deb(name, arch="all", files={f"usr/share/{name}": "signed"}), debs, "none")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        about = {"name": name, "version": "1", "arch": "all", "file": path.name, "size": len(data)}
        told.append({**about, "sha256": digest, "base": base})
        path.write_bytes(data.replace(b"signed", b"forged"))
    wanted = folder / "set.json"
    wanted.write_text(json.dumps({"suite": "bookworm", "archs": ["amd64"], "asked": [], "packages": told}))
    return wanted, debs


def unpacked(verb: str, wanted: Path, debs: Path, folder: Path) -> tuple[int, str]:
    """Run unpack.py: its exit status, and what it says to the builder."""
    said = folder / "said"
    notes = [] if verb == "repository" else [str(folder / "notes")]
    program = [sys.executable, unpack.__file__, verb, str(wanted), str(folder / verb), *notes]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" 3>{said}', "sh", *program],
        env={**os.environ, "DEBS": str(debs), "REFUSED": "10", "PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    return done.returncode, said.read_text()


@pytest.mark.parametrize(
    ("verb", "name"), [("base", "base-files"), ("stage", "netbase"), ("repository", "base-files")]
)
def test_a_package_that_was_swapped_in_the_cache_is_refused(tmp_path: Path, verb: str, name: str) -> None:
    wanted, debs = swapped(tmp_path)
    status, said = unpacked(verb, wanted, debs, tmp_path)
    assert status == 1
    assert f"fail\tpackage {name}_1_all.deb in the cache is not what was signed\trun again" in said
    assert not (tmp_path / verb / "usr/share/netbase").exists()


def test_apt_refuses_a_package_that_was_swapped_behind_our_repository(tmp_path: Path) -> None:
    """mmdebstrap and apt read the cache through `copy:`; `trusted` covers the index, not what it lists."""
    wanted, debs = swapped(tmp_path)
    forged = (debs / "base-files_1_all.deb").read_bytes()
    (debs / "base-files_1_all.deb").write_bytes(forged.replace(b"forged", b"signed"))
    assert unpacked("repository", wanted, debs, tmp_path) == (0, "")
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "state/status").touch()
    (tmp_path / "list").write_text(f"deb [trusted=yes] copy:{tmp_path}/repository bookworm main\n")
    options = ["-o", f"Dir::State={tmp_path}/state", "-o", f"Dir::State::status={tmp_path}/state/status"]
    options += ["-o", f"Dir::Cache={tmp_path}/cache", "-o", f"Dir::Etc::SourceList={tmp_path}/list"]
    options += ["-o", "Dir::Etc::SourceParts=/dev/null", "-o", "APT::Sandbox::User=root"]
    options += ["-o", "APT::Architecture=amd64"]
    subprocess.run(["apt-get", *options, "update"], check=True)
    download = ["apt-get", *options, "install", "--yes", "--download-only", "base-files"]
    subprocess.run(download, check=True)
    (tmp_path / "cache/archives/base-files_1_all.deb").unlink()
    (debs / "base-files_1_all.deb").write_bytes(forged)
    done = subprocess.run(download, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Hash Sum mismatch" in done.stderr
    assert not list((tmp_path / "cache/archives").glob("*.deb"))


def test_a_package_whose_script_fails_is_named(as_root: Somewhere, resolution: Resolution) -> None:
    """The configuration of one package breaks: the error says which."""
    step = described(resolution)
    broken = '"$1" sh /var/lib/dpkg/preinst-runner\n'
    assert broken in step.script
    spoiled = step.script.replace(
        broken, f'{broken}printf "#!/bin/sh\\nexit 3\\n" >"$ROOT/var/lib/dpkg/info/netbase.postinst"\n'
    )
    (layer,) = plan.layers([Step(step.name, spoiled, step.files, bootstrap=True)])
    with pytest.raises(Refused) as caught:
        as_root.agent.call("layer", **layer_request(as_root.where, layer, **as_root.more))
    assert "netbase" in caught.value.message


def test_the_initramfs_holds_every_driver_and_repeats(as_root: Somewhere, cache: Path) -> None:
    asked = ("linux-image-amd64", "initramfs-tools", "udev", "e2fsprogs")
    resolution = resolved(cache, *asked)
    settings = Settings.model_validate({"packages": {"all": asked}})
    look = Step(
        "look",
        """
        in_tree lsinitramfs /initrd.img >"$WORK/content"
        sha256sum <"$ROOT/boot/"initrd.img-* >"$WORK/sum"
        cp "$WORK/content" "$WORK/sum" "$ROOT/"
        test -L "$ROOT/initrd.img" -a -s "$ROOT/$(readlink "$ROOT/vmlinuz")"
        """,
    )
    steps = [
        described(resolution, asked=asked),
        initramfs.step(Loaded(settings, {}, Path("tiny.yaml")), resolution),
        look,
    ]
    tree = as_root.build(*steps)
    content = (tree / "content").read_text().replace("-", "_")
    for driver in initramfs.drivers():
        assert f"/{driver.replace('-', '_')}.ko" in content
    assert "sbin/fsck.ext4" in content
    again = [*steps[:1], Step("initramfs", f"# again\n{steps[1].script}", steps[1].files), look]
    assert (as_root.build(*again) / "sum").read_text() == (tree / "sum").read_text()


def test_a_tree_without_a_kernel_is_refused(as_root: Somewhere, resolution: Resolution) -> None:
    loaded = Loaded(Settings.model_validate({"packages": {"all": ASKED}}), {}, Path("tiny.yaml"))
    with pytest.raises(Refused) as caught:
        build_on(as_root, described(resolution), initramfs.step(loaded, resolution))
    assert "kernel" in caught.value.message
    assert "linux-image-amd64" in caught.value.hint


def build_on(somewhere: Somewhere, *steps: Step) -> dict[str, Any]:
    """Build layers; answers what the last one said."""
    answers = [
        somewhere.agent.call("layer", **layer_request(somewhere.where, layer, **somewhere.more))
        for layer in plan.layers(steps)
    ]
    return dict(answers[-1])
