"""Packages whose maintainer scripts try every way out of the tree: each must fail, in root and in user mode.

The same script runs in a plain chroot, too, as scripts once did: there it does get out, so what it tries is
real. Whatever it tries is harmless where it succeeds.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from build.agent import enter
from build.engine.plan import Step
from build.engine.resolution import Package, Resolution
from tests import mirror
from tests.root.test_bootstrap import Somewhere, described, resolved

pytestmark = pytest.mark.root

ATTEMPTS = r"""#!/usr/bin/perl
# Writes `NAME got out` or `NAME REASON` for each attempt.
use strict;
use warnings;
use Errno;
use Socket;

my ($canary, $written, $mark, $port, $outcome) = ("@CANARY@", "@WRITTEN@", "@MARK@", @PORT@, "@OUTCOME@");

sub text { my ($path) = @_; open(my $file, "<", $path) or return ""; local $/; return <$file> // ""; }
sub again { # write to a file what stands in it
    my ($path) = @_;
    my $value = text($path);
    open(my $file, "+<", $path) or return 0;
    return defined(syswrite($file, $value)) && close($file);
}
sub apart { # for what cannot be undone: in a process and, if we may, with mounts of its own
    my ($try) = @_;
    my $child = fork // die;
    unless ($child) {
        syscall(272, 0x00020000);
        exit($try->() ? 0 : ($!+0) || 1);
    }
    waitpid($child, 0);
    $! = $? >> 8;
    return $? == 0;
}
sub call { my ($number, @words) = @_; return syscall($number, @words) != -1; }
sub up { return ("../" x 40) . $canary; }

my ($none, $empty, $slash, $tmpfs, $mnt, $proc, $sys, $dev, $null) =
    (0, "", "/", "tmpfs", "/mnt", "/proc", "/sys", "/dev", "/dev/null");

my %attempts = (
    # Whoever may call it learns that there is no such module or command; who may not is told just that.
    module => sub { call(175, $none, $none, $empty) || $!{ENOEXEC} || $!{EFAULT} || $!{EINVAL} },
    reboot => sub { call(169, 0xfee1dead, 672274793, 0xbad, $none) || $!{EINVAL} },
    sysrq => sub {
        open(my $file, ">", "/proc/sysrq-trigger") or return 0;
        return syswrite($file, "h"); # help
    },
    sysctl => sub { again("/proc/sys/vm/swappiness") },
    hostname => sub { again("/proc/sys/kernel/hostname") },
    sysfs => sub { again("/sys/kernel/rcu_normal") },
    mem => sub { open(my $file, "<", "/dev/mem") },
    node => sub { chmod((stat "/dev/null")[2] & 07777, "/dev/null") }, # to what it is
    owner => sub { chown(0, 0, "/dev/zero") },
    mknod => sub {
        my $node = "/node";
        my $made = call(133, $node, 060600, 0x7ff);
        my $why = $!+0;
        unlink $node if $made;
        $! = $why;
        return $made;
    },
    processes => sub {
        opendir(my $folder, "/proc") or return 0;
        return grep { /^\d+$/ && index(text("/proc/$_/cmdline"), $mark) >= 0 } readdir($folder);
    },
    signal => sub { kill(0, @PID@) && index(text("/proc/@PID@/cmdline"), $mark) >= 0 },
    ptrace => sub {
        index(text("/proc/@PID@/cmdline"), $mark) >= 0 or return 0;
        return apart(sub {
            call(101, 16, @PID@, $none, $none) or return 0;
            waitpid(@PID@, 0);
            return call(101, 17, @PID@, $none, $none);
        });
    },
    network => sub {
        socket(my $client, PF_INET, SOCK_STREAM, 0) or return 0;
        return connect($client, pack_sockaddr_in($port, inet_aton("127.0.0.1")));
    },
    abstract => sub {
        socket(my $client, PF_UNIX, SOCK_STREAM, 0) or return 0;
        return connect($client, pack_sockaddr_un("\0$mark"));
    },
    read => sub { text($canary) ne "" },
    climb => sub {
        return apart(sub {
            mkdir "/cell";
            opendir(my $outside, "/") or return 0;
            chroot("/cell") or return 0;
            rmdir "/cell";
            call(81, fileno($outside)) or return 0;
            return text(up()) ne "";
        });
    },
    roots => sub { grep { text("/proc/$_/root$canary") ne "" } (1, @PID@) },
    write => sub {
        for my $path ($written, "/proc/1/root$written", "/proc/@PID@/root$written") {
            open(my $file, ">>", $path) or next;
            print $file "x";
            return close($file);
        }
        return 0;
    },
    descriptor => sub {
        opendir(my $folder, "/proc/self/fd") or return 0;
        my @open = grep { /^\d+$/ && $_ != fileno($folder) } readdir($folder);
        return grep { text("/proc/self/fd/$_/" . up()) ne "" } @open;
    },
    mount => sub { apart(sub { call(165, $tmpfs, $mnt, $tmpfs, $none, $none) }) },
    remount_proc => sub { apart(sub { call(165, $empty, $proc, $none, 32 | 4096, $none) }) },
    remount_sys => sub { apart(sub { call(165, $empty, $sys, $none, 32 | 4096, $none) }) },
    unmount_proc => sub { apart(sub { call(166, $proc, 2) }) },
    unmount_sys => sub { apart(sub { call(166, $sys, 2) }) },
    unmount_dev => sub { apart(sub { call(166, $dev, 2) }) },
    join => sub {
        return grep {
            my $pid = $_;
            apart(sub {
                open(my $file, "<", "/proc/$pid/ns/net") or return 0;
                return call(308, fileno($file), $none);
            });
        } (1, @PID@);
    },
    mounts => sub { apart(sub { call(272, 0x00020000) }) },
    user => sub { apart(sub { call(272, 0x10000000) }) },
    keys => sub { call(250, $none, -4, 1) },
    handle => sub {
        my $handle = pack("IiC128", 128, 0, (0) x 128);
        my $id = pack("i", 0);
        call(303, -100, $slash, $handle, $id, $none) or return 0;
        opendir(my $folder, "/") or return 0;
        return call(304, fileno($folder), $handle, $none) || $!{ESTALE}; # a handle that it would open
    },
);

open(my $told, ">", $outcome) or die "$outcome: $!";
for my $name (sort keys %attempts) {
    $! = 0;
    my $out = $attempts{$name}->();
    print $told "$name ", ($out ? "got out" : "failed: $!"), "\n";
}
print $told "capabilities ", (text("/proc/self/status") =~ /^CapBnd:\s*(\S+)/m), "\n";
close($told) or die;
"""


@dataclass(frozen=True)
class Outside:
    """What the scripts would reach: files, a process and servers of this test."""

    folder: Path
    child: subprocess.Popen[bytes]
    mark: str
    port: int

    def script(self, outcome: str) -> str:
        """The attempts, and where in the tree their outcome goes."""
        values = {
            "CANARY": self.folder / "canary",
            "WRITTEN": self.folder / "open" / "written",
            "MARK": self.mark,
            "PORT": self.port,
            "PID": self.child.pid,
            "OUTCOME": outcome,
        }
        text = ATTEMPTS
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        return text


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o755)
    (folder / "canary").write_text("of the host")
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    mark = f"hostile-{os.getpid()}-{time.monotonic_ns()}"
    with (
        subprocess.Popen([mark, "3600"], executable="/usr/bin/sleep") as child,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0{mark}")
        abstract.listen()
        yield Outside(folder, child, mark, server.getsockname()[1])
        assert child.poll() is None, "a script ended a process of the host"
        child.kill()


@pytest.fixture(scope="module")
def hostile(cache: Path, outside: Outside) -> Resolution:
    """A set with a hostile package in the base and one in the rest."""
    found = resolved(cache, "netbase")
    return replace(
        found, packages=(*found.packages, *(_package(cache, outside, base) for base in (True, False)))
    )


NAMES = {True: "hostile-base", False: "hostile-rest"}
STAGES = [f"{name}.{stage}" for name in NAMES.values() for stage in ("preinst", "postinst")]


def _package(cache: Path, outside: Outside, base: bool) -> Package:
    name = NAMES[base]
    scripts = {f"DEBIAN/{stage}": outside.script(f"/{name}.{stage}") for stage in ("preinst", "postinst")}
    made = mirror.build(mirror.Deb(name, files=scripts), cache)
    content = made.read_bytes()
    package = Package(name, "1", "amd64", hashlib.sha256(content).hexdigest(), len(content), "", base)
    made.rename(cache / "debs" / package.filename)
    return package


def outcomes(file: Path) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in file.read_text().splitlines())


def assert_held(told: dict[str, str]) -> None:
    kept = sum(1 << number for number in enter.KEPT.values())
    assert int(told.pop("capabilities"), 16) == kept
    assert len(told) == ATTEMPTS.count(" => sub {")
    assert not [name for name, outcome in told.items() if not outcome.startswith("failed: ")]


@contextmanager
def built(folder: Path, cache: Path, step: Step, *, user: bool) -> Iterator[Path]:
    folder.chmod(0o755)
    somewhere = Somewhere(folder, cache, user=user)
    try:
        yield somewhere.build(step)
    finally:
        somewhere.remove()


def test_the_attempts_get_out_of_a_plain_chroot(
    tmp_path: Path, cache: Path, hostile: Resolution, outside: Outside
) -> None:
    """The control group. What this machine's kernel has not, or a container keeps, says nothing."""
    with built(tmp_path, cache, described(hostile, asked=("netbase",)), user=False) as tree:
        (tree / "attempts").write_text(outside.script("/attempts.told"))
        lines = (
            'mount -t proc proc "$0/proc"; mount --rbind /sys "$0/sys"; mount --rbind /dev "$0/dev"',
            'exec chroot "$0" perl /attempts 5</',
        )
        argv = ["unshare", "--mount", "--propagation", "private", "bash", "-euc", "\n".join(lines), str(tree)]
        subprocess.run(argv, check=True, cwd="/")
        told = outcomes(tree / "attempts.told")
    got_out = {name for name, outcome in told.items() if outcome == "got out"}
    assert {
        *("sysctl", "hostname", "mknod", "reboot", "processes", "signal", "ptrace", "network", "abstract"),
        *("climb", "roots", "write", "descriptor", "mount", "remount_proc", "unmount_sys", "join", "handle"),
        *("node", "owner"),
    } <= got_out
    assert (outside.folder / "open/written").read_text() == "x"
    (outside.folder / "open/written").unlink()


@pytest.mark.parametrize(
    "kind",
    [
        "root builtin",
        "user builtin",
        pytest.param("root mmdebstrap", marks=pytest.mark.soak(25)),
        "root debootstrap",
    ],
)
def test_no_script_gets_out_of_the_tree(
    kind: str, tmp_path: Path, cache: Path, hostile: Resolution, outside: Outside
) -> None:
    mode, tool = kind.split()
    step = described(hostile, tool, asked=("netbase",))
    with built(tmp_path, cache, step, user=mode == "user") as tree:
        for stage in STAGES:
            assert_held(outcomes(tree / stage))
    assert not (outside.folder / "open/written").exists()
