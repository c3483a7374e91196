"""The formats that an image is converted to: which, their files' names, and the request for the build host.

What a format is stands in `build.formats`; the build host's agent (`build.agent.verbs.convert`) does the
work, in one reading of the disk for all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from build import wire
from build.engine import cloudstack
from build.engine.errors import BuildError
from build.engine.hosts.host import CHECKOUT
from build.engine.options import Options
from build.engine.pipeline import Build
from build.engine.render import render
from build.engine.settings import Loaded, Settings
from build.formats import FAMILIES, FORMATS, KINDS
from build.formats.lib import outer as compression
from build.formats.lib import unwrap
from build.formats.lib.errors import Unsupported
from build.formats.lib.format import Template
from build.verbs import artifacts

TEMPLATES = CHECKOUT / "templates"
_ARCH = {"amd64": "x86_64"}
_DEBIAN = {"bookworm": 12, "trixie": 13}


@dataclass(frozen=True)
class Guest:
    """What an OVF says of the system on the disk."""

    number: int
    """CIM's OSType."""
    vmware: str
    """VMware's name of it."""
    description: str


UNKNOWN = Guest(101, "otherLinux64Guest", "Linux (64-bit)")
"""Of a disk that somebody else made."""


def chosen(asked: str | Iterable[str], settings: Settings) -> tuple[str, ...]:
    """Formats to make: those asked for (`vhd,ova`), else the definition's, else every one it names.

    Raises BuildError for an unknown one.
    """
    names = [name.strip() for name in asked.split(",")] if isinstance(asked, str) else list(asked)
    wanted = (
        [name for name in names if name] or list(settings.formats) or list(settings.names) or list(FORMATS)
    )
    wanted = [each for name in wanted for each in FAMILIES.get(name, (name,))]
    for name in (*wanted, *settings.names):
        if name not in FORMATS:
            near = get_close_matches(name, (*FORMATS, *FAMILIES), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BuildError(f"unknown format {name!r}", f"{hint}known formats: {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(wanted))


def file_name(name: str, settings: Settings) -> str:
    """The artifact's file name from the image definition's table; raises BuildError for a blank field."""
    row = settings.names.get(name, FORMATS[name].file)
    fields = {
        "imagename": settings.imagename,
        "release": settings.cloudstack_release,
        "template": cloudstack.template_version(settings.cloudstack_release)
        if settings.cloudstack_release
        else "",
        "arch": _arch(settings),
        "suite": settings.suite,
    }
    for field in re.findall(r"{([^{}]*)}", row):
        if field not in fields:
            raise BuildError(
                f"names.{name}: unknown field {{{field}}}",
                f"known fields: {', '.join(f'{{{key}}}' for key in fields)}",
            )
        if not fields[field]:
            raise BuildError(
                f"names.{name}: {{{field}}} would be blank in {row!r}",
                "set cloudstack_release, or give the format a name without it",
            )
    filled = re.sub(r"{([^{}]*)}", lambda match: fields[match[1]], row)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,200}", filled):
        raise BuildError(
            f"names.{name}: {filled!r} is no file name", "use letters, digits, dots and dashes only"
        )
    inner = filled.removesuffix(f".{outer(filled)}") if outer(filled) else filled
    suffix = FORMATS[name].kind.suffix
    if suffix and not inner.endswith(f".{suffix}"):
        raise BuildError(
            f"names.{name}: {filled!r} does not end in .{suffix}",
            "importers go by the name: correct it",
        )
    return filled


def _arch(settings: Settings) -> str:
    return _ARCH.get(settings.arch, settings.arch)


def outer(name: str) -> str:
    """Outer compression that a file name asks for; empty for none."""
    end = name.rpartition(".")[2]
    return end if end in compression.KINDS else ""


def request(
    loaded: Loaded,
    formats: Iterable[str],
    image: str,
    outdir: str,
    epoch: int,
    options: Options | None = None,
    threads: int = 0,
    location: str = "",
    guest: Guest | None = None,
) -> wire.Convert:
    """What the agent's `convert` is asked; `image` and `outdir` are paths on the build host.

    `guest` is what is on the disk; None: what the settings build.

    Raises BuildError for names that clash or would be blank, before anything runs.
    """
    settings = loaded.settings
    specs = [_spec(name, settings, options or Options(), guest or debian(settings)) for name in formats]
    taken: dict[str, str] = {}
    for spec in specs:
        if other := taken.get(spec["file"]):
            raise BuildError(
                f"names.{spec['name']}: {spec['file']} is the name of {other}, too",
                "give each format its own name",
            )
        taken[spec["file"]] = spec["name"]
    return wire.Convert(
        image=image,
        outdir=outdir,
        formats=tuple(specs),
        identity=settings.imagename,
        epoch=epoch,
        threads=threads,
        location=location,
        cloudstack=_metadata(settings),
        private=settings.opens_root,
    )


def for_cloudstack(settings: Settings) -> bool:
    """Whether this is a system VM that a CloudStack release starts; none of them takes 32 bits."""
    return bool(settings.cloudstack_release) and settings.arch == "amd64"


def _metadata(settings: Settings) -> dict[str, Any] | None:
    if not for_cloudstack(settings):
        return None
    files = {name: file_name(name, settings) for name in cloudstack.FORMATS}
    return cloudstack.metadata(settings.cloudstack_release, _arch(settings), files, settings.download_url)


def debian(settings: Settings) -> Guest:
    """The system that the settings build. ESXi 6.5 knows no Debian after 10."""
    if settings.arch == "amd64":
        return Guest(96, "debian10_64Guest", f"Debian GNU/Linux {_DEBIAN[settings.suite]} (64-bit)")
    return Guest(95, "debian10Guest", f"Debian GNU/Linux {_DEBIAN[settings.suite]} (32-bit)")


def _spec(name: str, settings: Settings, options: Options, guest: Guest) -> dict[str, Any]:
    row, file = FORMATS[name], file_name(name, settings)
    try:
        given = {**row.options, **row.kind.options(options.model_dump(), outer(file))}
    except Unsupported as error:
        raise BuildError(f"{name}: {error.message}", error.hint) from None
    if row.descriptor:
        base = file.removesuffix(f".{outer(file)}").removesuffix(f".{row.kind.suffix}")
        given["ovf"] = descriptor(row.descriptor, settings.imagename, guest, options, base)
    spec: dict[str, Any] = {
        "name": name,
        "kind": row.kind.name,
        "file": file,
        "compress": outer(file),
        "options": given,
    }
    if row.cloudstack and for_cloudstack(settings):
        spec["register"] = _register(row.cloudstack, settings)
    return spec


def descriptor(template: str, name: str, guest: Guest, options: Options, base: str) -> str:
    """The OVF text; three numbers are left for the build host. Raises BuildError for a bad template."""
    from jinja2 import TemplateError  # here: it is slow to load, and most verbs do without

    values = {
        **options.ovf.model_dump(),
        "base": base,
        "name": name,
        "description": guest.description,
        "guest_os": options.ovf.guest_os or guest.vmware,
        "os_id": guest.number,
    }
    try:
        return render((TEMPLATES / template).read_text(encoding="utf-8"), values)
    except TemplateError as error:
        raise BuildError(f"{template}: {error}", "correct the template") from None


def _register(template: Template, settings: Settings) -> dict[str, Any]:
    """CloudStack's registerTemplate parameters without url, zone and type; the checksum comes with the file.

    They are those that a management server itself registers with (SystemVmTemplateRegistration.java).
    """
    arch = _arch(settings)
    name = cloudstack.template_name(template.hypervisor, settings.cloudstack_release, arch)
    return {
        "name": name,
        "displaytext": name,
        "hypervisor": template.hypervisor,
        "format": template.format,
        "ostype": template.guest_os,
        "arch": arch,
        "bits": 64,
        "requireshvm": True,
        "isextractable": False,
        "isfeatured": False,
        "ispublic": False,
        "passwordenabled": False,
    }


def convert(build: Build, formats: str, source: str, disk: str, json: bool) -> None:
    """Convert the raw image, or another file, to the formats asked for, else to those of the definition."""
    if source:
        asked = foreign(build, formats, source, disk)
    else:
        if disk:
            raise BuildError("--disk is for a file of --from", "leave it out: our image has one disk")
        wanted = chosen(formats, build.settings)  # a wrong name is told before an image is asked for
        asked = ours(build, wanted, artifacts.need_image(build).get("epoch", 0))
    made = build.order("convert", asked)
    if made and source and not build.host.remote:
        build.console.note(f"in {made.folder}")
    here = artifacts.bring_home(build, made)
    if json and made:
        facts = {"source": asked.image, "virtual_size": made.virtual_size, "guest_sha256": made.guest_sha256}
        build.console.json(**facts, **artifacts.converted(made, here))


def order(build: Build, wanted: Sequence[str], epoch: int) -> wire.Converted | None:
    """Have the host convert the raw image, now or without us (None)."""
    return build.order("convert", ours(build, wanted, epoch))


def ours(build: Build, wanted: Sequence[str], epoch: int) -> wire.Convert:
    """The request for the raw image."""
    image, outdir = build.prospect.image, build.prospect.place.location
    return request(build.loaded, wanted, image, outdir, epoch, build.settings.convert, location=outdir)


def foreign(build: Build, formats: str, source: str, disk: str = "") -> wire.Convert:
    """The request for a file of any maker: nothing but `convert` of the image definition counts for it.

    The files go where it lies, or to the folder of --to, and are named after it.
    """
    number = disk_number(disk)
    remote = build.host.remote
    path = PurePosixPath(source) if remote else Path(source).resolve()
    folder = path.parent if remote or not build.flags.to else Path(build.flags.to).resolve()
    base = stem(path.name) + (f"-disk{number}" if number > 1 else "")
    settings = build.settings.model_copy(update={"imagename": base, "names": {}, "cloudstack_release": ""})
    wanted = chosen(formats, settings)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or 0)
    loaded = replace(build.loaded, settings=settings)
    asked = request(loaded, wanted, str(path), str(folder), epoch, settings.convert, guest=UNKNOWN)
    return replace(asked, foreign=True, disk=number, private=False)


def disk_number(text: str) -> int:
    """The number of a disk in a file that holds several, from 1 on; raises BuildError."""
    if text and not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise BuildError(f"--disk {text} is no number of a disk", "count from 1; see: inv inspect FILE")
    return int(text or 1)


def stem(name: str) -> str:
    """What files made of one are named after: its name without suffixes, fit for a file name."""
    known = {*unwrap.KINDS, "tgz", "img", "raw"}
    known |= {kind.suffix for kind in KINDS.values()}
    base = name
    while (end := base.rpartition("."))[0] and end[2].lower() in known:
        base = end[0]
    return re.sub(r"[^A-Za-z0-9._+~-]+", "-", base).lstrip("._+~-")[:150] or "disk"
