"""Install the packages into the lowest layer: a Debian system of exactly the resolved set.

The base system is unpacked first; while dpkg configures it, the other packages are unpacked in parallel, and
dpkg then configures them in one go. A few large ones that nothing needs are unpacked beside that, and are
configured last; what scripts ask for again and again is done beside it, too. mmdebstrap or debootstrap can
make the base instead: then the scripts do all their work themselves, and the tree is the same. A base that
ours refuses is made by mmdebstrap; a set that the parallel way refuses is installed by apt.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

from build import debian
from build.engine import script
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
HELPERS = ("chroot", "later", "warm")
"""Programs that stand in for one of the host or of the tree."""
REFUSED = 10
"""What unpack.py ends with when it leaves a set to dpkg."""
LINKS = {"amd64": "bin sbin lib lib64", "i386": "bin sbin lib"}
"""What a merged /usr makes links of."""
LATE = ("linux-image-*", "default-jre-headless", "openjdk-*-jre-headless", "containerd", "runc")
"""Large packages that are unpacked while dpkg configures all others, where none of these needs them."""
DEFERRED = ("py3compile", "depmod", "systemd-hwdb")
"""Programs that scripts of packages call for something that no other package's script reads."""
WARMED = ("deb-systemd-helper", "addgroup", "adduser", "a2enconf", "a2enmod", "update-rc.d")
"""Programs in Perl that scripts of packages call again and again."""
MODULES = (
    *("Cwd", "Data::Dumper", "File::Basename", "File::Path", "File::Spec", "File::Temp", "Getopt::Long"),
    *("I18N::Langinfo", "POSIX"),
    *("Debconf::AutoSelect", "Debconf::ConfModule", "Debconf::Db", "Debconf::DbDriver::Cache"),
    *("Debconf::DbDriver::File", "Debconf::DbDriver::Stack", "Debconf::Format::822"),
    *("Debconf::FrontEnd::Noninteractive", "Debconf::Log", "Debconf::Template"),
)
"""What they and debconf's frontend load; one that is missing is left to them."""
ANSWERS = (
    # The package would save the build host's firewall rules into the image.
    "iptables-persistent iptables-persistent/autosave_v4 boolean false",
    "iptables-persistent iptables-persistent/autosave_v6 boolean false",
    "sysstat sysstat/enable boolean true",
    "strongswan-starter strongswan/install_x509_certificate boolean false",
    "libc6 libraries/restart-without-asking boolean false",
    "locales locales/locales_to_be_generated multiselect en_US.UTF-8 UTF-8",
    "locales locales/default_environment_locale select en_US.UTF-8",
    # The disk gets its boot code when it is assembled, never while a package is configured.
    "grub-pc grub-pc/install_devices_empty boolean true",
    "grub-pc grub-pc/install_devices multiselect",
)
"""Answers to the questions of packages, as debconf-set-selections(1) reads them."""


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Describe the bootstrap of the resolved set; the packages themselves lie in `$DEBS`."""
    settings = loaded.settings
    files = {
        **script.programs(__file__, "nosync.py"),
        **{name: File(Path(__file__).with_name(name).read_bytes(), 0o755) for name in HELPERS},
        "lock": File(resolution.lock().encode()),
        "set.json": File(_set(settings, resolution).encode()),
        "answers": File("".join(f"{line}\n" for line in ANSWERS).encode()),
        "debian.sources": File(sources(settings, resolution).encode()),
    }
    rest = [package for package in resolution.packages if not package.essential]
    text = script.of(
        __file__,
        suite=settings.suite,
        arch=settings.arch,
        tool=settings.bootstrap,
        archs=debian.architectures(settings.arch, settings.package_list),
        exactly=[f"{package.name}:{_native(package.arch, settings)}={package.version}" for package in rest],
        links=LINKS[settings.arch],
        deferred=DEFERRED,
        warmed=WARMED,
        modules=MODULES,
        total=len(rest),
        refused=REFUSED,
    )
    return Step("debootstrap", text, files, bootstrap=True)


def _native(arch: str, settings: Settings) -> str:
    return settings.arch if arch == "all" else arch


def _set(settings: Settings, resolution: Resolution) -> str:
    packages = [
        {
            "name": package.name,
            "version": package.version,
            "arch": package.arch,
            "file": package.filename,
            "size": package.size,
            "sha256": package.sha256,
            "base": package.essential,
            "late": not package.essential and any(fnmatchcase(package.name, name) for name in LATE),
        }
        for package in resolution.packages
    ]
    told = {
        "suite": settings.suite,
        "archs": debian.architectures(settings.arch, settings.package_list),
        "asked": sorted(settings.package_list),
        "packages": packages,
    }
    return json.dumps(told, indent=1, sort_keys=True)


def sources(settings: Settings, resolution: Resolution) -> str:
    """The image's own sources list: never the build's proxy, nor a mirror given for the build only."""
    mirror = settings.image_mirror or resolution.default_mirror
    parts = [("", mirror, f"{settings.suite} {settings.suite}-updates")]
    if settings.security:
        parts.append(("\n", security_sibling(mirror), f"{settings.suite}-security"))
    return "".join(
        f"{gap}Types: deb\nURIs: {uri}\nSuites: {suites}\n"
        f"Components: {' '.join(settings.components)}\nSigned-By: {KEYRING}\n"
        for gap, uri, suites in parts
    )


def security_sibling(mirror: str) -> str:
    """Where a mirror keeps its security suites: .../debian-security beside .../debian."""
    return f"{mirror}-security" if mirror.endswith("/debian") else f"{mirror}/debian-security"
