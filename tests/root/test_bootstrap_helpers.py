"""Programs that stand in PATH before those of a tree while its packages are configured."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from build import debootstrap
from tests.waiting import LONG

pytestmark = pytest.mark.root

PROGRAM = r"""#!/usr/bin/perl
use strict;
use File::Temp qw(tempfile);
my ($words, $hello, $folder) = (join(",", @ARGV), $ENV{GREETING} // "-", readlink "/proc/self/cwd");
my $told = sprintf "%s|%s|%s|%04o|%s", $words, $hello, $folder, umask,
    join "", <STDIN>;
print "out $0 $told\n";
print STDERR "err $told\n";
kill $1, $$ if ($ARGV[0] // "") =~ /^kill(\d+)$/;
die "it broke\n" if ($ARGV[0] // "") eq "die";
exit($ARGV[0] // 0);
"""


class Front:
    """A folder that PATH begins with, and one with the programs themselves behind it."""

    def __init__(self, folder: Path, helper: str, program: str, text: str) -> None:
        self.here, self.behind = folder / "here", folder / "behind"
        self.here.mkdir()
        self.behind.mkdir()
        shutil.copy(Path(debootstrap.__file__).with_name(helper), self.here)
        (self.here / program).symlink_to(helper)
        (self.behind / program).write_text(text)
        (self.behind / program).chmod(0o755)
        self.helper, self.program = self.here / helper, program

    def call(self, *words: str, text: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.here}:{self.behind}:{os.environ['PATH']}"
        line = ["sh", "-c", 'umask 027; exec "$@"', "sh", self.program, *words]
        return subprocess.run(
            line,
            input=text,
            env={"PATH": path, "LC_ALL": "C.UTF-8", **env},
            cwd=self.behind,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        env = {"PATH": f"{self.behind}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [self.helper, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@contextlib.contextmanager
def serving(front: Front) -> Iterator[None]:
    """Serve, until it is over."""
    server = front.start("serve", "File::Temp", "No::Such::Module")
    try:
        while not (front.here / "socket").exists():
            assert server.poll() is None
            time.sleep(0.01)
        yield
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def perl(tmp_path: Path) -> Front:
    return Front(tmp_path, "warm", "told", PROGRAM)


@pytest.mark.parametrize("words", [(), ("3",), ("0", "a b", "", "ü\n'"), ("die",), ("kill15",)])
def test_a_warm_program_does_what_it_does_alone(perl: Front, words: tuple[str, ...]) -> None:
    alone = perl.call(*words, text="in\nput\n", GREETING="hi there")
    with serving(perl):
        warm = perl.call(*words, text="in\nput\n", GREETING="hi there")
    assert (warm.stdout, warm.stderr) == (alone.stdout, alone.stderr)
    assert f"{','.join(words)}|hi there|{perl.behind}|0027|in\nput\n" in warm.stderr
    # A signal is told as a shell tells it.
    assert warm.returncode == (alone.returncode if alone.returncode >= 0 else 128 - alone.returncode)


def test_output_goes_to_the_end_of_a_file_that_others_write_to(perl: Front, tmp_path: Path) -> None:
    """As the log of a step."""
    with serving(perl), (tmp_path / "log").open("ab") as log:
        path = f"{perl.here}:{perl.behind}:{os.environ['PATH']}"
        line = [
            "sh",
            "-c",
            "echo before; told 0 one </dev/null; echo between; told 0 two </dev/null; echo after",
        ]
        subprocess.run(line, env={"PATH": path}, stdout=log, stderr=log, check=True)
    told = [text.split()[0] for text in (tmp_path / "log").read_text().splitlines() if text]
    assert (told[0], told[3], told[6]) == ("before", "between", "after")
    assert sorted(told[1:3]) == sorted(told[4:6]) == ["err", "out"]


def test_calls_at_the_same_time_do_not_mix(perl: Front) -> None:
    with serving(perl):
        path = f"{perl.here}:{perl.behind}:{os.environ['PATH']}"
        many = [
            subprocess.Popen(
                ["told", str(number)],
                executable=perl.here / "told",
                env={"PATH": path, "GREETING": str(number)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(20)
        ]
        for number, one in enumerate(many):
            out, _ = one.communicate(timeout=LONG)
            assert one.returncode == number
            assert f"{number}|{number}|" in out


@pytest.fixture
def slow(tmp_path: Path) -> Front:
    text = '#!/bin/sh\necho "$(basename "$0") $#: $*"\n[ "$1" != fail ] || exit 7\n'
    front = Front(tmp_path, "later", "compile", text)
    (front.here / "compile.queue").touch()
    return front


def test_what_is_noted_is_done_beside(slow: Front) -> None:
    first = slow.call("-p", "one:amd64", "/usr/lib/x.y", "-V", "3.11-")
    assert (first.returncode, first.stdout) == (0, "")
    running = slow.start("run", "compile")
    second = slow.call()
    assert (second.returncode, second.stdout) == (0, "")
    assert len((slow.here / "compile.queue").read_text().splitlines()) == 2
    with (slow.here / "compile.queue").open("a") as queue:  # a line that is written in two pieces
        queue.write("compile thi")
        queue.flush()
        time.sleep(0.2)
        queue.write("rd\n")
    (slow.here / "done").touch()
    out, _ = running.communicate(timeout=LONG)
    assert running.returncode == 0
    assert out.splitlines() == [
        "compile 5: -p one:amd64 /usr/lib/x.y -V 3.11-",
        "compile 0: ",
        "compile 1: third",
    ]


@pytest.mark.parametrize("words", [("a b",), ("",), ("$(id)",), ("a\nb",), ("x*",), ("ü",)])
def test_what_a_line_cannot_hold_is_done_at_once(slow: Front, words: tuple[str, ...]) -> None:
    done = slow.call("-p", *words)
    assert done.stdout == f"compile 2: -p {words[0]}\n"
    assert (slow.here / "compile.queue").read_text() == ""
    assert slow.call("fail", *words).returncode == 7


def test_the_first_that_fails_ends_it(slow: Front) -> None:
    slow.call("fail")
    slow.call("never")
    (slow.here / "done").touch()
    running = slow.start("run", "compile")
    out, _ = running.communicate(timeout=LONG)
    assert running.returncode == 7
    assert out == "compile 1: fail\n"
