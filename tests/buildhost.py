"""A build host of the tests' own: namespaces with users, sudoers and a real sshd, and nothing of ours.

Its mounts hide the checkout, `.venv` and temporary folders, so that a local path which leaks to the remote
side fails there. Client and host share a network namespace of the test's, where packets can be dropped.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from passlib.hash import sha512_crypt

from tests import ordinary
from tests.waiting import until

CHECKOUT = Path(__file__).resolve().parents[1]
PASSWORD = "geheim $x' 7"
USERS = {"alice": 54401, "bob": 54402, "carol": ordinary.UID}
"""May use sudo freely; with a password; not at all, and owns what the ordinary user here built."""
SUBIDS = {"alice": "200000:65536", "bob": "265536:65536", "carol": ordinary.SUBIDS}
SUDOERS = """Defaults env_reset, use_pty
Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
root ALL=(ALL:ALL) ALL
alice ALL=(ALL) NOPASSWD: ALL
bob ALL=(ALL) ALL
"""
HOST, JUMP = "127.0.0.1", "127.0.0.2"
JUMP_PORT = 2222
RELAY, LATE = CHECKOUT / "tests/remote/relay.py", 0.05
"""Makes the host `far`: seconds from here to there, and as many back."""
KEPT = "systemvm-builder"
"""Name of the folder of ours that stays for the next run."""
HIDDEN = ("/tmp", str(CHECKOUT), sys.prefix)


@dataclass(frozen=True)
class Buildhost:
    """The running host: its first process as seen from here, and the folder that holds its state."""

    pid: int
    folder: Path
    mounts: list[str]
    """What was mounted there when it started."""

    @property
    def client(self) -> Path:
        """Home of the user who sits at the client."""
        return self.folder / "client"

    @property
    def prefix(self) -> list[str]:
        """What a client's command line begins with: ssh takes a home from the user database only."""
        table = shlex.quote(str(self.folder / "passwd"))
        enter = f'mount --bind {table} /etc/passwd; exec "$@"'
        return [
            *("nsenter", f"--net=/proc/{self.pid}/ns/net", "--"),
            *("unshare", "--mount", "--propagation", "private", "bash", "-euc", enter, "client"),
        ]

    @property
    def env(self) -> dict[str, str]:
        """Environment of a client."""
        return {"HOME": str(self.client), "SSH_AUTH_SOCK": ""}

    def inside(self, *argv: str) -> str:
        """Run a command on the host as its root; answers what it printed."""
        line = ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", "-r", "--", *argv]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout

    def kept(self, user: str) -> Path:
        """Folder of this user's that stays for the next run, as seen from here."""
        if user == "root":
            return Path(f"/proc/{self.pid}/root/var/lib", KEPT)
        return self.folder / "home" / user / ".local/state" / KEPT

    def location(self, user: str) -> Path:
        """Where a build of this user's lies by default, as seen from here; root's for those who have sudo."""
        if user == "carol":
            return self.folder / "home/carol/.local/share/systemvm"
        return self.folder / "images/systemvm"

    def processes(self) -> dict[int, str]:
        """What runs there beside sshd and the first process: numbers as seen there, and command lines."""
        found = {}
        for entry in Path(f"/proc/{self.pid}/root/proc").glob("[0-9]*"):
            try:
                if entry.name == "1" or (entry / "comm").read_text().strip().startswith("sshd"):
                    continue
                if _is_reaped(entry):
                    continue
                words = (entry / "cmdline").read_bytes() or b"[ending]"
                found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
        return found

    def wait_until_empty(self, seconds: float = 40) -> None:
        """Wait until nothing of ours runs there, and see that no mount and no temporary file is left."""
        self.wait_until_idle(seconds)
        # One that was there may go: whoever mounted it elsewhere on this machine removes its folder.
        assert not Counter(_mounts(self.pid)) - Counter(self.mounts)
        assert self.inside("ls", "-A", "/tmp", "/var/tmp").split() == ["/tmp:", "/var/tmp:"]

    def wait_until_idle(self, seconds: float = 40) -> None:
        """Wait until nothing of ours runs there."""
        until(lambda: not self.processes(), seconds, lambda: f"still there: {self.processes()}")

    def kill_sessions(self) -> None:
        """End sshd's sessions, not its listeners, with -9."""
        for entry in Path(f"/proc/{self.pid}/root/proc").glob("[0-9]*"):
            try:
                if (entry / "cmdline").read_bytes().startswith(b"sshd: ") and b"[listener]" not in (
                    entry / "cmdline"
                ).read_bytes():
                    self.inside("kill", "-9", entry.name)
            except (OSError, subprocess.CalledProcessError):
                continue

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Drop every packet to and from sshd; nobody is told."""
        rules = "add table inet cut; add chain inet cut in { type filter hook input priority 0 ; }"
        for port in ("dport", "sport"):
            rules += f"; add rule inet cut in tcp {port} 22 drop"
        self.inside("nft", rules)
        try:
            yield
        finally:
            self.inside("nft", "delete table inet cut")

    @contextmanager
    def narrow(self) -> Iterator[None]:
        """Make the line from sshd so narrow that an image takes a while."""
        rules = "add table inet line; add chain inet line out { type filter hook output priority 0 ; }"
        self.inside(
            "nft", f"{rules}; add rule inet line out tcp sport 22 limit rate over 4 mbytes/second drop"
        )
        try:
            yield
        finally:
            self.inside("nft", "delete table inet line")

    def halt(self, pattern: str) -> bool:
        """Stop what runs there with this pattern in its command line; answers whether there is any."""
        found = [str(number) for number, line in self.processes().items() if re.search(pattern, line)]
        if found:
            self.inside("sh", "-c", 'kill -STOP "$@" || true', "-", *found)
        return bool(found)


def _is_reaped(entry: Path) -> bool:
    """Whether a process is a zombie that holds nothing any more.

    Its command line is empty sooner than that: a killed process gives up its memory before its files and the
    locks on them, and while one of its threads still ends it holds both.
    """
    ended = re.search(r"^State:\tZ", (entry / "status").read_text(), re.M)
    return ended is not None and len(list((entry / "task").iterdir())) == 1


def _mounts(pid: int) -> list[str]:
    return [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]


@contextmanager
def running(folder: Path, tree: Path = Path("/")) -> Iterator[Buildhost]:
    """Start a build host with its state in `folder` and the system of `tree`, which stays as it is."""
    for name in ("home", "root", "images", "vartmp", "etc", "client/.ssh"):
        (folder / name).mkdir(parents=True)
    (folder / "vartmp").chmod(0o1777)
    for key in ("host", "jump"):
        keygen(folder / "etc" / key)
    keygen(folder / "client/.ssh/id_ed25519")
    public = (folder / "client/.ssh/id_ed25519.pub").read_text()
    _make_users(folder, public, tree)
    write_client(folder)
    for name, address, port in (("host", HOST, 22), ("jump", JUMP, JUMP_PORT)):
        (folder / "etc" / f"sshd_{name}").write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey /etc/buildhost/{name}\nUsePAM no\n"
            "StrictModes no\nPidFile none\nPermitRootLogin yes\nMaxSessions 100\n"
            "AuthorizedKeysFile /etc/buildhost/authorized\nMaxStartups 100\n"
        )
    (folder / "etc/authorized").write_text(public)
    script = folder / "start.sh"
    script.write_text(_script(folder, tree))
    errors = (folder / "sshd.log").open("wb")
    namespaces = ("--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc")
    child = subprocess.Popen(
        [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "--",
            "unshare",
            *namespaces,
            "--propagation",
            "private",
            "bash",
            "-eu",
            str(script),
        ],
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        start_new_session=True,
    )
    try:
        log = folder / "sshd.log"
        until(lambda: log.read_text().count("listening on 127") == 2, 20, log.read_text)
        first = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0]
        yield Buildhost(int(first), folder, _mounts(int(first)))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        errors.close()


def keygen(path: Path) -> None:
    """Make a key without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)


def write_client(folder: Path) -> None:
    """Give the client the configuration that the tests begin with: both hosts known, and ways to them."""
    ssh = folder / "client/.ssh"
    known = {HOST: "host", f"[{JUMP}]:{JUMP_PORT}": "jump"}
    keys = {name: (folder / f"etc/{key}.pub").read_text().strip() for name, key in known.items()}
    (ssh / "known_hosts").write_text("".join(f"{name} {key}\n" for name, key in keys.items()))
    (ssh / "config").write_text(
        f"Include {ssh}/more\n"
        f"Match host alias user carol\n  HostName {HOST}\n"
        f"Host behind\n  HostName {HOST}\n  ProxyJump root@{JUMP}:{JUMP_PORT}\n"
        f"Host piped\n  HostName {HOST}\n  User root\n"
        "  ProxyCommand bash -c 'exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3'\n"
        f"Host far\n  HostName {HOST}\n  User root\n"
        f"  ProxyCommand {shlex.join([sys.executable, '-I', str(RELAY)])} %h %p {LATE} {folder}/turns\n"
    )
    (ssh / "more").write_text(f"Host included\n  HostName {HOST}\n  User alice\n")


def _make_users(folder: Path, public: str, tree: Path) -> None:
    tables = {name: Path(tree, "etc", name).read_text() for name in ("passwd", "group", "shadow")}
    hashed = sha512_crypt.using(rounds=1000).hash(PASSWORD)
    for name, uid in USERS.items():
        # First, because the number may belong to somebody on this machine.
        tables["passwd"] = f"{name}:x:{uid}:{uid}::/home/{name}:/bin/bash\n" + tables["passwd"]
        tables["group"] = f"{name}:x:{uid}:\n" + tables["group"]
        tables["shadow"] += f"{name}:{hashed if name == 'bob' else '*'}:19000:0:99999:7:::\n"
        (folder / "home" / name).mkdir(mode=0o755)
        os.chown(folder / "home" / name, uid, uid)
    sub = "".join(f"{name}:{ids}\n" for name, ids in SUBIDS.items())
    tables |= {"subuid": sub, "subgid": sub, "sudoers": SUDOERS}
    for name, text in tables.items():
        (folder / "etc" / name).write_text(text)
    (folder / "passwd").write_text(f"root:x:0:0::{folder}/client:/bin/bash\n")


def _script(folder: Path, tree: Path) -> str:
    """What makes the host of bare namespaces."""
    own = shlex.quote(str(folder))
    # The kernel lets a user who is only changed into another root open no user namespace.
    enter = [
        "mount -t tmpfs tmpfs /mnt; mkdir /mnt/upper /mnt/work /mnt/root",
        f"mount -t overlay overlay -o lowerdir={tree},upperdir=/mnt/upper,workdir=/mnt/work /mnt/root",
        "cd /mnt/root; mount -t proc proc proc; mount --rbind /dev dev; mount --rbind /sys sys",
        f"mkdir -p .{own} .{shlex.quote(str(CHECKOUT))}; mount --bind {own} .{own}",
        "pivot_root . .; umount -l .; cd /",
    ]
    lines = [
        *(enter if tree != Path("/") else ()),
        "mount -t tmpfs tmpfs /run",
        "mkdir -m 755 /run/sshd /run/lock /run/upper",
        "ip link set lo up",
        *(
            f"mkdir -p /run/upper/{name} /run/work/{name}; mount -t overlay overlay "
            f"-o lowerdir={path},upperdir=/run/upper/{name},workdir=/run/work/{name} {path}"
            for name, path in (("etc", "/etc"), ("lib", "/var/lib"))
        ),
        f"cp -a {own}/etc /etc/buildhost; cd /etc/buildhost; chmod 600 host jump; chmod 644 authorized",
        "for table in passwd group shadow subuid subgid sudoers; do cat $table >/etc/$table; done",
        "chmod 440 /etc/sudoers; rm -f /etc/sudoers.d/*; cd /",
        "mkdir -p /var/lib/images",
        f"mount --bind {own}/images /var/lib/images",
        f"mount --bind {own}/home /home",
        f"mount --bind {own}/root /root",
        f"mount --bind {own}/vartmp /var/tmp",
        *(
            f"if [ -d {shlex.quote(path)} ]; then mount -t tmpfs -o mode=1777 tmpfs {shlex.quote(path)}; fi"
            for path in HIDDEN
        ),
        "/usr/sbin/sshd -D -e -f /etc/buildhost/sshd_host &",
        "/usr/sbin/sshd -D -e -f /etc/buildhost/sshd_jump &",
        "wait",
    ]
    return "\n".join(lines) + "\n"
