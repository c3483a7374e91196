"""Verb: ask the mirror what an image is made of today, and solve the exact set of packages.

Every InRelease (suite, updates, security) is fetched and verified each time. Only when an index that
the stored answer came from has changed is the set solved again, by apt itself; when the set is the
same, its epoch stays, so that a pulse of the mirror that touches none of ours rebuilds nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build import debian, wire
from build.agent import files, process
from build.agent.debian import release, web
from build.agent.debian.release import Release
from build.agent.debian.web import Absent, Limit, Source
from build.agent.events import Emit, Failure

SOLVER = 3
"""Raised when the way a set is solved changes, so that stored sets are solved anew."""

BASE = frozenset({"apt", "usr-is-merged"})
"""Added to every base: apt, and what says that /usr is merged (else `usrmerge` comes, with its Perl)."""


UNLISTED = 1 << 28
"""Bytes that an index may have unpacked when only its packed form is signed."""
STALE = 14 * 86400
"""Seconds after which a security suite without news is worth a word; Debian's gets some every few days."""


@dataclass(frozen=True)
class Archive:
    """One suite at one mirror, verified."""

    suite: str
    mirror: str
    source: Source
    release: Release
    signers: tuple[str, ...]
    """Fingerprints of the keys that signed it."""
    sha256: str
    """Of the InRelease as it was served."""

    @property
    def where(self) -> str:
        """The suite's folder, for messages and URLs."""
        return f"{self.mirror}/dists/{self.suite}"


def run(request: wire.Resolve, emit: Emit) -> dict[str, Any]:
    """Answer the package set for this request, its epoch, and when the mirror was asked.

    Request: suite, arch, components, mirror, security_mirror, security, keyring, apt_proxy, packages,
    store (a writable folder), frozen, accept_older. Answer: packages (name, version, arch, sha256, size, url,
    essential), epoch, checked, changed, dates (seconds, by suite), default_mirror.
    Raises Failure before any package is downloaded when mirror, suite or a package is not as asked.
    """
    store = Path(request.store)
    file = store / "sets" / f"{_identity(request)}.json"
    stored = _read(file)
    if request.frozen:
        if not stored:
            raise Failure("no stored resolution for this image", "build once without --frozen")
        return _answer(stored, changed=False)
    try:
        return _resolved(request, store, file, stored, emit)
    finally:
        web.hang_up()


def _resolved(
    request: wire.Resolve, store: Path, file: Path, stored: dict[str, Any] | None, emit: Emit
) -> dict[str, Any]:
    """Ask the mirror; the stored answer holds as long as nothing it came from has changed."""
    archives = _archives(request, store, emit)
    origins = _origins(archives)
    if stored and stored["origins"] == origins:
        stored["checked"] = int(time.time())
        _write(file, stored)
        return _answer(stored, changed=False)
    packages, indices = _solve(request, archives, store, stored, emit)
    changed = not stored or _lock(packages) != _lock(stored["packages"])
    fresh = {
        "packages": packages,
        "epoch": max(archive.release.date for archive in archives)
        if changed or not stored
        else stored["epoch"],
        "checked": int(time.time()),
        "dates": {archive.suite: archive.release.date for archive in archives},
        "default_mirror": default_mirror() if not request.mirror else "",
        "origins": origins,
        "indices": indices,
    }
    _write(file, fresh)
    return _answer(fresh, changed=changed)


def _answer(stored: Mapping[str, Any], *, changed: bool) -> dict[str, Any]:
    shown = ("packages", "epoch", "checked", "dates", "default_mirror")
    return {**{key: stored[key] for key in shown}, "changed": changed}


def _identity(request: wire.Resolve) -> str:
    """Name a request by what it asks for and whom it trusts; where the mirror stands is not part of it."""
    asked = {key: getattr(request, key) for key in ("suite", "arch", "components", "security", "keyring")}
    text = json.dumps([SOLVER, asked, sorted(set(request.packages))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _origins(archives: Iterable[Archive]) -> dict[str, list[str]]:
    return {archive.suite: [archive.mirror, archive.sha256] for archive in archives}


def _lock(packages: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return sorted((p["name"], p["arch"], p["version"], p["sha256"]) for p in packages)


# --- the mirror ------------------------------------------------------------------------------------


def default_mirror() -> str:
    """The mirror that this host's own bootstrap tools use when none is given."""
    patterns = (
        ("/usr/bin/mmdebstrap", r"^\s*my \$mirror\s*=\s*'(https?://[^']+)'"),
        ("/usr/sbin/debootstrap", r'^DEF_MIRROR="(https?://[^"$]+)"'),
    )
    for path, pattern in patterns:
        tool = Path(path)
        if tool.is_file() and (
            found := re.search(pattern, tool.read_text(encoding="utf-8", errors="replace"), re.M)
        ):
            return found[1].rstrip("/")
    raise Failure(
        "no bootstrap tool on this host names a default mirror", "install mmdebstrap, or set debian_mirror"
    )


def security_mirrors(mirror: str, asked: str) -> list[str]:
    """Where the security suite may stand, in the order to look."""
    if asked:
        return [asked]
    parent, _, name = mirror.rpartition("/")
    siblings = (
        [f"{mirror}-security"] if name == "debian" else [f"{parent}/debian-security", f"{mirror}-security"]
    )
    return list(dict.fromkeys([*siblings, mirror]))


def _archives(request: wire.Resolve, store: Path, emit: Emit) -> list[Archive]:
    """Fetch and verify every InRelease at the same time."""
    suite, proxy = request.suite, request.apt_proxy
    mirror = (request.mirror or default_mirror()).rstrip("/")
    keys = release.keyring(request.keyring)
    main = Source(proxy)
    guard = Source(proxy, "security_mirror" if request.security_mirror else "debian_mirror")
    places = security_mirrors(mirror, request.security_mirror.rstrip("/")) if request.security else []
    asked = [(suite, [mirror], main), (f"{suite}-updates", [mirror], main)]
    asked += [(f"{suite}-security", places, guard)] if places else []
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda row: _archive(row[0], row[1], row[2], keys, store), asked))
    found = [archive for archive in answers if archive]
    names = {archive.suite for archive in found}
    if missing := [name for name, _, _ in asked[:2] if name not in names]:
        raise _no_suite(missing[0], suite, mirror, main)
    if places and f"{suite}-security" not in names:
        raise Failure(
            f"no suite {suite}-security at {' or '.join(places)}",
            "set security_mirror to a mirror that has it, or security: false to build without",
        )
    for archive in found:
        release.check(archive.release, archive.suite, f"{archive.where}/InRelease", time.time())
    for note in remember(found, store, accept_older=request.accept_older):
        emit("note", text=note)
    for archive in found:
        age = time.time() - archive.release.date
        if archive.suite == f"{suite}-security" and age > STALE:
            dated = f"{release.utc(archive.release.date)}, {age // 86400:.0f} days ago"
            emit("note", text=f"{archive.where} is of {dated}: its mirror may hold updates back")
    if not request.security:
        emit("note", text=f"built without {suite}-security: security is switched off")
    return found


def _no_suite(name: str, suite: str, mirror: str, source: Source) -> Failure:
    if name != suite:
        return Failure(
            f"mirror {mirror} has no suite {name}", "use a mirror that holds the updates of its suites too"
        )
    for known in ("dists/stable/InRelease", "dists/stable/Release", "dists/", "dists/sid/InRelease"):
        try:
            web.get(f"{mirror}/{known}", source, web.RELEASE)
        except Absent:
            continue
        return Failure(f"mirror {mirror} has no suite {suite}", f"look into {mirror}/dists/ for what it has")
    return Failure(
        f"{mirror} is not a Debian mirror with suite {suite}", "correct debian_mirror; it ends before /dists"
    )


def _archive(suite: str, mirrors: Sequence[str], source: Source, keys: Path, store: Path) -> Archive | None:
    """A suite at the first of these mirrors that has it."""
    for mirror in mirrors:
        with contextlib.suppress(Absent):
            return _verified(suite, mirror, source, keys, store)
    return None


def _verified(suite: str, mirror: str, source: Source, keys: Path, store: Path) -> Archive:
    """Fetch one InRelease if it changed, and verify it."""
    url = f"{mirror}/dists/{suite}/InRelease"
    file = store / "releases" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    seen = _read(file)
    known = seen["validators"] if seen else {}
    answer = web.get(url, source, web.RELEASE, known)
    if answer.body is None and seen:
        body, validators = seen["text"].encode("utf-8", "surrogateescape"), seen["validators"]
    else:
        body, validators = answer.body or b"", answer.validators
    signed = release.verify(body, keys, url)
    try:
        told = release.parse(signed.text)
    except ValueError as error:
        raise Failure(f"{url} cannot be read: {error}", "use another mirror") from error
    if not seen or answer.body is not None:
        kept = {"url": url, "validators": dict(validators)}
        _write(file, {**kept, "text": body.decode("utf-8", "surrogateescape")})
    return Archive(suite, mirror, source, told, signed.signers, hashlib.sha256(body).hexdigest())


def remember(archives: Sequence[Archive], store: Path, *, accept_older: bool) -> list[str]:
    """Note the newest Date of each suite by who signs it, so that no mirror can go behind another one.

    Raises Failure for a suite that is older than one seen before, wherever that was; with `accept_older`
    answers what there is to say of it.
    """
    file, notes = store / "releases" / "seen.json", []
    with _locked(file.parent):
        newest: dict[str, int] = _read(file) or {}
        before = dict(newest)
        for archive in archives:
            date = archive.release.date
            keys = [f"{signer} {archive.suite} {archive.release.origin}" for signer in archive.signers]
            last = max(newest.get(key, 0) for key in keys)
            if date < last:
                dates = f"of {release.utc(date)}, not {release.utc(last)}"
                older = f"{archive.where} is older than what was seen before: {dates}"
                if not accept_older:
                    raise Failure(
                        older, "use a mirror that is kept up to date; accept_older: true takes it on purpose"
                    )
                notes.append(f"{older}; it is taken because accept_older is set")
            newest |= {key: max(date, newest.get(key, 0)) for key in keys}
        if newest != before:
            _write(file, newest)
    return notes


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other builds of the same LOCATION out."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- the indices -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """One list of packages: where it belongs, and its text."""

    archive: Archive
    path: str
    text: str


def _wanted(
    archives: Sequence[Archive], components: Sequence[str], archs: Sequence[str]
) -> list[tuple[Archive, str]]:
    return [
        (archive, path)
        for archive in archives
        for path in release.index_paths(archive.release, components, archs, archive.where)
    ]


def _index(archive: Archive, path: str, folder: Path) -> Index:
    """Fetch one index unless the same one is at hand; what is read is what was signed."""
    name = release.compressed(archive.release, path, archive.where)
    digest, size = archive.release.files[name]
    kept = folder / digest
    data = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        data = _signed(archive, name, digest, size)
        files.write(kept, data)
    _, plain = archive.release.files.get(path, ("", UNLISTED))
    try:
        text = unpacked(name, data, plain)
    except ValueError as error:
        raise Failure(f"{archive.where}/{name} {error}", "use another mirror") from error
    return Index(archive, path, text.decode("utf-8", "replace"))


def _signed(archive: Archive, name: str, digest: str, size: int) -> bytes:
    folder, _, _ = name.rpartition("/")
    plain = f"{archive.where}/{name}"
    urls = (
        [f"{archive.where}/{folder}/by-hash/SHA256/{digest}", plain] if archive.release.by_hash else [plain]
    )
    seen = "is missing"
    for url in urls:
        try:
            data = web.get(url, archive.source, Limit.of(size)).body or b""
        except Absent:
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        seen = f"is not what was signed ({len(data)} bytes, {size} expected)"
    raise Failure(
        f"{plain} {seen}", "try again in some minutes: the mirror may be in the middle of an update"
    )


def unpacked(name: str, data: bytes, size: int) -> bytes:
    """Unpack an index by the suffix of its name; raises ValueError behind `size` bytes, and for damage."""
    packed = io.BytesIO(data)
    try:
        if name.endswith(".xz"):
            text = lzma.open(packed).read(size + 1)
        else:
            text = (gzip.open(packed) if name.endswith(".gz") else packed).read(size + 1)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"cannot be unpacked: {error}") from error
    if len(text) > size:
        raise ValueError(f"unpacks to more than the {size} bytes that are signed")
    return text


# --- the set ---------------------------------------------------------------------------------------


def _solve(
    request: wire.Resolve,
    archives: Sequence[Archive],
    store: Path,
    stored: Mapping[str, Any] | None,
    emit: Emit,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The set, and the digests of the indices that it was solved from."""
    archs = debian.architectures(request.arch, request.packages)
    wanted = _wanted(archives, request.components, archs)
    digests = {f"{archive.suite}/{path}": _digest_of(archive, path) for archive, path in wanted}
    mirrors = {archive.suite: archive.mirror for archive in archives}
    if stored and stored["indices"] == digests and {k: v[0] for k, v in stored["origins"].items()} == mirrors:
        return stored["packages"], digests
    emit("note", text="package index changed: solving the package set")
    with ThreadPoolExecutor(len(wanted)) as pool:
        indices = list(pool.map(lambda pair: _index(pair[0], pair[1], store / "indices"), wanted))
    packages = solve(indices, request.packages, archs, store, emit)
    kept = {_digest_of(archive, path) for archive, path in wanted}
    for old in (store / "indices").iterdir():
        if old.name not in kept:
            old.unlink()
    return packages, digests


def _digest_of(archive: Archive, path: str) -> str:
    return archive.release.files[release.compressed(archive.release, path, archive.where)][0]


def solve(
    indices: Sequence[Index], asked: Sequence[str], archs: Sequence[str], store: Path, emit: Emit
) -> list[dict[str, Any]]:
    """Let apt choose versions and dependencies, from nothing, without recommendations."""
    paragraphs = [(index, list(debian.paragraphs(index.text))) for index in indices]
    names = {debian.name_of(text) for _, texts in paragraphs for text in texts}
    required = debian.base_names(text for _, texts in paragraphs for text in texts)
    if not required:
        raise Failure(f"{indices[0].archive.where} has no essential packages", "use a mirror of Debian")
    wanted = [*sorted(required), *sorted(BASE & names), *_existing(asked, names, paragraphs, emit)]
    with tempfile.TemporaryDirectory(prefix=".solve-", dir=store) as folder:
        output = _simulate(Path(folder), _reachable(paragraphs, wanted), archs, wanted)
    installed = {(name, version, arch) for name, version, arch in selections(output)}
    return _describe(installed, paragraphs, required | BASE)


def _reachable(paragraphs: Sequence[tuple[Index, list[str]]], roots: Iterable[str]) -> list[Index]:
    """The same indices without what no chain of dependencies leads to: a tenth of it for apt to read."""
    kept = reachable((text for _, texts in paragraphs for text in texts), roots)
    return [
        Index(index.archive, index.path, "\n\n".join([*(t for t in texts if debian.name_of(t) in kept), ""]))
        for index, texts in paragraphs
    ]


def reachable(paragraphs: Iterable[str], roots: Iterable[str]) -> set[str]:
    """Names of packages that apt may come to from these: every alternative, every version, every provider."""
    by_name: dict[str, list[str]] = {}
    providers: dict[str, list[str]] = {}
    for text in paragraphs:
        name = debian.name_of(text)
        by_name.setdefault(name, []).append(text)
        for provided in _field_names("Provides", text):
            providers.setdefault(provided, []).append(name)
    found: set[str] = set()
    pending = [name.partition(":")[0] for name in roots]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        pending += providers.get(name, ())
        for text in by_name.get(name, ()):
            pending += [*_field_names("Pre-Depends", text), *_field_names("Depends", text)]
    return found


def _field_names(field: str, text: str) -> list[str]:
    """Names in a relation field of a paragraph that stands on one line, as in every index."""
    begin = text.find(f"\n{field}: ")
    if begin < 0:
        return []
    line = text[begin + len(field) + 3 :].partition("\n")[0]
    return debian.names(line)


def _existing(
    asked: Sequence[str], names: set[str], paragraphs: Iterable[tuple[Index, list[str]]], emit: Emit
) -> list[str]:
    """The packages asked for, virtual ones replaced; raises one Failure that names every one missing."""
    unknown = [name for name in asked if name.partition(":")[0] not in names]
    if not unknown:
        return list(asked)
    texts = [text for _, group in paragraphs for text in group]
    providers = {name: provided_by(name.partition(":")[0], texts) for name in unknown}
    if absent := [name for name in unknown if not providers[name]]:
        near = {name: difflib.get_close_matches(name, names, n=2, cutoff=0.75) for name in absent}
        guesses = [f"{name}: {' or '.join(close)}" for name, close in near.items() if close]
        raise Failure(
            f"no such package: {', '.join(absent)}",
            f"did you mean {'; '.join(guesses)}?" if guesses else "correct packages in the image definition",
        )
    if several := {name: found for name, found in providers.items() if len(found) > 1}:
        raise Failure(
            "; ".join(f"{name} is a virtual package" for name in several),
            "; ".join(f"name one of {', '.join(sorted(found)[:8])}" for found in several.values()),
        )
    for name, found in providers.items():
        emit("note", text=f"{name} is a virtual package: taking {next(iter(found))}")
    return [next(iter(providers[name])) if name in providers else name for name in asked]


def provided_by(name: str, paragraphs: Iterable[str]) -> set[str]:
    """Names of the packages that provide a virtual one."""
    pattern = re.compile(rf"^Provides:.*?(?<![\w.+-]){re.escape(name)}(?![\w.+-])", re.M)
    return {debian.name_of(text) for text in paragraphs if name in text and pattern.search(text)}


def _simulate(folder: Path, indices: Sequence[Index], archs: Sequence[str], names: Sequence[str]) -> str:
    """Run apt on the indices in a root of its own, where nothing is installed and nothing will be."""
    numbers = {
        mirror: number for number, mirror in enumerate(dict.fromkeys(i.archive.mirror for i in indices))
    }
    for part in ("lists/partial", "archives/partial", "etc"):
        (folder / part).mkdir(parents=True)
    sources = set()
    for index in indices:
        # apt finds a list by the mangled name of its URL; neutral names keep every mirror's odd ones out.
        base = f"m{numbers[index.archive.mirror]}_dists_{index.archive.suite}_"
        (folder / "lists" / f"_{base}{index.path.replace('/', '_')}").write_text(index.text, encoding="utf-8")
        (folder / "lists" / f"_{base}Release").write_text(_release_text(index.archive), encoding="utf-8")
        component = index.path.partition("/binary-")[0]
        sources.add(
            f"deb [trusted=yes] file:/m{numbers[index.archive.mirror]} {index.archive.suite} {component}\n"
        )
    (folder / "sources.list").write_text("".join(sorted(sources)), encoding="utf-8")
    (folder / "status").touch()
    with files.neutral(folder) as (path, handle):  # apt.conf(5) knows no way to write a quote
        (folder / "apt.conf").write_text(_configuration(path, archs), encoding="utf-8")
        done = process.run(
            ["apt-get", "--simulate", "--quiet", "--no-install-recommends", "install", *names],
            check=False,
            env={"APT_CONFIG": str(path / "apt.conf")},
            pass_fds=(handle,),
        )
    if done.returncode:
        raise Failure(
            f"the packages cannot be installed together: {complaint(done.stdout + done.stderr)}",
            "correct packages in the image definition",
        )
    return done.stdout


def _release_text(archive: Archive) -> str:
    told = archive.release
    fields = {
        "Origin": "Debian",
        "Suite": told.suite,
        "Codename": told.codename,
        "Architectures": " ".join(told.architectures),
    }
    return (
        "".join(f"{name}: {value}\n" for name, value in fields.items())
        + f"Components: {' '.join(told.components)}\n"
    )


def _configuration(folder: Path, archs: Sequence[str]) -> str:
    """Read before any other file of apt's: nothing of the host's own configuration is."""
    empty = "/dev/null"
    values = {
        "APT::Architecture": archs[0],
        "Dir::Etc::main": empty,
        "Dir::Etc::parts": empty,
        "Dir::Etc::preferences": empty,
        "Dir::Etc::preferencesparts": empty,
        "Dir::Etc::sourceparts": empty,
        "Dir::Etc::sourcelist": f"{folder}/sources.list",
        "Dir::State": str(folder),
        "Dir::State::lists": f"{folder}/lists",
        "Dir::State::status": f"{folder}/status",
        "Dir::State::extended_states": f"{folder}/extended_states",
        "Dir::Cache": str(folder),
        "Dir::Cache::archives": f"{folder}/archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Install-Recommends": "false",
        "APT::Install-Suggests": "false",
        "APT::Get::Show-User-Simulation-Note": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
    }
    lines = [f'{key} "{value}";\n' for key, value in values.items()]
    return "".join(lines) + "APT::Architectures {" + " ".join(f'"{arch}";' for arch in archs) + "};\n"


def selections(output: str) -> list[tuple[str, str, str]]:
    """Name, version and architecture of each package that a simulation of apt-get installs."""
    lines = re.findall(r"^Inst (\S+) \((\S+) .*?\[(\S+)\]\)", output, re.M)
    return [(name.partition(":")[0], version, arch) for name, version, arch in lines]


def complaint(output: str) -> str:
    """What apt says about packages that do not fit, in one line."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    broken = [line for line in lines if re.match(r"^(\S+ : )?(Pre-)?(Depends|Breaks|Conflicts): ", line)]
    errors = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")]
    return "; ".join((broken or errors or ["apt gives no reason"])[:4])


def _describe(
    installed: set[tuple[str, str, str]], paragraphs: Iterable[tuple[Index, list[str]]], base: set[str]
) -> list[dict[str, Any]]:
    """Look each chosen package up in the signed indices."""
    names = {name for name, _, _ in installed}
    found: dict[tuple[str, str, str], tuple[Index, dict[str, str]]] = {}
    for index, texts in paragraphs:
        for text in texts:
            if debian.name_of(text) in names:
                (fields,) = debian.stanzas(text)
                key = (fields["Package"], fields["Version"], fields["Architecture"])
                if key in installed:
                    found.setdefault(key, (index, fields))
    if lost := installed - found.keys():
        raise Failure(f"apt chose {sorted(lost)[0][0]}, which no index lists", "this is a defect: report it")
    essential = closure(base, {key: fields for key, (_, fields) in found.items()})
    return [
        {
            "name": key[0],
            "version": key[1],
            "arch": key[2],
            "sha256": fields["SHA256"],
            "size": int(fields["Size"]),
            "url": f"{index.archive.mirror}/{fields['Filename'].removeprefix('./')}",
            "essential": key in essential,
        }
        for key, (index, fields) in sorted(found.items())
    ]


def closure(
    roots: set[str], installed: Mapping[tuple[str, str, str], Mapping[str, str]]
) -> set[tuple[str, str, str]]:
    """Follow dependencies from the names in `roots` inside a set that is complete in itself."""
    by_name: dict[str, list[tuple[str, str, str]]] = {}
    for key, fields in installed.items():
        for name in (key[0], *debian.names(fields.get("Provides", ""))):
            by_name.setdefault(name, []).append(key)
    reached: set[tuple[str, str, str]] = set()
    pending = [key for key in installed if key[0] in roots]
    while pending:
        key = pending.pop()
        if key in reached:
            continue
        reached.add(key)
        fields = installed[key]
        for group in f"{fields.get('Pre-Depends', '')},{fields.get('Depends', '')}".split(","):
            candidates = [found for name in debian.names(group) for found in by_name.get(name, [])]
            candidates.sort(key=lambda found: (found[0] not in roots, found[2] not in (key[2], "all")))
            pending += candidates[:1]
    return reached


# --- files -----------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any] | None:
    """A stored answer, or None when there is none that can be read."""
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value


def _write(file: Path, value: Mapping[str, Any]) -> None:
    files.write(file, json.dumps(value, indent=1, sort_keys=True).encode())
