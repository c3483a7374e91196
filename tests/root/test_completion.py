"""Completion in the real shells, by the scripts that `inv completion` prints."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests import cli
from tests.waiting import until

LINES = {
    "inv conf": {"config"},
    "inv convert.vm": {"convert.vmdk"},
    "inv shell --at tw": {"tweak"},
    "inv why m": {"minimize"},
    "inv --set suite=": {"bookworm", "trixie"},
    "inv --set vrrp.advert": {"vrrp.advert_int="},
    "inv build --formats vhd,qc": {"vhd,qcow2"},
    "inv params --type secs": {"secstorage"},
    "inv --set suite=trixie plan --sc": {"--script"},
}
"""What the last word of a line can become; for bash what stands behind the last `=` or `:` of it."""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {**cli.environment(), "HOME": str(tmp_path), "TERM": "xterm"}


def script(shell: str) -> str:
    return cli.succeed("completion", shell)


@pytest.mark.parametrize("line", LINES)
def test_bash(line: str, env: dict[str, str]) -> None:
    words = shlex.join(line.split(" "))
    ask = f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=({words}) COMP_CWORD=0"
    text = f'compopt() {{ :; }}\n{script("bash")}\n{ask}\n_systemvm_inv\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == LINES[line]


@pytest.mark.parametrize("line", LINES)
def test_fish(line: str, env: dict[str, str]) -> None:
    text = f"{script('fish')}\ncomplete --do-complete {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", text], env=env, capture_output=True, text=True, check=True
    )
    front = line.split(" ")[-1].rpartition("=")[0]
    wanted = {f"{front}={word}" if front else word for word in LINES[line]}
    assert set(done.stdout.split()) == wanted


def test_zsh(env: dict[str, str], tmp_path: Path) -> None:
    """On a terminal: zsh completes nowhere else."""
    (tmp_path / ".zshrc").write_text(f"autoload -U compinit; compinit -u; PS1='$ '\n{script('zsh')}")
    socket = str(tmp_path / "tmux")

    def tmux(*words: str) -> str:
        line = ["tmux", "-S", socket, "-f", "/dev/null", *words]
        return subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout

    def shown() -> str:
        return tmux("capture-pane", "-p")

    tmux("new-session", "-d", "-x", "80", "-y", "24", "zsh")
    try:
        for typed, wanted in {
            "inv conf": "inv config",
            "inv convert.vm": "inv convert.vmdk",
            "inv --set vrrp.advert": "inv --set vrrp.advert_int=",
            "inv shell --at tw": "inv shell --at tweak",
        }.items():
            tmux("send-keys", "C-u")
            tmux("send-keys", "-l", typed)
            tmux("send-keys", "Tab")
            until(lambda wanted=wanted: f"$ {wanted}" in shown(), 30, shown)  # type: ignore[misc]
    finally:
        tmux("kill-server")


def test_an_unknown_shell_is_told() -> None:
    assert "shells: bash, fish, zsh" in cli.refuse("completion", "tcsh")
