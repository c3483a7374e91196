"""The formats an image is converted to: one row a format, their names, and the request for the build host.

Pure: the build host's agent (`build.agent.verbs.convert`) does the work, in one reading of the disk for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from jinja2 import TemplateError

from build import wire
from build.engine import cloudstack
from build.engine.errors import BuildError
from build.engine.hosts.host import CHECKOUT
from build.engine.options import Options
from build.engine.pipeline import Build
from build.engine.render import render
from build.engine.settings import Loaded, Settings
from build.formats import FORMATS
from build.formats.lib import outer as compression
from build.formats.lib.errors import Unsupported
from build.formats.lib.format import Template
from build.verbs import artifacts

TEMPLATES = CHECKOUT / "templates"
_ARCH = {"amd64": "x86_64"}
_DEBIAN = {"bookworm": 12, "trixie": 13}


def chosen(asked: str | Iterable[str], settings: Settings) -> tuple[str, ...]:
    """Formats to make: those asked for (`vhd,ova`), else the definition's, else every one it names.

    Raises BuildError for an unknown one.
    """
    names = [name.strip() for name in asked.split(",")] if isinstance(asked, str) else list(asked)
    wanted = (
        [name for name in names if name] or list(settings.formats) or list(settings.names) or list(FORMATS)
    )
    for name in (*wanted, *settings.names):
        if name not in FORMATS:
            near = get_close_matches(name, FORMATS, n=1)
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
) -> wire.Convert:
    """What the agent's `convert` is asked; `image` and `outdir` are paths on the build host.

    Raises BuildError for names that clash or would be blank, before anything runs.
    """
    settings = loaded.settings
    specs = [_spec(name, settings, options or Options()) for name in formats]
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


def _spec(name: str, settings: Settings, options: Options) -> dict[str, Any]:
    row, file = FORMATS[name], file_name(name, settings)
    try:
        given = {**row.options, **row.kind.options(options.model_dump(), outer(file))}
    except Unsupported as error:
        raise BuildError(f"{name}: {error.message}", error.hint) from None
    if row.descriptor:
        base = file.removesuffix(f".{outer(file)}").removesuffix(f".{row.kind.suffix}")
        given["ovf"] = descriptor(row.descriptor, settings, options, base)
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


def descriptor(template: str, settings: Settings, options: Options, base: str) -> str:
    """The OVF text; three numbers are left for the build host. Raises BuildError for a bad template."""
    ovf, bits = options.ovf, "64" if settings.arch == "amd64" else ""
    values = {
        **ovf.model_dump(),
        "base": base,
        "name": settings.imagename,
        "description": f"Debian GNU/Linux {_DEBIAN[settings.suite]} ({bits or '32'}-bit)",
        "guest_os": ovf.guest_os or f"debian10{'_64' if bits else ''}Guest",
        "os_id": 96 if bits else 95,
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


def convert(build: Build, formats: str) -> None:
    """Convert the raw image to the formats asked for, else to those of its definition."""
    wanted = chosen(formats, build.settings)  # a wrong name is told before an image is asked for
    made = order(build, wanted, artifacts.need_image(build).get("epoch", 0))
    artifacts.bring_home(build, made)


def order(build: Build, wanted: Sequence[str], epoch: int) -> wire.Converted | None:
    """Have the host convert the raw image, now or without us (None)."""
    image, outdir = build.prospect.image, build.prospect.place.location
    asked = request(build.loaded, wanted, image, outdir, epoch, build.settings.convert, location=outdir)
    return build.order("convert", asked)
