"""What to build: typed, frozen, validated together, and able to say where each value came from.

Order of precedence: `--set` > environment (`SYSTEMVM_<NAME>`) > `.env` > image definition (YAML) > default.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from build import debian
from build.engine import cloudstack, references, sources, urls
from build.engine.errors import BuildError
from build.engine.options import Options, Ovf, Qcow2
from build.engine.password import check_hash
from build.engine.sources import Given

Suite = Literal["bookworm", "trixie"]
Arch = Literal["amd64", "i386"]
KERNELS: Mapping[tuple[str, str], str] = {
    ("bookworm", "amd64"): "linux-image-amd64",
    ("bookworm", "i386"): "linux-image-686-pae",
    ("trixie", "amd64"): "linux-image-amd64",
}
"""Kernel package by suite and arch; a pair that is missing has no kernel in Debian (trixie dropped i386)."""
BOOT_PACKAGES: Mapping[str, str] = {"bios": "grub-pc-bin", "uefi": "systemd-boot-efi"}
"""Package that brings the boot code of each firmware."""


MIRRORS = ("http", "https", "file")
"""Schemes of URLs that files are read from."""
SECRETS = ("password", "password_hash")
"""Settings that neither a committed file nor a command line may hold, and nothing shows."""


class NearlyRight(ValueError):
    """A value is refused that a hint can put right."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class Conflict(ValueError):
    """Settings that do not go together: why, and their keys."""

    def __init__(self, text: str, *keys: str) -> None:
        super().__init__(text)
        self.keys = keys


def _named(pattern: str, what: str) -> AfterValidator:
    """Take only text that matches; `what` follows it in the error."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


def _interface(value: str) -> str:
    ipaddress.ip_interface(value)
    return value


Component = Annotated[str, _named(r"[a-z0-9][a-z0-9-]*", "a component")]
Interface = Annotated[str, AfterValidator(_interface)]
PackageName = Annotated[str, _named(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?", "a package name")]
Unit = Annotated[str, _named(r"[A-Za-z0-9_][A-Za-z0-9:_.@\\-]*", "the name of a unit")]


class Part(BaseModel):
    """A frozen piece of the settings; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, validate_default=True, use_attribute_docstrings=True
    )


class Vrrp(Part):
    """Values of the redundant router's keepalived.conf, when it is rendered at build time."""

    enabled: bool = False
    """Write a live /etc/keepalived/keepalived.conf into the image; template and renderer go in regardless."""
    router_id: str = "systemvm"
    instance: str = "inside_network"
    state: Literal["MASTER", "BACKUP"] = "BACKUP"
    interface: str = "eth2"
    virtual_router_id: Annotated[int, Field(ge=1, le=255)] = 51
    priority: Annotated[int, Field(ge=1, le=254)] = 100
    advert_int: Annotated[int, Field(strict=True, ge=1, le=255)] = 1
    """Whole seconds: VRRPv2 sends one octet (RFC 3768, 5.3.7)."""
    nopreempt: bool = True
    auth_type: Literal["AH", "PASS", "none"] = "AH"
    auth_pass: str = ""
    addresses: tuple[Interface, ...] = ()
    """Virtual addresses, `ADDRESS/PREFIX`, the same list on every router of the group."""
    check_script: str = "/ramdisk/rrouter/heartbeat.sh"
    check_interval: Annotated[int, Field(ge=1)] = 5
    notify_master: str = "/opt/cloud/bin/configure_router.py --primary"
    notify_backup: str = "/opt/cloud/bin/configure_router.py --backup"
    notify_fault: str = "/opt/cloud/bin/configure_router.py --fault"

    @field_validator("*")
    @classmethod
    def _check_printable(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.isprintable():
            raise ValueError("a newline or control character would end the line in keepalived.conf")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Vrrp:
        if self.nopreempt and self.state == "MASTER":
            raise ValueError("nopreempt needs state BACKUP on every router")
        if self.enabled and self.auth_type != "none" and not self.auth_pass:
            raise ValueError(f"auth_type {self.auth_type} needs auth_pass")
        return self


class Services(Part):
    """Units switched on and off in the image, in addition to what their packages do."""

    enable: tuple[Unit, ...] = ()
    disable: tuple[Unit, ...] = ()
    mask: tuple[Unit, ...] = ()


class Settings(Part):
    """Everything that decides what an image holds and where it is built.

    `location`, `mountpoint` and `imageloc` are empty until a host is known: their defaults depend on it.
    """

    imagename: str = "systemvm"
    """Name of the image and of its files."""
    location: str = ""
    """Folder of caches, logs and images on the build host."""
    mountpoint: str = ""
    """Where the tree is mounted while it is built, in a namespace of its own."""
    imageloc: str = ""
    """Path of the raw image."""
    password: SecretStr = SecretStr("")
    """Root's password; empty locks it, keys still log in."""
    password_hash: SecretStr = SecretStr("")
    """Its hash, as crypt(5) has it, in place of the password: the same image in every LOCATION."""
    apt_proxy: str = ""
    """An apt cacher, http://HOST:3142; never gets into the image."""
    hostname: str = "systemvm"
    """Host name inside the image."""
    size: Annotated[int, Field(ge=64, le=2088960)] = 2000
    """MiB, made even: a VHD for XenServer is a multiple of 2 MiB."""
    snapshot: str = ""
    """A moment, as 20261127T090000Z, whose packages are wanted; fills `{snapshot}` in the mirrors' URLs."""
    debian_mirror: str = ""
    """Where packages come from; empty: the bootstrap tool's own mirror."""
    security_mirror: str = ""
    """Where the security suite comes from; empty: the mirror's sibling."""
    security: bool = True
    """Whether the security suite is used."""
    keyring: str = ""
    """Keyring file on the build host that signs the mirror; empty means Debian's own."""
    accept_older: bool = False
    """Take Release files older than ones that were seen before."""
    minimize: bool = True
    """Remove documentation, locales, fonts and caches."""
    cloudstack_release: str = ""
    """Release of CloudStack that starts the image, N.N.N or N.N.N.N; empty for an image that none does."""
    download_url: str = f"file://{cloudstack.TEMPLATES}"
    """Folder that the artifacts are served from; metadata.ini and `inv register` name it."""
    suite: Suite = "bookworm"
    """Debian's release."""
    arch: Arch = "amd64"
    """i386: bookworm only, BIOS only."""
    firmware: tuple[Literal["bios", "uefi"], ...] = ()
    """What the disk boots under; empty means all that the arch can do (i386: BIOS only)."""
    components: tuple[Component, ...] = ("main",)
    """Components of the archive."""
    packages: Mapping[str, tuple[PackageName, ...]] = Field(default_factory=dict)
    """Package names by suite; the row `all` goes to every suite."""
    jre: str = ""
    """Java runtime package, or empty for none."""
    image_mirror: str = ""
    """What the image's own sources list says; empty means Debian's own mirror name."""
    kernel_cmdline: str = "console=tty0 console=ttyS0,115200n8 net.ifnames=0 biosdevname=0"
    """Arguments of the kernel, the same under BIOS and UEFI."""
    bootstrap: Literal["builtin", "mmdebstrap", "debootstrap"] = "builtin"
    """How the base system is made: by us, or by one of these tools; the result is the same."""
    rootfs: tuple[str, ...] = ()
    """Overlay folders laid over the tree in this order, relative to the image definition."""
    services: Services = Services()
    formats: tuple[str, ...] = ()
    """Formats that a build converts to."""
    names: Mapping[str, str] = Field(default_factory=dict)
    """File name of each format's artifact; fields such as `{template}` and `{arch}` are filled in."""
    qcow2: Qcow2 = Qcow2()
    ovf: Ovf = Ovf()
    vrrp: Vrrp = Vrrp()
    cache_limit: Annotated[int, Field(ge=1)] = 10
    """GiB of layers that `build` keeps."""
    space_headroom: Annotated[int, Field(ge=0)] = 0
    """MiB that must stay free in the root file system."""

    @field_validator("size")
    @classmethod
    def _make_even(cls, value: int) -> int:
        return value + value % 2

    @field_validator("imagename", "hostname")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", value):
            raise ValueError("use letters, digits, dots and dashes only, at most 64")
        return value

    @field_validator(*references.PATHS)
    @classmethod
    def _check_absolute(cls, value: str, info: ValidationInfo) -> str:
        value = re.sub("/+", "/", value)
        if value == "/":
            raise ValueError("the root directory of the host cannot be used")
        if value and (not value.startswith("/") or os.path.normpath(value) != value.rstrip("/")):
            raise ValueError("use an absolute path without '..'")
        if re.search(r"[\n\t]", value):
            raise ValueError("a path with a newline or a tab has no place in a line of a log")
        if info.field_name == "mountpoint" and re.search(r"[:,\"\\]", value):
            raise ValueError("a path with ':', ',', '\"' or a backslash cannot be told to apt")
        return value.rstrip("/")

    @field_validator("cloudstack_release")
    @classmethod
    def _check_release(cls, value: str) -> str:
        if value:
            cloudstack.parse(value)
        return value

    @field_validator("debian_mirror", "security_mirror", "apt_proxy", "image_mirror", "download_url")
    @classmethod
    def _check_url(cls, value: str, info: ValidationInfo) -> str:
        written = value
        if info.field_name in ("debian_mirror", "security_mirror") and "{snapshot}" in value:
            if not info.data.get("snapshot"):
                raise ValueError("set snapshot, which stands for {snapshot}")
            value = value.replace("{snapshot}", info.data["snapshot"])
        schemes = ("http", "https") if info.field_name in ("apt_proxy", "image_mirror") else MIRRORS
        if value and (what := urls.fault(value, schemes)):
            right = urls.in_full(written, schemes)
            raise NearlyRight(what, f"write {right}") if right else ValueError(what)
        return value.rstrip("/")

    @field_validator("snapshot")
    @classmethod
    def _check_snapshot(cls, value: str) -> str:
        try:
            if value:
                time.strptime(value, debian.SNAPSHOT)
        except ValueError:
            raise ValueError("write the moment as in 20261127T090000Z") from None
        return value

    @field_validator("password")
    @classmethod
    def _check_password(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().isprintable():
            raise ValueError("control characters cannot be typed at a login")
        return value

    @field_validator("password_hash")
    @classmethod
    def _check_hash(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value():
            check_hash(value.get_secret_value())
        return value

    @field_validator("components")
    @classmethod
    def _check_components(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("name at least one")
        return names

    @field_validator("kernel_cmdline")
    @classmethod
    def _check_cmdline(cls, value: str) -> str:
        if not value.isprintable() or re.search(r"[\"'\\$`]", value):
            raise ValueError("quotes, newlines, '$' and backslashes cannot be passed to a kernel")
        return value

    @field_validator("packages")
    @classmethod
    def _check_packages(cls, table: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
        for row in table:
            if row not in ("all", *get_args(Suite)):
                raise ValueError(f"unknown row {row!r}; known rows: all, {', '.join(get_args(Suite))}")
        return table

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if (self.suite, self.arch) not in KERNELS:
            text = f"{self.suite} has no kernel for {self.arch}; use suite bookworm or arch amd64"
            raise Conflict(text, "suite", "arch")
        if self.arch == "i386" and "uefi" in self.firmware:
            raise Conflict("i386 boots under BIOS only; leave uefi out of firmware", "arch", "firmware")
        if self.snapshot and self.snapshot not in self.debian_mirror:
            text = "a snapshot needs a debian_mirror with {snapshot} in its URL"
            raise Conflict(text, "snapshot", "debian_mirror")
        if self.imageloc and self.mountpoint and self.imageloc.startswith(self.mountpoint + "/"):
            text = "imageloc lies below mountpoint, where it would be hidden"
            raise Conflict(text, "imageloc", "mountpoint")
        if self.password.get_secret_value() and self.password_hash.get_secret_value():
            text = "password and password_hash are both set; leave one of them empty"
            raise Conflict(text, *SECRETS)
        return self

    def shown(self) -> dict[str, Any]:
        """Every setting as plain values fit to be printed or published: secrets only as set or empty."""
        values = self.model_dump(mode="json")
        values |= {name: "(set)" if getattr(self, name).get_secret_value() else "" for name in SECRETS}
        values["vrrp"]["auth_pass"] = "(set)" if self.vrrp.auth_pass else ""
        return values

    @property
    def opens_root(self) -> bool:
        """Whether the image has a root password, which makes its files their owner's alone."""
        return any(getattr(self, name).get_secret_value() for name in SECRETS)

    @property
    def convert(self) -> Options:
        """How formats are written."""
        return Options(qcow2=self.qcow2, ovf=self.ovf)

    @property
    def kernel(self) -> str:
        """Name of the kernel package for this suite and arch."""
        return KERNELS[(self.suite, self.arch)]

    @property
    def boots_under(self) -> tuple[str, ...]:
        """Firmware that the disk boots under."""
        return self.firmware or (("bios", "uefi") if self.arch == "amd64" else ("bios",))

    @property
    def boot_packages(self) -> tuple[str, ...]:
        """What the disk step takes from the tree: ext4 tools, GRUB's BIOS files, systemd's stub for UEFI."""
        return ("e2fsprogs", *(BOOT_PACKAGES[firmware] for firmware in self.boots_under))

    @property
    def package_list(self) -> tuple[str, ...]:
        """Every package asked for by name: the table's rows, kernel, boot and JRE, without repeats."""
        rows = (*self.packages.get("all", ()), *self.packages.get(self.suite, ()))
        asked = (*rows, self.kernel, *self.boot_packages)
        return tuple(dict.fromkeys((*asked, self.jre) if self.jre else asked))


def kinds_by_key() -> dict[str, Any]:
    """Type of every setting, those in tables as `table.key`."""
    kinds: dict[str, Any] = {}
    for name, told in Settings.model_fields.items():
        if _is_table(told.annotation):
            inner = told.annotation.model_fields.items()
            kinds |= {f"{name}.{key}": each.annotation for key, each in inner}
        else:
            kinds[name] = told.annotation
    return kinds


@dataclass(frozen=True)
class Loaded:
    """Settings with the origin of every key, and what the image definition brings along."""

    settings: Settings
    origins: Mapping[str, str]
    definition: Path
    overlays: tuple[Path, ...] = field(default_factory=tuple)


def load(
    definition: Path,
    environ: Mapping[str, str],
    dotenv: Path | None = None,
    overrides: Iterable[str] = (),
    password: str | None = None,
) -> Loaded:
    """Merge all sources into settings; raises BuildError that names key, file, line and nearest key.

    `origins` has a row for every key, and one for every `table.key` that was given.
    """
    given = [
        *map(_no_secret, sources.from_definition(definition)),
        *(sources.from_dotenv(dotenv) if dotenv else ()),
        *sources.from_environment(environ),
        *map(_no_secret, sources.from_flags(overrides)),
    ]
    if password is not None:
        given.append(Given(("password",), password, "--ask-password"))
    values: dict[str, Any] = {}
    origins: dict[str, str] = dict.fromkeys(Settings.model_fields, "default")
    for leaf in (leaf for one in given for leaf in _leaves(one)):
        _put(values, leaf.path, leaf.value)
        key = ".".join(leaf.path)
        origins = {name: origin for name, origin in origins.items() if not name.startswith(f"{key}.")}
        origins[leaf.path[0]] = origins[key] = leaf.origin
        origins |= {f"{key}.{number}": origin for number, origin in enumerate(leaf.items)}
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    values = references.fill_in(values, defaults, origins)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origins) from None
    overlays = tuple(definition.parent / folder for folder in settings.rootfs)
    for folder in overlays:
        if not folder.is_dir():
            what = f"{origins['rootfs']}: no overlay folder {sources.short(folder)}"
            raise BuildError(what, "create it or take it out of rootfs")
    return Loaded(settings, origins, definition, overlays)


def _no_secret(given: Given) -> Given:
    """Refuse a secret where other people would read it: in a committed file, in a list of processes."""
    if given.path[0] in SECRETS:
        name = f"{sources.PREFIX}{given.path[0].upper()}"
        raise BuildError(
            f"{given.origin}: a {given.path[0].replace('_', ' ')} is not allowed here",
            f"put {name} into the environment or .env, or use --ask-password",
        )
    return given


def _leaves(given: Given) -> Iterator[Given]:
    """Read a value by its key's type; a table is taken apart, so that it adds to what is known of it."""
    path = _path(given)
    kind = _type_of(path, given.origin)
    value = _read(kind, given)
    if _is_table(kind) and isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(Given((*path, str(key)), inner, given.origin, is_text=False))
    else:
        yield Given(path, value, given.origin, is_text=False, items=given.items)


def _path(given: Given) -> tuple[str, ...]:
    """Split the name of a variable such as VRRP_ADVERT_INT, which has no dots, at its table."""
    (first, *rest), fields = given.path, Settings.model_fields
    if first in fields or rest:
        return given.path
    tables = (name for name, field in fields.items() if _is_table(field.annotation))
    table = next((name for name in tables if first.startswith(f"{name}_")), None)
    return (table, first.removeprefix(f"{table}_")) if table else given.path


def _is_table(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _type_of(path: tuple[str, ...], origin: str) -> Any:
    """Find the type of a key; raises BuildError for an unknown one."""
    kind: Any = Settings
    for depth, part in enumerate(path):
        if _is_table(kind):
            if part not in kind.model_fields:
                what = f"{origin}: unknown key {'.'.join(path[: depth + 1])!r}"
                raise BuildError(what, sources.nearest(part, kind.model_fields))
            kind = kind.model_fields[part].annotation
        elif get_origin(kind) is Mapping:
            kind = get_args(kind)[1]
        else:
            above = ".".join(path[:depth])
            raise BuildError(f"{origin}: {above!r} holds one value, no keys", f"write it without {part!r}")
    return kind


def _read(kind: Any, given: Given) -> Any:
    """Read text by the type of its key: lists with commas or as YAML, tables as YAML, numbers in decimal."""
    text = given.value
    if not given.is_text:
        return given.written if kind is str and isinstance(text, int | float) else text
    if get_origin(kind) is tuple and not text.lstrip().startswith("["):
        return [part for part in re.split(r"[\s,]+", text) if part]
    if get_origin(kind) in (tuple, Mapping) or _is_table(kind):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise BuildError(f"{given.origin}: not YAML", "write {key: value} or [value, value]") from None
    return int(text) if kind is int and re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, dict) else {}
        values = values[part]
    values[path[-1]] = value


PLAIN: Mapping[str, str] = {
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "dict_type": "write keys with their values",
    "greater_than_equal": "use {ge} or more",
    "int_from_float": "write a whole number",
    "int_parsing": "write a whole number",
    "int_type": "write a whole number",
    "less_than_equal": "use {le} or less",
    "literal_error": "use {expected}",
    "mapping_type": "write keys with their values",
    "model_type": "write keys with their values",
    "string_type": "write a text",
    "tuple_type": "write a list, such as [a, b]",
}
"""What we say for a kind of pydantic's errors."""


def _explain(error: ValidationError, origins: Mapping[str, str]) -> BuildError:
    """Say where, which key, what is wrong with it, and what it was; a secret's value is never shown."""
    lines, hints = [], []
    for problem in error.errors(include_url=False):
        if isinstance(nearly := problem.get("ctx", {}).get("error"), NearlyRight):
            hints.append(nearly.hint)
        path = [str(part) for part in problem["loc"]]
        prefixes = (".".join(path[:count]) for count in range(len(path), 0, -1))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in PLAIN:
            message = PLAIN[problem["type"]].format_map(problem.get("ctx", {}))
        where = next((origins[prefix] for prefix in prefixes if prefix in origins), "")
        got = problem["input"]
        plain = isinstance(got, str | int | float) and not {*SECRETS, "auth_pass"} & {*path}
        shown = f" (got {got!r})" if plain and repr(got) not in message and len(repr(got)) < 60 else ""
        key = ".".join(part for part in path if not part.isdigit())
        where = where or _origins(problem.get("ctx", {}).get("error"), origins)
        parts = (where, "" if where.endswith(key) else key, message + shown)
        lines.append(": ".join(part for part in parts if part))
    hint = "; ".join(hints) or "correct it; .env.example tells every key and its meaning"
    return BuildError("\n       ".join(lines), hint)


def _origins(error: object, origins: Mapping[str, str]) -> str:
    """Say where the keys of a conflict were set."""
    keys = error.keys if isinstance(error, Conflict) else ()
    return ", ".join(dict.fromkeys(origins[key] for key in keys if origins[key] != "default"))
