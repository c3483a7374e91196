"""Lay the overlay over the tree and say what this machine is: name, file systems, locale, services."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from build.engine import overlay, script
from build.engine.overlay import Entry, text_file
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings

MODES = {
    "etc/sudoers.d/*": 0o440,
    "etc/ipsec.secrets": 0o600,
    "etc/ppp/*-secrets": 0o600,
    "root/.ssh/*": 0o600,
    "etc/wireguard/*": 0o600,
}
"""Overlay files whose mode is neither 0644 nor 0755, by shell pattern."""

ROOT_LABEL = "ROOT"
"""Label of the root file system; the disk step writes it."""

LOCALE_FILE = {"bookworm": "etc/default/locale", "trixie": "etc/locale.conf"}
"""Where the suite's systemd and PAM read LANG (on trixie /etc/default/locale is a link to locale.conf)."""

ARCHIVE = "usr/share/cloud/cloud-scripts.tgz"
SIGNATURE = "var/cache/cloud/cloud-scripts-signature"


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Plan the tweak layer."""
    settings = loaded.settings
    packages = {package.name for package in resolution.packages} | set(settings.package_list)
    brought: dict[str, Entry] = {}
    for folder in loaded.overlays:
        brought |= overlay.read(folder, MODES)
    entries = {**_identity(settings, packages, resolution.epoch), **brought}
    archived = sorted(brought) if any(path.startswith("opt/cloud/") for path in brought) else []
    files = overlay.step_files(entries)
    if archived:
        files |= script.programs(__file__)
        files["archive.json"] = File(json.dumps(archived, indent=1).encode())
    services = settings.services
    text = script.of(
        __file__,
        locales="etc/locale.gen" in brought,
        sysusers=_declared(brought, "usr/lib/sysusers.d"),
        tmpfiles=_declared(brought, "usr/lib/tmpfiles.d"),
        enable=map(_unit, services.enable),
        disable=map(_unit, services.disable),
        mask=map(_unit, services.mask),
        archive=ARCHIVE if archived else "",
        signature=SIGNATURE,
    )
    return Step("tweak", text, files)


def _identity(settings: Settings, packages: set[str], epoch: int) -> dict[str, Entry]:
    """What every image says about itself; an overlay may say it differently."""
    short = settings.hostname.split(".")[0]
    names = " ".join(dict.fromkeys((settings.hostname, short)))
    entries = {
        "etc/hostname": text_file(f"{settings.hostname}\n"),
        "etc/hosts": text_file(
            f"127.0.0.1\tlocalhost\n127.0.1.1\t{names}\n\n"
            "::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
        ),
        "etc/fstab": text_file(
            f"LABEL={ROOT_LABEL}\t/\text4\terrors=remount-ro\t0\t1\n"
            # A tenth of the memory, the default, is too little for a router with 256 MiB.
            "tmpfs\t/run\ttmpfs\tnodev,nosuid,size=20%,mode=755\t0\t0\n"
        ),
        LOCALE_FILE[settings.suite]: text_file(f"LANG={'en_US' if 'locales' in packages else 'C'}.UTF-8\n"),
        "etc/timezone": text_file("Etc/UTC\n"),
    }
    if settings.cloudstack_release:
        # A management server knows its template by this line; the date is that of the package set.
        date = time.strftime("%a %b %e %H:%M:%S UTC %Y", time.gmtime(epoch))
        release = f"Cloudstack Release {settings.cloudstack_release} {date}\n"
        entries["etc/cloudstack-release"] = text_file(release)
    if "tzdata" in packages:
        entries["etc/localtime"] = Entry(link="/usr/share/zoneinfo/Etc/UTC")
    return entries


def _declared(brought: Iterable[str], folder: str) -> list[str]:
    """Paths in the image of what the overlay declares in a folder: it is made now, not at the first boot."""
    return [f"/{path}" for path in overlay.below(brought, folder, ".conf")]


def _unit(name: str) -> str:
    return name if "." in name else f"{name}.service"
