"""Runs on a build host under whatever python3 is there, before anything else of ours does.

    python3 -I -c TEXT probe NAME...    tells which host it is, and which of these packs are there, whole
    python3 -I -c TEXT put NAME         keeps the pack that comes in, as tar, under this name

The engine sends it as text: it is one file, which every Python from 3.6 understands. Its last line is JSON.

Packs lie in one folder of the user who logs in, each named after the digest of all that is in it. What runs
from there runs as this user, with sudo as root, so nobody else may have a hand in it: every folder on the way
is opened from the one above it, no link is followed, and owner and mode are those of what is open. After that
only the user himself and root can change what lies there, which is why it may be used by its path.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import pwd
import secrets
import shutil
import stat
import subprocess
import sys
import tarfile
import time

OWN = "systemvm-builder"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
ENTRY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
WEEK = 7 * 24 * 60 * 60
"""Seconds without use after which a pack goes when another one comes."""


class Refused(Exception):
    """What is wrong, and what to do about it."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.answer = {"what": what, "hint": hint}


def way() -> "tuple[str, list[str]]":
    """Where our folder lies: a folder that is the administrator's to make, and the names below it.

    Source: XDG Base Directory Specification (XDG_STATE_HOME; a relative path does not count). What lies in
    XDG_RUNTIME_DIR would vanish with the login.
    """
    if os.getuid() == 0:
        return "/var/lib", [OWN]
    home = os.path.normpath(os.path.expanduser("~"))
    given = os.environ.get("XDG_STATE_HOME", "")
    state = os.path.normpath(given if os.path.isabs(given) else os.path.join(home, ".local/state"))
    start = home if state.startswith(os.path.join(home, "")) else "/"
    return start, [*filter(None, state[len(start) :].split("/")), OWN]


def where() -> str:
    """Path of our folder."""
    start, names = way()
    return os.path.join(start, *names)


def enter(make: bool) -> int:
    """Open our folder, after making what is missing of it if so wanted; raises Refused."""
    path, names = way()
    here = step(path, path, None, False)
    for name in names:
        if mine(path, here) & (stat.S_IWGRP | stat.S_IWOTH):
            raise Refused(f"others may write into {path}", f"run there: chmod go-w {path}")
        path = os.path.join(path, name)
        here = step(path, name, here, make)
    if mine(path, here, False) & 0o077:
        os.fchmod(here, 0o700)
    return here


def step(path: str, name: str, above: "int | None", make: bool) -> int:
    """Open a folder; links are followed only above the first one, where they are the administrator's."""
    try:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=above)
        return os.open(name, FOLDER | (0 if above is None else os.O_NOFOLLOW), dir_fd=above)
    except OSError as error:
        link = error.errno in (errno.ENOTDIR, errno.ELOOP)
        raise Refused(f"{path}: {'it is no folder' if link else error.strerror}", hint(error)) from None


def hint(error: OSError) -> str:
    """What to do when our folder cannot be used."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room there"
    return "set XDG_STATE_HOME there to a folder of yours" if os.getuid() else "correct that there"


def mine(path: str, handle: int, roots_too: bool = True) -> int:
    """Mode of a folder that is the user's, or root's; raises Refused for another's."""
    status = os.fstat(handle)
    if status.st_uid not in (os.getuid(), 0 if roots_too else os.getuid()):
        raise Refused(f"{path} belongs to another user ({status.st_uid})", hint(OSError()))
    return status.st_mode


def content(handle: int) -> object:
    """What an open file or folder holds: a digest, or names with what they hold.

    Raises OSError for what is neither, and for what others could write into.
    """
    status = os.fstat(handle)
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "not ours alone")
    if stat.S_ISREG(status.st_mode):
        with open(handle, "rb", closefd=False) as file:
            return hashlib.sha256(file.read()).hexdigest()
    found = {}
    for name in os.listdir(handle):  # of anything but a folder it raises
        below = os.open(name, ENTRY, dir_fd=handle)
        try:
            found[name] = content(below)
        finally:
            os.close(below)
    return found


def digest(found: object) -> str:
    """Digest of what a folder holds, as `content` tells it: all names and all bytes."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def whole(name: str, folder: int, entry: str = "") -> bool:
    """Whether a pack lies in our folder as it was sent, be it under another name; it counts as used now."""
    try:
        pack = os.open(entry or name, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        try:
            os.utime(pack)
            return name.endswith(f"-{digest(content(pack))}")
        finally:
            os.close(pack)
    except OSError:
        return False


def put(name: str) -> "dict[str, str]":
    """Make a pack of what comes in, and give it its name when it is whole."""
    os.umask(0o077)
    folder = enter(make=True)
    os.fchdir(folder)
    for entry in os.listdir("."):
        if os.lstat(entry).st_mtime < time.time() - WEEK:
            discard(entry)
    part = f".{secrets.token_hex(8)}"
    os.mkdir(part)
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            for member in archive:
                path, source = os.path.join(part, member.name), archive.extractfile(member)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb") as target:
                    target.write(source.read() if source else b"")
        if not whole(name, folder, part):
            raise Refused("it did not arrive whole", "run it again")
        publish(name, folder, part)
    except tarfile.TarError:
        raise Refused("it did not arrive whole", "run it again") from None
    finally:
        discard(part)
    return {"path": os.path.join(where(), name)}


def publish(name: str, folder: int, part: str) -> None:
    """Give a pack its name. What is broken under it goes first; what another run put there is as good."""
    if not whole(name, folder):
        discard(name)
        try:
            os.rename(part, name)
        except OSError:
            if not whole(name, folder):
                raise


def discard(entry: str) -> None:
    """Remove what lies in our folder; under its name there is never a half of it."""
    gone = f".{secrets.token_hex(8)}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(entry, gone)
        if stat.S_ISDIR(os.lstat(gone).st_mode):
            shutil.rmtree(gone, ignore_errors=True)
        else:
            os.unlink(gone)


def sudo() -> str:
    """How sudo lets this user be root: `free`, with a `password`, `none`: not at all."""
    if os.getuid() == 0:
        return "none"
    line = ["sudo", "-k", "-n", "--", "true"]
    try:
        asked = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=dict(os.environ, LC_ALL="C"),
        )
        said = asked.communicate()[1]
    except OSError:
        return "none"
    return "free" if asked.returncode == 0 else "password" if b"password is required" in said else "none"


def user() -> str:
    """Name of the user, or his number where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def there(names: "list[str]") -> "dict[str, str]":
    """Paths of those packs that are there, whole. Why there are none is told to whoever wants to put one."""
    try:
        folder = enter(make=False)
    except Refused:
        return {}
    return {name: os.path.join(where(), name) for name in names if whole(name, folder)}


def probe(names: "list[str]") -> "dict[str, object]":
    """Tell which host this is, and what is there."""
    return {
        "version": sys.version_info[:3],
        "implementation": sys.implementation.name,
        "python": sys.executable,
        "machine": platform.machine(),
        "libc": platform.libc_ver(),
        "uid": os.getuid(),
        "user": user(),
        "sudo": sudo(),
        "there": there(names),
    }


def main(verb: str, names: "list[str]") -> object:
    """Do what is asked; answers what is to be printed."""
    try:
        return probe(names) if verb == "probe" else put(names[0])
    except Refused as refused:
        return refused.answer
    except OSError as error:
        return {"what": f"{where()}: {error.strerror}", "hint": hint(error)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
