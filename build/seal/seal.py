"""Take out of a tree what must never ship, and prove it: `seal.py ROOT KEPT.json PASSWORD-HASH-FILE`.

KEPT lists paths that the image definition itself brought; they stay. The password file holds a crypt(3)
hash for root, or is empty or absent, which locks root's password (a key still logs in). SOURCE_DATE_EPOCH
is in the environment. One line on stderr and status 1 when something is left that must not ship.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import sys
from collections.abc import Iterator

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import inside

EMPTIED = ("dev", "proc", "run", "sys", "tmp", "var/tmp", "var/backups")
"""Folders whose content belongs to the machine that built the image (and device nodes only root can make)."""

REMOVED = (
    "usr/sbin/policy-rc.d",
    "etc/ssh/ssh_host_*",
    "etc/ssl/certs/ssl-cert-snakeoil.pem",
    "etc/ssl/private/ssl-cert-snakeoil.key",
    # Names of the mirror the packages came from stand in the names of these.
    "var/lib/apt/lists/*_*",
    "var/lib/apt/lists/partial/*",
    "var/cache/apt/*.bin",
    "var/cache/apt/archives/*.deb",
    "var/cache/apt/archives/partial/*",
    # As root, iptables-persistent saves the rules of the build host.
    "etc/iptables/rules.v4",
    "etc/iptables/rules.v6",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/urandom/random-seed",
    "var/cache/ldconfig/aux-cache",
    "var/cache/debconf/*-old",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/lock*",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/apt/lists/lock",
    "var/cache/apt/archives/lock",
    "var/lib/dhcp/*",
    "var/lib/dhcpcd/*",
    "var/lib/NetworkManager/*",
    "etc/udev/rules.d/*-persistent-net*.rules",
    "etc/*-",
    "etc/.pwd.lock",
    "etc/ld.so.cache~",
    "root/.*history",
    "root/.wget-hsts",
    "root/.cache",
    "root/.lesshst",
    "root/.ssh/known_hosts*",
)
"""Shell patterns of files and folders that go, if they are there."""

SECRET = re.compile(rb"-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY-----")
PROXY = re.compile(rb"^[^#/\n]*?(\bproxy\b[^;\n]*\"|_proxy\s*=)", re.IGNORECASE | re.MULTILINE)
"""A line of apt.conf(5) in any of its forms, or a variable that programs take their proxy from."""
PROXIES = (
    "etc/apt/apt.conf",
    "etc/apt/apt.conf.d/*",
    "etc/environment",
    "etc/wgetrc",
    "root/.curlrc",
    "root/.wgetrc",
)
HASH = re.compile(r"\$[0-9a-z]+\$[A-Za-z0-9./$=,+-]+")
CHECKS = {
    "special": "is neither file, folder nor link",
    "log": "is a log of the build",
    "key": "holds a private key",
}
JKS_MAGIC = 0xFEEDFEED
JKS_SALT = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"
"""The keystore's well-known password; encoded here, for a codec cannot be found once the root has changed."""


def remove(path: str) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def remove_traces(kept: set[str]) -> None:
    """Remove what the table names, log files, and links to the snakeoil certificate."""
    for pattern in REMOVED:
        for path in glob.glob(pattern, include_hidden=True):
            if path not in kept:
                remove(path)
    for folder in EMPTIED:
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            remove(os.path.join(folder, name))
    for path, status in walk("var/log"):
        if not stat.S_ISDIR(status.st_mode) and path not in kept:
            os.unlink(path)
    for path in glob.glob("etc/ssl/certs/*.[0-9]"):
        if os.path.islink(path) and os.path.basename(os.readlink(path)) == "ssl-cert-snakeoil.pem":
            os.unlink(path)
    for pattern in PROXIES:
        for path in glob.glob(pattern):
            if path not in kept and _matches(path, PROXY):
                os.unlink(path)


def walk(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder of this file system; links are not followed."""
    for above, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.normpath(os.path.join(above, name))
            yield path, os.lstat(path)


def _write(path: str, content: bytes, mode: int) -> None:
    """Write aside and rename: a link at that place is replaced, never written through."""
    aside = f"{path}.seal"
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)
    os.rename(aside, path)


def first_boot(kept: set[str]) -> None:
    """Leave what the first boot fills: an empty machine-id, and a resolver's file or link."""
    # Empty, not absent: an absent one means "first boot" to systemd, which then applies all presets again.
    _write("etc/machine-id", b"", 0o444)
    if "etc/resolv.conf" in kept:
        return
    if os.path.lexists("usr/lib/systemd/system/systemd-resolved.service"):
        if os.path.lexists("etc/resolv.conf"):
            os.unlink("etc/resolv.conf")
        os.symlink("../run/systemd/resolve/stub-resolv.conf", "etc/resolv.conf")
    else:
        _write("etc/resolv.conf", b"", 0o644)


def set_password(hashed: str, epoch: int) -> str:
    """Give root a crypt(3) hash, or none; returns what is wrong, without showing the hash."""
    if hashed and not HASH.fullmatch(hashed):
        return "the root password did not arrive as a crypt(3) hash"
    with open("etc/shadow", encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    if not any(line.startswith("root:") for line in lines):
        return "etc/shadow has no line for root"
    # "*" matches no password and, unlike "!", is not what sshd calls a locked account.
    changed = str(epoch // 86400)
    lines = [
        ":".join(["root", hashed or "*", changed, *line.split(":")[3:]]) if line.startswith("root:") else line
        for line in lines
    ]
    status = os.stat("etc/shadow")
    _write(
        "etc/shadow", ("\n".join(lines) + "\n").encode(errors="surrogateescape"), stat.S_IMODE(status.st_mode)
    )
    os.chown("etc/shadow", status.st_uid, status.st_gid)
    return ""


def normalized_keystore(data: bytes, epoch: int) -> bytes:
    """Put a Java keystore's certificates in order and give all of them one time.

    The format (JKS version 2) is that of the JDK's sun.security.provider.JavaKeyStore: magic, version, count;
    per trusted certificate a tag 2, alias, milliseconds, certificate type and certificate; at the end the
    SHA-1 of the password in UTF-16, the words "Mighty Aphrodite" and all that stands before.
    Raises ValueError for another format, another kind of entry or a wrong digest.
    """
    body, digest = data[:-20], data[-20:]
    if len(data) < 32 or struct.unpack_from(">II", data) != (JKS_MAGIC, 2):
        raise ValueError("not a Java keystore of version 2")
    if hashlib.sha1(JKS_SALT + body).digest() != digest:
        raise ValueError("the digest does not fit the content")
    entries, at = [], 12
    for _ in range(struct.unpack_from(">I", data, 8)[0]):
        tag, size = struct.unpack_from(">IH", body, at)
        if tag != 2:
            raise ValueError("an entry is not a trusted certificate")
        alias, at = body[at + 6 : at + 6 + size], at + 6 + size + 8
        kind = struct.unpack_from(">H", body, at)[0]
        end = at + 2 + kind + 4 + struct.unpack_from(">I", body, at + 2 + kind)[0]
        entries.append((alias, body[at:end]))
        at = end
    if at != len(body):
        raise ValueError("bytes are left over")
    time = struct.pack(">Q", epoch * 1000)
    rows = (struct.pack(">IH", 2, len(alias)) + alias + time + rest for alias, rest in sorted(entries))
    body = body[:12] + b"".join(rows)
    return body + hashlib.sha1(JKS_SALT + body).digest()


def normalize_keystore(epoch: int, path: str = "etc/ssl/certs/java/cacerts") -> None:
    """Normalise the image's keystore of root certificates in place, if it has one."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        data = file.read()
    fixed = normalized_keystore(data, epoch)
    if fixed != data:
        status = os.stat(path)
        _write(path, fixed, stat.S_IMODE(status.st_mode))
        os.chown(path, status.st_uid, status.st_gid)


def _matches(path: str, pattern: re.Pattern[bytes]) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(pattern.search(file.read(1 << 20)))
    except OSError:
        return False


def leftovers(kept: set[str]) -> list[str]:
    """Name what must not ship and is still there; empty when the tree is sealed."""
    found = [
        f"{path} is still there" for pattern in REMOVED for path in glob.glob(pattern) if path not in kept
    ]
    found += [f"{folder} is not empty" for folder in EMPTIED if os.path.isdir(folder) and os.listdir(folder)]
    found += [f"{path} {CHECKS[check]}" for path, check in _suspicious() if path not in kept]
    proxies = (path for pattern in PROXIES for path in glob.glob(pattern) if path not in kept)
    found += [f"{path} names a proxy" for path in proxies if _matches(path, PROXY)]
    if os.path.getsize("etc/machine-id"):
        found.append("etc/machine-id is not empty")
    return found


def _suspicious() -> Iterator[tuple[str, str]]:
    for path, status in walk("."):
        kind = stat.S_IFMT(status.st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            yield path, "special"
        elif path.startswith("var/log/") and kind != stat.S_IFDIR:
            yield path, "log"
        elif (
            kind == stat.S_IFREG and path.split("/")[0] in ("etc", "root", "home") and _matches(path, SECRET)
        ):
            yield path, "key"


def main() -> int:
    """Seal the tree."""
    root, table, secret = sys.argv[1:4]
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    with open(table, encoding="ascii") as file:
        kept = set(json.load(file))
    hashed = ""
    if os.path.exists(secret):
        with open(secret, encoding="ascii", errors="replace") as file:
            hashed = file.read().strip()
    os.umask(0o022)
    inside.enter(root)
    wrong = set_password(hashed, epoch)
    if wrong:
        print(wrong, file=sys.stderr)
        return 1
    remove_traces(kept)
    first_boot(kept)
    try:
        normalize_keystore(epoch)
    except (ValueError, struct.error) as error:
        print(f"etc/ssl/certs/java/cacerts: {error}", file=sys.stderr)
        return 1
    found = leftovers(kept)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
