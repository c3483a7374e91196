"""Run a command of a tree so that it can do nothing to the machine around it.

Usage: enter.py ROOT [--read-only] [--fd N]... [--capability NAME]... COMMAND [ARGUMENT...]

Whatever belongs to a tree, each package's maintainer scripts first of all, runs through this program. It
gets namespaces of its own (mounts, processes, network, IPC, host name), the tree as the root of all its
files, a /proc that cannot be written to, a /sys with nothing in it, devices that do no harm, the
capabilities in KEPT, and of the open descriptors 0, 1, 2 and those that are named. What is mounted in the
tree comes along; `--read-only` holds for the tree itself and not for that. Ends as the command does; 128
and the signal's number when one killed it.

It mounts before it gives up what it takes to mount, so it needs root: the machine's, or that of a user
namespace, where the kernel's answers are the same.

Not set is no_new_privs: a script may become another user and call a program with a set-user-id bit or
capabilities of its own, as it may in the finished image. They give it no more than the bounding set holds.

Sources: namespaces(7), pivot_root(2), capabilities(7), prctl(2), seccomp(2); numbers from the kernel's
headers, linux/sched.h, mount.h, capability.h, prctl.h, filter.h, audit.h, asm/unistd_64.h and unistd_32.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import sys
import warnings as warnings  # os.execvp asks for it, too late to find it
from collections.abc import Iterator, Sequence
from typing import NoReturn

HIDDEN = ("ROOT", "FILES", "WORK", "TMPDIR", "SECRETS", "PYTHON", "DEBS", "OUT", "ENTER")
"""Variables of a step that name folders of the host: initramfs-tools writes a ROOT into what it makes."""

KEPT = {
    "CHOWN": 0,  # dpkg and scripts give files their owners
    "DAC_OVERRIDE": 1,  # ... reach files that were given away or closed
    "FOWNER": 3,  # ... set modes, times and attributes of such files
    "FSETID": 4,  # ... and keep the set-group-id bit of a folder of another group
    "KILL": 5,  # end a helper that runs as a package's own user
    "SETGID": 6,  # become that user (su, runuser, setpriv) ...
    "SETUID": 7,
    "SETPCAP": 8,  # ... and drop more on the way
    "NET_BIND_SERVICE": 10,  # a daemon that tries its own file binds its port, in a network of its own
    "SYS_CHROOT": 18,  # a daemon that locks itself into an empty folder; here nothing lies outside
    "AUDIT_WRITE": 29,  # PAM refuses root where it may not write to the audit log
    "SETFCAP": 31,  # setcap on programs such as ping
}
"""Capabilities that a tree's programs keep, and what for. Not here is whatever reaches beyond the tree:
modules, raw input and output, mounts, device nodes, other processes' memory, the clock, the kernel's log,
BPF, handles of files (DAC_READ_SEARCH)."""
LENT = {"NET_ADMIN": 12, "NET_RAW": 13}
"""Capabilities that a step may ask for; they act on the network namespace, which is the command's own."""

NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
INHERITED = RDONLY | NOSUID | NODEV | NOEXEC
"""Flags that a remount repeats: a user namespace may not take them off. statvfs(3) has the same numbers."""
DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_READ, PR_CAPBSET_DROP = 1, 23, 24
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
SIGINT, SIGKILL, SIGPIPE, SIGXFSZ = 2, 9, 13, 25
CAPABILITY_VERSION = 0x20080522
CANNOT = 125
"""What it ends with when the command did not begin; chroot(1) has the same."""
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
AF_INET, SOCK_DGRAM = 2, 2

NODES = ("null", "zero", "full", "random", "urandom", "tty")
LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}

# System calls by AUDIT_ARCH: x86-64, i386.
ARCHES = (0xC000003E, 0x40000003)
KEYS = ((248, 249, 250), (286, 287, 288))  # add_key request_key keyctl
UNSHARE, CLONE, CLONE3, IOCTL = (272, 310), (56, 120), (435, 435), (16, 54)
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
X32 = 0x40000000
# BPF_LD|W|ABS; BPF_JMP with JEQ, JSET and JGE; BPF_RET|K
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
# Offsets in struct seccomp_data; an argument has 8 bytes, the lower half first.
NUMBER, ARCH, ARGUMENTS = 0, 4, 16
Code = list[tuple[int, int, int, int]]

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Call a function of libc; raises OSError with the function's name when it answers -1."""
    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in arguments]
    answer: int = libc[name](*words)
    if answer == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name} {arguments}: {os.strerror(number)}")
    return answer


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    texts = [text.encode(errors="surrogateescape") or None for text in (source, target, kind)]
    call("mount", *texts, flags, options.encode() or None)


def close_descriptors(kept: Sequence[int]) -> None:
    """Close what was inherited but for 0, 1, 2 and `kept`: a folder of the host among it would lead out."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def enter(root: str, flags: int) -> None:
    """Make the tree the root of all files and mount in it what its programs expect."""
    tree = os.open(root, os.O_PATH | os.O_DIRECTORY)
    # To the top of the mount namespace: above a chroot, if we are in one, there would be something left.
    call("setns", os.open("/proc/self/ns/mnt", os.O_RDONLY), NEWNS)
    path = os.readlink(f"/proc/self/fd/{tree}")
    mount("", "/", flags=REC | PRIVATE)
    mount(path, path, flags=BIND | REC)
    old = os.open("/", os.O_PATH)
    os.chdir(path)
    # A device node that a package brought must not open the machine's disk.
    mount("", ".", flags=REMOUNT | BIND | NODEV | flags | os.statvfs(".").f_flag & INHERITED)
    call("pivot_root", b".", b".")
    os.fchdir(old)
    furnish()
    call("umount2", b".", DETACH)
    os.chdir("/")
    os.close(old)
    os.close(tree)


def furnish() -> None:
    """Mount in the new root, `/`, what comes from the old one, the current folder.

    Only now, because links of the tree lead no further than its own root.
    """
    harmless = NOSUID | NODEV | NOEXEC
    mount("proc", "/proc", "proc", harmless | RDONLY)
    mount("tmpfs", "/sys", "tmpfs", harmless | RDONLY, "mode=755,size=4k")
    mount("tmpfs", "/dev", "tmpfs", harmless, "mode=755")
    for node in NODES:
        os.mknod(f"/dev/{node}")
        mount(f"dev/{node}", f"/dev/{node}", flags=BIND)
        # The machine's own: read-only, its mode and owner stay, and what is written to it goes where it went.
        inherited = os.statvfs(f"/dev/{node}").f_flag & INHERITED
        mount("", f"/dev/{node}", flags=REMOUNT | BIND | RDONLY | NOSUID | NOEXEC | inherited)
    for name, target in LINKS.items():
        os.symlink(target, f"/dev/{name}")
    os.mkdir("/dev/shm")
    os.chmod("/dev/shm", 0o1777)
    os.mkdir("/dev/pts")
    mount("devpts", "/dev/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    mount("tmpfs", "/run", "tmpfs", NOSUID | NODEV, "mode=755")
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=1777")
    os.mkdir("/run/lock")


def settle() -> None:
    """Name the machine, whose real name is not for the tree, and bring up its loopback device."""
    call("sethostname", b"localhost", len("localhost"))
    control = call("socket", AF_INET, SOCK_DGRAM, 0)
    call("ioctl", control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    os.close(control)


def drop(kept: frozenset[int]) -> None:
    """Give up every capability but these, for good."""
    number = 0
    while libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) >= 0:  # beyond the kernel's last it is an error
        if number not in kept:
            call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)
        number += 1
    # An inheritable one would come back when the command is started; the others follow the bounding set.
    head = struct.pack("Ii", CAPABILITY_VERSION, 0)
    held = ctypes.create_string_buffer(24)
    call("capget", head, held)
    wanted = sum(1 << number for number in kept)
    low, high = (wanted >> shift & 0xFFFFFFFF for shift in (0, 32))
    effective, permitted, _, above, permitted_above, _ = struct.unpack("6I", held.raw)
    left = (effective & low, permitted & low, 0, above & high, permitted_above & high, 0)
    call("capset", head, struct.pack("6I", *left))


def rules(arch: int) -> Iterator[tuple[int, int, int, int, int]]:
    """What is refused of an arch's system calls: number, error, argument (or -1), comparison, value.

    The kernel's keys belong to users, not to namespaces. A user namespace would give back every capability,
    and with them parts of the kernel that were never meant for strangers. Two ioctls type into the terminal
    of whoever opened a shell in the tree.
    """
    for key in KEYS[arch]:
        yield key, errno.EPERM, -1, 0, 0
    yield CLONE3[arch], errno.ENOSYS, -1, 0, 0  # its flags lie in memory; libc goes back to clone
    yield CLONE[arch], errno.EPERM, 0, ANY_BIT, NEWUSER
    yield UNSHARE[arch], errno.EPERM, 0, ANY_BIT, NEWUSER
    yield IOCTL[arch], errno.EPERM, 1, EQUAL, TIOCSTI
    yield IOCTL[arch], errno.EPERM, 1, EQUAL, TIOCLINUX


def program() -> bytes:
    """The filter as an array of struct sock_filter."""
    code: Code = []
    for arch, number in enumerate(ARCHES):
        part: Code = [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
        for wanted, error, argument, comparison, value in rules(arch):
            refusal = (RETURN, 0, 0, REFUSE | error)
            if argument < 0:
                part += [(EQUAL, 0, 1, wanted), refusal]
            else:
                part += [(EQUAL, 0, 4, wanted), (LOAD, 0, 0, ARGUMENTS + 8 * argument)]
                part += [(comparison, 0, 1, value), refusal, (LOAD, 0, 0, NUMBER)]
        part.append((RETURN, 0, 0, ALLOW))
        code += [(LOAD, 0, 0, ARCH), (EQUAL, 0, len(part), number), *part]
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def refuse_calls() -> None:
    """Filter the system calls of this process and of all that it starts."""
    code = program()
    wanted = Filter(len(code) // 8, code)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(wanted), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def start(root: str, flags: int, command: list[str], kept: frozenset[int]) -> NoReturn:
    """Become the command, the first process of its namespace: the kernel ends all others with it."""
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    sys.path.clear()  # what were imported in the tree would be the tree's, and run before it is fenced
    enter(root, flags)
    settle()
    refuse_calls()
    drop(kept)
    for name in HIDDEN:
        os.environ.pop(name, None)
    for signal in (SIGPIPE, SIGXFSZ):  # Python ignores them, and so would the command
        libc.signal(signal, None)
    os.execvp(command[0], command)


def main(arguments: list[str]) -> int:
    """Run the command and answer its status."""
    descriptors: list[int] = []
    capabilities = dict(KEPT)
    flags = 0
    root, *command = arguments
    while command[0].startswith("--"):
        option = command.pop(0)
        if option == "--read-only":
            flags = RDONLY
        elif option == "--fd":
            descriptors.append(int(command.pop(0)))
        else:
            capabilities[command[0]] = LENT[command.pop(0)]
    libc.signal(SIGINT, None)  # the terminal's is for the command
    close_descriptors(descriptors)
    call("unshare", NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET)
    child = os.fork()
    if not child:
        try:
            start(root, flags, command, frozenset(capabilities.values()))
        except OSError as error:
            print(f"enter.py: {error}", file=sys.stderr, flush=True)
            os._exit(CANNOT)
    for descriptor in descriptors:
        os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
