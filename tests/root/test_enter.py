"""The fence around a tree's programs, by itself: what comes through, what does not, and how it ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from build.agent import enter, sandbox
from tests.agent import CHECKOUT
from tests.waiting import until

pytestmark = pytest.mark.root
BORROW = 'mount --bind /usr "$0/usr"; exec "$@"'
"""Lets a tree have the host's programs, in mounts that end with the command."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("proc", "sys", "dev", "run", "tmp", "usr"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    return root


def command(tree: Path, *arguments: str) -> list[str]:
    borrowed = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", BORROW, str(tree)]
    return [*borrowed, sys.executable, "-I", "-S", "-B", str(sandbox.ENTER), str(tree), *arguments]


def run(tree: Path, *arguments: str, descriptors: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = command(tree, *arguments)
    return subprocess.run(argv, capture_output=True, text=True, check=False, pass_fds=descriptors)


def capabilities(tree: Path, *options: str) -> int:
    done = run(tree, *options, "sed", "-n", r"s/^CapBnd:\s*//p", "/proc/self/status")
    return int(done.stdout, 16)


def test_the_status_is_the_commands(tree: Path) -> None:
    assert run(tree, "sh", "-c", "exit 7").returncode == 7
    missing = run(tree, "no-such-program")
    assert missing.returncode == 125
    assert "No such file" in missing.stderr


def test_it_is_first_of_its_processes_and_has_no_network_but_its_own(tree: Path) -> None:
    done = run(tree, "sh", "-c", "echo $$; hostname; sed 1,2d /proc/net/dev | cut -d: -f1; ls -A /sys")
    assert done.stdout.split() == ["1", "localhost", "lo"]


def test_a_capability_is_lent_to_who_asks(tree: Path) -> None:
    kept = sum(1 << number for number in enter.KEPT.values())
    assert capabilities(tree) == kept
    assert capabilities(tree, "--capability", "NET_ADMIN") == kept | 1 << enter.LENT["NET_ADMIN"]
    made = "ip link add some0 type bridge && cut -d: -f1 /proc/net/dev"
    assert run(tree, "sh", "-c", made).returncode != 0
    assert "some0" in run(tree, "--capability", "NET_ADMIN", "sh", "-c", made).stdout
    assert "some0" not in Path("/proc/net/dev").read_text()


def test_only_descriptors_that_are_named_come_through(tree: Path) -> None:
    folder = os.open("/", os.O_RDONLY)
    try:
        look = ("sh", "-c", f"test -e /proc/self/fd/{folder}/etc/passwd")
        assert run(tree, *look, descriptors=(folder,)).returncode == 1
        assert run(tree, "--fd", str(folder), *look, descriptors=(folder,)).returncode == 0
    finally:
        os.close(folder)


def test_a_device_node_of_the_tree_opens_nothing(tree: Path) -> None:
    node = tree / "node"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with node.open("rb") as device:
        assert device.read(1) == b"\0"
    done = run(tree, "head", "-c", "1", "/node")
    assert done.returncode != 0
    assert "Permission denied" in done.stderr


def test_a_read_only_tree_is_so_but_for_what_is_mounted_in_it(tree: Path) -> None:
    write = ("sh", "-c", "echo x >/run/x && ! echo x >/x && echo x >/usr/share/x")
    (tree.parent / "share").mkdir()
    argv = command(tree, "--read-only", *write)
    share = 'mount --bind "$0" "$1/usr/share"; shift; exec "$@"'
    at = argv.index(sys.executable)
    inner = ["bash", "-euc", share, str(tree.parent / "share"), str(tree)]
    subprocess.run([*argv[:at], *inner, *argv[at:]], check=True, stderr=subprocess.DEVNULL)
    assert (tree.parent / "share/x").read_text() == "x\n"
    assert not (tree / "x").exists()


PROGRAM = """
import sys
from build import inside
if sys.argv[2] == "enter":
    inside.enter(sys.argv[1])
else:
    import os
    os.chroot(sys.argv[1])
import planted
"""


def test_a_program_of_ours_takes_no_code_from_the_tree(tree: Path, tmp_path: Path) -> None:
    library = tree / "usr/lib/code"
    library.mkdir(parents=True)
    (library / "planted.py").write_text("print('run')")
    argv = [sys.executable, "-c", f"import sys; sys.path.append('/usr/lib/code'){PROGRAM}", str(tree)]
    said = {
        how: subprocess.run([*argv, how], cwd=CHECKOUT, capture_output=True, text=True, check=False)
        for how in ("enter", "plain")
    }
    assert said["plain"].stdout == "run\n"
    assert said["enter"].stdout == ""
    assert "No module named 'planted'" in said["enter"].stderr


@pytest.mark.parametrize("name", ["proc", "sys", "dev", "run", "tmp"])
def test_a_link_in_place_of_a_folder_leads_no_further_than_the_tree(name: str, tree: Path) -> None:
    outside = tree.parent / "outside"
    outside.mkdir()
    (tree / name).rmdir()
    (tree / name).symlink_to(outside)
    assert run(tree, "true").returncode == 125
    assert not list(outside.iterdir())


def test_nothing_of_a_tree_outlives_who_entered_it(tree: Path) -> None:
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    script = f"(exec -a {mark} sleep 100) & (exec -a {mark} setsid sleep 100) & wait"
    with subprocess.Popen(command(tree, "bash", "-c", script)) as entered:
        until(lambda: there(mark))
        entered.send_signal(signal.SIGKILL)
    until(lambda: not there(mark))
    assert str(tree) not in Path("/proc/self/mounts").read_text()


def there(mark: str) -> list[str]:
    """Processes with this name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if name == mark.encode():
            found.append(process.name)
    return found
