"""Unpack packages in parallel, then hand them to dpkg as if it had unpacked them.

dpkg unpacks one package after another and most of its time goes into forks and journals, not into
files. What it leaves behind is known (deb(5), dpkg's doc/triggers.txt, deb-conffiles(5)): files,
`info/`, a status of `install ok unpacked`, conffiles under `.dpkg-new`, trigger interests. This tool
leaves the same behind, on all cores, and everything that runs maintainer scripts stays dpkg's own
work. It refuses what it does not understand, so that the caller can take the ordinary way.

    unpack.py base SET ROOT NOTES           unpack the base's packages of SET into ROOT, an empty folder
    unpack.py begin SET ROOT NOTES          begin dpkg's database with them, and write what runs their preinst
    unpack.py stage SET STAGE NOTES [LATE]  unpack the packages of SET that are not of the base into STAGE;
                                            LATE becomes a SET of those that can come late, if any can
    unpack.py merge SET STAGE NOTES ROOT    move STAGE, a path in the tree, into the tree, enter the packages
                                            into dpkg's database, and write what runs their preinst to
                                            ROOT/var/lib/dpkg/preinst-runner
    unpack.py repository SET FOLDER         make an apt repository of the base's packages (all: with --all)
    unpack.py restore SET ROOT              give the base's packages in ROOT their own priorities back

The environment names the folder with the packages (DEBS) and the exit status that leaves a set to dpkg
(REFUSED); SET is JSON as the step writes it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import debian, inside

LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Names at the top that a merged /usr turns into links."""
CHUNK = 1 << 18
_MEMBER = re.compile(rb"([ -~]{16})[ -~]{32}([0-9]+) *`\n")
_BROKEN = (tarfile.TarError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError)
"""What the standard library says of archives that are cut off or damaged."""
Tell = Callable[[bytes], None]
SYSTEM_IDS = 100
"""User and group numbers below this are the same on every Debian system (base-passwd)."""


class ChangedPackage(Exception):
    """The file of a package, which this names, is not the one that was signed."""


class UnsupportedPackage(Exception):
    """A package holds something that this tool leaves to dpkg."""


class ControlFile(NamedTuple):
    """A control file: content, mode, and time of its last change in seconds since 1970; None: now."""

    content: bytes
    mode: int = 0o644
    mtime: int | None = None


@dataclass(frozen=True)
class Unpacked:
    """What one package brought along."""

    key: str
    """Name of its files in dpkg's info folder: with the architecture when it is Multi-Arch: same."""
    control: str
    files: tuple[str, ...]
    """Paths as dpkg lists them, `/.` first."""
    folders: Mapping[str, tuple[int, int, int]]
    """Mode, uid and gid of each directory."""
    conffiles: tuple[str, ...] = ()
    triggers: str = ""
    preinst: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


# --- reading a .deb --------------------------------------------------------------------------------


def members(file: IO[bytes]) -> Iterator[tuple[str, int]]:
    """Names and sizes of the members of an ar archive; the file stands at the member's first byte."""
    if file.read(8) != b"!<arch>\n":
        raise UnsupportedPackage("not a Debian package")
    while header := file.read(60):
        found = _MEMBER.fullmatch(header)
        if not found:
            raise UnsupportedPackage("not an ar archive to its end")
        name, size = found[1].decode().rstrip().removesuffix("/"), int(found[2])
        start = file.tell()
        yield name, size
        file.seek(start + size + size % 2)


def tar_of(file: IO[bytes], name: str, size: int) -> tarfile.TarFile:
    """Open a tar member of a .deb as a stream."""
    packed = io.BytesIO(file.read(size))
    suffix = Path(name).suffix
    if suffix == ".xz":
        return tarfile.open(fileobj=lzma.LZMAFile(packed), mode="r|", bufsize=CHUNK)
    if suffix == ".gz":
        return tarfile.open(fileobj=gzip.GzipFile(fileobj=packed), mode="r|", bufsize=CHUNK)
    if suffix != ".tar":
        raise UnsupportedPackage(f"{name} is packed in a way that is left to dpkg")
    return tarfile.open(fileobj=packed, mode="r|", bufsize=CHUNK)


def signed(path: Path, sha256: str) -> io.BytesIO:
    """A package as it lies there, once it is what was signed; nobody can change what is read of it then.

    Raises ChangedPackage.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ChangedPackage(path.name)
    return io.BytesIO(data)


@contextlib.contextmanager
def sound(package: str) -> Iterator[None]:
    """Raise UnsupportedPackage for a package that turns out to be broken: dpkg says better what is wrong."""
    try:
        yield
    except _BROKEN as error:
        raise UnsupportedPackage(f"{package} is broken: {error}") from error


def control_of(path: Path, sha256: str) -> dict[str, ControlFile]:
    """The control files of a package."""
    with signed(path, sha256) as file, sound(path.name):
        for name, size in members(file):
            if name.startswith("control.tar"):
                return read_control(file, name, size)
    raise UnsupportedPackage(f"{path.name} has no control files")


def read_control(file: IO[bytes], name: str, size: int) -> dict[str, ControlFile]:
    """Read the control member that the file stands at."""
    found = {}
    with tar_of(file, name, size) as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isfile() else None
            if content:
                name = os.path.basename(info.name)
                found[name] = ControlFile(content.read(), info.mode & 0o777, int(info.mtime))
    return found


# --- stage -----------------------------------------------------------------------------------------


def unpack(path: Path, sha256: str, stage: Path) -> Unpacked:
    """Unpack one package below `stage`; other packages are unpacked there at the same time."""
    with signed(path, sha256) as file, sound(path.name):
        controls: dict[str, ControlFile] = {}
        for name, size in members(file):
            if name.startswith("control.tar"):
                controls = read_control(file, name, size)
            elif name.startswith("data.tar"):
                control = controls.pop("control").content.decode().strip("\n")
                fields = debian.fields(control)
                conffiles = parse_conffiles(text_of(controls, "conffiles"), path.name)
                preinst = text_of(controls, "preinst")
                summing = "md5sums" not in controls
                with tar_of(file, name, size) as tar:
                    files, folders, sums = extract(tar, stage, frozenset(conffiles), summing=summing)
                if summing:
                    lines = "".join(f"{sum_}  {name}\n" for name, sum_ in sums)
                    controls["md5sums"] = ControlFile(lines.encode())
                key = fields["Package"]
                if fields.get("Multi-Arch") == "same":
                    key = f"{key}:{fields['Architecture']}"
                write_info(stage / "var/lib/dpkg/info", key, controls, files)
                return Unpacked(
                    key,
                    control,
                    tuple(files),
                    folders,
                    conffiles,
                    text_of(controls, "triggers"),
                    preinst,
                    fields,
                )
    raise UnsupportedPackage(f"{path.name} has no data")


def text_of(controls: Mapping[str, ControlFile], name: str) -> str:
    """A control file as text, empty when it is not there."""
    return controls.get(name, ControlFile(b"")).content.decode("utf-8", "surrogateescape")


def parse_conffiles(text: str, package: str) -> tuple[str, ...]:
    """Paths of a package's conffiles; one that is only removed on upgrade has no file (deb-conffiles(5))."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("remove-on-upgrade ")]
    if strange := [line for line in lines if not line.startswith("/")]:
        raise UnsupportedPackage(f"{package} lists the conffile {strange[0]!r}")
    return tuple(lines)


def extract(
    tar: tarfile.TarFile, stage: Path, conffiles: frozenset[str], *, summing: bool
) -> tuple[list[str], dict[str, tuple[int, int, int]], list[tuple[str, str]]]:
    """Write the files of a package: paths as dpkg lists them, directories, and MD5 sums."""
    root = str(stage)
    paths = []
    folders = {}
    sums = []
    for info in tar:
        name = info.name.removeprefix("./").strip("/")
        name = "" if name == "." else name
        paths.append(f"/{name}" if name else "/.")
        if ".." in name.split("/"):
            raise UnsupportedPackage(f"path {name} leaves the tree")
        if max(info.uid, info.gid) >= SYSTEM_IDS:
            raise UnsupportedPackage(f"{name} belongs to a user that is not in every system")
        target = f"{root}/{name}"
        if info.isdir():
            folders[f"/{name}"] = (info.mode & 0o7777, info.uid, info.gid)
            make_folder(target)
            continue
        if f"/{name}" in conffiles:
            target += ".dpkg-new"
        if info.isfile():
            digest = hashlib.md5(usedforsecurity=False) if summing else None
            write_file(tar, info, target, digest.update if digest else None)
            if digest:
                sums.append((name, digest.hexdigest()))
        elif info.issym():
            at(target, lambda path, link=info.linkname: os.symlink(link, path))
        elif info.islnk():
            linked = info.linkname.removeprefix("./").strip("/")
            source = f"{root}/{linked}" + (".dpkg-new" if f"/{linked}" in conffiles else "")
            at(target, lambda path, source=source: os.link(source, path, follow_symlinks=False))
            continue
        else:
            raise UnsupportedPackage(f"{name} is neither file, folder nor link")
        os.chown(target, info.uid, info.gid, follow_symlinks=False)
        if not info.issym():
            os.chmod(target, info.mode & 0o7777)
        os.utime(target, (int(info.mtime), int(info.mtime)), follow_symlinks=False)
    return paths, folders, sums


def make_folder(path: str) -> None:
    """Make a folder; a link to one (merged /usr) stays."""
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except FileExistsError as error:
        raise UnsupportedPackage(f"{path} is a folder in one package and a file in another") from error


def at(path: str, make: Any) -> None:
    """Make something at a path, and the folders above it when a package does not list them."""
    try:
        try:
            make(path)
        except FileNotFoundError:
            make_folder(os.path.dirname(path))
            make(path)
    except FileExistsError:
        raise UnsupportedPackage(f"{path} is in two packages") from None


def write_file(tar: tarfile.TarFile, info: tarfile.TarInfo, target: str, tell: Tell | None) -> None:
    """Write one regular file and tell what it holds."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    handles: list[int] = []
    at(target, lambda path: handles.append(os.open(path, flags, 0o600)))
    try:
        content = tar.extractfile(info)
        while content and (chunk := content.read(CHUNK)):
            os.write(handles[0], chunk)
            if tell:
                tell(chunk)
    finally:
        os.close(handles[0])


def write_info(folder: Path, key: str, controls: Mapping[str, ControlFile], files: Iterable[str]) -> None:
    """Write a package's control files where dpkg keeps them."""
    for name, file in controls.items():
        path = folder / f"{key}.{name}"
        path.write_bytes(file.content)
        path.chmod(file.mode)
        if file.mtime is not None:
            os.utime(path, (file.mtime, file.mtime))
    listed = folder / f"{key}.list"
    listed.write_text("".join(f"{path}\n" for path in files), encoding="utf-8", errors="surrogateescape")


def stage_but_late(
    packages: Sequence[Mapping[str, Any]], debs: Path, folder: Path
) -> tuple[list[Unpacked], list[Mapping[str, Any]]]:
    """Unpack packages into `folder`; returns these, and the late ones, which are left."""
    late = {package["file"]: package for package in packages if package["late"]}
    unpacked = stage([package for package in packages if not package["late"]], debs, folder)
    told = {}
    for file, package in late.items():
        controls = control_of(debs / file, package["sha256"])
        fields = debian.fields(text_of(controls, "control").strip("\n"))
        told[file] = {**fields, "Triggers": text_of(controls, "triggers")}
    needed = on_time(told, unpacked)
    unpacked += stage([package for file, package in late.items() if file in needed], debs, folder)
    left = [package for file, package in late.items() if file not in needed]
    return sorted(unpacked, key=lambda package: package.key), left


def stage(packages: Iterable[Mapping[str, Any]], debs: Path, folder: Path) -> list[Unpacked]:
    """Unpack packages into `folder`, the largest first."""
    prepare(folder)
    packages = sorted(packages, key=lambda package: -package["size"])
    total, done = sum(package["size"] for package in packages), 0
    unpacked = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = {
            pool.submit(unpack, debs / package["file"], package["sha256"], folder): package
            for package in packages
        }
        for task in as_completed(tasks):
            unpacked.append(task.result())
            done += tasks[task]["size"]
            say("progress", "unpack", done, total)
    return sorted(unpacked, key=lambda package: package.key)


def prepare(folder: Path) -> None:
    """Make the frame that packages are unpacked into: /usr merged, and a place for dpkg's records."""
    (folder / "var/lib/dpkg/info").mkdir(parents=True, exist_ok=True)
    for name in LINKS:
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"usr/{name}")


def on_time(late: Mapping[str, Mapping[str, str]], unpacked: Iterable[Unpacked]) -> set[str]:
    """Files of those of the late packages that others need, or that wait for what others do.

    `late` has the fields of each package by its file, with what its triggers control file says as `Triggers`.
    """
    asking = [package.fields for package in unpacked]
    found: set[str] = set()
    while asking:
        wanted = {name for fields in asking for name in needed_names(fields)}
        more = {
            file: fields
            for file, fields in late.items()
            if file not in found
            and (
                wanted.intersection(offered_names(fields))
                or any(verb.startswith("interest") for verb, _ in directives(fields["Triggers"]))
            )
        }
        found.update(more)
        asking = list(more.values())
    return found


# --- merge -----------------------------------------------------------------------------------------


def begin(unpacked: list[Unpacked], root: Path) -> None:
    """Begin dpkg's database with the base, which lies in the tree already.

    As with every bootstrap tool, the base's scripts find its conffiles from the first one on.
    """
    ordered = by_dependency(unpacked)
    dress(ordered, root)
    for package in ordered:
        for conffile in package.conffiles:
            path = real(root, conffile)
            os.link(f"{path}.dpkg-new", path)
    (root / "etc/fstab").write_text("# UNCONFIGURED FSTAB FOR BASE SYSTEM\n", encoding="utf-8")
    database = root / "var/lib/dpkg"
    for name in ("triggers", "updates"):
        (database / name).mkdir(exist_ok=True)
    register(ordered, database)


def merge(unpacked: list[Unpacked], stage: Path, root: Path) -> None:
    """Move what was staged into the tree and tell dpkg's database that it is unpacked."""
    database = root / "var/lib/dpkg"
    ordered = by_dependency(unpacked)
    check_owners(ordered, database)
    for name in LINKS:
        (stage / name).unlink()
        if not (root / name).is_symlink() and not any((stage / "usr" / name).iterdir()):
            (stage / "usr" / name).rmdir()
    dress(ordered, stage)
    move(stage, root)
    register(ordered, database)


def dress(ordered: Iterable[Unpacked], stage: Path) -> None:
    """Give each folder what the first of its packages says, as dpkg does."""
    first: dict[str, tuple[int, int, int]] = {}
    for package in ordered:
        for path, owner in package.folders.items():
            first.setdefault(path, owner)
    for path, (mode, uid, gid) in first.items():
        folder = real(stage, path)
        if folder.is_dir():
            os.chown(folder, uid, gid)
            folder.chmod(mode)


def register(ordered: list[Unpacked], database: Path) -> None:
    """Tell dpkg that these are unpacked."""
    append(database / "status", "".join(f"\n{stanza(package)}" for package in ordered))
    write_triggers(ordered, database)
    (database / "preinst-runner").write_text(runner(ordered), encoding="utf-8")


def real(stage: Path, path: str) -> Path:
    """Where a path of a package lies when /usr is merged."""
    top = path.strip("/").partition("/")[0]
    return stage / ("usr" + path if top in LINKS else path.lstrip("/"))


def check_owners(unpacked: Iterable[Unpacked], database: Path) -> None:
    """Refuse files that a package of the base has, or has diverted: dpkg alone knows the rules for them."""
    owners: dict[str, set[str]] = {}
    for listed in (database / "info").glob("*.list"):
        for line in listed.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            owners.setdefault(line, set()).add(listed.stem.partition(":")[0])
    diversions = database / "diversions"
    diverted = set(diversions.read_text(encoding="utf-8").splitlines()) if diversions.exists() else set()
    for package in unpacked:
        for path in package.files:
            plain = path.rstrip("/")
            if plain in diverted:
                raise UnsupportedPackage(f"{path} of {package.key} is diverted")
            # Packages that are Multi-Arch: same share files, which are alike in every architecture.
            others = owners.get(plain, set()) - {package.key.partition(":")[0]}
            if others and plain not in package.folders and path != "/.":
                raise UnsupportedPackage(f"{path} is in {package.key} and in the base")


def move(source: Path, target: Path) -> None:
    """Move the content of a folder into another; folders in both keep the owner and mode of the target."""
    with os.scandir(source) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            place = target / entry.name
            if entry.is_dir(follow_symlinks=False) and place.is_dir():
                move(Path(entry.path), place)
                os.rmdir(entry.path)
            else:
                os.rename(entry.path, place)


def stanza(package: Unpacked) -> str:
    """The package's paragraph in dpkg's status file: unpacked, its conffiles not yet installed."""
    head, _, rest = package.control.partition("\n")
    if not head.startswith("Package:"):
        raise UnsupportedPackage(f"{package.key} does not begin with its name")
    lines = [head, "Status: install ok unpacked", rest]
    if package.conffiles:
        lines += ["Conffiles:", *(f" {path} newconffile" for path in package.conffiles)]
    return "\n".join(lines) + "\n"


def by_dependency(unpacked: Iterable[Unpacked]) -> list[Unpacked]:
    """Order packages so that each comes after what it depends on; a cycle is cut at its first name."""
    packages = sorted(unpacked, key=lambda package: package.key)
    providers: dict[str, list[Unpacked]] = {}
    for package in packages:
        for name in offered_names(package.fields):
            providers.setdefault(name, []).append(package)
    ordered: dict[str, Unpacked] = {}
    entered: set[str] = set()
    for first in packages:
        trail = [(first, iter(needs(first, providers)))] if first.key not in entered else []
        entered.add(first.key)
        while trail:
            package, left = trail[-1]
            for needed in left:
                if needed.key not in entered:
                    entered.add(needed.key)
                    trail.append((needed, iter(needs(needed, providers))))
                    break
            else:
                ordered[package.key] = package
                trail.pop()
    return list(ordered.values())


def needs(package: Unpacked, providers: Mapping[str, list[Unpacked]]) -> list[Unpacked]:
    """Packages of the same set that this one depends on."""
    return [found for name in needed_names(package.fields) for found in providers.get(name, ())]


def needed_names(fields: Mapping[str, str]) -> list[str]:
    """Names in what a package depends on, alternatives too."""
    return debian.names(",".join(fields.get(name, "") for name in ("Pre-Depends", "Depends")))


def offered_names(fields: Mapping[str, str]) -> list[str]:
    """Names that others may ask for and get this package."""
    return [fields["Package"], *debian.names(fields.get("Provides", ""))]


def write_triggers(unpacked: Iterable[Unpacked], database: Path) -> None:
    """Register interests, and note every trigger that these packages set off (dpkg's doc/triggers.txt)."""
    folder = database / "triggers"
    interested: dict[str, list[str]] = {}
    activated: set[str] = set()
    for package in sorted(unpacked, key=lambda package: package.key):
        for directive, name in directives(package.triggers):
            if directive.startswith("interest"):
                suffix = "/noawait" if directive == "interest-noawait" else ""
                interested.setdefault(name, []).append(f"{package.key}{suffix}")
            elif directive.startswith("activate"):
                activated.add(name)
    on_files = [
        f"{name} {who}\n" for name, keys in interested.items() if name.startswith("/") for who in keys
    ]
    append(folder / "File", "".join(on_files))
    for name, keys in interested.items():
        if not name.startswith("/"):
            append(folder / name, "".join(f"{who}\n" for who in keys))
    watched = {line.split()[0] for line in read(folder / "File").splitlines() if line.strip()}
    for package in unpacked:
        for path in package.files:
            activated.update(above for above in parents(path) if above in watched)
    known = activated & (watched | {path.name for path in folder.iterdir()})
    append(folder / "Unincorp", "".join(f"{name} -\n" for name in sorted(known)))


def directives(text: str) -> Iterator[tuple[str, str]]:
    """Directives of a triggers control file."""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) == 2:
            yield words[0], words[1]


def parents(path: str) -> Iterator[str]:
    """A path and every folder above it."""
    while path not in ("", "/", "/."):
        yield path
        path = path.rpartition("/")[0]


def runner(unpacked: Iterable[Unpacked]) -> str:
    """A shell script that runs every preinst the way dpkg does (dpkg(1), deb-preinst(5))."""
    lines = ["set -eu", "export DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT= DPKG_MAINTSCRIPT_NAME=preinst"]
    lines.append("DPKG_RUNNING_VERSION=$(dpkg-query -W -f '${Version}' dpkg); export DPKG_RUNNING_VERSION")
    for package in unpacked:
        if package.preinst:
            lines.append(
                f"DEBCONF_PACKAGE={package.fields['Package']}"
                f" DPKG_MAINTSCRIPT_PACKAGE={package.fields['Package']} DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1"
                f" DPKG_MAINTSCRIPT_ARCH={package.fields['Architecture']}"
                f" /var/lib/dpkg/info/{package.key}.preinst install"
                f" || {{ echo '{package.key}: preinst failed'; exit 1; }}"
            )
    return "\n".join([*lines, ""])


def read(path: Path) -> str:
    """A file's text, empty when it is not there."""
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""


def append(path: Path, text: str) -> None:
    """Add text to a file of dpkg's."""
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


# --- repository ------------------------------------------------------------------------------------


def repository(wanted: Mapping[str, Any], debs: Path, folder: Path, *, everything: bool) -> None:
    """Make an apt repository: links to the packages, an index, and a Release that names the suite."""
    packages = [package for package in wanted["packages"] if everything or package["base"]]
    folder.mkdir(parents=True)
    (folder / "pool").symlink_to(debs)
    entries = []
    for package in packages:
        control = (
            control_of(debs / package["file"], package["sha256"])["control"].content.decode().strip("\n")
        )
        if package["base"]:
            # debootstrap unpacks what is required before it runs anything, and it knows no other way to be
            # told than this field; `restore` sets it right in dpkg's records. mmdebstrap does so with what is
            # essential, and has apt enter the tree for all else: by chroot(2), past in_tree's fence.
            control = re.sub(r"^Priority: .*$", "Priority: required", control, flags=re.M)
            control = re.sub(r"^Essential: .*\n", "", control, flags=re.M) + "\nEssential: yes"
        where = f"Filename: pool/{package['file']}\nSize: {package['size']}\nSHA256: {package['sha256']}\n"
        entries.append(f"{control}\n{where}")
    suite = folder / "dists" / wanted["suite"]
    sums = []
    for arch in wanted["archs"]:
        index = suite / "main" / f"binary-{arch}" / "Packages"
        index.parent.mkdir(parents=True)
        index.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
        digest = hashlib.sha256(index.read_bytes()).hexdigest()
        sums.append(f" {digest} {index.stat().st_size} {index.relative_to(suite)}")
    fields = {
        "Suite": wanted["suite"],
        "Codename": wanted["suite"],
        "Date": "Thu, 01 Jan 1970 00:00:00 UTC",
        "Architectures": " ".join(wanted["archs"]),
        "Components": "main",
        "SHA256": "\n" + "\n".join(sums),
    }
    (suite / "Release").write_text(
        "".join(f"{key}: {value}\n" for key, value in fields.items()), encoding="utf-8"
    )


def restore(wanted: Mapping[str, Any], debs: Path, root: str) -> None:
    """Give the base's packages their own priorities back, which debootstrap took from our index."""
    status = Path("/var/lib/dpkg/status")
    priorities = {}
    for package in wanted["packages"]:
        if package["base"]:
            control = control_of(debs / package["file"], package["sha256"])["control"].content.decode()
            fields = debian.fields(control)
            priorities[package["name"]] = fields.get("Priority", "")
    inside.enter(root)
    paragraphs = []
    for paragraph in read(status).split("\n\n"):
        priority = priorities.get(paragraph.partition("\n")[0].removeprefix("Package: "))
        line = f"Priority: {priority}\n" if priority else ""
        paragraphs.append(re.sub(r"^Priority: .*\n", line, paragraph, flags=re.M))
    status.write_text("\n\n".join(paragraphs), encoding="utf-8", errors="surrogateescape")


# --- command line ----------------------------------------------------------------------------------


def say(*fields: object) -> None:
    """Send a line to the builder, which reads descriptor 3."""
    os.write(3, ("\t".join(str(part) for part in fields) + "\n").encode())


def main() -> int:
    """Do what the command line says."""
    verb, wanted = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    debs = Path(os.environ["DEBS"])
    try:
        if verb == "repository":
            repository(wanted, debs, Path(sys.argv[3]), everything="--all" in sys.argv)
        elif verb == "restore":
            restore(wanted, debs, sys.argv[3])
        elif verb in ("base", "stage"):
            packages = [package for package in wanted["packages"] if package["base"] == (verb == "base")]
            folder, notes = Path(sys.argv[3]), Path(sys.argv[4])
            if len(sys.argv) == 6:
                unpacked, left = stage_but_late(packages, debs, folder)
                if left:
                    Path(sys.argv[5]).write_text(json.dumps({"packages": left}), encoding="utf-8")
            else:
                unpacked = stage(packages, debs, folder)
            notes.write_bytes(pickle.dumps(unpacked))
        else:
            # Never in the tree, whose own programs could write it: it is code to whoever reads it.
            unpacked = pickle.loads(Path(sys.argv[4]).read_bytes())
            if verb == "begin":
                inside.enter(sys.argv[3])
                begin(unpacked, Path("/"))
            else:
                inside.enter(sys.argv[5])
                merge(unpacked, Path(sys.argv[3]), Path("/"))
    except UnsupportedPackage as reason:
        print(f"left to dpkg: {reason}")
        return int(os.environ["REFUSED"])
    except ChangedPackage as changed:
        say("fail", f"package {changed} in the cache is not what was signed", "run again: it will be fetched")
        return 1
    except FileNotFoundError as error:
        if Path(str(error.filename)).parent != debs:
            raise
        name = Path(str(error.filename)).name
        say("fail", f"package {name} is not in the cache", "run again: it will be fetched")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
