"""Boot an image and ask the system inside how it is doing. The image is never written to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shlex
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build import wire
from build.agent import memory
from build.agent.events import Emit, Failure
from build.agent.guest import kvm, last_words, qemu
from build.agent.guest.media import Media, opened

LIMITS = {"kvm": 120.0, "tcg": 1200.0}
"""Seconds for one guest from start to end. An emulated full image needs some 60 on two idle cores, and
needed 340 where six other processes wanted them too."""

PHASES = {
    "firmware": 0,
    "kernel": 12,
    "init": 25,
    "guest agent": 70,
    "answers": 75,
    "power off": 95,
    "off": 100,
}
"""Where a boot stands, in percent of its time as measured on a full image."""

SIGNS = {
    "kernel": re.compile(r"\bLinux version \d"),
    "init": re.compile(r"\bsystemd\[1\]: "),
}
"""What shows on the serial line that a phase was reached."""

QUESTIONS = {
    "system": "systemctl is-system-running --wait",
    "failed": (
        "systemctl list-units --failed --plain --no-legend --no-pager | while read -r unit rest; do "
        'echo "$unit"; journalctl --unit "$unit" --lines 5 --output cat --no-pager | sed "s/^/  /"; done'
    ),
    "killed": "journalctl --dmesg --output cat --no-pager | grep 'Out of memory: Killed process' || true",
    "firmware": "[ -d /sys/firmware/efi ] && echo uefi || echo bios",
    "mounts": "findmnt --json --list --bytes --real --output TARGET,SOURCE,FSTYPE,OPTIONS,SIZE",
    "disk": 'echo "$(cat "$disk/size") $(cat "$part/start") $(cat "$part/size")"',
    "superblock": 'dd "if=/dev/${part##*/}" bs=1024 skip=1 count=1 status=none',
    "gpt": (
        'dd "if=/dev/${disk##*/}" bs=512 skip=1 count=1 status=none; '
        'dd "if=/dev/${disk##*/}" bs=512 skip=$(($(cat "$disk/size") - 33)) count=33 status=none'
    ),
    "drivers": (
        'at=$(readlink -f "$disk/device"); while [ "$at" != /sys/devices ]; do '
        '[ ! -e "$at/driver" ] || basename "$(readlink "$at/driver")"; at=${at%/*}; done'
    ),
    "cards": (
        'for driver in /sys/class/net/*/device/driver; do [ ! -e "$driver" ] || '
        'basename "$(readlink -f "$driver")"; done'
    ),
    "kernel": "uname -r; uname -m",
    "cmdline": "cat /proc/cmdline",
    "release": "cat /etc/cloudstack-release",
    "listening": (
        "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null; for pid in $(pidof sshd); do ls -l /proc/$pid/fd; done"
    ),
    "memory": "cat /proc/meminfo",
    "times": "systemctl show --property FinishTimestampMonotonic --value",
}
"""What the guest is asked, one shell command each; `$disk` and `$part` are root's in /sys."""

_PROLOGUE = """
part=$(readlink -f "/sys/dev/block/$(mountpoint -d /)")
if [ -e "$part/partition" ]; then disk=${part%/*}; else disk=$part; fi
export part disk
answer() { printf '%s ' "$1"; { sh -c "$2" 2>&1; printf '\\n%s' $?; } | base64 -w0; echo; }
"""

ATTEMPTS = 3
"""How often the guest is asked when its agent is restarted in the midst."""

SLACK = 4 << 20
"""Bytes that may lie behind the root file system: alignment, and a last block group too small to be used."""


@dataclass(frozen=True)
class Answer:
    """What a command in the guest printed, and its exit status."""

    output: bytes
    status: int

    @property
    def text(self) -> str:
        """The output as text."""
        return self.output.decode(errors="replace").strip()


Check = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One guest to boot."""

    name: str
    kind: str
    model: qemu.Machine
    media: Media
    size: int
    """Bytes of disk that the guest sees."""

    @property
    def label(self) -> str:
        """What tells it from the others."""
        return f"{self.name}-{self.model.firmware}"


def run(request: wire.Verify, emit: Emit) -> dict[str, Any]:
    """Boot every asked guest, side by side where cores and memory allow it."""
    qemu.need(qemu.PROGRAM, "qemu-img")
    accel = request.accel or kvm.accelerator()
    # All are known to be possible before the first one starts.
    models = [
        qemu.machine(
            {"arch": request.arch, "memory": request.memory, "machine": wire.dump(asked)},
            asked.firmware,
            accel,
        )
        for asked in request.guests
    ]
    Path(request.work).mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        shelf: dict[tuple[str, str], Media] = {}
        jobs = []
        for asked, model in zip(request.guests, models, strict=True):
            kind = asked.format
            image = str(Path(asked.image).absolute())
            if (image, kind) not in shelf:
                shelf[image, kind] = stack.enter_context(opened(image, kind, Path(request.work), emit))
            media = shelf[image, kind]
            jobs.append(Job(asked.name or kind, kind, model, media, _size(media, request)))
        return {"guests": asyncio.run(_all(request, jobs, emit))}


def _size(media: Media, request: wire.Verify) -> int:
    size = media.size()
    grown = request.grow_to << 20 if request.grow_to else size
    if grown < size:
        raise Failure(
            f"grow_to {grown >> 20} MiB is less than the image's {size >> 20} MiB",
            "give more, or leave it out",
        )
    return grown


async def _all(request: wire.Verify, jobs: list[Job], emit: Emit) -> list[dict[str, Any]]:
    slots = asyncio.Semaphore(_side_by_side([job.model for job in jobs]))
    done = {job.label: 0 for job in jobs}

    async def boot(job: Job) -> dict[str, Any]:
        async with slots:
            started = time.monotonic()

            def reached(phase: str, percent: int) -> None:
                done[job.label] = percent
                emit("progress", label="verify", done=sum(done.values()), total=100 * len(done))
                if PHASES[phase] == percent:
                    emit(
                        "phase",
                        guest=job.name,
                        firmware=job.model.firmware,
                        phase=phase,
                        seconds=round(time.monotonic() - started, 1),
                    )

            return await _boot(request, job, reached)

    results = await asyncio.gather(*(boot(job) for job in jobs), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Failure):
            raise result
    guests = [result for result in results if isinstance(result, dict)]
    if failures := [result for result in results if isinstance(result, Failure)]:
        first = failures[0]
        said = "; ".join(failure.message for failure in failures)
        raise Failure(said, first.hint, **first.details, guests=guests)
    return guests


def _side_by_side(machines: list[qemu.Machine]) -> int:
    """Return how many guests may run at a time: one a core, each with room for QEMU itself."""
    need = (max(model.memory for model in machines) + 512) << 20
    return max(1, min(len(os.sched_getaffinity(0)), memory.available() // need))


class _Watch:
    """Follows a boot: the phase it is in, told onwards once each."""

    def __init__(self, reached: Callable[[str, int], None]) -> None:
        self.phase = ""
        self._reached = reached
        self.enter("firmware")

    def enter(self, phase: str, share: float = 0) -> None:
        """Note that a phase begins, or how far it is (0 to 1); a phase never goes back."""
        order = list(PHASES)
        if self.phase and (
            order.index(phase) < order.index(self.phase) or (phase == self.phase and not share)
        ):
            return
        self.phase = phase
        following = PHASES[order[min(order.index(phase) + 1, len(order) - 1)]]
        self._reached(phase, round(PHASES[phase] + share * (following - PHASES[phase])))


async def _boot(request: wire.Verify, job: Job, reached: Callable[[str, int], None]) -> dict[str, Any]:
    """Run one guest from start to end and return what was found."""
    work, model = Path(request.work), job.model
    limit = request.timeout or LIMITS[model.accel]
    log = work / f"serial-{job.label}.log"
    watch = _Watch(reached)
    serial: qemu.Serial | None = None
    guest: qemu.Guest | None = None
    started = time.monotonic()

    def heard(line: str, ended: bool) -> None:
        for phase, sign in SIGNS.items():
            if sign.search(line):
                watch.enter(phase)
        if guest and (why := last_words.fatal(line, ended)):
            guest.fail(why)

    def dead(why: str) -> Failure:
        who, took = job.label.removeprefix("raw-"), time.monotonic() - started
        return Failure(
            f"{who}: {why} (phase: {watch.phase}, after {took:.0f} s)",
            f"read the serial log {log}",
            firmware=model.firmware,
            phase=watch.phase,
            log=str(log),
            tail=serial.last() if serial else [],
        )

    try:
        async with (
            asyncio.timeout(limit),
            qemu.running(model, job.media, job.size, work, job.label, heard) as guest,
        ):
            serial = guest.serial
            answers = await _ask(guest, watch)
            watch.enter("power off")
            before = time.monotonic()
            await guest.power_off()
            took = time.monotonic() - before
            watch.enter("off")
    except TimeoutError:
        raise dead(f"no end within {limit:.0f} s") from None
    except qemu.Stopped as error:
        raise dead(str(error)) from None
    found = [
        *checks(answers, request.expect, model, job.size),
        _check("power off", f"after {took:.1f} s"),
    ]
    return {
        "name": job.name,
        "firmware": model.firmware,
        "format": job.kind,
        "disk": model.disk,
        "accel": model.accel,
        "ok": all(check["ok"] for check in found),
        "seconds": round(time.monotonic() - started, 1),
        "checks": found,
        "serial_log": str(log),
    }


async def _ask(guest: qemu.Guest, watch: _Watch) -> dict[str, Answer]:
    await guest.until(guest.connected.wait())
    watch.enter("guest agent")
    lines = [_PROLOGUE, *(f"answer {name} {shlex.quote(command)}" for name, command in QUESTIONS.items())]
    script = "\n".join(lines)
    for _ in range(ATTEMPTS - 1):
        # The start of the system may restart the agent, which takes the script down with it.
        with contextlib.suppress(qemu.Interrupted):
            return await _answers(guest, script, watch)
    return await _answers(guest, script, watch)


async def _answers(guest: qemu.Guest, script: str, watch: _Watch) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    async for line in guest.report(script):
        name, _, encoded = line.partition(" ")
        output, _, status = base64.b64decode(encoded).rpartition(b"\n")
        answers[name] = Answer(output, int(status))
        watch.enter("answers", len(answers) / len(QUESTIONS))
    return answers


def checks(
    answers: Mapping[str, Answer], expect: Mapping[str, Any], model: qemu.Machine, size: int
) -> list[Check]:
    """Judge a guest's answers; `size` is its disk in bytes."""
    rows = [
        _equal("firmware", answers["firmware"].text, model.firmware),
        _equal("system", answers["system"].text, "running"),
        _none("failed units", answers["failed"].text),
        _none("out of memory", answers["killed"].text),
        _mounts(answers["mounts"]),
        *_disk(answers, size, expect.get("min_disk")),
        _within("disk driver", qemu.DISKS[model.disk].driver, answers["drivers"].text.split()),
        *(
            _within("nic driver", qemu.NICS[nic.model][1], answers["cards"].text.split())
            for nic in model.nics
        ),
        _kernel(answers["kernel"], model.arch),
        _arguments(answers["cmdline"].text, expect.get("kernel_cmdline") or ""),
    ]
    if expect.get("release") is not None:
        rows.append(_release(answers["release"].text, expect["release"].strip()))
    if expect.get("ssh_port") is not None:
        rows.append(_ssh(answers["listening"], int(expect["ssh_port"])))
    return [*rows, _memory(answers["memory"]), _boot_time(answers["times"])]


def _check(name: str, value: str, ok: bool = True, expected: str = "") -> Check:
    return {"name": name, "ok": ok, "value": value, "expected": expected}


def _equal(name: str, value: str, expected: str) -> Check:
    return _check(name, value or "nothing", value == expected, expected)


def _none(name: str, text: str) -> Check:
    return _check(name, text or "none", not text, "none")


def _within(name: str, expected: str, values: list[str]) -> Check:
    return _check(
        name, expected if expected in values else " ".join(values) or "none", expected in values, expected
    )


def _mounts(answer: Answer) -> Check:
    """Show the file systems that lie on devices; root has to be ext4 and writable."""
    expected = "/ ext4, writable"
    try:
        mounts = json.loads(answer.text)["filesystems"]
    except (ValueError, KeyError):
        return _check("mounts", answer.text or "nothing", False, expected)
    shown = ", ".join(
        f"{mount['target']} {mount['fstype']} {mount['options'].split(',')[0]}" for mount in mounts
    )
    root = [mount for mount in mounts if mount["target"] == "/"]
    good = bool(root) and root[-1]["fstype"] == "ext4" and "rw" in root[-1]["options"].split(",")
    return _check("mounts", shown, good, expected)


def _disk(answers: Mapping[str, Answer], size: int, min_disk: int | None) -> list[Check]:
    """Judge the disk's size, root's growth and both partition tables."""
    try:
        sectors, start, length = (int(word) for word in answers["disk"].text.split())
    except ValueError:
        return [_check("disk size", answers["disk"].text or "nothing", False, _mib(size))]
    seen = sectors * 512
    wanted = max(size, (min_disk or 0) << 20)
    filesystem = ext4_size(answers["superblock"].output)
    end = start * 512 + min(filesystem, length * 512)
    gap = seen - end
    return [
        _check(
            "disk size", _mib(seen), seen == size // 512 * 512 and seen >= wanted // 512 * 512, _mib(wanted)
        ),
        _check(
            "root grown",
            f"{_mib(filesystem)}, {_mib(gap)} unused behind it",
            filesystem > 0 and gap <= SLACK,
            f"up to {_mib(SLACK)} behind it",
        ),
        _equal("backup GPT", gpt_fault(answers["gpt"].output, sectors) or "intact", "intact"),
    ]


def _mib(size: int) -> str:
    return f"{size >> 20} MiB" if size % (1 << 20) == 0 else f"{size / (1 << 20):.1f} MiB"


def ext4_size(superblock: bytes) -> int:
    """Return the bytes of an ext4 file system, or 0 where there is none.

    Fields: Linux, Documentation/filesystems/ext4/super.rst (s_blocks_count_lo 0x4, s_log_block_size
    0x18, s_magic 0x38, s_feature_incompat 0x60, s_blocks_count_hi 0x150, valid with INCOMPAT_64BIT 0x80).
    """
    if len(superblock) < 1024 or struct.unpack_from("<H", superblock, 0x38)[0] != 0xEF53:
        return 0
    low, log = struct.unpack_from("<I", superblock, 4)[0], struct.unpack_from("<I", superblock, 0x18)[0]
    wide = struct.unpack_from("<I", superblock, 0x60)[0] & 0x80
    high = struct.unpack_from("<I", superblock, 0x150)[0] if wide else 0
    return int((high << 32 | low) << (10 + min(log, 6)))


def gpt_fault(data: bytes, sectors: int) -> str:
    """Say what is wrong with a disk's partition tables, or nothing.

    `data` is the primary header (sector 1) and the last 33 sectors: backup entries and backup header.
    Layout: UEFI specification 2.10, 5.3.2 table 5.5 and 5.3.3.
    """
    primary, entries, backup = data[:512], data[512:-512], data[-512:]
    if len(data) != 34 * 512:
        return "the disk cannot be read"
    for name, header, here, there in (
        ("primary", primary, 1, sectors - 1),
        ("backup", backup, sectors - 1, 1),
    ):
        signature, _, length, checksum = struct.unpack_from("<8sIII", header)
        if signature != b"EFI PART":
            return f"no {name} header"
        if not 92 <= length <= 512 or zlib.crc32(header[:16] + bytes(4) + header[20:length]) != checksum:
            return f"the {name} header's checksum is wrong"
        if struct.unpack_from("<QQ", header, 24) != (here, there):
            return f"the {name} header points to the wrong sectors"
    start, count, width, checksum = struct.unpack_from("<QIII", backup, 72)
    if start != sectors - 33 or count * width != len(entries):
        return "the backup entries lie in the wrong place"
    return "" if zlib.crc32(entries) == checksum else "the backup entries' checksum is wrong"


def _kernel(answer: Answer, arch: str) -> Check:
    expected = {"amd64": "x86_64", "i386": "i686"}[arch]
    release, _, family = answer.text.partition("\n")
    return _check("kernel", f"{release} {family}", family == expected, expected)


def _arguments(line: str, expected: str) -> Check:
    """All arguments have to be there; the boot loader may add its own."""
    missing = [word for word in expected.split() if word not in line.split()]
    return _check(
        "kernel arguments", f"without {' '.join(missing)}: {line}" if missing else line, not missing, expected
    )


def _release(line: str, expected: str) -> Check:
    """The expected words come first; a date may follow."""
    return _check("release", line or "nothing", f"{line} ".startswith(f"{expected} "), expected)


def _ssh(answer: Answer, port: int) -> Check:
    """Find the ports on which a process named sshd listens."""
    ports = " ".join(str(number) for number in listening(answer.text))
    return _equal("sshd port", ports, str(port))


def listening(text: str) -> list[int]:
    """Return the listening TCP ports in /proc/net/tcp whose sockets are among listed file descriptors.

    Source: Linux, Documentation/networking/proc_net_tcp.rst (state 0A is LISTEN, field 10 the inode).
    """
    held = set(re.findall(r"-> socket:\[(\d+)\]", text))
    rows = re.findall(
        r"^\s*\d+: [0-9A-F]+:([0-9A-F]{4}) [0-9A-F:]+ 0A (?:\S+\s+){5}(\d+)", text, re.MULTILINE
    )
    return sorted({int(port, 16) for port, inode in rows if inode in held})


def _memory(answer: Answer) -> Check:
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", answer.text, re.MULTILINE))
    free, total = (int(table.get(key, 0)) >> 10 for key in ("MemAvailable", "MemTotal"))
    return _check("memory", f"{free} of {total} MiB available")


def _boot_time(answer: Answer) -> Check:
    """Report seconds from the kernel's start to the end of the boot (systemd, org.freedesktop.systemd1)."""
    micros = int(answer.text) if re.fullmatch("[0-9]{1,18}", answer.text) else 0
    return _check(
        "boot time", f"{micros / 1e6:.1f} s" if micros else "unknown", micros > 0, "a finished boot"
    )
