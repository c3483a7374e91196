"""Release files and package indices of a Debian archive: verify, read, find.

Sources: the Debian wiki's RepositoryFormat page, deb-control(5), gpgv(1) and GnuPG's DETAILS file on
status lines.
"""

from __future__ import annotations

import base64
import binascii
import calendar
import email.utils
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from build import debian
from build.agent import process
from build.agent.events import Failure

KEYRINGS = tuple(
    Path("/usr/share/keyrings") / name
    for name in ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
)
END_OF_TIME = 253402300800
"""Seconds from 1970 to the year 10000, which nothing here can write down."""
SIGNATURE_END = b"\n-----END PGP SIGNATURE-----"
CLOCK_SLACK = 60
"""Seconds that a mirror's clock may be ahead of ours."""


@dataclass(frozen=True)
class Release:
    """What a verified InRelease says."""

    origin: str
    suite: str
    codename: str
    date: int
    """Seconds since 1970."""
    valid_until: int | None
    components: tuple[str, ...]
    architectures: tuple[str, ...]
    by_hash: bool
    separate_all: bool
    """Packages of architecture `all` stand in an index of their own only."""
    files: Mapping[str, tuple[str, int]]
    """SHA-256 and size of each file, by path below the suite."""


@dataclass(frozen=True)
class Signed:
    """What of an InRelease is signed, and by whom."""

    text: str
    signers: tuple[str, ...]
    """Fingerprints of the primary keys that made a good signature."""


def parse(text: str) -> Release:
    """Read the signed text of an InRelease; raises ValueError when a field that must be there is not."""
    (fields,) = debian.stanzas(text.strip() + "\n") or ({},)
    if "Date" not in fields or "SHA256" not in fields:
        raise ValueError("no Date or no SHA256 list")
    files = {}
    for line in fields["SHA256"].split("\n"):
        if line.strip():
            digest, size, path = line.split()
            if not re.fullmatch("[0-9]{1,18}", size):
                raise ValueError(f"{path} has no size")
            files[path] = (digest, int(size))
    return Release(
        origin=fields.get("Origin", ""),
        suite=fields.get("Suite", ""),
        codename=fields.get("Codename", ""),
        date=seconds(fields["Date"]),
        valid_until=seconds(fields["Valid-Until"]) if "Valid-Until" in fields else None,
        # The security archive writes `updates/main` for what its paths and apt call `main`.
        components=tuple(name.rpartition("/")[2] for name in fields.get("Components", "").split()),
        architectures=tuple(fields.get("Architectures", "").split()),
        by_hash=fields.get("Acquire-By-Hash", "").strip() == "yes",
        separate_all="all" in fields.get("Architectures", "").split()
        and "No-Support-for-Architecture-all" not in fields,
        files=files,
    )


def seconds(date: str) -> int:
    """Read an RFC 5322 date as the archive writes it, in UTC; raises ValueError."""
    parsed = email.utils.parsedate(date)
    try:
        moment = calendar.timegm(parsed) if parsed else -1
    except OverflowError:
        moment = -1
    if not 0 <= moment < END_OF_TIME:
        raise ValueError(f"not a date: {date!r}")
    return moment


def keyring(asked: str) -> Path:
    """The keyring that signs the mirror: the one asked for, or Debian's own on this host."""
    if asked:
        if not Path(asked).is_file():
            raise Failure(f"no keyring {asked}", "correct keyring; empty means Debian's own")
        return Path(asked)
    for path in KEYRINGS:
        if path.is_file():
            return path
    raise Failure(
        "Debian's archive keyring is missing on this host", "install debian-archive-keyring, or set keyring"
    )


def is_framed(data: bytes) -> bool:
    """Tell whether a file is one clear-signed text (RFC 9580, 7) and nothing else.

    gpgv skips what stands around it, and unpacks a packed message before it looks at any signature: one of
    some KiB fills the memory.
    """
    text, _, signature = data.rstrip().partition(b"\n-----BEGIN PGP SIGNATURE-----")
    return (
        text.startswith(b"-----BEGIN PGP SIGNED MESSAGE-----")
        and b"\n-----" not in text
        and signature.find(b"\n-----") == len(signature) - len(SIGNATURE_END)
        and signature.endswith(SIGNATURE_END)
    )


def verify(data: bytes, keys: Path, where: str) -> Signed:
    """Check the signature of an InRelease and return the text that is signed.

    Raises Failure unless a key of the keyring made a good signature.
    """
    if not is_framed(data):
        raise Failure(f"{where} is not a signed file", "check the mirror: something else answers for it")
    with process.nameless(data) as signed, process.nameless(_binary(keys)) as ring:
        # A path with a slash: gpgv looks for a bare name elsewhere.
        line = ["gpgv", "--status-fd", "2", "--keyring", f"/proc/self/fd/{ring}", "--output", "-"]
        done = process.run([*line, f"/proc/self/fd/{signed}"], check=False, pass_fds=(ring, signed))
    said = re.findall(r"^\[GNUPG:\] (\w+) ?(\S*)", done.stderr, re.M)
    # A file signed by several keys is good when one of ours signed it and no signature is broken.
    signers = good_keys(done.stderr)
    if signers and "BADSIG" not in {kind for kind, _ in said} and done.stdout:
        return Signed(done.stdout, signers)
    if not shutil.which("gpgv", path=process.PATH):
        raise Failure("gpgv is missing on this host", "install gpgv")
    raise _rejected(where, keys, said)


def good_keys(status: str) -> tuple[str, ...]:
    """Fingerprints of the primary keys of every good signature in gpgv's status lines.

    The signature of an expired or revoked key has VALIDSIG, too, but no GOODSIG before it.
    """
    found, good = [], False
    for line in status.split("\n"):
        words = line.split(" ")
        if words[:2] == ["[GNUPG:]", "NEWSIG"]:
            good = False
        elif words[:2] == ["[GNUPG:]", "GOODSIG"]:
            good = True
        elif words[:2] == ["[GNUPG:]", "VALIDSIG"] and good:
            found.append(words[-1])
    return tuple(dict.fromkeys(found))


def _rejected(where: str, keys: Path, said: Iterable[tuple[str, str]]) -> Failure:
    reasons = {
        "BADSIG": "the content was changed after it was signed",
        "EXPKEYSIG": "the key {} has expired",
        "REVKEYSIG": "the key {} was revoked",
        "EXPSIG": "the signature by {} has expired",
        "NO_PUBKEY": "the key {} is not in the keyring",
    }
    for kind, text in reasons.items():
        for found, argument in said:
            if found == kind:
                return Failure(f"signature of {where} fails: {text.format(argument)}", _key_hint(kind, keys))
    return Failure(f"signature of {where} fails: no good signature", _key_hint("", keys))


def _key_hint(kind: str, keys: Path) -> str:
    if kind == "BADSIG":
        return "try again later or use another mirror: this one does not serve what was signed"
    return f"set keyring to the file that holds the mirror's key, or update {keys}"


def _binary(keys: Path) -> bytes:
    """A keyring as gpgv reads it: it takes binary ones only."""
    content = keys.read_bytes()
    armoured = content.lstrip().startswith(b"-----BEGIN PGP PUBLIC KEY BLOCK-----")
    return b"".join(dearmor(content)) if armoured else content


def dearmor(content: bytes) -> Iterator[bytes]:
    """Decode every armoured key block (RFC 9580, 6.2); raises Failure on a broken one."""
    for block in re.findall(
        rb"-----BEGIN PGP PUBLIC KEY BLOCK-----(.*?)-----END PGP PUBLIC KEY BLOCK-----", content, re.S
    ):
        _, _, body = block.replace(b"\r", b"").partition(b"\n\n")
        lines = [line.strip() for line in body.splitlines() if line.strip() and not line.startswith(b"=")]
        try:
            yield base64.b64decode(b"".join(lines), validate=True)
        except binascii.Error as error:
            raise Failure("the keyring is damaged", "give another with keyring") from error


def check(release: Release, suite: str, where: str, now: float) -> None:
    """Refuse a release that is another suite's, out of date, or from the future."""
    if suite not in (release.codename, release.suite):
        raise Failure(
            f"{where} is the release of {release.codename or release.suite}, not of {suite}",
            "use a mirror that holds the suite",
        )
    if release.valid_until is not None and release.valid_until < now:
        raise Failure(
            f"{where} expired on {utc(release.valid_until)}",
            "use a mirror that is kept up to date, and check this host's clock",
        )
    if release.date > now + CLOCK_SLACK:
        raise Failure(f"{where} is dated {utc(release.date)}, in the future", "set this host's clock")


def utc(moment: float) -> str:
    """A moment as people read it."""
    return email.utils.formatdate(moment, usegmt=True).replace("GMT", "UTC")


def index_paths(release: Release, components: Iterable[str], archs: Iterable[str], where: str) -> list[str]:
    """Paths of the package indices to read, without suffix; raises Failure when the suite lacks one."""
    found = []
    for component in components:
        if component not in release.components:
            raise Failure(
                f"{where} has no component {component!r}",
                f"use of its components: {', '.join(release.components)}",
            )
        for arch in archs:
            if arch not in release.architectures:
                raise Failure(
                    f"{where} has no packages for {arch}",
                    f"use of its architectures: {', '.join(release.architectures)}",
                )
            found.append(f"{component}/binary-{arch}/Packages")
        if release.separate_all:
            found.append(f"{component}/binary-all/Packages")
    return [path for path in found if compressed(release, path, where)]


def compressed(release: Release, path: str, where: str) -> str:
    """The smallest form of an index that this archive has and we read."""
    for suffix in (".xz", ".gz", ""):
        if path + suffix in release.files:
            return path + suffix
    if path.endswith("binary-all/Packages"):
        return ""
    raise Failure(f"{where} lists no {path} that we can read (.xz, .gz or plain)", "use another mirror")
