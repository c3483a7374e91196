"""The protocol: what client and agent say to each other, as frozen dataclasses that both ends import.

A request goes down the agent's stdin as one line of JSON, {"verb": NAME, ...}; up come events, each one line,
{"event": KIND, ...}, until `result` with its value, or `failure` with message and hint. What a verb may send
besides: `work` (name, last: seconds of the last run there), `progress` (label, done, total), `note` (text),
and what its request says. The class of a request names the verb and the type of its result; `dump` makes
JSON of either, `load` makes it again and raises ValueError for what is not of that kind.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

Kind = TypeVar("Kind")
Result = TypeVar("Result")


class Request(Generic[Result]):
    """What a verb is asked for; `Result` is the type of what it returns."""

    verb: ClassVar[str]


def result_of(request: type[Request[Result]]) -> type[Result]:
    """The type that a class of requests names as its result."""
    bases: tuple[Any, ...] = vars(request)["__orig_bases__"]
    result: type[Result] = typing.get_args(bases[0])[0]
    return result


def result(verb: str, value: Any) -> Any:
    """Make of JSON what a verb has returned."""
    kind = next(kind for kind in Request.__subclasses__() if kind.verb == verb)
    return load(result_of(kind), value)


# ---- the build host --------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildPaths:
    """Where and how a host builds."""

    location: str
    mountpoint: str
    mode: str
    """`root` or `user`."""
    overlay: bool
    """Whether overlayfs works there; else layers are full copies."""
    keep_visible: tuple[str, ...] = ()
    """Paths that a mount at `mountpoint` must not hide."""


@dataclass(frozen=True)
class Located:
    """What `location` has settled."""

    place: BuildPaths
    image: str
    """IMAGELOC."""
    salt: str = ""
    """For the password of this image in this LOCATION; empty: not asked for, or not known yet."""


@dataclass(frozen=True)
class Location(Request[Located]):
    """Settle where and how the host builds; empty settings get the host's defaults."""

    verb: ClassVar[str] = "location"
    location: str
    mountpoint: str
    imageloc: str
    imagename: str
    create: bool
    """Make LOCATION and prove that builds can be there; else nothing is touched."""
    keep_visible: tuple[str, ...] = ()
    salted: bool = False
    """Whether a salt is wanted; with `create`, LOCATION gets a secret to make it from."""


@dataclass(frozen=True)
class Digest(Request[dict[str, str]]):
    """Ask for the digests of secrets, keyed by LOCATION; what has them tells nothing about the secrets."""

    verb: ClassVar[str] = "digest"
    location: str
    secrets: Mapping[str, str]


@dataclass(frozen=True)
class Facts(Request[dict[str, Any]]):
    """Ask what host this is; returns what `build.agent.facts` gathers."""

    verb: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Space:
    """What `preflight` has found."""

    free: int
    """Bytes of the disk that LOCATION is on."""


@dataclass(frozen=True)
class Preflight(Request[Space]):
    """Check tools, memory and space before a build."""

    verb: ClassVar[str] = "preflight"
    location: str
    image: str


@dataclass(frozen=True)
class Installed:
    """What `install` has installed."""

    packages: tuple[str, ...]


@dataclass(frozen=True)
class Install(Request[Installed]):
    """Install the Debian packages that are missing there."""

    verb: ClassVar[str] = "install"
    script: str
    """Run by sh with the packages' names."""


@dataclass(frozen=True)
class Check:
    """A row of `doctor`."""

    name: str
    ok: bool
    value: str
    """What was found."""
    fix: str = ""
    """The command that closes the gap; of a row that is ok, nothing."""
    needed: bool = True
    """Whether a build fails without it."""


@dataclass(frozen=True)
class Doctor(Request[tuple[Check, ...]]):
    """Check the build host; changes nothing."""

    verb: ClassVar[str] = "doctor"
    place: BuildPaths
    image: str
    settings: Mapping[str, Any]
    """Of the image definition, without the password."""


@dataclass(frozen=True)
class Audit(Request[tuple[Check, ...]]):
    """Read every layer in full; those that are not as they were made are layers no more."""

    verb: ClassVar[str] = "audit"
    place: BuildPaths


@dataclass(frozen=True)
class Job(Request[dict[str, Any]]):
    """Do something with the build that was left to the host; returns how it is.

    That is `state` (running, finished, failed, cancelled, killed; of `status` also none, hidden), `user`,
    `what`, `since`, `until`, `step`, `results`, `failure`, and of `status` who holds the `lock`.
    Event of `follow`: `job`, with what that build has `told`.
    """

    verb: ClassVar[str] = "job"
    place: BuildPaths
    action: str
    """`start`, `status`, `follow` or `cancel`."""
    what: str = ""
    orders: tuple[dict[str, Any], ...] = ()
    """Of `start`: each with verb, name and request."""


@dataclass(frozen=True)
class Lent:
    """By what a program of the same user gets a request."""

    token: str


@dataclass(frozen=True)
class Terminal(Request[Lent]):
    """Hand a request to a program that takes over the terminal, and lend it this session's life."""

    verb: ClassVar[str] = "terminal"
    request: dict[str, Any]


@dataclass(frozen=True)
class Shell:
    """For the program `shell`: a shell in a tree; what is changed there is thrown away."""

    place: BuildPaths
    chain: tuple[str, ...]
    label: str
    argv: tuple[str, ...] = ()
    """Runs instead of a shell."""
    term: str = "dumb"


@dataclass(frozen=True)
class Boot:
    """For the program `boot`: the image on this terminal; nothing is written to it."""

    image: str
    firmware: str
    """`bios` or `uefi`."""
    memory: int
    """MiB."""
    arch: str
    work: str
    """Folder for what the guest writes."""


# ---- packages --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mirrors:
    """Which archives are asked, and what of theirs is believed."""

    suite: str
    mirror: str
    """Empty: the default of the bootstrap tools there."""
    security_mirror: str
    """Empty: beside the mirror."""
    security: bool
    keyring: str
    """Empty: the host's."""
    apt_proxy: str
    store: str
    """Folder of what was seen and solved before."""
    accept_older: bool = False
    """Take Release files older than ones that were seen before."""
    snapshot: str = ""
    """The moment (20261127T090000Z) that the mirrors show, and Release files need to have been valid at."""
    consent: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of Release files, by suite, that are taken whatever their age."""


@dataclass(frozen=True)
class Resolve(Request[dict[str, Any]]):
    """Ask the mirror for the exact package set.

    Returns packages (name, version, arch, sha256, size, url, path, suite, source, essential), epoch, when the
    mirror was asked, and by suite what its Release files were, as `build.engine.resolution` reads it.
    """

    verb: ClassVar[str] = "resolve"
    mirrors: Mirrors
    arch: str
    components: tuple[str, ...]
    packages: tuple[str, ...]
    frozen: bool = False
    """Take the last answer and ask nobody."""
    held: tuple[Mapping[str, Any], ...] = ()
    """Packages whose versions are to be kept, as far as `renew` and what is asked for allow."""
    renew: tuple[str, ...] = ()
    """Names of those that get the newest version; of no use without `held`."""
    debs: str = ""
    """Folder of packages, to be read (and fetched) where no index lists a held version any more."""


@dataclass(frozen=True)
class Seen:
    """What the archives of a locked set say of themselves today."""

    mirrors: Mapping[str, str]
    """Where each suite lies."""
    dates: Mapping[str, int]
    """Of each suite's Release file, seconds since 1970; nothing when they were not asked."""
    default_mirror: str
    """Of the bootstrap tools there."""
    unknown: str = ""
    """Why there are no dates."""


@dataclass(frozen=True)
class See(Request[Seen]):
    """Ask for Release files alone."""

    verb: ClassVar[str] = "see"
    mirrors: Mirrors
    offline: bool = False


SURROUNDINGS = (*("folder", "file-system", "umask", "locale", "zone", "cpus", "host-name", "python", "user"),)
"""What can be changed around a second build, in the order in which it is."""


@dataclass(frozen=True)
class Compared:
    """A file of both builds."""

    file: str
    same: bool
    sha256: str
    """Of the first."""
    why: tuple[str, ...]
    """Where it differs, as lines."""


@dataclass(frozen=True)
class Reproduced:
    """What a second build was, and how it compares."""

    varied: Mapping[str, str]
    """What was changed, by its name."""
    kept: Mapping[str, str]
    """What was not, and why."""
    compared: tuple[Compared, ...]


@dataclass(frozen=True)
class Repro(Request[Reproduced]):
    """Build again from nothing, on the machine of the client, and compare with what was built."""

    verb: ClassVar[str] = "repro"
    place: BuildPaths
    store: str
    """Folder of the first build's layers."""
    image: str
    files: tuple[str, ...]
    """Names of the converted ones, below LOCATION."""
    layers: tuple[tuple[str, ...], ...]
    """Step and key."""
    line: tuple[str, ...]
    """Words of the client's command line, but for where it builds."""
    environment: Mapping[str, str]
    """Settings."""
    vary: tuple[str, ...]


# ---- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached(Request[tuple[str, ...]]):
    """Ask which of these layers are in the cache; returns their keys."""

    verb: ClassVar[str] = "cached"
    place: BuildPaths
    keys: tuple[str, ...]
    use: bool = False
    """They will be: mark them as just used, and drop those that are not what was recorded."""
    image: str = ""
    disk: str = ""
    """Key of the disk that will be made of them at `image`; empty: none."""
    what: str = ""
    """Who asks, for whoever waits for LOCATION."""


@dataclass(frozen=True)
class Records(Request[tuple[Any, ...]]):
    """Ask what went into the stored layers of a step; the most recently used is last."""

    verb: ClassVar[str] = "records"
    place: BuildPaths
    step: str


@dataclass(frozen=True)
class File:
    """A file that a step brings along."""

    content: str
    """Base64."""
    mode: int


@dataclass(frozen=True)
class Built:
    """What came of a layer."""

    state: str
    """`built` or `cached`."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What the script had to say."""


@dataclass(frozen=True)
class Layer(Request[Built]):
    """Build a layer on those below, unless it is in the cache."""

    verb: ClassVar[str] = "layer"
    place: BuildPaths
    key: str
    below: tuple[str, ...]
    """Keys, the lowest first."""
    step: str
    script: str
    files: Mapping[str, File]
    bootstrap: bool
    """Whether it is the lowest one, built in a plain directory."""
    epoch: int
    record: Mapping[str, Any]
    """What is kept with the layer, for `inv why`."""
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    what: str = "build"
    """What is said to those who wait for the lock."""


@dataclass(frozen=True)
class Disk:
    """What came of a raw image."""

    state: str
    """`built` or `cached`."""
    seconds: float
    image: str
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()
    mode: str = ""
    """Of an image that holds a root password: its permissions, as 0600."""


@dataclass(frozen=True)
class Assemble(Request[Disk]):
    """Write the raw image of a finished tree, unless its manifest says that it is there."""

    verb: ClassVar[str] = "disk"
    place: BuildPaths
    image: str
    key: str
    seed: str
    """Hex; every identifier on the disk is derived from it."""
    chain: tuple[str, ...]
    script: str
    files: Mapping[str, File]
    epoch: int
    manifest: Mapping[str, Any]
    """What the image's manifest tells besides."""
    what: str = "build"
    private: bool = False
    """Nobody but its owner may read it: it holds a root password."""


@dataclass(frozen=True)
class Fetched:
    """What `fetch` has brought."""

    paths: tuple[str, ...]
    """In the order of the packages."""
    bytes: int
    """Downloaded."""


@dataclass(frozen=True)
class Fetch(Request[Fetched]):
    """Bring .deb files into a folder, each as it was signed."""

    verb: ClassVar[str] = "fetch"
    packages: tuple[Mapping[str, Any], ...]
    """As `resolve` returns them."""
    debs: str
    apt_proxy: str = ""
    lock: str = ""
    """The lock that names them, for messages: its file and day."""
    offline: bool = False
    """Ask nobody: raises Failure that names what is not there."""


@dataclass(frozen=True)
class Update:
    """A package that is to be replaced by a newer one."""

    old: str
    """Version; empty: it was not there."""
    package: Mapping[str, Any]
    """The newer one, as `resolve` returns them."""


@dataclass(frozen=True)
class News:
    """What the changelog of a source package says between two versions."""

    source: str
    urgency: str
    """The greatest one; empty: no changelog is to be had."""
    cves: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Changes(Request[tuple[News, ...]]):
    """Read what updates bring, out of the packages themselves: one for each source package."""

    verb: ClassVar[str] = "changes"
    updates: tuple[Update, ...]
    debs: str
    apt_proxy: str = ""
    offline: bool = False
    """Read what is there, and fetch nothing."""


@dataclass(frozen=True)
class Pending:
    """A package for which its suite has a security update."""

    package: str
    arch: str
    source: str
    old: str
    new: str
    urgency: str = ""
    cves: tuple[str, ...] = ()
    """Of the new package's changelog, where that package is there."""


@dataclass(frozen=True)
class Behind:
    """How a set of packages compares with its suite's security updates."""

    suite: str
    date: int
    """Of the security suite's Release file, seconds since 1970."""
    packages: int
    updates: tuple[Pending, ...]


@dataclass(frozen=True)
class Outdated(Request[Behind]):
    """Look which packages of a set, or of the system in an image file, have security updates."""

    verb: ClassVar[str] = "outdated"
    mirrors: Mirrors
    """With a file, the suite is what the system in it says."""
    arch: str
    components: tuple[str, ...]
    packages: tuple[Mapping[str, Any], ...]
    debs: str
    file: str = ""
    disk: int = 1


@dataclass(frozen=True)
class Stocked:
    """What a folder of packages holds."""

    whole: int
    missing: tuple[str, ...]
    """Names of files."""
    damaged: tuple[str, ...]
    others: tuple[str, ...]
    """Files that none of the packages is."""
    bytes: int
    """Of `others` and `damaged`."""


@dataclass(frozen=True)
class Stock(Request[Stocked]):
    """Compare a folder of packages with what should be there, each with its SHA-256."""

    verb: ClassVar[str] = "stock"
    packages: tuple[Mapping[str, Any], ...]
    debs: str
    prune: bool = False
    """Remove `others` and `damaged`."""


@dataclass(frozen=True)
class Mounted:
    """What `mount` has seen."""

    mounted: str
    """findmnt's line."""


@dataclass(frozen=True)
class Mount(Request[Mounted]):
    """Prove the host: mount the tree of a chain, or an empty one, at MOUNTPOINT in a sandbox."""

    verb: ClassVar[str] = "mount"
    place: BuildPaths
    chain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """Where `keep` has mounted a tree, or has unmounted it."""

    mountpoint: str


@dataclass(frozen=True)
class Keep(Request[Kept]):
    """Show a finished tree on the host itself, or take it away."""

    verb: ClassVar[str] = "keep"
    place: BuildPaths
    action: str
    """`mount` or `umount`."""
    chain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Removed:
    """A path that `clean` has removed, or would remove."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Cleaned:
    """What `clean` has removed."""

    removed: tuple[Removed, ...]


@dataclass(frozen=True)
class Clean(Request[Cleaned]):
    """Remove what is left over, what no plan reaches, or everything."""

    verb: ClassVar[str] = "clean"
    place: BuildPaths
    image: str
    what: str
    """`parts`; `cache`: layers outside of `reach`, too; `all`; or `limit`: of these layers the least recently
    used, until what stays is within `bytes`."""
    reach: tuple[str, ...] = ()
    bytes: int = 0
    dry_run: bool = False
    """Only list."""


# ---- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest(Request[dict[str, Any]]):
    """Ask for the manifest of an image that is there; an empty one if it has none."""

    verb: ClassVar[str] = "manifest"
    image: str


@dataclass(frozen=True)
class Artifact:
    """A converted file, as its folder has it."""

    file: str
    state: str
    """`made`; `missing`; `changed`: it is not what its manifest says."""
    artifact: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What its manifest tells, of a file that is made."""


@dataclass(frozen=True)
class Made(Request[tuple[Artifact, ...]]):
    """Ask which of these converted files lie in a folder."""

    verb: ClassVar[str] = "made"
    folder: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """What came of a conversion."""

    files: tuple[dict[str, Any], ...]
    """Each with file, format, state (`built` or `cached`), virtual_size, size, allocated, guest_sha256, md5,
    sha256, sha512, seconds, writer, compressor, reproducible, and register for CloudStack."""
    folder: str
    beside: Mapping[str, str]
    """Text of each file that CloudStack wants beside them."""
    virtual_size: int
    guest_sha256: str
    seconds: float
    private: bool = False
    """Whether the files are their owner's alone."""
    notes: tuple[str, ...] = ()
    """What is worth knowing of some of them, one line each."""


@dataclass(frozen=True)
class Convert(Request[Converted]):
    """Write the formats of an image into a folder, in one reading."""

    verb: ClassVar[str] = "convert"
    image: str
    outdir: str
    formats: tuple[dict[str, Any], ...]
    """Each with name, kind, file, compress, options, and register for CloudStack."""
    identity: str
    """What every id in the files is derived from, beside the disk's content."""
    epoch: int
    threads: int = 0
    """0: as many as there are cores."""
    location: str = ""
    """Locked meanwhile; empty: the folder itself is."""
    foreign: bool = False
    """The image is a file of any maker and kind, also packed; otherwise it is a raw disk of ours."""
    disk: int = 1
    """Which of several disks in it."""
    force: bool = False
    """Also what is there already."""
    cloudstack: dict[str, Any] | None = None
    """What the files beside are made of."""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Kept in the manifests."""
    private: bool = False
    """Nobody but their owner may read the files; of an image that not everybody may read that goes unsaid."""


@dataclass(frozen=True)
class Sent:
    """A finished file, and what its manifest says of it."""

    path: str
    size: int
    mtime_ns: int
    sha256: str
    manifest: Mapping[str, Any]
    private: bool = False
    """Whether not everybody may read it there."""


@dataclass(frozen=True)
class Send(Request[tuple[Sent, ...]]):
    """Ask for what is needed to fetch files; refused for one that is not what its manifest says."""

    verb: ClassVar[str] = "send"
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing about an image file: a row of docs/findings.md that applies to it."""

    code: str
    severity: str
    """`error`, `warning` or `info`."""
    where: str
    text: str
    refused_by: str
    """Who would refuse the file or misread it, for people."""
    fix: str
    lossy: bool
    """Whether data is wrong or missing."""
    disk: int | None
    """Which disk of an archive it is about, counted from 1; None: the file as a whole."""
    fields: Mapping[str, str | int]
    """What stands in the text for this file."""
    affects: tuple[Mapping[str, str], ...]
    """The same for programs: `platform`, and where there are any `since`, `before`, `only`, `case`."""
    repair: str
    """What `inv repair` does about it, by a key; empty: nothing."""
    times: int
    """How many of its kind it stands for."""


@dataclass(frozen=True)
class Inspected:
    """What a file is, and what is wrong with it."""

    file: str
    size: int
    allocated: int
    """Bytes on the disk."""
    outer: str
    """Compression around it; empty: none."""
    format: str | None = None
    """None, as all that follows, for a file that cannot be read."""
    virtual_size: int | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What the file says of itself, for people."""
    guest_sha256: str | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Inspect(Request[Inspected]):
    """Say what an image file is, and lint it."""

    verb: ClassVar[str] = "inspect"
    file: str
    work: str | None = None
    """Folder for what is expanded; None: the system's."""
    disk: int = 1
    """Which of several disks in it."""
    content: bool = False
    """Also hash what a guest would see."""
    limit: int = 0
    """Bytes that are expanded and hashed at most; 0: the usual."""


@dataclass(frozen=True)
class Repaired:
    """What was changed in an OVA; without a change nothing was written."""

    file: str
    """Written; empty: nothing."""
    changes: tuple[str, ...]
    """One line each."""
    size: int = 0
    sha256: str = ""
    """Of the file that was written."""


@dataclass(frozen=True)
class Repair(Request[Repaired]):
    """Make an OVA into one that vSphere imports; the file itself is never touched."""

    verb: ClassVar[str] = "repair"
    file: str
    output: str
    """Must not be there."""
    hardware: int
    """Version of VMware's hardware that a foreign family becomes."""
    work: str | None = None
    """Folder for what is expanded; None: the system's."""


@dataclass(frozen=True)
class Guest:
    """A machine that `verify` starts."""

    image: str
    """Also within bz2, gz, zip or zst."""
    firmware: str
    """`bios` or `uefi`."""
    name: str = ""
    """Empty: that of its format."""
    format: str = "raw"
    """A kind of `build.formats`."""
    disk: str = "virtio"
    """A key of qemu.DISKS."""
    nic: str = ""
    """A key of qemu.NICS; empty: no network."""


@dataclass(frozen=True)
class Verify(Request[dict[str, Any]]):
    """Boot images, never written to, and ask the systems inside how they are.

    Returns `guests`, each with name, firmware, format, disk, accel, ok, seconds, serial_log and checks
    (name, ok, value, expected). A system that answers but is not as expected is a result with `ok` false; a
    guest that never answers is a failure with firmware, phase, log (path of the serial log) and tail (its
    last 20 lines).
    Events: `progress` over all guests together, in percent; `phase` (guest, firmware, phase, seconds).
    """

    verb: ClassVar[str] = "verify"
    guests: tuple[Guest, ...]
    memory: int
    """MiB."""
    arch: str
    expect: Mapping[str, Any]
    """release (how the line of /etc/cloudstack-release begins, or None), ssh_port (or None), kernel_cmdline,
    min_disk (MiB, or None)."""
    work: str
    """Folder for the serial logs."""
    grow_to: int | None = None
    """MiB of the disk that guests see; None: the image's own size."""
    accel: str = ""
    """`kvm` or `tcg`; empty: what works."""
    timeout: float | None = None
    """Seconds for one guest; None: what its accelerator needs."""


# ---- rehearsal -------------------------------------------------------------------------------------

KEY = "@KEY@"
"""Stands in a boot line for the base64 of the public key that the agent makes."""


@dataclass(frozen=True)
class Document:
    """A document as a management server sends it to a router."""

    name: str
    """File name of its kind, as `firewall_rules.json`."""
    text: str
    """JSON in one line."""


@dataclass(frozen=True)
class Effect:
    """What must be seen inside when the documents are in force."""

    name: str
    run: str
    """A shell command."""
    expect: str
    """A regular expression that its output must hold; `^` and `$` are ends of lines."""


@dataclass(frozen=True)
class Nic:
    """A network card of a rehearsed machine."""

    mac: str
    control: str = ""
    """On the control network: the address that is reached from the host."""
    network: str = ""
    """What it is on, as `192.0.2.0/24`; empty: some other."""
    gateway: str = ""
    """An address of somebody else there who answers."""
    late: bool = False
    """Plugged while the machine runs, as a VPC's tiers are."""


@dataclass(frozen=True)
class Machine:
    """One system VM of a rehearsal."""

    kind: str
    name: str
    line: str
    """Its boot line, with KEY for the key."""
    nics: tuple[Nic, ...]
    port: int = 3922
    """Where its sshd listens; 22 is a user's own machine, which no key of a server opens."""
    documents: tuple[Document, ...] = ()
    effects: tuple[Effect, ...] = ()
    checks: tuple[Effect, ...] = ()
    """What must be seen whatever documents came."""
    answers_state: bool = False
    """Whether a server asks it for its redundancy state."""


@dataclass(frozen=True)
class Scripts:
    """Files of a management server, by their paths on the host."""

    scripts: str
    agent: str
    patch: str
    passing: str = ""
    """A folder that holds nothing but these and is to be removed as soon as they are open."""


@dataclass(frozen=True)
class Pair:
    """What a redundant pair of machines is asked for."""

    gateway: str
    """Address that the primary answers for."""
    observer: str
    """Address from which it is asked."""
    bound: float
    """Seconds of a failover at most, as `inv keepalived-render` says it for the machines' interval."""


@dataclass(frozen=True)
class Step:
    """How one step ended; also the event `step` that tells of it at once."""

    machine: str
    name: str
    state: str
    """`ok`, `FAIL`, or `-` for what was not played."""
    seconds: float
    says: str
    """What was seen; of a failure, why."""
    tail: tuple[str, ...] = ()
    """Last lines of the console and of the journal, of a failure only."""


@dataclass(frozen=True)
class RehearseResult:
    """What came of a rehearsal."""

    accel: str
    steps: tuple[Step, ...]
    logs: tuple[str, ...]
    """Paths of the serial logs on the host."""


@dataclass(frozen=True)
class RehearseRequest(Request[RehearseResult]):
    """Play a management server's part against an image.

    Events: `open` when the files are, `step` with a Step as soon as it has ended.
    """

    verb: ClassVar[str] = "rehearse"
    image: str
    """Path of the raw image; it is not written to."""
    arch: str
    memory: int
    """MiB of each machine."""
    release: str
    """How /etc/cloudstack-release must begin; empty: anything."""
    work: str
    """Folder for the serial logs."""
    machines: tuple[Machine, ...]
    scripts: Scripts | None = None
    """None: nothing is copied."""
    pair: Pair | None = None
    """Of two machines on one network; None: the machines are played one after another, each alone."""
    accel: str = ""
    """`kvm` or `tcg`; empty: what works."""


def dump(value: Any) -> Any:
    """Make plain values, as JSON has them, of a dataclass or of what holds some."""
    if isinstance(value, list | tuple):
        return [dump(each) for each in value]
    if isinstance(value, Mapping):
        return {name: dump(each) for name, each in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    return {each.name: dump(getattr(value, each.name)) for each in dataclasses.fields(value)}


def load(kind: type[Kind], value: Any) -> Kind:
    """Make a dataclass, or a tuple of them, of JSON; raises ValueError that names what does not fit."""
    loaded: Kind = _load(kind, value, getattr(kind, "__name__", str(kind)))
    return loaded


@functools.cache
def _fields(kind: type) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Types of a dataclass's fields, and the names of those without a default."""
    named = {each.name: each for each in dataclasses.fields(kind)}
    types_of = {name: hint for name, hint in typing.get_type_hints(kind).items() if name in named}
    missing = dataclasses.MISSING
    needed = (
        name for name, each in named.items() if each.default is missing and each.default_factory is missing
    )
    return types_of, frozenset(needed)


def _load(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is no object")
        hints, needed = _fields(typing.cast("type", kind))
        if wrong := (set(value) - set(hints)) | (needed - set(value)):
            raise ValueError(f"{where}: unknown or missing: {', '.join(sorted(wrong))}")
        make: Any = kind
        return make(**{name: _load(hints[name], given, f"{where}.{name}") for name, given in value.items()})
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is no list")
        return tuple(_load(arguments[0], each, f"{where}[{number}]") for number, each in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is no object")
        return {name: _load(arguments[1], each, f"{where}.{name}") for name, each in value.items()}
    if arguments and type(value) in arguments:  # str | int
        return value
    if arguments:  # X | None
        return None if value is None else _load(arguments[0], value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is no {kind.__name__}")
    return value
