"""One build on one host: settings, resolution and plan meet the agent's cache.

Verbs are made of this. Planning is pure; every effect is a call of the host's agent.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from build import disk, seal, wire
from build.engine import lockfile, plan, prompt, recipe, remote, script, settings
from build.engine.console import Console, size
from build.engine.errors import BuildError, again
from build.engine.hosts.host import CHECKOUT, Host
from build.engine.hosts.session import Event, encode
from build.engine.lockfile import Lock
from build.engine.password import crypt
from build.engine.plan import Layer, Step
from build.engine.resolution import Resolution

DEFINITION = CHECKOUT / "config" / "systemvm.yaml"
GIB = 1 << 30
UNRESOLVED = Resolution((), 0, 0)
"""Stands in where a plan is shown before anything was resolved."""


def of(context: remote.HostContext) -> Build:
    """The build of a task's context; tasks of one command line and host share it."""
    if "build" not in context.state:
        context.state["build"] = Build(context.host, context.flags, context.console)
    build: Build = context.state["build"]
    return build


def submit_detached(context: remote.HostContext) -> None:
    """Leave to the host what the verbs of a line with --detach have asked for; raises BuildError."""
    build: Build | None = context.state.get("build")
    if build is None or not build.orders:
        raise BuildError(
            "there is nothing to leave to the host", "--detach goes with build, disk and convert"
        )
    orders = [
        {
            "verb": request.verb,
            "name": name,
            "request": {**wire.dump(request), **build.host.ensure_compressors(request.verb)},
        }
        for name, request in build.orders
    ]
    request = wire.Job(build.site.place, "start", f"inv {build.settings.imagename}", tuple(orders))
    build.host.ask(request, build.follow)
    build.console.line(build.again("it goes on without us: inv status, inv attach, inv cancel"))


Result = TypeVar("Result")


class Build:
    """What a task works with. Everything is asked for when it is first needed, and once."""

    def __init__(self, host: Host, flags: remote.Flags, console: Console) -> None:
        self.host = host
        self.flags = flags
        self.console = console
        self.orders: list[tuple[str, wire.Request[Any]]] = []
        """What is to be done without us (--detach)."""
        self.ended: dict[str, tuple[str, float]] = {}
        """State (`built` or `cached`) and seconds of each step that is through, the disk too."""
        self._told: set[str] = set()

    def again(self, text: str) -> str:
        """A text whose command lines `inv VERB` go to this build's host and image definition."""
        return again(text, self.host.name, self.flags.image)

    def order(self, name: str, request: wire.Request[Result]) -> Result | None:
        """Have the agent do something, now or without us (None), and show by a name what came of it."""
        if self.flags.detach:
            self.orders.append((name, request))
            return None
        result = self.host.ask(request, self.follow)
        self.show(name, result)
        return result

    def show(self, name: str, result: Any) -> None:
        """Print the line or lines of a finished order."""
        self.console.done()
        match result:
            case wire.Fetched(bytes=fetched):
                if fetched:
                    self.console.note(f"fetched {size(fetched)} of packages")
            case wire.Built(state, seconds):
                self._end(state, name, seconds)
            case wire.Disk(state, seconds):
                self._end(state, name, seconds, described(result))
            case wire.Converted(files=files, notes=notes):
                for file in files:
                    made = f"{file['file']}  {size(file['size'])}"
                    self.console.step(file["state"], file["format"], file["seconds"], made)
                for text in notes:
                    self.console.note(text)
                if result.private:
                    self.console.note("new files have mode 0600, as the image may hold a root password")
            case wire.Cleaned(removed=rows):
                if rows:
                    dropped = size(sum(row.bytes for row in rows))
                    self.console.note(f"dropped {len(rows)} old layers, {dropped}")

    def _end(self, state: str, name: str, seconds: float, extra: str = "") -> None:
        self.ended[name] = (state, round(seconds, 3))
        self.console.step(state, name, seconds, extra)

    @property
    def definition(self) -> Path:
        """The image definition's file."""
        return Path(self.flags.image) if self.flags.image else DEFINITION

    @cached_property
    def loaded(self) -> settings.Loaded:
        """Settings with their origins."""
        password = (
            prompt.new_password(f"root password of {self.definition.stem}")
            if self.flags.ask_password
            else None
        )
        return settings.load(self.definition, os.environ, CHECKOUT / ".env", self.flags.overrides, password)

    @property
    def settings(self) -> settings.Settings:
        """The settings themselves."""
        return self.loaded.settings

    def _secrets(self, salt: str) -> dict[str, str]:
        """What steps get by their names for it; nothing where root has no password."""
        password, hashed = (getattr(self.settings, name).get_secret_value() for name in settings.SECRETS)
        return {seal.PASSWORD: hashed or crypt(password, salt)} if self.settings.opens_root else {}

    def digests(self, site: wire.Located) -> dict[str, str]:
        """Of the secrets, for the keys of layers; "unknown" where LOCATION has made none yet."""
        if not self.settings.opens_root:
            return {}
        if not site.salt:
            return {seal.PASSWORD: "unknown"}
        return self.host.ask(wire.Digest(site.place.location, self._secrets(site.salt)))

    @cached_property
    def site(self) -> wire.Located:
        """Where this host builds, proved."""
        return self._locate(create=True)

    @cached_property
    def prospect(self) -> wire.Located:
        """The same without touching anything: for verbs that only look."""
        return self._locate(create=False)

    def _locate(self, create: bool) -> wire.Located:
        wanted = self.settings
        request = wire.Location(
            location=wanted.location,
            mountpoint=wanted.mountpoint,
            imageloc=wanted.imageloc,
            imagename=wanted.imagename,
            create=create,
            keep_visible=() if self.host.remote else (str(CHECKOUT),),
            salted=wanted.opens_root,
        )
        return self.host.ask(request, self.follow)

    @property
    def lock_file(self) -> Path:
        """Where the lock of this image lies, or would."""
        return lockfile.path_of(self.definition, self.settings.arch)

    @cached_property
    def lock(self) -> Lock | None:
        """The lock, if there is one; raises BuildError when it does not fit what is built."""
        found = None if self.flags.unlocked else lockfile.read(self.lock_file)
        if found:
            lockfile.check(found, self.settings)
        return found

    @cached_property
    def resolution(self) -> Resolution:
        """The exact package set: of the lock, or asked from the mirror unless `--frozen`."""
        return self._resolve(self.site, self.flags.frozen or self.flags.offline)

    def stored_resolution(self) -> Resolution | None:
        """The resolution of an earlier run, for verbs that only look; None where there is none."""
        site, _ = self.prospect, self.lock  # what is wrong with settings or lock is told as that
        try:
            return self._resolve(site, frozen=True)
        except BuildError:
            return None

    def _resolve(self, site: wire.Located, frozen: bool) -> Resolution:
        request = wire.Resolve(frozen=frozen, **self._wanted(site))
        found = self.locked(self.lock, site, frozen) if self.lock else self.solve(request)
        if not found.default_mirror and not self.settings.image_mirror:
            raise BuildError(
                "no bootstrap tool there names a mirror for the image's own sources list", "set image_mirror"
            )
        return found

    def unlocked(self) -> Resolution:
        """The set of what the mirror has today (--frozen: had when it was asked), whatever is locked."""
        return self.solve(wire.Resolve(frozen=self.flags.frozen, **self._wanted(self.site)))

    def _wanted(self, site: wire.Located) -> dict[str, Any]:
        return {
            "mirrors": self.mirrors(site, self.settings.suite),
            "arch": self.settings.arch,
            "components": tuple(self.settings.components),
            "packages": tuple(self.settings.package_list),
        }

    def mirrors(
        self, site: wire.Located, suite: str, consent: Mapping[str, str] | None = None
    ) -> wire.Mirrors:
        """Whom to ask for the packages of a suite."""
        wanted = self.settings
        return wire.Mirrors(
            suite=suite,
            mirror=wanted.debian_mirror,
            security_mirror=wanted.security_mirror,
            security=wanted.security,
            keyring=wanted.keyring,
            apt_proxy=wanted.apt_proxy,
            store=f"{site.place.location}/resolutions",
            accept_older=wanted.accept_older,
            snapshot=wanted.snapshot,
            consent=consent or {},
        )

    def solve(self, request: wire.Resolve) -> Resolution:
        """Have a package set solved."""
        answer = self.host.ask(request, self.follow)
        self.console.done()
        return Resolution.from_json(answer)

    def renewed(self, held: Lock, names: Sequence[str]) -> Resolution:
        """A set with the newest versions of these, and what is locked of all else as far as that goes."""
        request = wire.Resolve(
            held=held.records(), renew=tuple(names), debs=self.debs, **self._wanted(self.site)
        )
        return self.solve(request)

    def locked(self, held: Lock, site: wire.Located, frozen: bool) -> Resolution:
        """The set of a lock, with where its packages lie and what is newer."""
        seen = self.host.ask(wire.See(self.mirrors(site, held.suite, held.consent), frozen), self.follow)
        self.console.done()
        packages = tuple(replace(p, url=f"{seen.mirrors[p.suite]}/{p.path}") for p in held.packages)
        return Resolution(
            packages,
            held.epoch,
            0,
            seen.default_mirror,
            held.releases,
            f"{held.title}, {lockfile.age(held, seen)}",
        )

    def plan(self, resolution: Resolution, digests: Mapping[str, str]) -> list[Layer]:
        """Chain the steps into layers; pure."""
        salt = f"{script.SURROUNDINGS}{resolution.epoch}"
        return plan.layers(recipe.steps(self.loaded, resolution), salt, digests)

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers of this build."""
        return self.plan(self.resolution, self.digests(self.site))

    def layer(self, name: str, layers: Sequence[Layer] | None = None) -> Layer:
        """The layer of a step by the step's name; raises BuildError that names the known ones."""
        known = {layer.step.name: layer for layer in layers or self.layers}
        if name not in known:
            raise BuildError(f"no step {name!r}", f"steps: {', '.join(known)}")
        return known[name]

    def present(self, layers: Sequence[Layer], site: wire.Located) -> set[str]:
        """Keys of these layers that are in the host's cache."""
        found: tuple[str, ...] = self.host.ask(wire.Cached(site.place, tuple(layer.key for layer in layers)))
        return set(found)

    def _usable(self, layers: Sequence[Layer], disk: str) -> set[str]:
        """Keys of these layers that can be built on; without us, the build itself looks into them."""
        if self.flags.detach:
            return self.present(layers, self.site)
        keys = tuple(layer.key for layer in layers)
        what = f"inv {layers[-1].step.name}"
        request = wire.Cached(self.site.place, keys, True, self.site.image, disk, what)
        found: tuple[str, ...] = self.host.ask(request, self.follow)
        return set(found)

    def mount(self) -> None:
        """Prove the host: the sandbox opens and a tree can be mounted at MOUNTPOINT in it."""
        started = time.monotonic()
        seen = self.host.ask(wire.Mount(self.site.place), self.follow)
        self.console.step("ok", "mount", time.monotonic() - started, " ".join(seen.mounted.split()[:2]))

    def ensure(self, name: str, disk: str = "") -> Layer:
        """Bring the layer of this step into the cache, with all it stands on; `disk` will be made of it."""
        wanted = self.layer(name)
        chain = self.layers[: len(wanted.chain)]
        present = self._usable(chain, disk)
        for layer in chain:
            if layer.key in self._told and (layer.key in present or self.flags.detach):
                continue
            if layer.key in present:
                self._end("cached", layer.step.name, 0.0)
            else:
                self._make(layer)
            if layer.step.remark:
                self.console.note(layer.step.remark)
            self._told.add(layer.key)
        return wanted

    def _make(self, layer: Layer) -> None:
        if layer.step.bootstrap:
            self._fetch()
        request = wire.Layer(
            place=self.site.place,
            key=layer.key,
            below=tuple(layer.parents),
            step=layer.step.name,
            script=script.render(layer.step.script),
            files=encode(layer.step.files),
            bootstrap=layer.step.bootstrap,
            epoch=self.resolution.epoch,
            record=record(layer),
            secrets=self._secrets(self.site.salt) if layer.step.secrets else {},
            variables={"DEBS": self.debs},
            what=f"inv {layer.step.name}",
        )
        self.order(layer.step.name, request)

    @property
    def debs(self) -> str:
        """Folder of packages on the host."""
        return f"{self.site.place.location}/debs"

    def _fetch(self) -> None:
        packages = tuple(package.__dict__ for package in self.resolution.packages)
        self.order("packages", self.fetch_request(packages))

    def fetch_request(self, packages: Sequence[Mapping[str, Any]]) -> wire.Fetch:
        """Have packages brought to the store, or without a network looked at."""
        named = self.lock.title if self.lock else ""
        return wire.Fetch(tuple(packages), self.debs, self.settings.apt_proxy, named, self.flags.offline)

    @cached_property
    def disk_step(self) -> Step:
        """How the raw disk is assembled."""
        return disk.step(self.loaded, self.resolution)

    def disk(self) -> wire.Disk | None:
        """Bring the raw image to IMAGELOC, once; None with --detach."""
        return self._disk

    @cached_property
    def _disk(self) -> wire.Disk | None:
        top, step = self.layers[-1], self.disk_step
        key = disk_key(top, step)
        self.ensure(top.step.name, key)
        request = wire.Assemble(
            place=self.site.place,
            image=self.site.image,
            key=key,
            seed=self._seed(),
            chain=tuple(top.chain),
            script=script.render(step.script),
            files=encode(step.files),
            epoch=self.resolution.epoch,
            manifest=self._manifest(top),
            what="inv disk",
            private=self.settings.opens_root,
        )
        made = self.order("disk", request)
        self._limit_cache()
        return made

    def _seed(self) -> str:
        """What every identifier of the disk is derived from (hex): all inputs but the secrets.

        A secret's digest is keyed by LOCATION, and the same inputs must give the same bytes everywhere.
        """
        public = self.plan(self.resolution, {})[-1].key
        return hashlib.sha256(f"{self.settings.imagename} {public}".encode()).hexdigest()

    def _manifest(self, top: Layer) -> dict[str, Any]:
        own = {"apt_proxy", "location", "mountpoint", "imageloc"}  # of this host, not of the image
        shown = {key: value for key, value in self.settings.shown().items() if key not in own}
        return {
            "image": self.settings.imagename,
            "settings": shown,
            "epoch": self.resolution.epoch,
            "layers": list(top.chain),
            "packages": [
                {"name": p.name, "version": p.version, "arch": p.arch, "sha256": p.sha256}
                for p in self.resolution.packages
            ],
        }

    def _limit_cache(self) -> None:
        reach = tuple(layer.key for layer in self.layers)
        limit = self.settings.cache_limit * GIB
        self.order("cache", wire.Clean(self.site.place, self.site.image, "limit", reach, limit))

    def follow(self, event: Event) -> None:
        """Show what the agent says while it works."""
        if event["event"] == "progress":
            self.console.progress(event["label"], event["done"], event["total"])
        elif event["event"] == "work":
            self.console.work(event["name"], event["last"])
        elif event["event"] == "note":
            self.console.note(event["text"])


def described(made: wire.Disk) -> str:
    """Name a raw image, and say who may read it where that is not everybody's."""
    return f"{made.image}  mode {made.mode}: it holds a root password" if made.mode else made.image


def record(layer: Layer) -> dict[str, Any]:
    """What went into a layer, for `inv why`."""
    return {
        "step": layer.step.name,
        "below": layer.parents[-1] if layer.parents else "",
        "chain": list(layer.chain),
        "script": layer.step.script,
        "files": {
            name: f"{file.mode:o} {hashlib.sha256(file.content).hexdigest()}"
            for name, file in layer.step.files.items()
        },
    }


def disk_key(top: Layer, step: Step) -> str:
    """Key of the disk: the finished tree and how it is laid out."""
    inputs = f"{top.key} {script.SURROUNDINGS} {plan.digest(step, {})}"
    return f"disk-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"


def why(layer: Layer, stored: dict[str, Any]) -> list[str]:
    """Tell which inputs differ between a planned layer and a stored one of the same step."""
    new = record(layer)
    lines = []
    if new["below"] != stored["below"]:
        lines.append(f"below: {stored['below'] or 'nothing'} -> {new['below'] or 'nothing'}")
    if new["script"] != stored["script"]:
        lines.append("script: changed")
    for name in sorted({*new["files"], *stored["files"]}):
        before, after = stored["files"].get(name), new["files"].get(name)
        if before != after:
            state = "added" if before is None else "removed" if after is None else "changed"
            lines.append(f"file {name!r}: {state}")
    return lines
