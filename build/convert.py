"""The formats an image is converted to: one row a format, their names, and the request for the build host.

Pure: the build host's agent (`build.agent.convert`) does the work, in one reading of the disk for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from build.engine.errors import BuildError
from build.engine.options import Options
from build.engine.render import render
from build.engine.settings import Loaded, Settings

TEMPLATE = Path(__file__).resolve().parents[1] / "templates" / "systemvm.ovf.j2"
OUTER = ("bz2", "gz", "zip", "zst")
"""Outer compressions, asked for by the end of a file's name."""
_ARCH = {"amd64": "x86_64"}
_DEBIAN = {"bookworm": 12, "trixie": 13}


@dataclass(frozen=True)
class Format:
    """One format: who imports it, what writes it, and what CloudStack calls it."""

    help: str
    kind: str
    """Writer and reader on the build host."""
    name: str
    """File name when the image definition has none."""
    hypervisor: str = ""
    """CloudStack's name of the hypervisor; empty for a format that it does not register."""
    register: str = ""
    """CloudStack's name of the format."""


FORMATS: Mapping[str, Format] = {
    "vhd": Format("VHD for XenServer and XCP-ng", "vhd", "{imagename}.vhd", "XenServer", "VHD"),
    "ova": Format("OVA for VMware", "ova", "{imagename}.ova", "VMware", "OVA"),
    "vmdk": Format("VMDK (streamOptimized) for VMware", "vmdk", "{imagename}.vmdk"),
    "qcow2": Format("QCOW2 for KVM", "qcow2", "{imagename}.qcow2", "KVM", "QCOW2"),
    "vhdx": Format("VHDX for Hyper-V", "vhdx", "{imagename}.vhdx", "Hyperv", "VHDX"),
    "hyperv-vhd": Format("VHD for Hyper-V", "vhd", "{imagename}-hyperv.vhd", "Hyperv", "VHD"),
    "raw": Format("the raw disk, sparse", "raw", "{imagename}.raw", "KVM", "RAW"),
}


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
    row = settings.names.get(name, FORMATS[name].name)
    fields = {
        "imagename": settings.imagename,
        "release": settings.cloudstack_release,
        "arch": _ARCH.get(settings.arch, settings.arch),
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
    if not inner.endswith(f".{FORMATS[name].kind}") and FORMATS[name].kind != "raw":
        raise BuildError(
            f"names.{name}: {filled!r} does not end in .{FORMATS[name].kind}",
            "importers go by the name: correct it",
        )
    return filled


def outer(name: str) -> str:
    """Outer compression that a file name asks for; empty for none."""
    end = name.rpartition(".")[2]
    return end if end in OUTER else ""


def request(
    loaded: Loaded,
    formats: Iterable[str],
    image: str,
    outdir: str,
    epoch: int,
    options: Options | None = None,
    threads: int = 0,
) -> dict[str, Any]:
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
    return {
        "image": image,
        "outdir": outdir,
        "formats": specs,
        "identity": settings.imagename,
        "epoch": epoch,
        "threads": threads,
    }


def _spec(name: str, settings: Settings, options: Options) -> dict[str, Any]:
    row, file = FORMATS[name], file_name(name, settings)
    given: dict[str, Any] = {}
    if row.kind == "vhd":
        given = {"creator": "hyperv" if name == "hyperv-vhd" else "xen"}
    elif row.kind == "qcow2":
        given = options.qcow2.model_dump()
        if given["compression"] == "zstd" and given["version"] == 2:
            raise BuildError("qcow2: version 2 knows no zstd", "set version 3, or compression deflate")
        if given["compression"] == "deflate" and outer(file):
            given["compression"] = "none"  # deflate inside would only hinder what is put around it
    elif row.kind in ("vmdk", "ova"):
        given = {"adapter": options.ovf.controller}
    if row.kind == "ova":
        given["ovf"] = descriptor(
            settings, options, file.removesuffix(f".{outer(file)}").removesuffix(".ova")
        )
    spec: dict[str, Any] = {
        "name": name,
        "kind": row.kind,
        "file": file,
        "compress": outer(file),
        "options": given,
    }
    return {**spec, "register": _register(row, settings)} if row.register else spec


def descriptor(settings: Settings, options: Options, base: str) -> str:
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
        return render(TEMPLATE.read_text(encoding="utf-8"), values)
    except TemplateError as error:
        raise BuildError(f"{TEMPLATE.name}: {error}", "correct the template") from None


def _register(row: Format, settings: Settings) -> dict[str, Any]:
    """CloudStack's registerTemplate parameters without url and zone; the checksum comes with the file."""
    name = f"systemvm-{row.hypervisor.lower()}-{settings.cloudstack_release or settings.imagename}"
    bits = "64" if settings.arch == "amd64" else "32"
    return {
        "name": name,
        "displaytext": name,
        "hypervisor": row.hypervisor,
        "format": row.register,
        "ostype": f"Debian GNU/Linux {_DEBIAN[settings.suite]} ({bits}-bit)",
        "requireshvm": True,
        "isextractable": False,
        "isfeatured": False,
        "ispublic": False,
        "isrouting": False,
        "passwordenabled": False,
    }
