"""Verb: ask the mirror what an image is made of today, and solve the exact set of packages.

Every InRelease (suite, updates, security) is fetched and verified each time. Only when an index that
the stored answer came from has changed is the set solved again, by apt itself; when the set is the
same, its epoch stays, so that a pulse of the mirror that touches none of ours rebuilds nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from build import debian, wire
from build.agent import deb, files, process
from build.agent.debian import archives, indices, web
from build.agent.debian.archives import Archive
from build.agent.debian.indices import Index
from build.agent.events import Emit, Failure
from build.agent.verbs import fetch

SOLVER = 3
"""Raised when the way a set is solved changes, so that stored sets are solved anew."""

BASE = frozenset({"apt", "usr-is-merged"})
"""Added to every base: apt, and what says that /usr is merged (else `usrmerge` comes, with its Perl)."""


class Unsolvable(Exception):
    """apt finds no way to install what is wanted; `output` is what it says."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def run(request: wire.Resolve, emit: Emit) -> dict[str, Any]:
    """Return the package set for this request, as wire.Resolve says.

    Raises Failure before any package is downloaded when mirror, suite or a package is not as asked.
    """
    store = Path(request.mirrors.store)
    file = store / "sets" / f"{_identity(request)}.json"
    stored = archives.read(file)
    if request.frozen:
        if not stored:
            raise Failure("no stored resolution for this image", "build once without --frozen")
        return _answer(stored, changed=False)
    try:
        if request.held:
            return _renewed(request, store, emit)
        return _resolved(request, store, file, stored, emit)
    finally:
        web.hang_up()


def _resolved(
    request: wire.Resolve, store: Path, file: Path, stored: dict[str, Any] | None, emit: Emit
) -> dict[str, Any]:
    """Ask the mirror; the stored answer holds as long as nothing it came from has changed."""
    found = archives.find(request.mirrors, emit)
    origins = _origins(found)
    # What a version before stored lacks what a lock has to know.
    known = stored if stored and "releases" in stored else None
    if known and known["origins"] == origins:
        known["checked"] = int(time.time())
        archives.write(file, known)
        return _answer(known, changed=False)
    packages, digests = _solve(request, found, store, known, emit)
    changed = not stored or _lock(packages) != _lock(stored["packages"])
    epoch = stored["epoch"] if stored and not changed else _newest(found)
    fresh = {**_record(request, packages, found, epoch), "origins": origins, "indices": digests}
    archives.write(file, fresh)
    return _answer(fresh, changed=changed)


def _newest(found: Iterable[Archive]) -> int:
    return max(archive.release.date for archive in found)


def _record(
    request: wire.Resolve, packages: list[dict[str, Any]], found: Iterable[Archive], epoch: int
) -> dict[str, Any]:
    return {
        "packages": packages,
        "epoch": epoch,
        "checked": int(time.time()),
        "releases": {
            archive.suite: {
                "date": archive.release.date,
                "sha256": archive.sha256,
                "signers": sorted(archive.signers),
            }
            for archive in found
        },
        "default_mirror": archives.image_mirror(request.mirrors),
    }


def _answer(stored: Mapping[str, Any], *, changed: bool) -> dict[str, Any]:
    shown = ("packages", "epoch", "checked", "releases", "default_mirror")
    return {**{key: stored.get(key, {}) for key in shown}, "changed": changed}


def _identity(request: wire.Resolve) -> str:
    """Name a request by what it asks for and whom it trusts; where the mirror stands is not part of it."""
    asked = {key: getattr(request.mirrors, key) for key in ("suite", "security", "keyring")}
    asked |= {"arch": request.arch, "components": request.components}
    if request.mirrors.snapshot:
        asked["snapshot"] = request.mirrors.snapshot
    text = json.dumps([SOLVER, asked, sorted(set(request.packages))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _origins(found: Iterable[Archive]) -> dict[str, list[str]]:
    return {archive.suite: [archive.mirror, archive.sha256] for archive in found}


def _lock(packages: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return sorted((p["name"], p["arch"], p["version"], p["sha256"]) for p in packages)


# --- the set ---------------------------------------------------------------------------------------


def _solve(
    request: wire.Resolve, found: Sequence[Archive], store: Path, stored: Mapping[str, Any] | None, emit: Emit
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The set, and the digests of the indices that it was solved from."""
    archs = debian.architectures(request.arch, request.packages)
    wanted = indices.paths(found, request.components, archs)
    digests = {f"{archive.suite}/{path}": indices.digest(archive, path) for archive, path in wanted}
    mirrors = {archive.suite: archive.mirror for archive in found}
    if stored and stored["indices"] == digests and {k: v[0] for k, v in stored["origins"].items()} == mirrors:
        return stored["packages"], digests
    emit("note", text="package index changed: solving the package set")
    lists = indices.fetch_all(wanted, store / "indices")
    try:
        packages = solve(lists, request.packages, archs, store, emit)
    except Unsolvable as error:
        raise _unsolvable(error.output) from None
    kept = {indices.digest(archive, path) for archive, path in wanted}
    for old in (store / "indices").iterdir():
        if old.name not in kept:
            old.unlink()
    return packages, digests


def _unsolvable(output: str) -> Failure:
    return Failure(
        f"the packages cannot be installed together: {complaint(output)}",
        "correct packages in the image definition",
    )


# --- a locked set, renewed in part -----------------------------------------------------------------


def _renewed(request: wire.Resolve, store: Path, emit: Emit) -> dict[str, Any]:
    """Keep every held version that can be kept; nothing of this is stored."""
    found = archives.find(request.mirrors, emit)
    archs = debian.architectures(request.arch, request.packages)
    lists = indices.fetch_all(indices.paths(found, request.components, archs), store / "indices")
    held = {(package["name"], package["arch"]): package for package in request.held}
    known = {debian.name_of(text) for index in lists for text in debian.paragraphs(index.text)}
    if unknown := [name for name in request.renew if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=2, cutoff=0.75)
        hint = f"did you mean {' or '.join(near)}?" if near else "name packages of the lock"
        raise Failure(f"no such package: {', '.join(unknown)}", hint)
    free = set(request.renew)
    lists, lost = _with_held(lists, held, free, request, emit)
    free |= lost
    while True:
        kept = {key: package["version"] for key, package in held.items() if key[0] not in free}
        try:
            packages = solve(_only(lists, kept), request.packages, archs, store, emit)
        except Unsolvable as error:
            more = unmet(error.output) & ({name for name, _ in held} - free)
            if not more:
                raise _unsolvable(error.output) from None
            free |= more
            continue
        return {**_record(request, packages, found, _newest(found)), "changed": True}


def _only(lists: Sequence[Index], kept: Mapping[tuple[str, str], str]) -> list[Index]:
    """The same lists, in which what is kept has no other version."""

    def stays(text: str) -> bool:
        version = kept.get((debian.name_of(text), debian.field_of("Architecture", text)))
        return version in (None, debian.field_of("Version", text))

    return [
        Index(
            index.archive,
            index.path,
            "".join(f"{text}\n\n" for text in debian.paragraphs(index.text) if stays(text)),
        )
        for index in lists
    ]


def _with_held(
    lists: Sequence[Index],
    held: Mapping[tuple[str, str], Mapping[str, Any]],
    free: Collection[str],
    request: wire.Resolve,
    emit: Emit,
) -> tuple[list[Index], set[str]]:
    """Add to the lists what they have no more, from the packages themselves; and names of what is nowhere."""
    names = {name for name, _ in held}
    there: dict[tuple[str, str, str], set[str]] = {}
    for index in lists:
        for text in debian.paragraphs(index.text):
            if debian.name_of(text) in names:
                fields = debian.fields(text)
                key = (fields["Package"], fields["Architecture"], fields["Version"])
                there.setdefault(key, set()).add(fields["SHA256"])
    gone = []
    for (name, arch), package in held.items():
        known = there.get((name, arch, package["version"]))
        if name in free:
            continue
        if known and package["sha256"] not in known:
            raise Failure(
                f"{name} {package['version']} is another file than the lock names: it was changed at the "
                "same version",
                f"find out why; then: inv lock --update {name}",
            )
        if not known:
            gone.append(package)
    proxy = request.mirrors.apt_proxy
    more: dict[str, list[str]] = {}
    lost = set()
    for package in gone:
        place = next((index.archive.mirror for index in lists if index.archive.suite == package["suite"]), "")
        try:
            path = fetch.one({**package, "url": f"{place}/{package['path']}"}, Path(request.debs), proxy)
        except fetch.Gone:
            gone_one = f"{package['name']} {package['version']}"
            emit("note", text=f"{gone_one} is nowhere any more: it is renewed, too")
            lost.add(package["name"])
            continue
        facts = {"Filename": package["path"], "Size": package["size"], "SHA256": package["sha256"]}
        lines = "".join(f"{name}: {value}\n" for name, value in facts.items())
        more.setdefault(package["suite"], []).append(f"{deb.control(path).strip()}\n{lines}")
    added = []
    for index in lists:
        texts = more.pop(index.archive.suite, [])
        text = "\n".join([index.text.rstrip("\n"), *(f"\n{text.rstrip()}" for text in texts)])
        added.append(Index(index.archive, index.path, f"{text.lstrip()}\n"))
    return added, lost


def unmet(output: str) -> set[str]:
    """Names on both sides of what apt-get says about unmet dependencies."""
    _, _, told = output.partition("unmet dependencies:\n")
    lines = [line for line in told.split("\n") if line.startswith(" ")]
    pattern = r"^ (?:(\S+) :|\s+) *(?:Pre-)?(?:Depends|Breaks|Conflicts): (\S+)"
    found = (re.match(pattern, line) for line in lines)
    return {name.partition(":")[0] for match in found if match for name in match.groups() if name}


# --- what apt makes of it --------------------------------------------------------------------------


def solve(
    lists: Sequence[Index], asked: Sequence[str], archs: Sequence[str], store: Path, emit: Emit
) -> list[dict[str, Any]]:
    """Let apt choose versions and dependencies, from nothing, without recommendations; raises Unsolvable."""
    paragraphs = [(index, list(debian.paragraphs(index.text))) for index in lists]
    names = {debian.name_of(text) for _, texts in paragraphs for text in texts}
    required = debian.base_names(text for _, texts in paragraphs for text in texts)
    if not required:
        raise Failure(f"{lists[0].archive.where} has no essential packages", "use a mirror of Debian")
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
        if "\nProvides: " in text:  # few have it
            for provided in debian.names(debian.field_of("Provides", text)):
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
            for field in ("Pre-Depends", "Depends"):
                pending += debian.names(debian.field_of(field, text))
    return found


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


def _simulate(folder: Path, lists: Sequence[Index], archs: Sequence[str], names: Sequence[str]) -> str:
    """Run apt on the indices in a root of its own, where nothing is installed and nothing will be."""
    numbers = {mirror: number for number, mirror in enumerate(dict.fromkeys(i.archive.mirror for i in lists))}
    for part in ("lists/partial", "archives/partial", "etc"):
        (folder / part).mkdir(parents=True)
    sources = set()
    for index in lists:
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
        raise Unsolvable(done.stdout + done.stderr)
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
            "path": fields["Filename"].removeprefix("./"),
            "suite": index.archive.suite,
            "source": fields.get("Source", key[0]).partition(" ")[0],
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
