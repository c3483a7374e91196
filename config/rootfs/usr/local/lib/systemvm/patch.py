"""Scripts that a management server brought: on a CD-ROM (up to 4.17) or copied over SSH (later)."""

from __future__ import annotations

import hashlib

from systemvm.machine import Machine
from systemvm.setup import KEYS

SIGNATURE = "/var/cache/cloud/cloud-scripts-signature"
REQUIRED = "/var/cache/cloud/patch.required"
COPIED = "/var/cache/cloud/cloud-scripts.tgz"
ARCHIVE = "cloud-scripts.tgz"
MOUNT = "/media/cdrom"
DEVICES = ("/dev/xvdd", "/dev/cdrom", "/dev/cdrom1", "/dev/cdrom2", "/dev/cdrom3", "/dev/sr0")


def checksums(data: bytes) -> tuple[str, str]:
    """What the signature may be: SHA-512 of today, MD5 of older management servers."""
    return hashlib.sha512(data).hexdigest(), hashlib.md5(data, usedforsecurity=False).hexdigest()


def apply(machine: Machine) -> bool:
    """Unpack an archive that is not the one in place; says whether scripts changed."""
    changed = unpack(machine, COPIED)
    device = next((name for name in DEVICES if machine.path(name).exists()), None)
    if device is None:
        return changed
    machine.path(MOUNT).mkdir(parents=True, exist_ok=True)
    if not machine.run("mount", "-o", "ro", device, MOUNT, quiet=True).ok:
        machine.log(f"no medium in {device}")
        return changed
    try:
        changed = unpack(machine, f"{MOUNT}/{ARCHIVE}") or changed
        keys = machine.read_bytes("/var/cache/cloud/authorized_keys") or machine.read_bytes(
            f"{MOUNT}/authorized_keys"
        )
        if keys:
            machine.write(KEYS, keys, 0o600)
        if changed and machine.path(f"{MOUNT}/agent.zip").exists():
            _agent(machine)
    finally:
        machine.run("umount", MOUNT)
    return changed


def unpack(machine: Machine, name: str) -> bool:
    """Unpack one archive at /, unless its checksum is the signature in place."""
    data = machine.read_bytes(name, limit=1 << 30)
    if not data:
        return False
    known = machine.read(SIGNATURE).strip()
    current = checksums(data)
    if known in current:
        return False
    if not machine.run("tar", "-xzf", name, "-C", "/", "--no-same-owner", seconds=300).ok:
        machine.log(f"{name} does not unpack; the image's own scripts stay")
        return False
    # In the form of the one in place: whoever wrote that one compares with it.
    machine.write(SIGNATURE, (current[1] if len(known) == len(current[1]) else current[0]) + "\n")
    machine.write(REQUIRED, "")
    machine.run("systemctl", "daemon-reload")
    machine.log(f"unpacked {name}")
    return True


def _agent(machine: Machine) -> None:
    """The Java agent of console proxy and secondary storage VM; its own keys survive."""
    home = "/usr/local/cloud/systemvm"
    machine.path(home).mkdir(parents=True, exist_ok=True)
    keep = ("-x", "conf/*") if machine.path(f"{home}/conf/cloud.jks").exists() else ()
    machine.run("unzip", "-q", "-o", f"{MOUNT}/agent.zip", "-d", home, *keep, seconds=300)
    for script in machine.path(home).glob("*.sh"):
        script.chmod(0o555)
