"""Tweak: lay the overlay over the tree and say what this machine is: name, file systems, locale, services."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from build.engine import overlay
from build.engine.overlay import Entry, text
from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Services, Settings
from build.engine.shell import words

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
        tool = Path(__file__).parent / "tools" / "archive.py"
        files |= {
            "archive.py": File(tool.read_bytes()),
            "archive.json": File(json.dumps(archived, indent=1).encode()),
        }
    parts = [
        overlay.LAY,
        LOCALE if "etc/locale.gen" in brought else "",
        _accounts(brought),
        _services(settings.services),
        _archive() if archived else "",
    ]
    return Step("tweak", "\n".join(part for part in parts if part), files)


def _identity(settings: Settings, packages: set[str], epoch: int) -> dict[str, Entry]:
    """What every image says about itself; an overlay may say it differently."""
    short = settings.hostname.split(".")[0]
    names = " ".join(dict.fromkeys((settings.hostname, short)))
    entries = {
        "etc/hostname": text(f"{settings.hostname}\n"),
        "etc/hosts": text(
            f"127.0.0.1\tlocalhost\n127.0.1.1\t{names}\n\n"
            "::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
        ),
        "etc/fstab": text(
            f"LABEL={ROOT_LABEL}\t/\text4\terrors=remount-ro\t0\t1\n"
            # A tenth of the memory, the default, is too little for a router with 256 MiB.
            "tmpfs\t/run\ttmpfs\tnodev,nosuid,size=20%,mode=755\t0\t0\n"
        ),
        LOCALE_FILE[settings.suite]: text(f"LANG={'en_US' if 'locales' in packages else 'C'}.UTF-8\n"),
        "etc/timezone": text("Etc/UTC\n"),
    }
    if settings.cloudstack_release:
        # A management server knows its template by this line; the date is that of the package set.
        date = time.strftime("%a %b %e %H:%M:%S UTC %Y", time.gmtime(epoch))
        entries["etc/cloudstack-release"] = text(f"Cloudstack Release {settings.cloudstack_release} {date}\n")
    if "tzdata" in packages:
        entries["etc/localtime"] = Entry(link="/usr/share/zoneinfo/Etc/UTC")
    return entries


LOCALE = """\
in_tree locale-gen --keep-existing
[ -s "$ROOT/usr/lib/locale/locale-archive" ]
"""


def _accounts(brought: Iterable[str]) -> str:
    """Make now what the overlay's sysusers.d and tmpfiles.d declare: it is there before the first boot."""
    tools = {"usr/lib/sysusers.d": "systemd-sysusers", "usr/lib/tmpfiles.d": "systemd-tmpfiles --create"}
    files = {tool: overlay.below(brought, folder, ".conf") for folder, tool in tools.items()}
    return "".join(
        f"in_tree {tool} {words(f'/{path}' for path in paths)}\n" for tool, paths in files.items() if paths
    )


def _services(services: Services) -> str:
    """Switch units; one that is not in the image is an error, not a silent nothing."""
    verbs = {"enable": services.enable, "disable": services.disable, "mask": services.mask}
    asked = [_unit(name) for names in verbs.values() for name in names]
    if not asked:
        return ""
    check = f"""\
present() {{
    local file
    for file; do
        if [ -e "$ROOT/$file" ] || [ -L "$ROOT/$file" ]; then return 0; fi
    done
    return 1
}}
for unit in {words(asked)}; do
    vendor="usr/lib/systemd/system"
    present "etc/systemd/system/$unit" "$vendor/$unit" "$vendor/${{unit/@*./@.}}" "etc/init.d/${{unit%.*}}" ||
        fail "services: the image has no unit $unit" "take it out of services, or add its package"
done
"""
    switch = [
        f"in_tree systemctl --quiet {verb} {words(map(_unit, names))}\n"
        for verb, names in verbs.items()
        if names
    ]
    return check + "".join(switch)


def _unit(name: str) -> str:
    return name if "." in name else f"{name}.service"


def _archive() -> str:
    """The scripts as an archive to be unpacked at /, as a management server would send it, and its checksum.

    The tree's own gzip packs it, so that the bytes depend on the suite and not on this machine's zlib.
    """
    name = ARCHIVE.replace(".tgz", ".tar")
    return f"""\
"$PYTHON" -I "$FILES/archive.py" "$ROOT" "$FILES/archive.json" {name}
in_tree gzip -9 --no-name /{name}
mv "$ROOT/{name}.gz" "$ROOT/{ARCHIVE}"
sha512sum "$ROOT/{ARCHIVE}" | cut -d ' ' -f 1 >"$ROOT/{SIGNATURE}"
"""
