"""Which host -H means, how it is told from another, and who we are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import buildhost, cli, ordinary
from tests.buildhost import HOST, JUMP, JUMP_PORT, PASSWORD, Buildhost
from tests.images import TINY
from tests.remote.clients import start
from tests.waiting import until

pytestmark = pytest.mark.remote
CONFIG = ("config", *TINY)


def succeed(there: Buildhost, *arguments: str) -> str:
    return cli.succeed(*arguments, prefix=there.prefix, env=there.env)


def refuse(there: Buildhost, *arguments: str) -> str:
    return cli.refuse(*arguments, prefix=there.prefix, env=there.env)


@pytest.fixture
def ssh(there: Buildhost) -> Iterator[Path]:
    """The client's ~/.ssh, to be changed."""
    yield there.client / ".ssh"
    buildhost.write_client(there.folder)


@pytest.mark.parametrize("form", ["-H {}", "-H{}", "--hosts={}"])
def test_every_form_of_the_flag_reaches_the_host(form: str, there: Buildhost) -> None:
    words = form.format(f"root@{HOST}").split()
    for line in ([*words, *CONFIG], [*CONFIG, *words]):
        out = succeed(there, *line)
        assert all(told.startswith(f"root@{HOST} | ") for told in out.splitlines())


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("included", "/var/lib/images/systemvm"),
        ("carol@alias", "/home/carol/.local/share/systemvm"),
        ("behind", "/var/lib/images/systemvm"),
        ("piped", "/var/lib/images/systemvm"),
    ],
    ids=["Include", "Match", "ProxyJump", "ProxyCommand"],
)
def test_the_configuration_of_ssh_counts(name: str, location: str, there: Buildhost) -> None:
    assert re.search(rf"LOCATION +{location} ", succeed(there, "-H", name, *CONFIG))


def test_without_an_ssh_here_the_configuration_counts_still(there: Buildhost, tmp_path: Path) -> None:
    for tool in ("nsenter", "unshare", "bash", "mount"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    env = {**there.env, "PATH": str(tmp_path)}
    assert "LOCATION" in cli.succeed("-H", "behind", *CONFIG, prefix=there.prefix, env=env)


@pytest.mark.parametrize(
    ("known", "target", "what"),
    [
        ("jump", f"root@{HOST}", "build host '127.0.0.1'"),
        ("host", "behind", "jump host '127.0.0.2'"),
        ("jump", "behind", "build host 'behind'"),
    ],
)
def test_an_unknown_key_is_refused_on_every_hop(
    known: str, target: str, what: str, there: Buildhost, ssh: Path
) -> None:
    """What the hint says mends it, once the key is compared."""
    lines = (ssh / "known_hosts").read_text().splitlines(keepends=True)
    (ssh / "known_hosts").write_text(lines[known == "jump"])
    said = refuse(there, "-H", target, *CONFIG)
    assert f"the host key of {what}" in said
    assert "not found in known_hosts" in said
    key = there.folder / "etc" / ("host.pub" if known == "jump" else "jump.pub")
    shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] in said
    mend = said.splitlines()[-1].partition("then: ")[2]
    subprocess.run([*there.prefix, "bash", "-c", mend], check=True, capture_output=True)
    assert "LOCATION" in succeed(there, "-H", target, *CONFIG)


@pytest.mark.parametrize("name", [HOST, f"[{JUMP}]:{JUMP_PORT}"])
def test_a_changed_key_is_refused_on_every_hop(
    name: str, there: Buildhost, ssh: Path, tmp_path: Path
) -> None:
    buildhost.keygen(tmp_path / "other")
    other = (tmp_path / "other.pub").read_text().strip()
    lines = (ssh / "known_hosts").read_text().splitlines()
    wrong = [f"{name} {other}" if line.split()[0] == name else line for line in lines]
    (ssh / "known_hosts").write_text("\n".join(wrong) + "\n")
    said = refuse(there, "-H", "behind", *CONFIG)
    assert f"({name}) does not match line {1 + (name != HOST)} of {ssh}/known_hosts" in said
    mend = re.search(r"on purpose: (.*), then", said)
    assert mend
    subprocess.run([*there.prefix, "bash", "-c", mend[1]], check=True, capture_output=True)
    assert name not in {line.split()[0] for line in (ssh / "known_hosts").read_text().splitlines()}


@pytest.mark.parametrize(
    ("target", "what"),
    [
        (f"root@{HOST}:3", "cannot reach build host"),
        ("nosuch.invalid", "cannot reach build host"),
        (f"nobody@{HOST}", "127.0.0.1"),
        ("a b", "is no host"),
    ],
)
def test_a_host_out_of_reach_is_one_clear_error(target: str, what: str, there: Buildhost) -> None:
    assert what in refuse(there, "-H", target, *CONFIG)


def test_a_key_that_is_not_wanted_is_told_so(there: Buildhost, ssh: Path, tmp_path: Path) -> None:
    buildhost.keygen(tmp_path / "other")
    (ssh / "config").write_text(f"Host *\n  IdentityFile {tmp_path}/other\n")
    said = refuse(there, "-H", f"root@{HOST}", *CONFIG)
    assert "permission denied (publickey) for root" in said
    assert f"{tmp_path}/other" in said


@pytest.fixture
def locked(there: Buildhost, ssh: Path, tmp_path: Path) -> Path:
    """The client's key behind PASSWORD, and no other."""
    key = tmp_path / "locked"
    shutil.copy(there.client / ".ssh/id_ed25519", key)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", PASSWORD, "-f", key], check=True, capture_output=True)
    (ssh / "config").write_text(
        f"Host *\n  IdentityFile {key}\n  IdentitiesOnly yes\n"
        f"Host behind\n  HostName {HOST}\n  ProxyJump root@{JUMP}:{JUMP_PORT}\n"
    )
    return key


def test_a_passphrase_is_asked_once_for_all_hops_and_hosts(there: Buildhost, locked: Path) -> None:
    question = f"passphrase of {locked} (empty: do without)"
    line = ["-H", f"behind,root@{HOST}", *CONFIG]
    status, shown = on_terminal(there, line, [(question, PASSWORD)])
    assert status == 0, shown
    assert shown.count("passphrase of") == 1
    assert PASSWORD not in shown
    status, shown = on_terminal(there, line[:1] + line[1].split(",")[1:] + line[2:], [(question, "wrong")])
    assert status == 1
    assert f"error: root@{HOST}: that is not the passphrase of {locked}" in shown
    status, shown = on_terminal(there, ["-H", f"root@{HOST}", *CONFIG], [(question, "")])
    assert status == 1
    assert f"hint: unlock {locked}: ssh-add {locked}" in shown
    assert f"ssh-add {locked}" in refuse(there, "-H", f"root@{HOST}", *CONFIG)  # nobody is there to ask


def test_a_key_that_the_agent_has_is_not_asked_about(there: Buildhost, locked: Path, tmp_path: Path) -> None:
    key = there.client / ".ssh/id_ed25519"
    shutil.copy(f"{key}.pub", f"{locked}.pub")
    script = 'ssh-add -q "$1"; shift; exec "$@"'
    agent = [*there.prefix, "ssh-agent", "bash", "-euc", script, "agent", str(key)]
    told = cli.inv("-H", f"root@{HOST}", *CONFIG, prefix=agent, env={"HOME": there.env["HOME"]})
    assert "LOCATION" in told.stdout, told.stderr


def test_a_user_whom_the_machine_does_not_know_is_told_so(there: Buildhost, tmp_path: Path) -> None:
    """As in a container that was started with a number for a user: ssh refuses to work there."""
    home, number = tmp_path / "home", ordinary.UID
    shutil.copytree(there.client, home)
    for path in (home, *home.rglob("*")):
        os.chown(path, number, number)
    become = (
        f"setpriv --reuid {number} --regid {number} --clear-groups --inh-caps -all env -u USER -u LOGNAME"
    )
    ways = ordinary.ways((Path(sys.base_prefix), cli.CHECKOUT, home))
    script = "\n".join([*ways, f'exec {become} "$@"'])
    prefix = [*there.prefix, "bash", "-euc", script, "client"]
    line = ("-H", f"root@{HOST}", *CONFIG)
    said = cli.refuse(*line, prefix=prefix, env={"HOME": str(home)})
    assert f"this machine has no name for its user {number}" in said
    prefix[-2] = script.replace("-u LOGNAME", "LOGNAME=me")
    assert "LOCATION" in cli.succeed(*line, prefix=prefix, env={"HOME": str(home)})


@pytest.mark.parametrize("old", [None, "3.9.2"])
def test_a_python_that_is_missing_or_too_old_is_told_so(old: str | None, there: Buildhost) -> None:
    """The user's PATH on the host is what finds the python3; this one has little on it."""
    folder = "/var/tmp/oldpython"
    there.inside("mkdir", "-p", folder)
    there.inside("ln", "-sf", "/bin/sh", f"{folder}/sh")
    if old:
        fake = f"#!/bin/sh\necho '{{\"version\": [{old.replace('.', ', ')}]}}'\n"
        there.inside(
            "sh", "-c", f"printf '%s' \"$1\" >{folder}/python3; chmod 755 {folder}/python3", "-", fake
        )
    there.inside("sh", "-c", f"echo 'export PATH={folder}' >/home/carol/.bashrc")
    try:
        said = refuse(there, "-H", f"carol@{HOST}", *CONFIG)
    finally:
        there.inside("rm", "-r", folder, "/home/carol/.bashrc")
    assert (f"has Python {old}, but" if old else "has no python3, but") in said


# --- who we are there ------------------------------------------------------------------------------


def on_terminal(there: Buildhost, arguments: list[str], answers: list[tuple[str, str]]) -> tuple[int, str]:
    """Run a command line of the client's on a terminal; answers status and all that was shown."""
    env = cli.environment({**there.env, "NO_COLOR": "1"})
    return cli.on_terminal([*there.prefix, *cli.INV, *arguments], answers, env)


QUESTION = f"sudo password of bob on bob@{HOST}"


def test_a_sudo_password_is_asked_once_and_never_shown(there: Buildhost) -> None:
    """Three verbs of one line, one of them on a terminal of its own, ask once."""
    arguments = ["-H", f"bob@{HOST}", "config", "plan", "config", *TINY]
    status, shown = on_terminal(there, arguments, [(QUESTION, PASSWORD)])
    assert status == 0, shown
    assert shown.count("sudo password") == 1
    assert PASSWORD not in shown
    assert "/var/lib/images/systemvm" in shown


def test_a_wrong_sudo_password_is_one_clear_error(there: Buildhost) -> None:
    wrong = "not it"
    status, shown = on_terminal(there, ["-H", f"bob@{HOST}", *CONFIG], [(QUESTION, wrong)])
    assert status == 1
    assert "error: the sudo password is wrong (bob on bob@127.0.0.1)" in shown
    assert "Traceback" not in shown
    assert wrong not in shown
    there.wait_until_empty()


def test_who_has_no_sudo_says_so_with_an_empty_answer_or_a_flag(there: Buildhost) -> None:
    status, shown = on_terminal(there, ["-H", f"bob@{HOST}", *CONFIG], [(QUESTION, "")])
    assert status == 0, shown
    assert "/home/bob/.local/share/systemvm" in shown
    status, shown = on_terminal(there, ["-H", f"bob@{HOST}", "--rootless", *CONFIG], [])
    assert status == 0, shown
    assert "sudo" not in shown
    assert "/home/bob/.local/share/systemvm" in shown


def test_sudo_without_a_password_and_root_ask_nothing(there: Buildhost) -> None:
    for user in ("root", "alice"):
        status, shown = on_terminal(there, ["-H", f"{user}@{HOST}", *CONFIG], [])
        assert status == 0, shown
        assert "/var/lib/images/systemvm" in shown
        assert "sudo" not in shown


def test_a_password_is_in_no_argv_there(there: Buildhost) -> None:
    """While the agent runs, sudo and all below it show their command lines to everybody."""
    hole = "add table inet hole; add chain inet hole in { type filter hook input priority 0 ; }"
    there.inside("nft", f"{hole}; add rule inet hole in tcp dport 81 drop")
    child = start(there, "bob", "resolve", *TINY, "--set", "debian_mirror=http://127.0.0.1:81")
    until(lambda: "agent/__main__.py serve" in str(there.processes()))
    listed = (
        there.inside("ps", "axww", "-o", "args")
        + subprocess.run(["ps", "axwwe", "-o", "args"], capture_output=True, text=True, check=True).stdout
    )
    assert PASSWORD not in listed
    child.kill()
    child.wait()
    there.wait_until_empty()
    there.inside("nft", "delete table inet hole")
