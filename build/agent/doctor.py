"""Verb: check what this host needs to build, and name the one command that mends each gap."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from build.agent import (
    facts,
    keep,
    kvm,
    packages,
    preflight,
    process,
    release,
    resolve,
    sandbox,
    store,
    web,
)
from build.agent.events import Emit, Failure
from build.agent.sandbox import Place

UTIL_LINUX = (2, 38)
"""The first with `unshare --map-auto`."""
SKEW = 300
"""Seconds that the clock may differ from the mirror's."""
PLENTY = 3 << 30
"""Bytes of free memory with which the tree is built in memory (it takes about 1.2 GiB)."""


@dataclass(frozen=True)
class Row:
    """One check: what was found, and the command that mends it unless it is well.

    `needed` says whether a build fails without it.
    """

    name: str
    ok: bool
    value: str
    fix: str = ""
    needed: bool = True


@dataclass(frozen=True)
class Patient:
    """What the checks look at: the host's facts, where it builds, and the settings of the image."""

    facts: Mapping[str, Any]
    place: Place
    image: Path
    settings: Mapping[str, Any]
    emit: Emit

    def as_root(self, command: str) -> str:
        """Write a command so that this user can paste it."""
        return command if self.facts["uid"] == 0 else f"sudo {command}"

    def folder(self) -> Path:
        """LOCATION, or the folder above it that exists."""
        location = self.place.location
        return next(path for path in (location, *location.parents) if path.is_dir())


def run(request: dict[str, Any], emit: Emit) -> list[dict[str, Any]]:
    """Answer a row for each check: name, ok, value, fix, needed.

    Request: `place` and `image` as `location` answers them, `settings` as plain JSON without the password.
    Changes nothing; what it tries, it tries in namespaces of its own and in a folder that it removes.
    """
    patient = Patient(
        facts.run({}, emit),
        Place.from_request(request["place"]),
        Path(request["image"]),
        request["settings"],
        emit,
    )
    rows: list[Row] = []
    for done, check in enumerate(CHECKS):
        emit("progress", label="doctor", done=done, total=len(CHECKS))
        try:
            rows += check(patient)
        except Failure as failure:
            rows.append(Row(check.__name__, False, failure.message, failure.hint))
        except OSError as error:
            rows.append(
                Row(check.__name__, False, f"{error.strerror}: {error.filename}", "look at that file")
            )
    return [asdict(replace(row, fix="") if row.ok else row) for row in rows]


def host(patient: Patient) -> Iterator[Row]:
    """Debian release and Python; a build runs on Debian 12 and 13."""
    known = patient.facts
    found = (
        f"{known['debian'] or 'not Debian'}, {known['arch']}, Linux {known['kernel']}, {known['cores']} cores"
    )
    yield Row(
        "host",
        known["debian"] in ("bookworm", "trixie") and known["arch"] in ("amd64", "i386"),
        found,
        "build on a Debian 12 or 13 host of amd64: inv -H HOST build",
        needed=known["debian"] == "" or known["arch"] != "amd64",
    )


def tools(patient: Patient) -> Iterator[Row]:
    """Packages that bring the tools of a build, and of booting the image."""
    for name, needed in (("build", True), ("boot", False)):
        lacking = dict.fromkeys(need.package for need in packages.missing(name))
        install = patient.as_root(f"apt-get install --no-install-recommends {' '.join(lacking)}")
        value = f"missing: {', '.join(lacking)}" if lacking else "all here"
        yield Row(f"tools: {name}", not lacking, value, install, needed)


def versions(patient: Patient) -> Iterator[Row]:
    """Versions of the tools whose version matters."""
    asked = {
        "unshare": "--version",
        "mmdebstrap": "--version",
        "mke2fs": "-V",
        "qemu-system-x86_64": "--version",
    }
    found = {
        tool: version_of(tool, option)
        for tool, option in asked.items()
        if shutil.which(tool, path=process.PATH)
    }
    old = numbers(found.get("unshare", "")) < UTIL_LINUX
    yield Row(
        "versions",
        not old,
        ", ".join(f"{tool} {version}" for tool, version in found.items()) or "none",
        "use a host with util-linux 2.38 or newer: Debian 12 or 13",
    )


def version_of(tool: str, option: str) -> str:
    """The first dotted number that a tool prints about itself, or empty."""
    done = process.run([tool, option], check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else ""


def numbers(version: str) -> tuple[int, ...]:
    """Numbers of a dotted version, for comparison."""
    return tuple(int(part) for part in version.split(".") if part)


def privileges(patient: Patient) -> Iterator[Row]:
    """Root that may mount, or an ordinary user with a user namespace and a range of sub-ids."""
    known, user = patient.facts, patient.facts["user"]
    if known["uid"] != 0:
        start = first_free_id(facts.read("/etc/subuid") + facts.read("/etc/subgid"))
        ids = f"{start}-{start + facts.RANGE - 1}"
        yield Row(
            "sub-ids",
            known["subids"],
            "a range of 65536"
            if known["subids"]
            else f"{user} has no range of 65536 in /etc/subuid and /etc/subgid",
            f"sudo usermod --add-subuids {ids} --add-subgids {ids} {shlex.quote(user)}",
        )
    opened = process.run([*sandbox.namespaces(patient.place.mode), "true"], check=False)
    reason = (opened.stderr.strip().splitlines() or ["unshare failed"])[-1]
    kind = "root" if known["uid"] == 0 else "user namespace"
    yield Row(
        "privileges", opened.returncode == 0, kind if opened.returncode == 0 else reason, _open_up(patient)
    )


def _open_up(patient: Patient) -> str:
    if patient.facts["uid"] == 0:
        return "give this container CAP_SYS_ADMIN (docker run --privileged), or build with: inv -H HOST build"
    switches = {
        "user/max_user_namespaces": "15000",
        "kernel/unprivileged_userns_clone": "1",
        "kernel/apparmor_restrict_unprivileged_userns": "0",
    }
    for path, wanted in switches.items():
        value = facts.read(f"/proc/sys/{path}").strip()
        if value and (value == "0") != (wanted == "0"):
            return f"sudo sysctl -w {path.replace('/', '.')}={wanted}"
    return "build as root: sudo ./inv build"


def first_free_id(tables: str) -> int:
    """First sub-id behind every range of subuid(5) text, not below 100000."""
    ends = [100000]
    for line in tables.splitlines():
        _, _, rest = line.partition(":")
        start, _, count = rest.partition(":")
        if start.strip().isdigit() and count.strip().isdigit():
            ends.append(int(start) + int(count))
    return max(ends)


def location(patient: Patient) -> Iterator[Row]:
    """LOCATION can be written, has room, and its file system carries overlays."""
    folder, wanted = patient.folder(), patient.place.location
    refused = _refused(folder)
    mine = f"install -d -o {shlex.quote(patient.facts['user'])} {shlex.quote(str(wanted))}"
    yield Row("location", not refused, refused or str(wanted), patient.as_root(mine))
    free = shutil.disk_usage(folder).free
    need = preflight.TREE + preflight.HEADROOM + (patient.settings["size"] << 20)
    yield Row(
        "space",
        free >= need,
        f"{free >> 20} MiB free, a first build takes up to {need >> 20}",
        f"SYSTEMVM_LOCATION=/a/larger/disk ./inv build, or free {max(0, need - free) >> 20} MiB",
    )
    if not refused:
        with contextlib.suppress(Failure):  # no namespace opens: the row on privileges says so
            works = sandbox.overlay_works(folder, patient.place.mode)
            value = "works" if works else f"not on {folder}: every layer is a full copy"
            fix = "SYSTEMVM_LOCATION=/a/folder/on/ext4/or/xfs ./inv build"
            yield Row("overlay", works, value, fix, needed=False)


def _refused(folder: Path) -> str:
    """Say why nothing can be written there, or nothing; tried, since access(2) tells root little."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"


def memory(patient: Patient) -> Iterator[Row]:
    """Free memory: with plenty the tree is built there."""
    free = patient.facts["memory_available"]
    yield Row(
        "memory",
        free >= PLENTY,
        f"{free >> 20} MiB free{'' if free >= PLENTY else ': the tree is built on disk, slower'}",
        f"free {max(0, PLENTY - free) >> 20} MiB of memory",
        needed=False,
    )


def virtualization(patient: Patient) -> Iterator[Row]:
    """KVM, tried with a guest; without it guests are emulated, and slow."""
    found = kvm.run({}, patient.emit)
    usable, why = found["usable"], found["why"]
    device = Path("/dev/kvm")
    closed = device.exists() and not os.access(device, os.R_OK | os.W_OK)
    join = f"sudo usermod --append --groups kvm {shlex.quote(patient.facts['user'])}, then log in again"
    mend = (
        join if closed else "enable (nested) virtualization for this machine; until then guests are emulated"
    )
    yield Row("kvm", usable, "runs guests" if usable else why, mend, needed=False)


def mirror(patient: Patient) -> Iterator[Row]:
    """The mirror answers with a signed suite, its security suite stands somewhere, and the clocks agree."""
    wanted = patient.settings
    base = (wanted["debian_mirror"] or resolve.default_mirror()).rstrip("/")
    try:
        found = _fetch(patient, base, wanted["suite"])
    except web.Absent:
        value = f"{base} has no suite {wanted['suite']}"
        yield Row("mirror", False, value, "correct suite or debian_mirror; it ends before /dists")
        return
    yield from _clock(patient, found.date)
    yield _judge(patient, "mirror", found)
    if wanted["security"]:
        yield _security(patient, resolve.security_mirrors(base, wanted["security_mirror"].rstrip("/")))


def _security(patient: Patient, places: list[str]) -> Row:
    suite = f"{patient.settings['suite']}-security"
    for place in places:
        with contextlib.suppress(web.Absent):
            return _judge(patient, "security", _fetch(patient, place, suite))
    return Row(
        "security", False, f"no {suite} at {' or '.join(places)}", "set security_mirror, or security: false"
    )


@dataclass(frozen=True)
class Fetched:
    """An InRelease as it was served, and the server's Date."""

    suite: str
    url: str
    body: bytes
    date: str | None


def _fetch(patient: Patient, mirror: str, suite: str) -> Fetched:
    """Fetch an InRelease. Raises Absent when the mirror has none, Failure when nothing sound answers."""
    source, url = web.Source(patient.settings["apt_proxy"]), f"{mirror}/dists/{suite}/InRelease"
    try:
        with web.opened(url, source, {"Cache-Control": "max-age=0"}) as answer:
            return Fetched(suite, url, answer.body.read(), answer.headers.get("date"))
    except (OSError, http.client.HTTPException, web.Refused) as error:
        raise web.failure(url, source, error) from error


def _judge(patient: Patient, name: str, found: Fetched) -> Row:
    """Check signature, suite and dates of what was fetched."""
    try:
        text = release.verify(found.body, release.keyring(patient.settings["keyring"]), found.url)
        told = release.parse(text)
        release.check(told, found.suite, found.url, time.time())
    except Failure as failure:
        return Row(name, False, failure.message, failure.hint)
    except ValueError as error:
        return Row(name, False, f"{found.url} cannot be read: {error}", "use another mirror")
    return Row(name, True, f"{found.url} of {release.utc(told.date)}, signature good")


def _clock(patient: Patient, date: str | None) -> Iterator[Row]:
    """Compare the clock with an HTTP Date header (RFC 9110, 6.6.1); a file:// mirror has none."""
    moment = email.utils.parsedate_to_datetime(date).timestamp() if date else None
    if moment is None:
        return
    ahead = time.time() - moment
    state = (
        "agrees with the mirror's"
        if abs(ahead) <= SKEW
        else f"is {abs(ahead):.0f} s {'fast' if ahead > 0 else 'slow'}"
    )
    yield Row("clock", abs(ahead) <= SKEW, state, patient.as_root(f"date --utc --set='{date}'"))


def leftovers(patient: Patient) -> Iterator[Row]:
    """What runs that were cut off left behind, and the mount that `inv mount --keep` made."""
    place = patient.place
    if kept := keep.kept(place.location):
        yield Row("kept mount", False, f"the tree is shown at {kept[0]}", "inv umount", needed=False)
    for preset in sorted(Path("/run/systemd/system-preset").glob("00-systemvm-builder-*.preset")):
        if not Path("/proc", preset.stem.rpartition("-")[2]).exists():
            value = "an installation of packages was cut off; new services stay off until this is gone"
            yield Row("preset", False, value, patient.as_root(f"rm {preset}"), needed=False)
    if not place.location.is_dir() or not os.access(place.location, os.W_OK):
        return
    if store.is_locked(place.location):
        yield Row("leftovers", True, "a build is running", needed=False)
        return
    stores = place.location.glob("cache/*")
    parts = [*place.location.glob(".*"), *(part for folder in stores for part in store.parts(folder))]
    yield Row("leftovers", not parts, f"{len(parts) or 'no'} unfinished parts", "inv clean", needed=False)


CHECKS: tuple[Callable[[Patient], Iterator[Row]], ...] = (
    host,
    tools,
    versions,
    privileges,
    location,
    memory,
    virtualization,
    mirror,
    leftovers,
)
