"""`./inv` on checkouts of its own: the environment it makes, the packages it asks for, its arguments."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from build.engine.rings import NETWORK
from tests.waiting import until

CHECKOUT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    "inv",
    "build/__init__.py",
    "build/agent/debian/packages.py",
    "build/engine/__init__.py",
    "build/engine/handover.py",
    "build/engine/install.sh",
    "build/engine/venv.py",
)
TASKS = """
from build.engine.handover import hand_over

hand_over()
import json, os, sys
from invoke import Argument, task
from invoke.main import program

if program.argv:
    stock = program.core_args
    program.core_args = lambda: [
        *stock(),
        Argument(names=("hosts", "H")),
        Argument(names=("yes",), kind=bool, default=False),
    ]
    program.parse_core(program.argv)


def show(c, text=""):
    print(json.dumps({"argv": sys.argv[1:], "prefix": sys.prefix, "cwd": os.getcwd()}))


for name in ("build", "config", "help", "plan", "test", "verify", "version"):
    globals()[name] = task(show, name=name, default=name == "build")


@task
def register(c, url, zone, endpoint):
    show(c)
"""
PIN = re.compile(r"^invoke==.*?(?=^\S)", re.M | re.S)
LACK = "need build  no-such-tool  no-such-package  nothing\n"


def run(
    checkout: Path,
    *arguments: str,
    shell: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call the launcher with nothing but PATH, HOME and what pip and the network here need."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", *NETWORK) if name in os.environ}
    return subprocess.run(
        [*shell, str(checkout / "inv"), *arguments],
        cwd=cwd or checkout,
        env={**kept, **(env or {})},
        input=text,
        stdin=None if text is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """What the task printed; fails with the launcher's words if it did not run."""
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def write(folder: Path) -> Path:
    """A checkout with the real launcher, a toy tasks.py and a lock of Invoke alone."""
    for name in LAUNCHER:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, target)
    (folder / "tasks.py").write_text(TASKS)
    pin = PIN.search((CHECKOUT / "requirements.lock").read_text())
    assert pin
    (folder / "requirements.lock").write_text(pin[0])
    (folder / "requirements-dev.lock").write_text(f"{pin[0]}# and what tests need\n")
    table = folder / "build/agent/debian/packages.py"
    rows = [line for line in table.read_text().splitlines(keepends=True) if not line.startswith("need")]
    table.write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose environment is made; tests leave it as it is."""
    folder = write(tmp_path_factory.mktemp("ready") / 'it\'s a "checkout"')
    done = run(folder, "build")
    assert told(done)["prefix"] == str(folder / ".venv")
    lines = done.stderr.splitlines()
    assert [lines[0].partition(" with ")[0], *lines[1:]] == [
        "making .venv from requirements.lock",
        f'to call it as plain `inv` from anywhere: export PATH={shlex.quote(str(folder))}:"$PATH"',
    ]
    return folder


@pytest.fixture
def lacking(ready: Path, tmp_path: Path) -> Path:
    """A copy of the ready checkout whose `build` wants a package that this host lacks."""
    folder = tmp_path / "lacking"
    shutil.copytree(ready, folder, symlinks=True)
    table = folder / "build/agent/debian/packages.py"
    table.write_text(table.read_text().replace("verbs test", f"{LACK}verbs test", 1))
    return folder


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with what the launcher calls, and an apt-get that notes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cmp", "id", "mkdir", "rm", "rmdir", "python3"):
        real = shutil.which(name)
        assert real
        (folder / name).symlink_to(real)
    stub(
        folder / "apt-get",
        f'for a; do printf "%s\\n" "$a"; done >>{folder}/called; echo "$RUNLEVEL" >{folder}/runlevel',
    )
    return folder


def presets() -> list[Path]:
    """What keeps services from being started while packages are installed, by whomever on this machine."""
    return list(Path("/run/systemd").glob("system-preset/00-systemvm-builder-*"))


def stub(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", [(), ("dash",), ("bash", "--posix"), ("busybox", "sh")], ids=str)
def test_arguments_arrive_as_they_are(ready: Path, shell: tuple[str, ...]) -> None:
    arguments = ["build", "--text", "a  b\n'c' \"d\" $HOME *"]
    done = run(ready, *arguments, shell=shell)
    assert told(done)["argv"] == arguments
    assert done.stderr == ""


def test_an_empty_argument_and_a_glob_stay(ready: Path) -> None:
    assert told(run(ready, "build", "--text", ""))["argv"] == ["build", "--text", ""]
    assert told(run(ready, "build", "--text=?*[a]"))["argv"] == ["build", "--text=?*[a]"]


def test_the_exit_status_is_invokes(ready: Path) -> None:
    done = run(ready, "nonsense")
    assert done.returncode == 1
    assert "No idea what 'nonsense' is!" in done.stderr


@pytest.mark.parametrize("way", ["path", "link", "relative", "below"])
def test_it_is_found_however_it_is_called(ready: Path, tmp_path: Path, way: str) -> None:
    env = {"PATH": f"{ready}:{os.environ['PATH']}"}
    if way == "link":
        (tmp_path / "far").symlink_to(os.path.relpath(ready / "inv", tmp_path))
        (tmp_path / "inv").symlink_to("far")
    call, cwd = {
        "path": (["inv"], tmp_path),
        "link": ([str(tmp_path / "inv")], tmp_path),
        "relative": (["sh", "inv"], ready),
        "below": (["../inv"], ready / "build"),
    }[way]
    done = subprocess.run([*call, "build"], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert told(done)["prefix"] == str(ready / ".venv")
    assert told(done)["cwd"] == str(cwd)


# --- the environment -------------------------------------------------------------------------------


def test_a_changed_lock_makes_it_anew_and_says_the_path_no_second_time(ready: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(ready, folder, symlinks=True)
    assert told(run(folder, "build"))["prefix"] == str(folder / ".venv")
    with (folder / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    done = run(folder, "build")
    assert told(done)["prefix"] == str(folder / ".venv")
    assert done.stderr.splitlines()[0].startswith("making .venv from requirements.lock")
    assert "export PATH" not in done.stderr
    assert run(folder, "build").stderr == ""
    scripts = (folder / ".venv/bin/invoke").read_text()
    assert ".venv.part" not in scripts
    assert sorted(path.name for path in folder.glob(".venv*")) == [".venv"]


def test_tests_bring_their_own_lock_which_serves_all_verbs(ready: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(ready, folder, symlinks=True)
    assert "from requirements-dev.lock" in run(folder, "test").stderr
    assert run(folder, "build").stderr == ""


def test_two_launchers_at_once_make_one_environment(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkout")
    env = {**os.environ, "SYSTEMVM_X": ""}
    both = [
        subprocess.Popen(
            [folder / "inv", "build"],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [child.communicate() for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert sum("making .venv" in err for _, err in said) == 1
    assert sorted(path.name for path in folder.glob(".venv*")) == [".venv"]


def test_one_that_was_killed_half_way_is_repaired(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkout")
    child = subprocess.Popen(
        [folder / "inv", "build"], cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stderr is not None
    assert child.stderr.readline().startswith("making .venv")
    while not (folder / ".venv.part/bin").is_dir():
        assert child.poll() is None
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert not (folder / ".venv").exists()
    assert told(run(folder, "build"))["prefix"] == str(folder / ".venv")
    assert sorted(path.name for path in folder.glob(".venv*")) == [".venv"]


def test_a_wrong_hash_is_refused_and_the_old_environment_stays(ready: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(ready, folder, symlinks=True)
    lock = folder / "requirements.lock"
    lock.write_text(re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", lock.read_text()))
    done = run(folder, "build")
    assert done.returncode != 0
    assert "error: the Python packages of requirements.lock could not be installed" in done.stderr
    assert "  hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.glob(".venv*")) == [".venv"]
    assert (folder / ".venv/lock").read_text() == (ready / "requirements.lock").read_text()


def test_a_python_that_went_away_is_replaced(ready: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(ready, folder, symlinks=True)
    (folder / ".venv/bin/python").unlink()
    (folder / ".venv/bin/python").symlink_to("/nowhere/python3.11")
    assert told(run(folder, "build"))["prefix"] == str(folder / ".venv")


@pytest.mark.parametrize("found", ["an old one", "none"])
def test_without_a_fitting_python_it_says_so(tmp_path: Path, tools: Path, found: str) -> None:
    folder = write(tmp_path / "checkout")
    (tools / "python3").unlink()
    (tools / "apt-get").unlink()
    if found == "an old one":
        stub(tools / "python3", "exit 1")
    hide = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount --bind {tools}/none "$(readlink -f /usr/bin/python3)"; exec "$@"',
        "-",
    )
    stub(tools / "none", "exit 127")
    done = run(folder, "build", shell=(*hide, "env", f"PATH={tools}", f"{tools}/sh"))
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: no CPython 3.11, 3.12 or 3.13 with ensurepip here\n  hint: install one"
    )


# --- packages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("config",),
        ("plan",),
        ("register", "--url", "build", "--zone", "verify", "--endpoint", "test"),
        ("--help",),
        ("help",),
        ("help", "build"),
        ("--version",),
        ("--list",),
        ("build", "--help"),
        ("-H", "host", "build"),
        ("-Hhost", "build"),
        ("--hosts=host", "build"),
        ("build", "-H", "host"),
    ],
    ids=" ".join,
)
def test_what_does_not_build_here_wants_no_package(lacking: Path, arguments: tuple[str, ...]) -> None:
    done = run(lacking, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments", [("build",), (), ("verify",), ("config", "build"), ("-e", "build")], ids=" ".join
)
def test_what_is_missing_is_named_and_not_installed_unasked(
    lacking: Path, tools: Path, arguments: tuple[str, ...]
) -> None:
    done = run(lacking, *arguments, env={"PATH": str(tools)})
    assert done.returncode == 1
    assert done.stdout == ""
    line = "apt-get install --no-install-recommends no-such-package"
    assert done.stderr.splitlines() == [
        "Debian packages are missing: no-such-package",
        "error: no terminal to ask on",
        f"  hint: repeat it with --yes, or run: {line}",
    ]
    assert not (tools / "called").exists()


@pytest.mark.parametrize(
    ("arguments", "env"), [(("build", "--yes"), {}), (("--yes", "build"), {}), (("build",), {"CI": "true"})]
)
def test_with_consent_apt_installs_them_and_the_verb_runs(
    lacking: Path, tools: Path, arguments: tuple[str, ...], env: dict[str, str]
) -> None:
    done = run(lacking, *arguments, env={"PATH": str(tools), **env})
    assert told(done)["argv"] == [*arguments]
    called = (tools / "called").read_text().splitlines()
    assert [word for word in called if not word.startswith(("-qq", "-o", "D"))] == [
        "update",
        *("install", "-y", "--no-install-recommends", "--", "no-such-package"),
    ]
    assert (tools / "runlevel").read_text() == "1\n"
    until(lambda: not presets(), say=lambda: f"left: {presets()}")


def test_apt_that_fails_ends_it_with_the_line_to_run(lacking: Path, tools: Path) -> None:
    stub(tools / "apt-get", '[ "$6" = update ] || exit 100')
    done = run(lacking, "build", "--yes", env={"PATH": str(tools)})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "error: the packages could not be installed",
        "  hint: ask an administrator to run: apt-get install --no-install-recommends no-such-package",
    ]
    until(lambda: not presets(), say=lambda: f"left: {presets()}")


@pytest.mark.parametrize(("answer", "installs"), [("\n", True), ("y\n", True), ("n\n", False), ("", False)])
def test_on_a_terminal_it_asks(lacking: Path, tools: Path, answer: str, installs: bool) -> None:
    done = on_terminal([str(lacking / "inv"), "build"], answer, {"PATH": str(tools)})
    assert "Install them? [Y/n] " in done
    assert ("nothing was installed" in done) is not installs
    assert (tools / "called").exists() is installs


def on_terminal(argv: list[str], answer: str, env: dict[str, str]) -> str:
    """Run with a terminal of its own, answer its question, and give back all it showed."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(argv[0], argv, env)
    shown = b""
    while b"[Y/n] " not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, answer.encode() or b"\x04")
    try:
        while chunk := os.read(terminal, 1024):
            shown += chunk
    except OSError:
        pass  # the terminal's other end is closed: it has ended
    os.waitpid(pid, 0)
    return shown.decode()


def test_without_root_and_sudo_it_gives_the_line_for_an_administrator(lacking: Path, tools: Path) -> None:
    stub(tools / "none", "")
    (tools / "id").unlink()
    stub(tools / "id", "echo 1000")
    done = run(lacking, "build", "--yes", env={"PATH": str(tools)})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: Debian packages are missing: no-such-package",
        "  hint: ask an administrator to run: apt-get install --no-install-recommends no-such-package",
    ]
    assert not (tools / "called").exists()


def test_sudo_is_for_apt_alone(lacking: Path, tools: Path) -> None:
    (tools / "id").unlink()
    stub(tools / "id", "echo 1000")
    stub(tools / "sudo", f'echo "$@" >>{tools}/sudone; exec "$@"')
    assert told(run(lacking, "build", "--yes", env={"PATH": str(tools)}))
    assert (tools / "sudone").read_text() == f"sh {lacking}/build/engine/install.sh no-such-package\n"
    assert "install" in (tools / "called").read_text()


def test_a_host_without_apt_is_told_where_to_build(lacking: Path, tools: Path) -> None:
    (tools / "apt-get").unlink()
    done = run(lacking, "build", "--yes", env={"PATH": str(tools)})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: this host is not Debian and lacks: no-such-package",
        "  hint: build on a Debian host: ./inv -H HOST ...",
    ]


# --- a foreign inv ---------------------------------------------------------------------------------


def test_a_foreign_inv_goes_on_in_the_checkouts_own(ready: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "other"
    shutil.copytree(ready / ".venv", foreign, symlinks=True)
    done = subprocess.run(
        [foreign / "bin/python", foreign / "bin/invoke", "build", "--text", "a b\nc"],
        cwd=ready,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told(done) == {
        "argv": ["build", "--text", "a b\nc"],
        "prefix": str(ready / ".venv"),
        "cwd": str(ready),
    }


def test_the_hand_over_needs_no_library(ready: Path) -> None:
    lines = (
        "import sys",
        "sys.path.insert(0, '.')",
        "from build.engine import handover",
        "handover.hand_over()",
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "\n".join([*lines, "print('in')"])],
        cwd=ready,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "in\n", done.stderr


# --- the real checkout -----------------------------------------------------------------------------


def test_a_fresh_clone_lists_its_verbs(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", CHECKOUT, clone], check=True)
    done = run(clone, "--list")
    assert done.returncode == 0, done.stderr
    for verb in ("build", "config", "doctor", "plan", "verify"):
        assert re.search(rf"^  {verb}\b", done.stdout, re.M)
