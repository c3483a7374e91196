"""Verb: check what this host needs to build, and name the one command that fixes each gap."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from build import wire
from build.agent import facts, process, sandbox, store
from build.agent.debian import archives, packages, release, web
from build.agent.events import Emit, Failure
from build.agent.files import read
from build.agent.guest import kvm, qemu
from build.agent.memory import NEEDED
from build.agent.sandbox import BuildPaths
from build.agent.verbs import keep, preflight
from build.wire import Check

UTIL_LINUX = (2, 38)
"""The first with `unshare --map-auto`."""
SKEW = 300
"""Seconds that the clock may differ from the mirror's."""


@dataclass(frozen=True)
class CheckContext:
    """What the checks look at: the host's facts, where it builds, and the settings of the image."""

    facts: Mapping[str, Any]
    place: BuildPaths
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


def run(request: wire.Doctor, emit: Emit) -> tuple[Check, ...]:
    """Make every check; what it tries, it tries in namespaces of its own and in a folder that it removes."""
    context = CheckContext(
        facts.gather(),
        BuildPaths.of(request.place),
        Path(request.image),
        request.settings,
        emit,
    )
    rows: list[Check] = []
    for done, check in enumerate(CHECKS):
        emit("progress", label="doctor", done=done, total=len(CHECKS))
        try:
            rows += check(context)
        except Failure as failure:
            rows.append(Check(check.__name__, False, failure.message, failure.hint))
        except OSError as error:
            rows.append(
                Check(check.__name__, False, f"{error.strerror}: {error.filename}", "look at that file")
            )
    return tuple(replace(row, fix="") if row.ok else row for row in rows)


def host(context: CheckContext) -> Iterator[Check]:
    """Debian release and Python; a build runs on Debian 12 and 13."""
    known = context.facts
    found = (
        f"{known['debian'] or 'not Debian'}, {known['arch']}, Linux {known['kernel']}, {known['cores']} cores"
    )
    yield Check(
        "host",
        known["debian"] in ("bookworm", "trixie") and known["arch"] in ("amd64", "i386"),
        found,
        "build on a Debian 12 or 13 host of amd64: inv -H HOST build",
        needed=known["debian"] == "" or known["arch"] != "amd64",
    )


def tools(context: CheckContext) -> Iterator[Check]:
    """Packages that bring the tools of a build, of booting the image, and of logging in to it."""
    for name, needed in (("build", True), ("boot", False), ("login", False)):
        lacking = dict.fromkeys(need.package for need in packages.missing(name))
        install = context.as_root(f"apt-get install --no-install-recommends {' '.join(lacking)}")
        value = f"missing: {', '.join(lacking)}" if lacking else "all here"
        yield Check(f"tools: {name}", not lacking, value, install, needed)


def versions(context: CheckContext) -> Iterator[Check]:
    """Versions of the tools whose version matters."""
    asked = {
        "unshare": "--version",
        "mmdebstrap": "--version",
        "qemu-system-x86_64": "--version",
    }
    found = {
        tool: version_of(tool, option)
        for tool, option in asked.items()
        if shutil.which(tool, path=process.PATH)
    }
    old = numbers(found.get("unshare", "")) < UTIL_LINUX
    yield Check(
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


def privileges(context: CheckContext) -> Iterator[Check]:
    """Root that may mount, or an ordinary user with a user namespace and a range of sub-ids."""
    known, user = context.facts, context.facts["user"]
    if known["uid"] != 0:
        start = first_free_id(read("/etc/subuid") + read("/etc/subgid"))
        ids = f"{start}-{start + facts.RANGE - 1}"
        yield Check(
            "sub-ids",
            known["subids"],
            "a range of 65536"
            if known["subids"]
            else f"{user} has no range of 65536 in /etc/subuid and /etc/subgid",
            f"sudo usermod --add-subuids {ids} --add-subgids {ids} {shlex.quote(user)}",
        )
        if not known["uidmap"]:
            install = context.as_root("apt-get install --no-install-recommends uidmap")
            yield Check("privileges", False, "newuidmap is missing, which maps the sub-ids", install)
            return
    opened = process.run([*sandbox.namespaces(context.place.mode), "true"], check=False)
    reason = (opened.stderr.strip().splitlines() or ["unshare failed"])[-1]
    kind = "root" if known["uid"] == 0 else "user namespace"
    yield Check(
        "privileges", opened.returncode == 0, kind if opened.returncode == 0 else reason, _open_up(context)
    )


def _open_up(context: CheckContext) -> str:
    if context.facts["uid"] == 0:
        return "give this container CAP_SYS_ADMIN (docker run --privileged), or build with: inv -H HOST build"
    switches = {
        "user/max_user_namespaces": "15000",
        "kernel/unprivileged_userns_clone": "1",
        "kernel/apparmor_restrict_unprivileged_userns": "0",
    }
    for path, wanted in switches.items():
        value = read(f"/proc/sys/{path}").strip()
        if value and (value == "0") != (wanted == "0"):
            return f"sudo sysctl -w {path.replace('/', '.')}={wanted}"
    return "build as root"


def first_free_id(tables: str) -> int:
    """First sub-id behind every range of subuid(5) text, not below 100000."""
    ends = [100000]
    for line in tables.splitlines():
        _, _, rest = line.partition(":")
        start, _, count = rest.partition(":")
        if start.strip().isdigit() and count.strip().isdigit():
            ends.append(int(start) + int(count))
    return max(ends)


def location(context: CheckContext) -> Iterator[Check]:
    """LOCATION can be written, has room, and its file system carries overlays."""
    folder, wanted = context.folder(), context.place.location
    refused = _refused(folder)
    mine = f"install -d -o {shlex.quote(context.facts['user'])} {shlex.quote(str(wanted))}"
    yield Check("location", not refused, refused or str(wanted), context.as_root(mine))
    free = shutil.disk_usage(folder).free
    need = preflight.TREE + preflight.HEADROOM + (context.settings["size"] << 20)
    yield Check(
        "space",
        free >= need,
        f"{free >> 20} MiB free, a first build takes up to {need >> 20}",
        f"SYSTEMVM_LOCATION=/a/larger/disk ./inv build, or free {max(0, need - free) >> 20} MiB",
    )
    if not refused:
        with contextlib.suppress(Failure):  # no namespace opens: the row on privileges says so
            works = sandbox.overlay_works(folder, context.place.mode)
            value = "works" if works else f"not on {folder}: every layer is a full copy"
            fix = "SYSTEMVM_LOCATION=/a/folder/on/ext4/or/xfs ./inv build"
            yield Check("overlay", works, value, fix, needed=False)


def _refused(folder: Path) -> str:
    """Say why nothing can be written there, or nothing; tried, since access(2) tells root little."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"


def memory(context: CheckContext) -> Iterator[Check]:
    """Free memory: enough that the kernel does not end a build for lack of it."""
    free = context.facts["memory_available"]
    yield Check(
        "memory",
        free >= NEEDED,
        f"{free >> 20} MiB free, a build needs about {NEEDED >> 20}",
        f"free {max(0, NEEDED - free >> 20) + 1} MiB of memory, or raise this container's limit",
    )


def virtualization(context: CheckContext) -> Iterator[Check]:
    """KVM, tried with a guest; without it guests are emulated, and slow."""
    why = kvm.missing()
    device = Path("/dev/kvm")
    closed = device.exists() and not os.access(device, os.R_OK | os.W_OK)
    join = f"sudo usermod --append --groups kvm {shlex.quote(context.facts['user'])}, then log in again"
    fix = "enable (nested) virtualization for this machine; until then guests are emulated"
    if why == f"{qemu.PROGRAM} is missing":
        fix = context.as_root("apt-get install --no-install-recommends qemu-system-x86")
    elif closed:
        fix = join
    yield Check("kvm", not why, why or "runs guests", fix, needed=False)


def mirror(context: CheckContext) -> Iterator[Check]:
    """The mirror answers with a signed suite, its security suite stands somewhere, and the clocks agree."""
    wanted = context.settings
    base = (wanted["debian_mirror"] or archives.default_mirror()).rstrip("/")
    try:
        found = _fetch(context, base, wanted["suite"])
    except web.Absent:
        value = f"{base} has no suite {wanted['suite']}"
        yield Check("mirror", False, value, "correct suite or debian_mirror; it ends before /dists")
        return
    yield from _clock(context, found.date)
    yield _judge(context, "mirror", found)
    if wanted["security"]:
        yield _security(context, archives.security_mirrors(base, wanted["security_mirror"].rstrip("/")))


def _security(context: CheckContext, places: list[str]) -> Check:
    suite = f"{context.settings['suite']}-security"
    for place in places:
        with contextlib.suppress(web.Absent):
            return _judge(context, "security", _fetch(context, place, suite))
    return Check(
        "security", False, f"no {suite} at {' or '.join(places)}", "set security_mirror, or security: false"
    )


@dataclass(frozen=True)
class Fetched:
    """An InRelease as it was served, and the server's Date."""

    suite: str
    url: str
    body: bytes
    date: str | None


def _fetch(context: CheckContext, mirror: str, suite: str) -> Fetched:
    """Fetch an InRelease. Raises Absent when the mirror has none, Failure when nothing sound answers."""
    source, url = web.Source(context.settings["apt_proxy"]), f"{mirror}/dists/{suite}/InRelease"
    try:
        with web.opened(url, source, web.RELEASE, {"Cache-Control": "max-age=0"}) as answer:
            return Fetched(suite, url, answer.body.whole(), answer.headers.get("date"))
    except (OSError, http.client.HTTPException) as error:
        raise web.failure(url, source, error) from error


def _judge(context: CheckContext, name: str, found: Fetched) -> Check:
    """Check signature, suite and dates of what was fetched."""
    try:
        signed = release.verify(found.body, release.keyring(context.settings["keyring"]), found.url)
        told = release.parse(signed.text)
        snapshot = context.settings["snapshot"]
        release.check(told, found.suite, found.url, archives.moment(snapshot) if snapshot else time.time())
    except Failure as failure:
        return Check(name, False, failure.message, failure.hint)
    except ValueError as error:
        return Check(name, False, f"{found.url} cannot be read: {error}", "use another mirror")
    return Check(name, True, f"{found.url} of {release.utc(told.date)}, signature good")


def _clock(context: CheckContext, date: str | None) -> Iterator[Check]:
    """Compare the clock with an HTTP Date header (RFC 9110, 6.6.1), where there is one that can be read."""
    try:
        moment = release.seconds(date or "")
    except ValueError:
        return
    ahead = time.time() - moment
    state = (
        "agrees with the mirror's"
        if abs(ahead) <= SKEW
        else f"is {abs(ahead):.0f} s {'fast' if ahead > 0 else 'slow'}"
    )
    yield Check(
        "clock", abs(ahead) <= SKEW, state, context.as_root(f"date --utc --set='{release.utc(moment)}'")
    )


def leftovers(context: CheckContext) -> Iterator[Check]:
    """What runs that were cut off left behind, and the mount that `inv mount --keep` made."""
    place = context.place
    if kept := keep.kept(place.location):
        yield Check("kept mount", False, f"the tree is shown at {kept[0]}", "inv umount", needed=False)
    for preset in sorted(Path("/run/systemd/system-preset").glob("00-systemvm-builder-*.preset")):
        if not Path("/proc", preset.stem.rpartition("-")[2]).exists():
            value = "an installation of packages was cut off; new services stay off until this is gone"
            yield Check("preset", False, value, context.as_root(f"rm {preset}"), needed=False)
    if not place.location.is_dir() or not os.access(place.location, os.W_OK):
        return
    if store.is_locked(place.location):
        yield Check("leftovers", True, "a build is running", needed=False)
        return
    stores = place.location.glob("cache/*")
    parts = [*place.location.glob(".*"), *(part for folder in stores for part in store.parts(folder))]
    yield Check("leftovers", not parts, f"{len(parts) or 'no'} unfinished parts", "inv clean", needed=False)


XENSERVER = {"xe-guest-utilities": "the guest agent", "vhd-util": "secondary storage"}
"""What CloudStack uses on XenServer and Debian does not have, and what for."""


def hypervisors(context: CheckContext) -> Iterator[Check]:
    """What a CloudStack image lacks on a hypervisor because Debian does not have it."""
    listed = {name for names in (context.settings.get("packages") or {}).values() for name in names}
    lacking = [f"{name} ({use})" for name, use in XENSERVER.items() if name not in listed]
    if context.settings.get("cloudstack_release") and lacking:
        yield Check(
            "xenserver",
            True,
            f"not in Debian, so not in the image: {', '.join(lacking)}; see docs/guest.md",
            needed=False,
        )


CHECKS: tuple[Callable[[CheckContext], Iterator[Check]], ...] = (
    host,
    tools,
    versions,
    privileges,
    location,
    memory,
    virtualization,
    mirror,
    leftovers,
    hypervisors,
)
