"""What the verbs of tasks.py do beyond bringing a layer: show, ask, and end well."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from build import convert as conversion
from build import inspect as inspection
from build import params as boot_line
from build.engine import fetch, pipeline, rings, script
from build.engine.console import size
from build.engine.errors import BuildError
from build.engine.fetch import Artifact
from build.engine.host import CHECKOUT
from build.engine.pipeline import Build
from build.engine.remote import HostContext
from build.engine.session import explain


def config(build: Build) -> None:
    """Print KEY VALUE ORIGIN for every setting; the password only as set or empty."""
    site = build.prospect
    shown = build.settings.shown()
    for key, value in (
        ("location", site["place"]["location"]),
        ("mountpoint", site["place"]["mountpoint"]),
        ("imageloc", site["image"]),
    ):
        shown[key] = value
    rows = [(key.upper(), _short(value), build.loaded.origins[key]) for key, value in shown.items()]
    build.console.table(("SETTING", "VALUE", "ORIGIN"), rows)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def plan(build: Build, scripts: bool) -> None:
    """Print the steps with keys and states; with `scripts` the text of each."""
    resolution = build.stored_resolution()
    if resolution is None:
        build.console.line("not resolved yet: keys are known after `inv resolve` or `inv build`")
        resolution = pipeline.UNRESOLVED
        present: set[str] = set()
        layers = build.plan(resolution, build.prospect)
    else:
        layers = build.plan(resolution, build.prospect)
        present = build.present(layers, build.prospect)
    if not scripts:
        unknown = resolution is pipeline.UNRESOLVED
        rows = [
            (
                layer.step.name,
                "?" if unknown else layer.key,
                "cached" if layer.key in present else "to build",
                len(layer.step.files),
            )
            for layer in layers
        ]
        build.console.table(("STEP", "KEY", "STATE", "FILES"), rows)
        return
    for layer in layers:
        print(f"# ---- {layer.step.name}: {', '.join(map(repr, layer.step.files)) or 'no files'}")
        print(script.render(layer.step.script))


def why(build: Build, name: str) -> None:
    """Print the inputs of a step that differ from its newest stored layer."""
    resolution = build.stored_resolution()
    if resolution is None:
        raise BuildError("nothing is resolved yet", "run: inv build")
    layer = build.layer(name, build.plan(resolution, build.prospect))
    if build.present([layer], build.prospect):
        build.console.line(f"{name}: cached as {layer.key}; nothing changed")
        return
    stored = build.host.call("records", place=build.prospect["place"], step=name)
    if not stored:
        build.console.line(f"{name}: was never built here")
        return
    build.console.line(f"{name}: {stored[-1]['key']} -> {layer.key}")
    for line in pipeline.why(layer, stored[-1]) or ["a secret, the header or the epoch changed"]:
        build.console.line(f"  {line}")


def doctor(build: Build, install: bool) -> None:
    """Print the host's checks, with `install` after mending them; fails when a build lacks something."""
    if install:
        script = (CHECKOUT / "build/engine/install.sh").read_text(encoding="utf-8")
        done = build.host.call("install", build.follow, script=script)
        build.console.done()
        build.console.line(f"installed: {', '.join(done['packages']) or 'nothing was missing'}")
    rendering = importlib.import_module("build.doctor")
    wanted = build.settings
    rows = build.host.call(
        "doctor",
        build.follow,
        place=build.prospect["place"],
        image=build.prospect["image"],
        settings=wanted.model_dump(mode="json", exclude={"password"}),
    )
    build.console.done()
    rendering.show(build.console, rows)


def resolve(build: Build) -> None:
    """Print what the mirror has for us, or how old what we use instead is."""
    started = time.monotonic()
    found = build.resolution
    total = size(sum(package.size for package in found.packages))
    what = f"{len(found.packages)} packages, {total}, as of {_date(found.epoch)}"
    if build.flags.frozen:
        what += f"; frozen, the mirror was asked {_age(time.time() - found.checked)} ago"
    build.console.step("frozen" if build.flags.frozen else "ok", "resolve", time.monotonic() - started, what)


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _age(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} seconds"


def mount(build: Build, keep: bool) -> None:
    """Prove the sandbox, or show the finished tree on the host."""
    if not keep:
        preflight(build)
        build.mount()
        return
    top = build.ensure("seal")
    shown = build.host.call("keep", place=build.site["place"], chain=list(top.chain), action="mount")
    build.console.line(
        f"the finished tree is mounted read-only at {shown['mountpoint']}; take it away with: inv umount"
    )


def umount(build: Build) -> None:
    """Unmount what --keep mounted."""
    shown = build.host.call("keep", place=build.prospect["place"], chain=[], action="umount")
    build.console.line(f"unmounted {shown['mountpoint']}")


def preflight(build: Build) -> None:
    """Check settings, tools, space and privileges before anything else; then resolve, before any download."""
    if build.flags.formats or build.settings.formats:
        wanted = conversion.chosen(build.flags.formats, build.settings)
        conversion.request(build.loaded, wanted, "", "", 0, build.settings.convert)
        build.host.outfit("convert")
    build.host.call(
        "preflight",
        build.follow,
        location=build.site["place"]["location"],
        image=build.site["image"],
    )
    resolve(build)


def keepalived_render(build: Build) -> None:
    """Bring the layer and print how long a failover may take."""
    from build.keepalived import failover_bound

    build.ensure("keepalived-render")
    vrrp = build.settings.vrrp
    build.console.note(
        f"failover within {failover_bound(vrrp.advert_int, vrrp.priority):.2f} s "
        f"(advert_int {vrrp.advert_int}, priority {vrrp.priority})"
    )


def build(build: Build) -> None:
    """Finish a build: convert to what was asked for and say where it lies."""
    image = build.site["image"]
    if manifest := build.disk():
        disk = manifest["disk"]
        build.console.line(
            f"image {image}  {size(disk['size'])} ({size(disk['allocated'])} on disk)  "
            f"sha256 {disk['sha256'][:16]}"
        )
        bring_home(build, [image])
    if build.flags.formats or build.settings.formats:
        wanted = conversion.chosen(build.flags.formats, build.settings)
        bring_home(build, _made("convert", _convert(build, wanted, build.resolution.epoch)))


def params(build: Build, kind: str) -> None:
    """Print a router's boot line; the KEY=VALUE pairs of --set are its own keys here, no settings."""
    pairs = [text.partition("=") for text in build.flags.overrides]
    for key, separator, _ in pairs:
        if not separator:
            raise BuildError(f"--set {key!r} has no value", f"write --set {key}=VALUE")
    print(boot_line.compose(kind, {key: value for key, _, value in pairs}))


def render(build: Build, line: str, hypervisor: str) -> None:
    """Print what the guest makes of a boot line; fails when it would refuse a part of it."""
    shown = boot_line.render(line, build.loaded, hypervisor)
    for path, (mode, text) in shown.files.items():
        print(f"==== {path} {mode:04o}\n{text}")
    print(f"==== type {shown.kind}")
    for name, words in (("start", shown.enable), ("stop", shown.disable), ("remove", shown.removed)):
        print(f"{name}: {' '.join(words) or '-'}")
    for command in shown.commands:
        print(f"run: {command}")
    if shown.complaints:
        raise BuildError(
            "the guest would refuse: " + "; ".join(shown.complaints),
            "correct the boot line; above stands what the guest makes of it, defaults included",
        )


def shell(build: Build, at: str, command: str) -> int:
    """Open the shell; answers its exit status."""
    resolution = build.stored_resolution()
    if resolution is None:
        raise BuildError("there is no tree yet", "run: inv build")
    layers = build.plan(resolution, build.prospect)
    layer = build.layer(at or layers[-1].step.name, layers)
    missing = [
        link.step.name
        for link in layers[: len(layer.chain)]
        if link.key not in build.present(layers, build.prospect)
    ]
    if missing:
        raise BuildError(f"{missing[0]} is not in the cache", f"run: inv {missing[-1]}")
    return build.host.interact(
        "shell",
        {
            "place": build.prospect["place"],
            "chain": list(layer.chain),
            "label": layer.step.name,
            "argv": shlex.split(command),
        },
    )


def boot(build: Build, uefi: bool, memory: str) -> int:
    """Boot the image on this terminal; answers QEMU's exit status."""
    _need_image(build)
    return build.host.interact(
        "boot",
        {
            "image": build.prospect["image"],
            "format": "raw",
            "firmware": "uefi" if uefi else "bios",
            "memory": _mebibytes(memory),
            "arch": build.settings.arch,
            "work": f"{build.prospect['place']['location']}/logs",
        },
    )


def verify(build: Build, memory: str, target: str) -> None:
    """Boot the raw image, or with --formats what it was converted to, and check it from inside.

    Prints the table and writes JSON; fails if any check does.
    """
    rendering = importlib.import_module("build.verify")
    wanted = build.settings
    mebibytes = _mebibytes(memory)
    grow_to: int | None = None
    if build.flags.formats:
        formats = conversion.chosen(build.flags.formats, wanted)
        made = _convert(build, formats, _need_image(build).get("epoch", 0))
        files = {file["format"]: f"{made['folder']}/{file['file']}" for file in made["files"]}
        guests = rendering.guests(wanted, files)
    else:
        _need_image(build)
        guests = [{"image": build.prospect["image"], "firmware": firmware} for firmware in wanted.boots_under]
        grow_to = wanted.size + 512
    result = build.host.call(
        "verify",
        build.follow,
        guests=guests,
        memory=mebibytes,
        arch=wanted.arch,
        expect=rendering.expectations(wanted, build.loaded.overlays),
        work=f"{build.prospect['place']['location']}/logs",
        grow_to=grow_to,
    )
    build.console.done()
    rendering.show(build.console, result)
    report = Path(target) if target else home(build) / f"{wanted.imagename}.verify.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    build.console.line(f"report {report}")
    if not rendering.passed(result):
        raise BuildError(
            "the image does not pass", "read the rows that say FAIL and the serial logs named above"
        )


def _mebibytes(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 64 <= int(text) <= 1 << 20:
        raise BuildError(f"--memory {text!r} is not a number of MiB", "write --memory 256")
    return int(text)


def convert(build: Build, formats: str) -> None:
    """Convert the raw image to the formats asked for, else to those of its definition."""
    wanted = conversion.chosen(formats, build.settings)  # a wrong name is told before an image is asked for
    bring_home(build, _made("convert", _convert(build, wanted, _need_image(build).get("epoch", 0))))


def _convert(build: Build, wanted: Sequence[str], epoch: int) -> dict[str, Any]:
    image, outdir = build.prospect["image"], build.prospect["place"]["location"]
    request = conversion.request(build.loaded, wanted, image, outdir, epoch, build.settings.convert)
    answer: dict[str, Any] = build.order("convert", "convert", **request, location=outdir)
    return answer


def _made(verb: str, answer: dict[str, Any]) -> list[str]:
    """Paths of the files that an order made for people to take away."""
    if verb == "convert":
        return [f"{answer['folder']}/{file['file']}" for file in answer.get("files", ())]
    return [answer["image"]] if verb == "disk" else []


def home(build: Build) -> Path:
    """Where this host's files belong here: dist/ or the folder of --to; of several hosts each has its own."""
    folder = Path(build.flags.to) if build.flags.to else CHECKOUT / "dist"
    return (
        folder / re.sub(r"[^A-Za-z0-9._@-]", "_", build.host.name) if len(build.flags.hosts) > 1 else folder
    )


def bring_home(build: Build, paths: list[str]) -> None:
    """Fetch these files of a remote host, unless they are there already."""
    if not build.host.remote or not paths:
        return
    if build.flags.no_fetch:
        for path in paths:
            build.console.line(f"left there: {path}")
        return
    folder = home(build)
    for row in build.host.call("send", paths=paths):
        artifact = Artifact(**row)
        started = time.monotonic()
        here = fetch.is_here(artifact, folder)
        if not here:
            label = f"fetch {artifact.name}"
            fetch.fetch(
                build.host, artifact, folder, lambda *told, label=label: build.console.progress(label, *told)
            )
        state = "cached" if here else "fetched"
        build.console.step(state, "fetch", time.monotonic() - started, str(folder / artifact.name))


def status(build: Build) -> None:
    """Print how the build is that was left to the host, and who holds LOCATION."""
    told = build.host.call("job", place=build.prospect["place"], action="status")
    if told["state"] == "none":
        build.console.line("no build was left to this host")
    else:
        end = told.get("until") or time.time()
        lasted = f"{int(end - told['since'])} s"
        step = f" at {told['step']}" if told["state"] != "finished" and "step" in told else ""
        build.console.line(f"{told['state']}{step} after {lasted}: {told['what']}, by {told['user']}")
    if told["lock"]:
        build.console.line(f"{build.prospect['place']['location']} is held by {told['lock']}")


def attach(build: Build) -> None:
    """Show what a build without us does until it ends, then bring home what it made; fails as it fails."""

    def show(event: dict[str, Any]) -> None:
        told = event.get("told", event)
        if told["event"] == "result":
            build.show(told["verb"], told["name"], told["value"])
        else:
            build.follow(told)

    try:
        told = build.host.call("job", show, place=build.prospect["place"], action="follow")
    except KeyboardInterrupt:
        raise BuildError("no longer attached", "the build goes on; come back with: inv attach", 130) from None
    build.console.done()
    if failure := told.get("failure"):
        raise explain(failure, build.host.debug)
    if told["state"] != "finished":
        raise BuildError(f"the build was {told['state']}", "run: inv build; finished layers are kept")
    bring_home(build, [path for made in told["results"] for path in _made(made["verb"], made["value"])])


def cancel(build: Build) -> None:
    """End the build that was left to the host."""
    told = build.host.call("job", place=build.prospect["place"], action="cancel")
    build.console.line(f"cancelled {told['what']}, by {told['user']}")


def inspect(build: Build, file: str) -> None:
    """Say what an image file is and what is wrong with it; fails when a hypervisor would refuse it."""
    path = file if build.host.remote else str(Path(file).resolve())
    told = build.host.call("inspect", build.follow, file=path)
    build.console.done()
    for line in inspection.lines(told):
        build.console.line(line)
    if inspection.status(told):
        raise BuildError(f"{file} would be refused", "correct what the findings name, or convert again")


def _need_image(build: Build) -> dict[str, Any]:
    manifest: dict[str, Any] = build.host.call("manifest", image=build.prospect["image"])
    return manifest


def clean(build: Build, what: str, dry_run: bool) -> None:
    """Remove and say what."""
    reach: list[str] = []
    if what == "cache" and (resolution := build.stored_resolution()):
        reach = [layer.key for layer in build.plan(resolution, build.prospect)]
    rows = build.host.call(
        "clean",
        build.follow,
        place=build.prospect["place"],
        image=build.prospect["image"],
        what=what,
        reach=reach,
        dry_run=dry_run,
    )["removed"]
    for row in rows:
        build.console.line(f"{'would remove' if dry_run else 'removed'} {row['path']}  {size(row['bytes'])}")
    build.console.line(
        f"{len(rows)} {'thing' if len(rows) == 1 else 'things'}, {size(sum(row['bytes'] for row in rows))}"
    )


def test(context: HostContext, ring: str, name: str) -> None:
    """Run pytest on the asked ring, or on all."""
    _only_here(context, "tests run")
    if ring and ring not in rings.RINGS:
        raise BuildError(f"no ring {ring!r}", f"rings: {', '.join(rings.RINGS)}")
    parts = rings.parts(ring, name, os.geteuid(), os.cpu_count() or 1)
    ended: list[tuple[rings.Part, int | None]] = []
    for part in parts:
        if part.sudo:
            print(rings.purpose(part, part is not parts[-1]), flush=True)
        ended.append((part, rings.status(part, context.host.show(part.line, CHECKOUT))))
        if ended[-1][1] == rings.INTERRUPTED:
            break
    if error := rings.verdict(ended, name):
        raise error


def _only_here(context: HostContext, what: str) -> None:
    if context.host.remote:
        raise BuildError(f"{what} on this machine only", "leave -H out, or log in there")


def bench(context: HostContext, name: str, pairs: str) -> None:
    """Run one of the benchmarks."""
    _only_here(context, "benchmarks run")
    known = sorted(path.stem for path in (CHECKOUT / "bench").glob("*.py"))
    if name not in known:
        raise BuildError(f"no benchmark {name!r}", f"benchmarks: {', '.join(known)}")
    line = [sys.executable, "-B", f"bench/{name}.py", "--pairs", pairs]
    if status := context.host.show(line, CHECKOUT):
        raise BuildError("slower than wanted", "run it again on a quiet machine", status)
