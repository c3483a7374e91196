"""The power of a build host is cut at any moment: what is there afterwards is right, or is not used."""

from __future__ import annotations

import filecmp
import json
import random
import shutil
import subprocess
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.guest import qemu
from build.agent.process import environment
from build.engine import plan, script
from build.engine.hosts.host import SHIPPED
from build.engine.plan import Step
from tests.agent import CHECKOUT, layer_request, place
from tests.boot.guest import SMALL, converse, output, put
from tests.boot.write_log import PIECE, cut, epochs, lay, replay
from tests.images import Built
from tests.root.test_layers import BASE, EDIT

pytestmark = pytest.mark.boot

MIB = 1 << 20
DISK = 96 * MIB
CUTS = 24
HOUR = 3600.0
"""Seconds for all of it on a busy machine."""
VARIANTS = ("this", "that")
PROGRAM = ("tests/__init__.py", "tests/boot/__init__.py", "tests/boot/power_guest.py")
HERE = "/run/power"
"""Where the guest has all that is no part of the disk."""
LOCATION = "/run/power/disk/location"
IMAGE = f"{LOCATION}/x.img"
BOOT_ID = "/proc/sys/kernel/random/boot_id"

ASSEMBLE = """
cd "$ROOT"
find . -type f | LC_ALL=C sort | tr '\\n' '\\0' | xargs -0 cat >"$OUT"
truncate --size=4M "$OUT"
printf '{"sha256": "%s"}' "$(sha256sum <"$OUT" | cut -d ' ' -f 1)" >"$OUT.json"
"""
"""A disk of the tree's files one after the other: how it is laid out is nothing to a power cut."""

LOOSELY = "commit=1,data=writeback,nodelalloc"
"""Mount options by which ext4 promises no more than POSIX does: names and sizes may come before content."""

LATE = '#!/bin/sh\nsleep 5\nexec /usr/bin/sync "$@"\n'
"""As on a busy host: layers have their names for a while before they are on the disk."""

FORMATS = [{"name": "vhdx", "file": "x.vhdx"}, {"name": "vhd", "file": "x.vhd.bz2", "compress": "bz2"}]


def many(says: str) -> Step:
    """A step that makes a thousand small files, and a few large ones."""
    return Step(
        "many",
        f"""
mkdir "$ROOT/many"
for n in $(seq 1000); do echo "{says} $n" >"$ROOT/many/$n"; done
for n in 1 2 3; do seq -f "{says} $n %.0f" 40000 >"$ROOT/large$n"; done
""",
    )


def variant(where: dict[str, Any], says: str) -> list[dict[str, Any]]:
    """Requests that make a tree, a disk of it, and artifacts of that."""
    layers = plan.layers([BASE, many(says), EDIT])
    chain = [layer.key for layer in layers]
    about = {"place": where, "image": IMAGE, "epoch": 1_700_000_000}
    return [
        {
            "verb": "cached",
            "place": where,
            "keys": chain,
            "use": True,
            "image": IMAGE,
            "disk": f"disk-{says}",
        },
        *({"verb": "layer", **wire.dump(layer_request(where, layer))} for layer in layers),
        {
            **{"verb": "disk", **about, "key": f"disk-{says}", "seed": "00", "chain": chain},
            **{"script": script.render(ASSEMBLE), "files": {}, "manifest": {}},
        },
        {
            **{"verb": "convert", "image": IMAGE, "outdir": f"{LOCATION}/out", "formats": FORMATS},
            **{"identity": "x", "epoch": 1_700_000_000, "location": LOCATION},
        },
    ]


def work() -> dict[str, Any]:
    """Two variants that replace one another, and one of them made again after it was removed."""
    # Copies, since the end of an overlay mount brings all of its upper file system to the disk by itself.
    where = place(Path(LOCATION), overlay=False, mountpoint="/mnt/tree")
    chains = {says: variant(where, says) for says in VARIANTS}
    keep = [request["key"] for request in chains["that"] if request["verb"] == "layer"]
    clean = {"verb": "clean", "place": where, "image": IMAGE}
    drop = {**clean, "what": "cache", "reach": keep}
    return {
        **{"place": where, "image": IMAGE, "outdir": f"{LOCATION}/out", "chains": chains},
        "order": ["this", "that", drop, "this", "this"],
        "audit": {"verb": "audit", "place": where},
        "tidy": {**clean, "what": "parts"},
    }


def fresh(disk: Path, stage: Path) -> None:
    """A disk with a small journal, and on it the programs, for the guest to take them off."""
    for name in (*SHIPPED, *PROGRAM):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copyfile
        copy(CHECKOUT / name, stage / name)
    (stage / "location").mkdir()
    with disk.open("xb") as file:
        file.truncate(DISK)
    lazy = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run(
        ["mkfs.ext4", "-q", "-b", str(PIECE), "-J", "size=4", "-E", lazy, "-d", stage, disk],
        check=True,
        env=environment(),
    )


async def plug(guest: qemu.Guest, name: str, **node: Any) -> None:
    """Plug a disk into a guest, with a cache that is volatile as a disk's is."""
    await guest.command("blockdev-add", **{"node-name": name, **node})
    device = {"driver": "virtio-blk-pci", "drive": name, "id": name, "serial": name, "write-cache": "on"}
    await guest.command("device_add", **device)
    await quietly(guest, f"until [ -e {by_id(name)} ]; do sleep 0.1; done")


async def quietly(guest: qemu.Guest, command: str) -> None:
    """Run a shell command in the guest that has nothing to say."""
    assert await output(guest, command) == ""


def by_id(name: str) -> str:
    """A plugged disk's name in the guest."""
    return f"/dev/disk/by-id/virtio-{name}"


def file_node(path: Path) -> dict[str, Any]:
    """A file of ours; nothing is lost of it when a guest ends."""
    return {"driver": "file", "filename": str(path), "cache": {"no-flush": True}}


async def told(guest: qemu.Guest, command: str) -> Any:
    """Run the program in the guest and read what it prints."""
    said = await output(guest, f"cd {HERE} && python3 -B -m tests.boot.power_guest {command}")
    try:
        return json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        raise AssertionError(said) from None


@pytest.mark.soak(600)
def test_what_a_power_cut_leaves_is_right_or_is_not_used(system: Built, seed: int, tmp_path: Path) -> None:
    """The writes of a disk are replayed up to moments of a build, and some after the last flush are lost."""
    dice = random.Random(seed)
    first, disk, log, cuts = (tmp_path / name for name in ("first", "disk", "log", "cuts"))
    fresh(first, tmp_path / "stage")
    for copy in (disk, cuts):
        lay(first, copy, 0)
    log.touch()

    async def build(guest: qemu.Guest) -> None:
        await plug(guest, "recorded", driver="blklogwrites", file=file_node(disk), log=file_node(log))
        await quietly(guest, f"mkdir -p {HERE}/disk")
        await quietly(guest, f"mount -o {LOOSELY} {by_id('recorded')} {HERE}/disk")
        await quietly(guest, f"cp -r {HERE}/disk/build {HERE}/disk/tests {HERE}")
        await put(guest, f"{HERE}/work", json.dumps(work()).encode())
        await put(guest, "/usr/local/bin/sync", LATE.encode())
        await quietly(guest, "chmod 755 /usr/local/bin/sync")
        wanted = await told(guest, "record work")
        await quietly(guest, "rm /usr/local/bin/sync")
        await put(guest, f"{HERE}/wanted", json.dumps(wanted).encode())
        await quietly(guest, f"umount {HERE}/disk")

    async def judge(guest: qemu.Guest) -> list[dict[str, list[str]]]:
        await plug(guest, "cuts", driver="raw", file=file_node(cuts))
        # To the agent the machine was started again since.
        await quietly(guest, f"echo later >{HERE}/boot; mount --bind {HERE}/boot {BOOT_ID}")
        found = []
        for number in range(CUTS):
            window = f"loop,offset={number * DISK},sizelimit={DISK}"
            await quietly(guest, f"mount -o {window} {by_id('cuts')} {HERE}/disk")
            found.append(await told(guest, f"judge work wanted {dice.choice(VARIANTS)}"))
            # Who brings layers to the disk was killed with the agent, and goes when its sync has ended.
            await quietly(guest, f"until umount -q {HERE}/disk 2>/dev/null; do sleep 0.1; done")
        return found

    async def conversation(guest: qemu.Guest) -> list[dict[str, list[str]]]:
        await build(guest)
        written = epochs(log)
        replay(log, chain(*written), cuts)
        assert filecmp.cmp(cuts, disk, shallow=False), "the log is not all that was written"
        cuts.unlink()
        for number in range(CUTS):
            # Most of them where much is written: layers on their way to the disk.
            sizes = [sum(write.length for write in epoch) for epoch in written]
            weights = sizes if number % 4 else [1] * len(written)
            (moment,) = dice.choices(range(len(written)), weights)
            lay(first, cuts, number * DISK)
            replay(log, chain(*written[:moment], cut(written[moment], dice)), cuts, number * DISK)
        return await judge(guest)

    machine = replace(SMALL, memory=512)
    found = converse(system.image, tmp_path, conversation, machine, limit=HOUR)
    assert {number: one["faults"] for number, one in enumerate(found) if one["faults"]} == {}
    # Cuts that leave nothing to use, or everything, would prove nothing.
    assert len({len(one["used"]) for one in found}) > 2
