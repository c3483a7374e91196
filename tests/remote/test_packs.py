"""What stays on a build host: one folder of the user's, and nothing in it runs that is not what was sent."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from build.engine.hosts import host
from tests import cli
from tests.buildhost import HOST, KEPT, USERS, Buildhost
from tests.images import TINY
from tests.remote.clients import start
from tests.waiting import LONG, until

pytestmark = pytest.mark.remote
CONFIG = ("config", *TINY)
AGENT = host.address("agent", host.agent())
OTHER = USERS["carol"]
"""Somebody else on the host."""
MARK = "/var/tmp/ran"
EVIL = f"open({MARK!r}, 'w').close()\n"


@pytest.fixture(params=["root", "alice"])
def user(request: pytest.FixtureRequest, there: Buildhost) -> Iterator[str]:
    """Who logs in, root or one who has sudo, and keeps nothing there yet; what was planted has not run."""
    forget(there, request.param)
    yield request.param
    forget(there, request.param)
    assert not (there.folder / "vartmp/ran").exists()


def forget(there: Buildhost, user: str) -> None:
    """Remove what stays of a user's, and the ways to it."""
    kept = there.kept(user)
    gone = kept if user == "root" else there.folder / "home" / user / ".local"
    subprocess.run(["rm", "-rf", gone], check=True)


def config(there: Buildhost, user: str) -> None:
    assert "LOCATION" in cli.succeed("-H", f"{user}@{HOST}", *CONFIG, prefix=there.prefix, env=there.env)


def refuse(there: Buildhost, user: str) -> str:
    return cli.refuse("-H", f"{user}@{HOST}", *CONFIG, prefix=there.prefix, env=there.env)


def good(there: Buildhost, user: str) -> dict[str, bytes]:
    """Files of the agent there, by path: what was sent, each of it the user's own and closed to others."""
    kept = there.kept(user)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    pack = kept / AGENT
    for path in (kept, pack, *pack.rglob("*")):
        status = path.lstat()
        assert status.st_uid == USERS.get(user, 0)
        assert not status.st_mode & 0o022
        assert not path.is_symlink()
    return {str(path.relative_to(pack)): path.read_bytes() for path in pack.rglob("*") if path.is_file()}


def test_one_folder_stays_and_is_used_again(user: str, there: Buildhost) -> None:
    config(there, user)
    assert good(there, user) == host.agent()
    (pack,) = there.kept(user).iterdir()
    os.utime(pack, (0, 0))
    born = pack.stat().st_ino
    config(there, user)
    assert [path.stat().st_ino for path in there.kept(user).iterdir()] == [born]
    assert time.time() - pack.stat().st_mtime < 3600
    there.wait_until_empty()


def add(pack: Path) -> None:
    (pack / "json.py").write_text(EVIL)


def add_pth(pack: Path) -> None:
    (pack / "build/agent/evil.pth").write_text(f"import os; {EVIL}")


def add_folder(pack: Path) -> None:
    (pack / "json").mkdir()


def change(pack: Path) -> None:
    main = pack / "build/agent/__main__.py"
    main.write_text(EVIL + main.read_text())


def remove(pack: Path) -> None:
    (pack / "build/agent/store.py").unlink()


def link_file(pack: Path) -> None:
    """Its content is the same, for now."""
    shutil.move(pack / "build/wire.py", pack.parent / "wire.py")
    (pack / "build/wire.py").symlink_to("../../wire.py")


def link_pack(pack: Path) -> None:
    shutil.move(pack, pack.parent / "elsewhere")
    pack.symlink_to("elsewhere")


def give_file(pack: Path) -> None:
    """Its content is the same, until its owner changes it."""
    os.chown(pack / "build/wire.py", OTHER, OTHER)


def give_pack(pack: Path) -> None:
    os.chown(pack, OTHER, OTHER)
    add(pack)


def open_file(pack: Path) -> None:
    (pack / "build/wire.py").chmod(0o666)


def open_folder(pack: Path) -> None:
    (pack / "build/agent").chmod(0o777)


def cut_short(pack: Path) -> None:
    """As a removal that was killed would have left it, had it begun under this name."""
    for path in sorted(pack.rglob("*.py"))[::2]:
        path.unlink()


def no_folder(pack: Path) -> None:
    shutil.rmtree(pack)
    pack.write_text("")


TAMPERED = (add, add_pth, add_folder, change, remove, cut_short, no_folder, link_file, link_pack)
EXPOSED = (give_file, give_pack, open_file, open_folder)


@pytest.mark.parametrize("spoil", [*TAMPERED, *EXPOSED])
def test_a_pack_that_is_not_what_was_sent_is_put_anew(
    spoil: Callable[[Path], None], there: Buildhost
) -> None:
    config(there, "alice")
    spoil(pack := there.kept("alice") / AGENT)
    if spoil in TAMPERED:  # nothing but the content tells
        own = str(USERS["alice"])
        subprocess.run(["chown", "--recursive", "--no-dereference", f"{own}:{own}", pack], check=True)
    config(there, "alice")
    assert good(there, "alice") == host.agent()
    assert not (there.folder / "vartmp/ran").exists()


def test_a_pack_that_somebody_planted_is_removed(user: str, there: Buildhost) -> None:
    """He could write there, for the folder was open to all; what is his cannot all be removed by the user."""
    kept = there.kept(user)
    evil = kept / AGENT / "build/agent"
    evil.mkdir(parents=True)
    (evil / "__main__.py").write_text(EVIL)
    for path in (evil / "__main__.py", evil, evil.parent, evil.parents[1]):
        os.chown(path, OTHER, OTHER)
    uid = USERS.get(user, 0)
    for path in (kept, *([kept.parent, kept.parents[1]] if uid else [])):
        os.chown(path, uid, uid)
    kept.chmod(0o777)
    config(there, user)
    assert good(there, user) == host.agent()


def test_a_folder_that_is_wider_is_narrowed(user: str, there: Buildhost) -> None:
    config(there, user)
    there.kept(user).chmod(0o755)
    config(there, user)
    assert good(there, user) == host.agent()


@pytest.mark.parametrize("how", ["folder", "link"])
def test_a_folder_or_link_of_somebody_else_is_refused(how: str, user: str, there: Buildhost) -> None:
    """It is where ours would be, with all in it that we would look for."""
    config(there, user)
    kept = there.kept(user)
    own = kept.with_name("own")
    kept.rename(own)
    try:
        if how == "folder":
            subprocess.run(["cp", "-a", own, kept], check=True)
            subprocess.run(["chown", "-R", f"{OTHER}:{OTHER}", kept], check=True)
            kept.chmod(0o755)
        else:
            kept.symlink_to("own")
            os.chown(kept, OTHER, OTHER, follow_symlinks=False)
        change(kept / AGENT)
        said = refuse(there, user)
        assert f"{KEPT} belongs to another user ({OTHER})" in said or f"{KEPT}: it is no folder" in said
    finally:
        subprocess.run(["rm", "-rf", kept, own], check=True)


def test_ways_to_it_that_others_can_change_are_refused(there: Buildhost) -> None:
    config(there, "alice")
    home = there.folder / "home/alice"
    local, state = home / ".local", home / ".local/state"
    for path in (home, local, state):
        path.chmod(0o775)
        said = refuse(there, "alice")
        shown = f"/home/alice{str(path).removeprefix(str(home))}"
        assert f"others may write into {shown}\n" in said
        assert f"run there: chmod go-w {shown}\n" in said
        path.chmod(0o755)
    os.chown(local, OTHER, OTHER)
    assert f"/home/alice/.local belongs to another user ({OTHER})" in refuse(there, "alice")
    os.chown(local, USERS["alice"], USERS["alice"])
    state.rename(home / "state")
    state.symlink_to("../state")
    assert "/home/alice/.local/state: it is no folder" in refuse(there, "alice")
    forget(there, "alice")
    shutil.rmtree(home / "state")


@contextlib.contextmanager
def login(there: Buildhost, user: str, *lines: str) -> Iterator[None]:
    """Have a user's login shell begin with these lines."""
    rc = there.folder / "home" / user / ".bashrc"
    rc.write_text("".join(f"{line}\n" for line in lines))
    try:
        yield
    finally:
        rc.unlink()


def test_the_folder_for_state_may_be_set(there: Buildhost) -> None:
    forget(there, "alice")
    with login(there, "alice", "export XDG_STATE_HOME=/home/alice/deep/state"):
        config(there, "alice")
    kept = there.folder / "home/alice/deep/state" / KEPT
    assert (kept / AGENT).is_dir()
    assert not there.kept("alice").exists()
    with login(there, "alice", "export XDG_STATE_HOME=relative"):  # which does not count
        config(there, "alice")
    assert good(there, "alice") == host.agent()
    with login(there, "alice", "export XDG_STATE_HOME=/var/tmp/alice"):
        assert "others may write into /var/tmp\n" in refuse(there, "alice")
    subprocess.run(["rm", "-r", there.folder / "home/alice/deep"], check=True)
    there.wait_until_empty()


def test_a_home_that_cannot_be_written_or_is_missing_is_told_with_a_way_out(there: Buildhost) -> None:
    forget(there, "alice")
    home = there.folder / "home/alice"
    os.chown(home, 0, 0)
    try:
        said = refuse(there, "alice")
    finally:
        os.chown(home, USERS["alice"], USERS["alice"])
    assert "cannot keep the agent there: /home/alice/.local: Permission denied\n" in said
    assert "set XDG_STATE_HOME there to a folder of yours" in said
    with login(there, "alice", "export HOME=/nonexistent"):
        said = refuse(there, "alice")
    assert "cannot keep the agent there: /nonexistent: No such file or directory\n" in said
    (there.folder / "home/state").mkdir()
    os.chown(there.folder / "home/state", USERS["alice"], USERS["alice"])
    with login(there, "alice", "export HOME=/nonexistent XDG_STATE_HOME=/home/state"):
        config(there, "alice")
    shutil.rmtree(there.folder / "home/state")


def test_a_home_that_root_cannot_read_is_told_with_a_way_out(there: Buildhost) -> None:
    """As one on NFS with root_squash: the sessions of this sshd have no right to pass over modes."""
    own = ("-p", "2201", "-o", f"ListenAddress={HOST}:2201", "-o", "PidFile=/run/lacking.pid")
    lacking = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    there.inside(*lacking, "/usr/sbin/sshd", "-f", "/etc/buildhost/sshd_host", *own)
    known = there.client / ".ssh/known_hosts"
    before = known.read_text()
    known.write_text(before + f"[{HOST}]:2201 {(there.folder / 'etc/host.pub').read_text()}")
    line = ("-H", f"alice@{HOST}:2201")
    try:
        said = cli.refuse(*line, *CONFIG, prefix=there.prefix, env=there.env)
        assert "root may not read /home/alice/.local/state/" in said
        assert "log in as root, or build without: --rootless" in said
        told = cli.succeed(*line, "--rootless", *CONFIG, prefix=there.prefix, env=there.env)
        assert "/home/alice/.local/share/systemvm" in told
    finally:
        known.write_text(before)
        there.inside("sh", "-c", "kill $(cat /run/lacking.pid)")


def test_what_nobody_used_for_a_week_goes_with_the_next_version(user: str, there: Buildhost) -> None:
    config(there, user)
    kept = there.kept(user)
    old, part, young = kept / f"agent-{'0' * 64}", kept / ".0123456789abcdef", kept / f"agent-{'1' * 64}"
    for folder in (old, part, young):
        shutil.copytree(kept / AGENT, folder)
        for path in (*folder.rglob("*"), folder):
            os.chown(path, USERS.get(user, 0), USERS.get(user, 0))
    for folder in (old, part):
        os.utime(folder, (time.time() - 8 * 86400,) * 2)
    config(there, user)
    assert old.is_dir()
    remove(kept / AGENT)
    config(there, user)
    assert {path.name for path in kept.iterdir()} == {AGENT, young.name}


def test_a_put_that_is_killed_leaves_no_half_a_pack(there: Buildhost) -> None:
    """Nor does the next one mind what it left."""
    forget(there, "alice")
    there.inside("nft", "add table inet line; add chain inet line in { type filter hook input priority 0 ; }")
    there.inside("nft", "add rule inet line in tcp dport 22 limit rate over 200 kbytes/second drop")
    client = start(there, "alice", *CONFIG)
    try:
        until(lambda: list(there.kept("alice").glob(".*/build")))
        (putting,) = [number for number, told in there.processes().items() if told.endswith(f"put {AGENT} ")]
        there.inside("kill", "-9", str(putting))
        os.killpg(client.pid, signal.SIGKILL)
        client.communicate(timeout=LONG)
    finally:
        there.inside("nft", "delete table inet line")
    there.wait_until_idle()
    assert [path.name[0] for path in there.kept("alice").iterdir()] == ["."]
    config(there, "alice")
    assert good(there, "alice") == host.agent()
