"""`./inv test` of an ordinary user at a terminal, with a real sudo: who runs what, what is asked and said."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest
from passlib.hash import sha512_crypt

from build.engine.rings import PRIVILEGED, RINGS
from tests import cli, ordinary

pytestmark = pytest.mark.root
HOME = Path("/mnt")
PASSWORD = "it's 1 password"
ASKED = f"[sudo] password for {ordinary.NAME}: "
INDEX = "http://me:secret@index.invalid/simple"
SAW = f"{INDEX} {HOME}/bin"
"""What a test finds in its environment."""
SUDOERS = f"""Defaults env_reset, lecture=never, passwd_tries=1, !mail_badpass, !mail_no_user
root ALL=(ALL:ALL) ALL
{ordinary.NAME} ALL=(ALL:ALL) ALL
"""
PLANTED = f"""
import os, subprocess, sys
from pathlib import Path

def test_planted() -> None:
    seen = Path("{HOME}/seen", Path(__file__).parent.name)
    seen.write_text(os.environ.get("PIP_INDEX_URL", "") + " " + os.environ["PATH"].partition(":")[0])
    if os.getuid() == 0:
        subprocess.run([sys.executable, "-c", "import build.engine.rings"], check=True)
"""
"""Writes a file whose owner is who ran it; what root imports would leave compiled files."""
PROPERTY = """
from hypothesis import given, strategies

@given(strategies.none())
def test_planted_property(_nothing: None) -> None: ...
"""
"""Would leave what Hypothesis notes of the tests that it sees."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's home with a checkout that has one test in each ring."""
    checkout = tmp_path / "home/checkout"
    leave = shutil.ignore_patterns(".*", "__pycache__", "test_*.py", "dist", "logs")
    shutil.copytree(cli.CHECKOUT, checkout, symlinks=True, ignore=leave)
    (checkout / ".venv").mkdir()
    for ring in RINGS:
        (checkout / "tests" / ring / "test_planted.py").write_text(PLANTED)
    (checkout / "tests/unit/test_planted_property.py").write_text(PROPERTY)
    (tmp_path / "home/seen").mkdir()
    for path in (tmp_path / "home", *(tmp_path / "home").rglob("*")):
        os.chown(path, ordinary.UID, ordinary.UID, follow_symlinks=False)
    return tmp_path / "home"


def run(home: Path, typed: str, sudoers: str = SUDOERS) -> tuple[int, str, dict[str, tuple[int, str]]]:
    """Run the tests as the user and type a password; answers status, what was shown, who ran each ring."""
    tables = home.with_name("tables")
    tables.mkdir()
    hashed = sha512_crypt.using(rounds=1000).hash(PASSWORD)
    shadow = f"root:*:19000:0:99999:7:::\n{ordinary.NAME}:{hashed}:19000:0:99999:7:::\n"
    # The tests' temporary folders, and sudo's memory of who has just typed a password, are this run's own.
    before = [
        shlex.join(["mount", "--bind", f"{cli.CHECKOUT}/.venv", f"{home}/checkout/.venv"]),
        shlex.join(["mount", "--rbind", str(home), str(HOME)]),
        "mount -t tmpfs -o mode=1777 tmpfs /tmp",
        "mount -t tmpfs tmpfs /run",
        f"cd {HOME}/checkout",
    ]
    argv = [
        *ordinary.prefix(tables, HOME, more={"shadow": shadow, "sudoers": sudoers}, before=before),
        *("env", f"PATH={HOME}/bin:/usr/local/bin:/usr/bin:/bin", f"PIP_INDEX_URL={INDEX}"),
        *("./inv", "test", "-k", "planted"),
    ]
    status, shown = cli.on_terminal(argv, [(ASKED, typed)], cli.environment())
    seen = {path.name: (path.stat().st_uid, path.read_text()) for path in (home / "seen").iterdir()}
    foreign = [path for path in home.rglob("*") if path.lstat().st_uid != ordinary.UID]
    assert {path.parent.name for path in foreign} <= {"seen"}
    return status, shown, seen


OWN = {ring: (ordinary.UID, SAW) for ring in RINGS if ring not in PRIVILEGED}


def test_sudo_is_asked_once_and_runs_what_needs_root(home: Path) -> None:
    status, shown, seen = run(home, PASSWORD)
    assert status == 0, shown
    first, _, rest = shown.partition(ASKED)
    assert first.strip() == (
        "sudo is for the root and remote tests: they make users, namespaces and mounts; "
        "the others follow without it"
    )
    assert "password" not in rest
    assert seen == {**OWN, **dict.fromkeys(PRIVILEGED, (0, SAW))}


@pytest.mark.parametrize(
    ("sudoers", "says"),
    [
        (SUDOERS, "1 incorrect password attempt"),
        pytest.param(
            *(SUDOERS.replace(ordinary.NAME, "nobody"), "is not in the sudoers file"),
            marks=pytest.mark.soak(15),
        ),
    ],
    ids=["wrong password", "not in sudoers"],
)
def test_where_sudo_refuses_the_others_run_and_the_end_says_so(home: Path, sudoers: str, says: str) -> None:
    status, shown, seen = run(home, PASSWORD if "nobody" in sudoers else "wrong", sudoers)
    assert status == 1, shown
    assert shown.count(ASKED) == 1
    assert says in shown
    assert [line.strip() for line in shown.strip().splitlines()[-2:]] == [
        "error: tests failed (root, remote: not run, sudo refused; unit, golden, boot: passed)",
        "hint: `./inv test` with --ring root and --ring remote as root, or as a user whom sudo lets",
    ]
    assert seen == OWN
