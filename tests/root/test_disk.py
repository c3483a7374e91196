"""Raw disks of a small real tree, read back by tools that are not ours.

The tree is Debian's, with the packages the disk is made from; kernel and initramfs are small inventions,
because nothing here boots them. On top lie files that are hard to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from build import disk
from build.engine import plan, script
from build.engine.hosts.session import encode
from build.engine.plan import Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings
from tests import ordinary
from tests.agent import Agent, Refused, build, place
from tests.images import shared

pytestmark = pytest.mark.root

EPOCH = 1_700_000_000
FEATURES = {
    *("has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg"),
    *("sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum"),
}
VERSION = "6.1.0-test"
PACKAGES = "e2fsprogs,grub-pc-bin,systemd-boot-efi,initramfs-tools-core,cpio"

KERNEL = f"""\
seq 1000000 >"$ROOT/boot/vmlinuz-{VERSION}"
mkdir -p "$ROOT/boot/made/usr/lib/modules/{VERSION}/kernel"
printf '#!/bin/sh\\n' >"$ROOT/boot/made/init"
seq 200000 >"$ROOT/boot/made/usr/lib/modules/{VERSION}/kernel/some.ko"
find "$ROOT/boot/made" -exec touch --date=@{EPOCH} {{}} +
in_tree sh -c 'cd /boot/made && find init usr | sort | cpio --quiet --reproducible -oH newc | gzip -n' \\
    >"$ROOT/boot/initrd.img-{VERSION}"
rm -r "$ROOT/boot/made"
ln -s boot/vmlinuz-{VERSION} "$ROOT/vmlinuz"
ln -s boot/initrd.img-{VERSION} "$ROOT/initrd.img"
"""

ODD = r"""
import os, socket, stat, struct, sys

root, backwards = sys.argv[1], sys.argv[2] == "backwards"
os.umask(0)
os.mkdir(f"{root}/odd")
os.chdir(f"{root}/odd")
epoch = 1_700_000_000


def made(name, content=b"content", mode=0o644):
    with open(name, "wb") as file:
        file.write(content)
    os.chmod(name, mode)


def names():
    plain = ("with blank", "quote'\"s", "new\nline", "tab\t", "-dash", "\u00fcn\u00efc\u00f6de \u2603")
    for name in (*plain, "n" * 255):
        made(name, name.encode())
    made(b"latin \xe9\xff", b"no UTF-8")


def links():
    made("hard one")
    os.link("hard one", "hard two")
    os.mkdir("elsewhere")
    os.link("hard one", "elsewhere/hard three")
    os.symlink("t" * 59, "short link")
    os.symlink("t" * 60, "longer link")
    os.symlink("t" * 4000, "longest link")
    os.symlink("/dangling/nowhere", "dangling")


def special():
    os.mkfifo("fifo", 0o640)
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    server.close()
    os.chmod("socket", 0o666)


def sparse():
    with open("sparse", "wb") as file:
        file.write(b"start")
        file.seek(40 << 20)
        file.write(b"middle")
        file.truncate(100 << 20)
    made("zeros", bytes(3 << 20))
    with open("pieces", "wb") as file:
        for piece in range(1500):  # more extents than four nodes hold
            file.seek(piece * 131072)
            file.write(b"%d" % piece)


def modes():
    made("setuid", mode=0o4755)
    made("setgid", mode=0o2711)
    made("closed", mode=0)
    os.chown("closed", 12345, 54321)
    for name, mode in (("sticky", 0o1777), ("inherit", 0o2775), ("shut", 0), ("readable", 0o555)):
        os.mkdir(name)
        os.chmod(name, mode)


def attributes():
    made("capable", mode=0o755)
    # VFS_CAP_REVISION_2, effective, CAP_NET_RAW
    os.setxattr("capable", "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    made("noted")
    for name in sorted(("user.b", "user.a", "user.longer"), reverse=backwards):
        os.setxattr("noted", name, name.encode() * 3)
    made("much noted")
    os.setxattr("much noted", "user.much", b"m" * 1000)
    made("listed")
    entries = ((1, 6, -1), (2, 4, 33), (4, 4, -1), (16, 4, -1), (32, 4, -1))
    acl = b"".join(struct.pack("<HHI", tag, perm, who & 0xFFFFFFFF) for tag, perm, who in entries)
    os.setxattr("listed", "system.posix_acl_access", struct.pack("<I", 2) + acl)


def many():
    os.mkdir("many")
    for number in sorted(range(4000), reverse=backwards):
        made(f"many/{number:05}-{'x' * (number % 40)}", b"")


def times():
    for name, when in (("old", 981173106), ("future", 2_200_000_000), ("ancient", -1)):
        made(name)
        os.utime(name, (when, when))


parts = [names, links, special, sparse, modes, attributes, many, times]
for part in reversed(parts) if backwards else parts:
    part()
# What the builder of the tree left behind in /dev must not matter.
if backwards:
    made(f"{root}/dev/left", b"behind")
"""

LIST = r"""
import hashlib, json, os, stat, sys

found = {}
for folder, folders, files in os.walk(os.fsencode(sys.argv[1])):
    for name in folders + files:
        path = os.path.join(folder, name)
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        content = None
        if stat.S_ISREG(kind):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(kind):
            content = os.readlink(os.fsdecode(path))
        when = status.st_mtime if 0 <= status.st_mtime <= int(sys.argv[2]) else int(sys.argv[2])
        shown = os.fsdecode(path)[len(sys.argv[1]) :]
        size = None if stat.S_ISDIR(kind) else status.st_size
        found[shown] = [oct(status.st_mode), status.st_uid, status.st_gid, size, int(when), content]
with open(sys.argv[3], "w") as file:
    json.dump(found, file)
"""


def loaded(**values: Any) -> Step:
    return disk.step(Loaded(Settings(**values), {}, Path("image.yaml")), Resolution((), 0, 0))


@dataclass
class Yard:
    """An agent, a place, and layers with the tree of the tests."""

    agent: Agent
    where: dict[str, Any]
    steps: list[Step]
    small: Path
    """A folder on a file system with little room."""
    trees: list[str] = field(default_factory=list)

    @property
    def location(self) -> Path:
        return Path(self.where["location"])

    def layer(self, key: str) -> Path:
        """Where the agent keeps a layer."""
        return next(self.location.glob(f"cache/*/{key}/tree"))

    def on_top(self, *steps: Step) -> list[str]:
        """Build more layers and return the keys of all."""
        build(self.agent, self.where, [*self.steps, *steps])
        return [layer.key for layer in plan.layers([*self.steps, *steps])]

    def disk(
        self,
        name: str,
        *steps: Step,
        seed: str = "5eed",
        folder: Path | None = None,
        private: bool = False,
        **values: Any,
    ) -> Path:
        """Make a disk; raises Refused."""
        step = loaded(**values)
        chain = self.on_top(*steps)
        image = (folder or self.location) / f"{name}.img"
        self.agent.call(
            "disk",
            place=self.where,
            image=str(image),
            key=f"disk-{name}",
            seed=seed,
            chain=chain,
            script=script.render(step.script),
            files=encode(step.files),
            epoch=EPOCH,
            manifest={},
            private=private,
        )
        return image


def yard(
    folder: Path, base: Path, mode: str = "root", overlay: bool = True, order: str = "forward"
) -> Iterator[Yard]:
    """Open an agent with room for trees, and close it."""
    location, tables, small = folder / "location", folder / "tables", folder / "small"
    for each in (location, tables, small):
        each.mkdir()
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    prefix += ['mount -t tmpfs -o size=32m,mode=1777 tmpfs "$0" && exec "$@"', str(small)]
    if mode == "user":
        os.chown(location, ordinary.UID, ordinary.UID)
        folder.chmod(0o755)
        prefix += ordinary.prefix(tables, location)
    unpack = f"""
without=(--exclude=./dev/null)
[ "$MODE" = root ] || without=(--exclude='./dev/*')
tar --numeric-owner --xattrs --xattrs-include='*' "${{without[@]}}" -C "$ROOT" -xpf {base}
"""
    odd = f"""cat >"$WORK/odd.py" <<'EOF'\n{ODD}\nEOF\n"$PYTHON" -I "$WORK/odd.py" "$ROOT" {order}\n"""
    agent = Agent(prefix)
    steps = [Step("base", unpack, bootstrap=True), Step("kernel", KERNEL), Step("odd", odd)]
    yield Yard(agent, place(location, mode, overlay=overlay), steps, small)
    agent.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Debian's tree as an archive."""

    def make(place: Path) -> None:
        argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={PACKAGES}"]
        archive = place / "tree.tar"
        done = subprocess.run([*argv, "bookworm", str(archive)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        archive.chmod(0o644)

    with shared(tmp_path_factory, "base", make) as place:
        yield place / "tree.tar"


@pytest.fixture(scope="module")
def here(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    yield from yard(tmp_path_factory.mktemp("disk"), base)


@pytest.fixture(scope="module")
def image(here: Yard) -> Path:
    return here.disk("first", size=1000)


def run(*argv: str | Path, text: str | None = None) -> str:
    done = subprocess.run(
        argv, input=text, capture_output=True, encoding="utf-8", errors="surrogateescape", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(image: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(image.with_name(f"{image.name}.json").read_text())["disk"]
    return manifest


def part(image: Path, role: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in told(image)["partitions"] if row["role"] == role)
    return found


def extract(image: Path, role: str, target: Path) -> Path:
    """Copy a partition out."""
    row = part(image, role)
    run(
        "dd",
        f"if={image}",
        f"of={target}",
        "bs=512",
        f"skip={row['start']}",
        f"count={row['sectors']}",
        "conv=sparse",
    )
    os.truncate(target, row["sectors"] * 512)
    return target


def root_of(image: Path) -> str:
    return f"{image}?offset={part(image, 'root')['start'] * 512}"


def debugfs(image: Path, command: str) -> str:
    return run("debugfs", "-R", command, root_of(image))


def superblock(image: Path) -> dict[str, str]:
    """What dumpe2fs tells of the root file system as a whole."""
    found: dict[str, str] = dict(
        re.findall(r"^([^:\n]+): +(.+)$", run("dumpe2fs", "-h", root_of(image)), re.M)
    )
    return found


def test_the_partition_table_stands_before_two_other_readers(image: Path) -> None:
    assert "No errors detected" in run("sfdisk", "--verify", image)
    assert "No problems found" in run("sgdisk", "--verify", image)
    table = json.loads(run("sfdisk", "--json", image))["partitiontable"]
    assert (table["label"], table["id"]) == ("gpt", told(image)["guid"].upper())
    mine = [
        (row["start"], row["sectors"], row["type"].upper(), row["guid"].upper(), row["name"])
        for row in told(image)["partitions"]
    ]
    theirs = [(p["start"], p["size"], p["type"], p["uuid"], p["name"]) for p in table["partitions"]]
    assert theirs == mine
    assert image.stat().st_size == 1000 << 20
    assert image.stat().st_blocks * 512 < 500 << 20


def test_both_file_systems_are_sound(image: Path, tmp_path: Path) -> None:
    run("e2fsck", "-fn", root_of(image))
    esp = extract(image, "esp", tmp_path / "esp")
    run("fsck.vfat", "-n", "-V", esp)
    serial = part(image, "esp")["filesystem"]["serial"].upper()
    assert f"{serial[:4]}-{serial[4:]}" in run("mdir", "-i", esp, "::EFI/BOOT")
    run("mcopy", "-i", esp, "::EFI/BOOT/BOOTX64.EFI", tmp_path / "linux.efi")
    assert (tmp_path / "linux.efi").read_bytes()[:2] == b"MZ"


def test_a_root_file_system_without_its_start_is_repaired_from_the_copies(
    image: Path, tmp_path: Path
) -> None:
    root = extract(image, "root", tmp_path / "root")
    with root.open("r+b") as file:
        file.write(bytes(2 * 4096))  # superblock and descriptors
    argv = ["e2fsck", "-fy", "-b", "32768", "-B", "4096", str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout  # all is corrected
    assert "lost+found" not in done.stdout, "no file lost its name"
    run("e2fsck", "-fn", root)
    assert "Links: 3" in run("debugfs", "-R", 'stat "/odd/hard one"', root)


def test_every_file_is_in_the_image_as_it_was_in_the_tree(here: Yard, image: Path, tmp_path: Path) -> None:
    look = Step(
        "look",
        f"""cat >"$WORK/list.py" <<'EOF'\n{LIST}\nEOF
mkdir "$WORK/tree"
mount --rbind "$ROOT" "$WORK/tree"
mount -t tmpfs -o mode=755 tmpfs "$WORK/tree/dev"
"$PYTHON" -I "$WORK/list.py" "$WORK/tree" {EPOCH} "$ROOT/listing"
""",
    )
    listing = here.layer(here.on_top(look)[-1]) / "listing"
    expected = json.loads(listing.read_text())
    expected.pop("/listing", None)
    (tmp_path / "dump").mkdir()
    run("debugfs", "-R", f"rdump / {tmp_path}/dump", root_of(image))
    (tmp_path / "list.py").write_text(LIST)
    run("python3", "-I", tmp_path / "list.py", tmp_path / "dump", str(EPOCH), tmp_path / "dumped")
    dumped = json.loads((tmp_path / "dumped").read_text())
    added = {"/lost+found", "/boot/grub", "/boot/grub/grub.cfg"}
    assert set(dumped) - set(expected) == added
    assert set(expected) - set(dumped) == {"/odd/fifo", "/odd/socket"}, "debugfs dumps no special files"
    for path in set(expected) & set(dumped):
        kind = stat.S_IFMT(int(expected[path][0], 8))
        # Of a link debugfs dumps the target only; the mode it sets before the owner, which loses setuid.
        first = 5 if kind == stat.S_IFLNK else 1
        assert dumped[path][first:] == expected[path][first:], path
    owned = owners(image, [path for path, row in expected.items() if stat.S_ISDIR(int(row[0], 8))])
    for path in set(expected) - {"/odd/new\nline"}:
        assert owned[path] == (int(expected[path][0], 8), *expected[path][1:3]), path
    assert len(expected) > 7_000


def owners(image: Path, folders: list[str]) -> dict[str, tuple[int, int, int]]:
    """Mode, owner and group of everything in these folders, by path."""
    found, folder = {}, ""
    commands = "".join(f'ls -p "{each}"\n' for each in ("", *folders))
    for line in run("debugfs", "-f", "/dev/stdin", root_of(image), text=commands).splitlines():
        if asked := re.fullmatch(r'debugfs: ls -p "(.*)"', line):
            folder = asked[1]
        elif entry := re.fullmatch(r"/\d+/(\d+)/(\d+)/(\d+)/(.*)/\d*/ *", line):
            found[f"{folder}/{entry[4]}"] = (int(entry[1], 8), int(entry[2]), int(entry[3]))
    return found


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("fifo", ["Type: FIFO", "Mode:  0640"]),
        ("socket", ["Type: socket", "Mode:  0666"]),
        ("'hard one'", ["Links: 3"]),
        ("sparse", ["Size: 104857600", "Blockcount: 256"]),
        ("zeros", ["Size: 3145728", "Blockcount: 0"]),
        ("setuid", ["Mode:  04755"]),
        ("closed", ["Mode:  0000", "User: 12345", "Group: 54321"]),
        ("capable", ["security.capability (20) = 01 00 00 02 00 20 00 00"]),
        ("noted", ['user.a (18) = "user.auser.auser.a"', 'user.longer (33) = "user.longer']),
        ("'much noted'", ["user.much (1000)"]),
        ("listed", ["system.posix_acl_access"]),
        ("old", ["mtime: 0x3a7b8372:00000000", f"crtime: {EPOCH:#x}:00000000"]),
        ("future", [f"mtime: {EPOCH:#x}:00000000", f"ctime: {EPOCH:#x}:00000000"]),
        ("ancient", [f"mtime: {EPOCH:#x}:00000000", f"atime: {EPOCH:#x}:00000000"]),
    ],
)
def test_what_is_hard_to_keep_is_kept(image: Path, path: str, words: list[str]) -> None:
    name = path.strip("'")
    said = re.sub(r" +", " ", debugfs(image, f'stat "/odd/{name}"'))
    missing = [word for word in words if re.sub(r" +", " ", word) not in said]
    assert not missing, said


def test_hard_links_lead_to_one_file(image: Path) -> None:
    places = ("/odd/hard one", "/odd/hard two", "/odd/elsewhere/hard three")
    numbers = {re.findall(r"Inode: (\d+)", debugfs(image, f'stat "{path}"'))[0] for path in places}
    assert len(numbers) == 1


def test_the_file_system_is_one_that_old_grub_reads_and_can_grow(image: Path, tmp_path: Path) -> None:
    said = superblock(image)
    assert set(said["Filesystem features"].split()) == FEATURES
    assert said["Filesystem volume name"] == "ROOT"
    assert said["Reserved block count"] == "0"
    assert said["Errors behavior"] == "Remount read-only"
    # 64 descriptors of 128 MiB each in every reserved block
    assert (int(said["Reserved GDT blocks"]) + 1) * 64 * 128 >= 1 << 20
    assert int(said["Free inodes"]) > int(said["Inode count"]) / 4
    grown = extract(image, "root", tmp_path / "root")
    os.truncate(grown, 20 << 30)
    run("resize2fs", grown)
    run("e2fsck", "-fn", grown)
    assert f"Block count: {20 << 18}" in re.sub(" +", " ", run("dumpe2fs", "-h", grown))


def test_bios_finds_grub_and_grub_finds_its_menu(here: Yard, image: Path) -> None:
    start = part(image, "bios")["start"]
    grub = here.layer(here.on_top()[0]) / "usr/lib/grub/i386-pc"
    with image.open("rb") as file:
        record = file.read(512)
        file.seek(start * 512)
        core = file.read(1 << 20)
    theirs = (grub / "boot.img").read_bytes()
    changed = [place for place in range(440) if record[place] != theirs[place]]
    assert set(changed) <= {*range(0x5C, 0x64), 0x66, 0x67}
    assert struct.unpack_from("<Q", record, 0x5C) == (start,)
    assert core[:500] == (grub / "diskboot.img").read_bytes()[:500]
    first, length, segment = struct.unpack_from("<QHH", core, 500)
    assert (first, segment) == (start + 1, 0x820)
    end = (length + 1) * 512
    assert any(core[end - 512 : end])
    assert not any(core[end:])
    menu = debugfs(image, "cat /boot/grub/grub.cfg")
    assert f"linux /vmlinuz {told(image)['kernel_cmdline']}\n" in menu
    assert "initrd /initrd.img\n" in menu


def test_uefi_gets_the_same_kernel_initramfs_and_command_line(
    here: Yard, image: Path, tmp_path: Path
) -> None:
    esp = extract(image, "esp", tmp_path / "esp")
    run("mcopy", "-i", esp, "::EFI/BOOT/BOOTX64.EFI", tmp_path / "linux.efi")
    program = (tmp_path / "linux.efi").read_bytes()
    (pe,) = struct.unpack_from("<I", program, 0x3C)
    number, optional = struct.unpack_from("<H12xH", program, pe + 6)
    found = {}
    for index in range(number):
        name, size, _, _, offset = struct.unpack_from("<8sIIII", program, pe + 24 + optional + 40 * index)
        found[name.rstrip(b"\0").decode()] = program[offset : offset + size]
    boot = here.layer(here.on_top()[1]) / "boot"
    assert found[".linux"] == (boot / f"vmlinuz-{VERSION}").read_bytes()
    assert found[".initrd"] == (boot / f"initrd.img-{VERSION}").read_bytes()
    assert found[".cmdline"].decode() == told(image)["kernel_cmdline"]
    assert found[".uname"].decode() == VERSION
    assert b"bookworm" in found[".osrel"]


def test_the_manifest_tells_the_truth(image: Path) -> None:
    with image.open("rb") as file:
        assert told(image)["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()
    assert told(image)["size"] == image.stat().st_size
    assert abs(told(image)["allocated"] - image.stat().st_blocks * 512) < 1 << 20
    root = part(image, "root")["filesystem"]
    said = superblock(image)
    assert (said["Filesystem UUID"], said["Block count"]) == (root["uuid"], str(root["blocks"]))


@pytest.mark.parametrize(
    ("mode", "overlay", "order"),
    [
        pytest.param("root", True, "backwards", marks=pytest.mark.soak(20)),
        ("root", False, "backwards"),
        ("user", True, "backwards"),
        pytest.param("user", False, "forward", marks=pytest.mark.soak(20)),
    ],
    ids=["root", "root-copy", "user", "user-copy"],
)
def test_the_same_tree_built_otherwise_gives_the_same_bytes(
    base: Path, image: Path, tmp_path: Path, mode: str, overlay: bool, order: str
) -> None:
    """And so does one that is its owner's alone."""
    opened = yard(tmp_path, base, mode, overlay, order)
    again = next(opened).disk("again", size=1000, private=True)
    run("cmp", image, again)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (image, again)] == [0o644, 0o600]
    assert next(opened, None) is None


def test_another_seed_or_name_gives_other_ids_everywhere(here: Yard, image: Path) -> None:
    first = json.dumps(told(image))
    for other in (here.disk("seed", size=1000, seed="5eee"), here.disk("name", size=1000, imagename="other")):
        ids = {told(other)["guid"], *(row["guid"] for row in told(other)["partitions"])}
        root, esp = part(other, "root")["filesystem"], part(other, "esp")["filesystem"]
        ids |= {root["uuid"], root["hash_seed"], esp["serial"]}
        assert len(ids) == 7
        assert not [each for each in ids if each in first]


@pytest.mark.parametrize(
    ("values", "roles"),
    [({"firmware": ("bios",)}, ["bios", "root"]), ({"firmware": ("uefi",)}, ["esp", "root"])],
    ids=["bios", "uefi"],
)
def test_one_firmware_alone(here: Yard, values: dict[str, Any], roles: list[str]) -> None:
    other = here.disk(roles[0], size=1000, **values)
    assert [row["role"] for row in told(other)["partitions"]] == roles
    run("sgdisk", "--verify", other)
    run("e2fsck", "-fn", root_of(other))
    with other.open("rb") as file:
        assert any(file.read(440)) is (roles[0] == "bios")


@pytest.mark.parametrize("headroom", [0, 300])
def test_the_size_that_is_named_is_enough_and_not_wasteful(here: Yard, headroom: int) -> None:
    name = f"small-{headroom}"
    with pytest.raises(Refused) as refused:
        here.disk(name, size=100, space_headroom=headroom)
    assert refused.value.message == "SIZE=100 MiB is too small"
    assert not list(here.location.glob(f"{name}*"))
    named = int(re.fullmatch(r"set SIZE to at least (\d+)", refused.value.hint)[1])  # type: ignore[index]
    smallest = here.disk(name, size=named, space_headroom=headroom)
    assert told(smallest)["smallest_size"] == named
    said = superblock(smallest)
    free = int(said["Free blocks"]) / 256
    assert headroom <= free < headroom + 4 + named * 0.02
    with pytest.raises(Refused, match=f"SIZE={named - 2} MiB is too small"):
        here.disk(f"{name}-less", size=named - 2, space_headroom=headroom)


def test_the_tools_of_the_tree_are_its_own(here: Yard) -> None:
    """Another loader than the tree's would be the build host's, and of another version some day."""
    tree = here.layer(here.on_top()[0])
    loader = tree / disk.LOADERS["amd64"]["loader"]
    assert loader.resolve().is_relative_to(tree)


def test_a_full_disk_is_named_and_leaves_nothing(here: Yard) -> None:
    with pytest.raises(Refused, match=r"the disk is full|No space left"):
        here.disk("full", size=1000, folder=here.small)


BOOT = '"$ROOT/boot'
BROKEN = {
    "no kernel": (f'rm {BOOT}/vmlinuz-{VERSION}"', "no kernel at /vmlinuz"),
    "no initramfs": ('rm "$ROOT/initrd.img"', "no initramfs at /initrd.img"),
    "dangling": ('ln -sf boot/nothing "$ROOT/initrd.img"', "no initramfs at /initrd.img"),
    "cut off": (f'truncate -s -1000 {BOOT}/initrd.img-{VERSION}"', "is damaged"),
    "zeros": (f'head -c 9999 /dev/zero >{BOOT}/initrd.img-{VERSION}"', "is not an initramfs"),
    "empty": (f'truncate -s 0 {BOOT}/initrd.img-{VERSION}"', "is not an initramfs"),
    "other version": (
        f'mv {BOOT}/initrd.img-{VERSION}" {BOOT}/initrd.img-9"; ln -sf boot/initrd.img-9 "$ROOT/initrd.img"',
        "/initrd.img to /boot/initrd.img-9",
    ),
    "own menu": (f'mkdir {BOOT}/grub"; touch {BOOT}/grub/grub.cfg"', "its own /boot/grub/grub.cfg"),
    "no e2fsprogs": ('rm "$ROOT/usr/sbin/mke2fs"', "no mke2fs"),
    "no GRUB": ('rm -r "$ROOT/usr/lib/grub/i386-pc"', "no GRUB for BIOS"),
    "no stub": ('rm "$ROOT/usr/lib/systemd/boot/efi/linuxx64.efi.stub"', "no stub for UEFI"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_tree_that_would_not_boot_is_refused_with_a_hint(here: Yard, what: str) -> None:
    command, words = BROKEN[what]
    with pytest.raises(Refused) as refused:
        here.disk("broken", Step("broken", f"{command}\n"), size=1000)
    assert words in refused.value.message
    assert refused.value.hint
    assert not list(here.location.glob("broken*"))


def test_progress_comes_in_bytes_and_reaches_the_end(here: Yard) -> None:
    before = len(here.agent.events)
    here.disk("progress", size=1000)
    steps = [event for event in here.agent.events[before:] if event["event"] == "progress"]
    reached = [event["done"] for event in steps if event["label"] == "disk"]
    assert reached == sorted(reached)
    assert {event["total"] for event in steps} == {reached[-1]} == {1000 << 20}
