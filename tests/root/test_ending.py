"""What is told of a step, a command or the agent that did not end by itself."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from build.agent import memory
from build.engine.plan import Step
from tests import cli
from tests.agent import Agent, Refused, build, place
from tests.images import TINY
from tests.waiting import LONG, until

pytestmark = pytest.mark.root
MIB = 1 << 20
GLUTTON = '"$PYTHON" -c \'bytearray(b"x") * (1 << 30)\''


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -KILL $$", "broken was ended by SIGKILL"),
        ("kill -TERM $$", "broken was ended by SIGTERM"),
        ("sh -c 'kill -SEGV $$'", "broken was ended by SIGSEGV: sh -c 'kill -SEGV $$'"),
        ("sh -c 'kill -KILL $$' || exit 3", "broken failed (exit 3)"),
    ],
)
def test_a_step_that_a_signal_ended(script: str, told: str, tmp_path: Path) -> None:
    agent = Agent()
    try:
        with pytest.raises(Refused) as refused:
            build(agent, place(tmp_path), [Step("broken", f"echo some words\n{script}\n", bootstrap=True)])
    finally:
        agent.close()
    assert refused.value.message.startswith(told)
    assert refused.value.event["tail"][:1] == ["some words"]


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of the version that this machine has, with room for 300 MiB and no swap."""
    mounts = Path("/proc/self/mountinfo").read_text()
    kind, root = next(
        (kind, folder)
        for kind in (memory.V1, memory.V2)
        for _, folder in memory._mounted(mounts, kind)
        if kind is memory.V1 or "memory" in (folder / "cgroup.subtree_control").read_text().split()
    )
    folder = root / f"test-{secrets.token_hex(8)}"
    folder.mkdir()
    (folder / kind.limits[0]).write_text(str(300 * MIB))
    for swap, limit in (("memory.memsw.limit_in_bytes", 300 * MIB), ("memory.swap.max", 0)):
        with contextlib.suppress(FileNotFoundError):  # a kernel without swap, or the other version
            if (folder / swap).exists():
                (folder / swap).write_text(str(limit))
    yield folder
    until(lambda: not (folder / "cgroup.procs").read_text(), 20)
    folder.rmdir()


def inside(group: Path) -> list[str]:
    """Command line that runs what follows it in a control group."""
    return ["bash", "-euc", f'echo $$ >{group}/cgroup.procs; exec "$@"', "inside"]


def test_a_step_that_runs_out_of_memory(group: Path, tmp_path: Path) -> None:
    """Whatever is made of it on the way; and the next one is not blamed for it."""
    agent, where = Agent(inside(group)), place(tmp_path)
    try:
        for script in (GLUTTON, f"{GLUTTON} || exit 1", f'{GLUTTON} || fail "it cannot be" "believe it"'):
            with pytest.raises(Refused) as refused:
                build(agent, where, [Step("broken", script, bootstrap=True)])
            assert refused.value.message == "broken was killed: out of memory"
            assert "more memory (a build needs about 512 MiB)" in refused.value.hint
        with pytest.raises(Refused, match=r"broken failed \(exit 1\): false"):
            build(agent, where, [Step("broken", "false", bootstrap=True)])
        assert build(agent, where, [Step("whole", f"{GLUTTON} || true", bootstrap=True)])
    finally:
        agent.close()


GLUTTONOUS = (sys.executable, "-c", "bytearray(b'x') * (1 << 30)")
RUN = """
import sys
from build.agent import process
from build.agent.events import Failure
try:
    process.run(sys.argv[1:], check=False)
except Failure as failure:
    print(failure.message, failure.hint, sep="; ")
"""


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("sh", "-c", "kill -TERM $$"), "sh was ended by SIGTERM; "),
        (GLUTTONOUS, f"{sys.executable} was killed: out of memory; give"),
        (("sh", "-c", '"$@"; exit 100', "sh", *GLUTTONOUS), "sh was killed: out of memory; give"),
        (("sh", "-c", "exit 100"), ""),
    ],
)
def test_a_command_that_was_killed_is_no_answer(argv: tuple[str, ...], told: str, group: Path) -> None:
    """As apt, which solves the package set."""
    line = [*inside(group), sys.executable, "-c", RUN, *argv]
    said = subprocess.run(line, cwd=cli.CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert said.startswith(told)
    assert bool(said) == bool(told)


def test_a_limit_of_a_group_is_seen_before_a_build_begins(group: Path, tmp_path: Path) -> None:
    agent = Agent(inside(group))
    try:
        with pytest.raises(Refused, match=r"^2\d\d MiB of memory are free, a build needs about 512 "):
            agent.call("preflight", location=str(tmp_path), image=str(tmp_path / "x.img"))
    finally:
        agent.close()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_an_agent_that_a_signal_ended(sign: signal.Signals, tmp_path: Path) -> None:
    """While it waits for a mirror that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = f"debian_mirror=http://127.0.0.1:{silent.getsockname()[1]}"
        client = cli.start("resolve", *TINY, "--set", f"location={tmp_path}", "--set", mirror)
        asked, _ = silent.accept()
        with asked:
            (agent,) = children(client.pid)
            os.kill(agent, sign)
            said, _ = client.communicate(timeout=LONG)
    assert client.returncode == 1
    error, hint = said.strip().splitlines()[-2:]
    assert error == f"error: the agent on this machine was lost: it was ended by {sign.name}"
    assert ("the kernel does that where memory is short" in hint) == (sign is signal.SIGKILL)
    assert "finished layers are kept" in hint


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    files = Path("/proc", str(parent), "task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]
