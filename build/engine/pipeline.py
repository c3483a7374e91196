"""One build on one host: settings, resolution and plan meet the agent's cache.

Tasks call this and nothing else. Planning is pure; every effect is a call of the host's agent.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from build import STEPS
from build.engine import plan, prompt, remote, script, settings
from build.engine.console import Console, size
from build.engine.errors import BuildError
from build.engine.host import CHECKOUT, Host
from build.engine.password import crypt
from build.engine.plan import Layer, Step
from build.engine.resolution import Resolution
from build.engine.session import Event, encode

DEFINITION = CHECKOUT / "config" / "systemvm.yaml"
UNPACKED = 4.5
"""Bytes a tree takes for each byte of its .debs (measured: 1.1 GB from 240 MB)."""
GIB = 1 << 30
UNRESOLVED = Resolution((), 0, 0)
"""Stands in where a plan is shown before anything was resolved."""


def of(context: remote.HostContext) -> Build:
    """The build of a task's context; tasks of one command line and host share it."""
    if "build" not in context.state:
        row = context.flags.hosts.index(context.host.name) if context.host.remote else 0
        console = Console(context.host.name, row=row)
        context.state["build"] = Build(context.host, context.flags, console)
    build: Build = context.state["build"]
    return build


def depart(context: remote.HostContext) -> None:
    """Leave to the host what the verbs of a line with --detach have asked for; raises BuildError."""
    build: Build | None = context.state.get("build")
    if build is None or not build.orders:
        raise BuildError(
            "there is nothing to leave to the host", "--detach goes with build, disk and convert"
        )
    orders = [
        {**asdict(order), "request": {**order.request, **build.host.outfit(order.verb)}}
        for order in build.orders
    ]
    build.host.call(
        "job",
        build.follow,
        action="start",
        place=build.site["place"],
        what=f"inv {build.settings.imagename}",
        orders=orders,
    )
    build.console.line("it goes on without us: inv status, inv attach, inv cancel")


@dataclass(frozen=True)
class Order:
    """Something for the agent to do, and what it is called where it is told about."""

    verb: str
    name: str
    request: dict[str, Any]


class Build:
    """What a task works with. Everything is asked for when it is first needed, and once."""

    def __init__(self, host: Host, flags: remote.Flags, console: Console) -> None:
        self.host = host
        self.flags = flags
        self.console = console
        self.orders: list[Order] = []
        """What is to be done without us (--detach)."""
        self._told: set[str] = set()

    def order(self, verb: str, name: str, **request: Any) -> Any:
        """Have the agent do something, now or without us, and show what came of it; answers that."""
        order = Order(verb, name, request)
        if self.flags.detach:
            self.orders.append(order)
            return {}
        answer = self.host.call(verb, self.follow, **request)
        self.show(verb, name, answer)
        return answer

    def show(self, verb: str, name: str, answer: Any) -> None:
        """Print the line or lines of a finished order."""
        self.console.done()
        match verb:
            case "fetch":
                if answer.get("bytes"):
                    self.console.note(f"fetched {size(answer['bytes'])} of packages")
            case "layer":
                self.console.step(answer["state"], name, answer["seconds"])
            case "disk":
                self.console.step(answer["state"], name, answer["seconds"], answer["image"])
            case "convert":
                for file in answer["files"]:
                    made = f"{file['file']}  {size(file['size'])}"
                    self.console.step(file["state"], file["format"], file["seconds"], made)
            case "clean":
                if rows := answer["removed"]:
                    dropped = size(sum(row["bytes"] for row in rows))
                    self.console.note(f"dropped {len(rows)} old layers, {dropped}")

    @cached_property
    def loaded(self) -> settings.Loaded:
        """Settings with their origins."""
        definition = Path(self.flags.image) if self.flags.image else DEFINITION
        password = (
            prompt.new_password(f"root password of {definition.stem}") if self.flags.ask_password else None
        )
        return settings.load(definition, os.environ, CHECKOUT / ".env", self.flags.overrides, password)

    @property
    def settings(self) -> settings.Settings:
        """The settings themselves."""
        return self.loaded.settings

    @cached_property
    def _secrets(self) -> dict[str, str]:
        return {"password-hash": crypt(self.settings.password.get_secret_value(), self.settings.imagename)}

    @cached_property
    def site(self) -> dict[str, Any]:
        """Where this host builds, proved: `place`, `image`, `facts`, `digests`."""
        return self._locate(create=True)

    @cached_property
    def prospect(self) -> dict[str, Any]:
        """The same without touching anything: for verbs that only look."""
        return self._locate(create=False)

    def _locate(self, create: bool) -> dict[str, Any]:
        wanted = self.settings
        answer: dict[str, Any] = self.host.call(
            "location",
            self.follow,
            location=wanted.location,
            mountpoint=wanted.mountpoint,
            imageloc=wanted.imageloc,
            imagename=wanted.imagename,
            keep_visible=[] if self.host.remote else [str(CHECKOUT)],
            secrets=self._secrets,
            create=create,
        )
        return answer

    @cached_property
    def resolution(self) -> Resolution:
        """The exact package set: asked from the mirror, unless `--frozen`."""
        return self._resolve(self.site, self.flags.frozen)

    def stored_resolution(self) -> Resolution | None:
        """The resolution of an earlier run, for verbs that only look."""
        try:
            return self._resolve(self.prospect, frozen=True)
        except BuildError:
            return None

    def _resolve(self, site: dict[str, Any], frozen: bool) -> Resolution:
        wanted = self.settings
        answer = self.host.call(
            "resolve",
            self.follow,
            suite=wanted.suite,
            arch=wanted.arch,
            components=list(wanted.components),
            mirror=wanted.debian_mirror,
            security_mirror=wanted.security_mirror,
            security=wanted.security,
            keyring=wanted.keyring,
            apt_proxy=wanted.apt_proxy,
            packages=list(wanted.package_list),
            store=f"{site['place']['location']}/resolutions",
            frozen=frozen,
        )
        self.console.done()
        return Resolution.from_json(answer)

    def steps(self, resolution: Resolution) -> list[Step]:
        """The recipe for these settings and this resolution."""
        return [importlib.import_module(f"build.{name}").step(self.loaded, resolution) for name in STEPS]

    def plan(self, resolution: Resolution, site: dict[str, Any]) -> list[Layer]:
        """Chain the steps into layers; pure."""
        salt = f"{script.HEADER}{resolution.epoch}"
        return plan.layers(self.steps(resolution), salt, site["digests"])

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers of this build."""
        return self.plan(self.resolution, self.site)

    def layer(self, name: str, layers: Sequence[Layer] | None = None) -> Layer:
        """The layer of a step by the step's name; raises BuildError that names the known ones."""
        known = {layer.step.name: layer for layer in layers or self.layers}
        if name not in known:
            raise BuildError(f"no step {name!r}", f"steps: {', '.join(known)}")
        return known[name]

    def present(self, layers: Sequence[Layer], site: dict[str, Any]) -> set[str]:
        """Keys of these layers that are in the host's cache."""
        return set(self.host.call("cached", place=site["place"], keys=[layer.key for layer in layers]))

    def mount(self) -> None:
        """Prove the host: the sandbox opens and a tree can be mounted at MOUNTPOINT in it."""
        mounted = self.host.call("mount", self.follow, place=self.site["place"], chain=[])
        self.console.line(f"{self.console.paint('ok', 'mount  ')} {mounted['mounted']}")

    def ensure(self, name: str) -> Layer:
        """Bring the layer of this step into the cache, with all it stands on."""
        wanted = self.layer(name)
        chain = self.layers[: len(wanted.chain)]
        present = self.present(chain, self.site)
        for layer in chain:
            if layer.key in self._told:
                continue
            if layer.key in present:
                self.console.step("cached", layer.step.name, 0.0)
            else:
                self._make(layer)
            self._told.add(layer.key)
        return wanted

    def _make(self, layer: Layer) -> None:
        if layer.step.bootstrap:
            self._fetch()
        self.order(
            "layer",
            layer.step.name,
            place=self.site["place"],
            key=layer.key,
            below=list(layer.parents),
            step=layer.step.name,
            script=script.render(layer.step.script),
            files=encode(layer.step.files),
            secrets={name: self._secrets[name] for name in layer.step.secrets},
            bootstrap=layer.step.bootstrap,
            expected_bytes=int(UNPACKED * sum(package.size for package in self.resolution.packages)),
            epoch=self.resolution.epoch,
            variables=self._variables(),
            record=record(layer),
            what=f"inv {layer.step.name}",
        )

    def _variables(self) -> dict[str, str]:
        return {"DEBS": f"{self.site['place']['location']}/debs"}

    def _fetch(self) -> None:
        self.order(
            "fetch",
            "packages",
            packages=[package.__dict__ for package in self.resolution.packages],
            debs=f"{self.site['place']['location']}/debs",
            apt_proxy=self.settings.apt_proxy,
        )

    @cached_property
    def disk_step(self) -> Step:
        """How the raw disk is assembled."""
        step: Step = importlib.import_module("build.disk").step(self.loaded, self.resolution)
        return step

    def disk(self) -> dict[str, Any]:
        """Bring the raw image to IMAGELOC, once; answers its manifest, which is empty with --detach."""
        return self._disk

    @cached_property
    def _disk(self) -> dict[str, Any]:
        top = self.ensure(self.layers[-1].step.name)
        step = self.disk_step
        answer = self.order(
            "disk",
            "disk",
            place=self.site["place"],
            image=self.site["image"],
            key=disk_key(top, step),
            seed=self._seed(),
            chain=list(top.chain),
            script=script.render(step.script),
            files=encode(step.files),
            epoch=self.resolution.epoch,
            manifest=self._manifest(top),
            what="inv disk",
        )
        self._limit_cache()
        manifest: dict[str, Any] = answer.get("manifest", {})
        return manifest

    def _seed(self) -> str:
        """What every identifier of the disk is derived from (hex): all inputs but the secrets.

        A secret's digest is keyed by LOCATION, and the same inputs must give the same bytes everywhere.
        """
        public = self.plan(self.resolution, {"digests": {}})[-1].key
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
        reach = [layer.key for layer in self.layers]
        self.order(
            "clean",
            "cache",
            place=self.site["place"],
            image=self.site["image"],
            what="limit",
            reach=reach,
            bytes=self.settings.cache_limit * GIB,
        )

    def follow(self, event: Event) -> None:
        """Show what the agent says while it works."""
        if event["event"] == "progress":
            self.console.progress(event["label"], event["done"], event["total"])
        elif event["event"] == "note":
            self.console.note(event["text"])


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
    inputs = f"{top.key} {script.HEADER} {plan.digest(step, {})}"
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
