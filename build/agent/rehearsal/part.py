"""The part of a management server and its KVM host, step by step, at one system VM.

Facts from CloudStack 4.22: LibvirtStartCommandWrapper (boot line, port 3922, files, isSystemVMSetup),
VirtualRoutingResource (patched.sh, get_template_version.sh, vr_cfg.sh, checkrouter.sh),
scripts/vm/hypervisor/kvm/patch.sh (guest agent), FileUtil.scpPatchFiles (mode 0755, four tries).
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
import uuid
from collections.abc import Sequence

from build import wire
from build.agent import process
from build.agent.guest import qemu
from build.agent.rehearsal import batch, health, login
from build.agent.rehearsal.network import quiet
from build.agent.rehearsal.stage import Fault, Stage, answers, inside, soon

CMDLINE = "/var/cache/cloud/cmdline"
SYNC = 1234567
BOOT = 600.0
"""Seconds until the guest agent answers, and until port 3922 does (host: 60 tries of some 10 s)."""
PATCHED = 600
"""Tries of patched.sh, a second apart."""
SCRIPT = 600.0
"""Seconds that a script may take (VRScripts.VR_SCRIPT_EXEC_TIMEOUT)."""
COPIES = 4
STATE = re.compile(r"Status: (PRIMARY|BACKUP|FAULT|UNKNOWN)")
DONE = (
    "f=/var/cache/cloud/boot_up_done; "
    '[ -e $f ] && [ "$(stat -c %Y $f)" -ge "$(sed -n "s/^btime //p" /proc/stat)" ]'
)
"""Whether this boot has come to its end: the file may be the last one's."""
SET_UP = (
    "systemctl show cloud-early-config --property "
    "ExecMainStartTimestampMonotonic,ExecMainExitTimestampMonotonic,CPUUsageNSec"
)
IDLE = 100.0
"""Seconds that the set-up of a reboot may do nothing; one that waits for an archive does so for 120."""


async def start(stage: Stage) -> None:
    """Play the first start: up to where the machine has set itself up. Raises Over when it cannot go on."""
    record = stage.record
    await record.step(
        "guest agent answers", soon(stage, _agent(stage.guest), BOOT, "it does not"), essential=True
    )
    await record.step("boot line", _deliver(stage.guest, stage.machine.line), essential=True)
    name = f"TCP {stage.machine.port} answers"
    await record.step(name, soon(stage, _ssh(stage), BOOT, "no SSH server greets"), essential=True)
    if stage.machine.port == 3922:
        await _scripts(stage)
    await record.step("boot is done", soon(stage, _done(stage.guest), BOOT, "no boot_up_done"))
    if stage.machine.port == 3922:
        await record.step("get_template_version.sh", _version(stage))


async def _scripts(stage: Stage) -> None:
    record = stage.record
    if stage.files:
        await record.step("set-up is not over yet", _waits(stage.guest))
        await record.step("scp of the scripts", _copy(stage), essential=True)
    else:
        record.note("scp of the scripts", "-", "no --scripts: the machine has what is in the image")
    if stage.machine.name.startswith(("s-", "v-")):
        await record.step("patched.sh", _patched(stage))


async def _agent(guest: qemu.Guest) -> str:
    await guest.ask("guest-ping")
    return ""


async def _deliver(guest: qemu.Guest, line: str) -> str:
    """Send the boot line as patch.sh does."""
    if await guest.ask("guest-sync", id=SYNC) != SYNC:
        raise Fault("guest-sync returns another number than it was sent")
    handle = await guest.ask("guest-file-open", path=CMDLINE, mode="w+")
    content = f"{line}\n".encode()
    sent = {"handle": handle, "buf-b64": base64.b64encode(content).decode()}
    written = await guest.ask("guest-file-write", **sent)
    await guest.ask("guest-file-close", handle=handle)
    if written.get("count") != len(content):
        raise Fault(f"{written.get('count')} of {len(content)} bytes were written")
    return f"{len(content)} bytes"


async def _ssh(stage: Stage) -> str:
    while not await stage.guest.until(login.greeted(stage.login.port, 10.0)):
        await stage.guest.until(asyncio.sleep(1))
    return ""


async def _waits(guest: qemu.Guest) -> str:
    if (await inside(guest, f"if {DONE}; then echo done; fi")).strip():
        raise Fault("it has finished its boot: whatever comes now is not unpacked")
    return ""


async def _copy(stage: Stage) -> str:
    """Copy the files into /var/cache/cloud."""
    for attempt in range(COPIES):
        ended = await stage.guest.until(
            login.copy(stage.login, stage.files, batch.CACHE, stage.pace * SCRIPT)
        )
        if not ended.status:
            break
        if attempt < COPIES - 1:
            await asyncio.sleep(2)
    else:
        raise Fault(ended.why)
    return ", ".join(file.name for file in stage.files)


async def _patched(stage: Stage) -> str:
    """Look for the scripts that make keystores, until they are there."""
    late = 0
    for tried in range(1, PATCHED + 1):
        ended = await execute(stage, f"{batch.BIN}patched.sh '/opt/cloud/bin/keystore*'")
        if not ended.status and stage.files:
            return f"at try {tried}"
        if not ended.status:
            raise Fault("it ends with 0 though no scripts came")
        late += bool((await inside(stage.guest, f"if {DONE}; then echo done; fi")).strip())
        if late and not stage.files:
            return f"refused, since no scripts came: {ended.why}"
        if late > 5:
            raise Fault(
                f"{ended.why}, and the machine has finished its boot: a host goes on to {PATCHED} tries"
            )
        await asyncio.sleep(1)
    raise Fault(ended.why)


async def _put(stage: Stage, files: Sequence[login.File]) -> login.Ended:
    limit = stage.pace * SCRIPT
    return await stage.guest.until(login.copy(stage.login, files, batch.CACHE, limit))


async def execute(stage: Stage, command: str, *options: str) -> login.Ended:
    """Run a command over SSH; fails with the guest."""
    return await stage.guest.until(login.run(stage.login, command, stage.pace * SCRIPT, *options))


async def _done(guest: qemu.Guest) -> str:
    up = await inside(guest, f"until {DONE}; do sleep 2; done; cut -d' ' -f1 /proc/uptime")
    return f"{float(up.split()[-1]):.0f} s after its kernel began" if up.split() else ""


async def _version(stage: Stage) -> str:
    ended = await execute(stage, f"{batch.BIN}get_template_version.sh")
    parts = ended.out.strip().split("&")
    if ended.status or len(parts) != 2:
        raise Fault(f"no `RELEASE&SIGNATURE` comes: {ended.out.strip() or ended.why}")
    release, signature = parts[0].strip(), parts[1].strip()
    if stage.release and not f"{release} ".startswith(f"{stage.release} "):
        raise Fault(f"{release!r} does not begin with {stage.release!r}")
    if stage.signed and (fault := batch.signature_fault(signature, stage.signed)):
        raise Fault(fault)
    if not stage.signed:
        return f"{release}, no scripts to compare its signature with"
    return f"{release}, {batch.SIGNATURES[len(signature)]} of the archive"


async def check_health(stage: Stage) -> str:
    """Look for what is broken inside."""
    text = await inside(stage.guest, health.script())
    if not health.complete(text):
        raise Fault(f"not all was answered: {text[-200:]}")
    if found := health.faults(text):
        raise Fault("; ".join(found))
    return ""


async def look(stage: Stage, effects: Sequence[wire.Effect]) -> None:
    """Note of each effect whether it is seen; a service that starts anew may need some seconds."""
    pending = list(effects)
    for attempt in range(4):
        if not pending:
            return
        started = time.monotonic()
        told = await answers(stage.guest, {effect.name: effect.run for effect in pending})
        seconds = (time.monotonic() - started) / len(pending)
        missing = []
        for effect in pending:
            if re.search(effect.expect, told[effect.name], re.MULTILINE):
                stage.record.note(effect.name, "ok", "", seconds)
            elif attempt < 3:
                missing.append(effect)
            else:
                why = f"no /{effect.expect}/ in: {told[effect.name][-400:] or 'nothing'}"
                stage.record.note(effect.name, "FAIL", why, seconds)
        pending = missing
        if pending:
            await stage.guest.until(asyncio.sleep(3))


async def plug(stage: Stage) -> None:
    """Plug the cards in that come later."""
    for number, nic in enumerate(stage.machine.nics):
        if nic.late:
            await stage.record.step(f"eth{number} is plugged in", _plug(stage, number, nic))


async def _plug(stage: Stage, number: int, nic: wire.Nic) -> str:
    await stage.guest.plug(qemu.Nic(backend=quiet(nic), mac=nic.mac), number)
    seen = f"until grep -qs {nic.mac} /sys/class/net/eth{number}/address; do sleep 0.2; done"
    return await soon(stage, inside(stage.guest, seen), 60, f"no eth{number} with {nic.mac}")


async def send_all(stage: Stage) -> bool:
    """Send all documents in one batch, as at a router's start."""
    return await stage.record.step("vr_cfg.sh -c, all documents", _batch(stage))


async def _batch(stage: Stage) -> str:
    name = f"VR-{uuid.uuid4()}.cfg"
    await _send(stage, name, batch.compose(stage.machine.documents))
    ended = await execute(stage, f"{batch.BIN}vr_cfg.sh -c {batch.CACHE}{name}")
    # The script's status says nothing of a document that failed; what it writes to stderr does.
    return _verdict(stage, ended, "execution failed" in ended.err)


async def send_each(stage: Stage, documents: Sequence[wire.Document]) -> None:
    """Send each document alone, as with each change of a router."""
    for document in documents:
        await stage.record.step(f"update_config.py {document.name}", _single(stage, document))


async def _single(stage: Stage, document: wire.Document) -> str:
    name = batch.file_name(document)
    await _send(stage, name, document.text)
    return _verdict(stage, await execute(stage, batch.update(name)))


def _verdict(stage: Stage, ended: login.Ended, failed: bool = False) -> str:
    refused = bool(ended.status) or failed
    if stage.files and refused:
        raise Fault(ended.why)
    if not stage.files and not refused:
        raise Fault("it ends with 0 though nothing in the image applies this: a server would believe it")
    return "" if stage.files else f"refused, since no scripts came: {ended.why}"


async def _send(stage: Stage, name: str, text: str) -> None:
    with process.nameless(text.encode()) as descriptor:
        ended = await _put(stage, [login.File(name, descriptor)])
    if ended.status:
        raise Fault(f"scp: {ended.why}")


async def state(stage: Stage) -> str:
    """Ask for the redundancy state, as checkrouter.sh tells it."""
    ended = await execute(stage, f"{batch.BIN}checkrouter.sh")
    told = STATE.fullmatch(ended.out.strip())
    if ended.status or not told:
        raise Fault(f"no line `Status: ...` comes: {ended.out.strip() or ended.why}")
    return told[1]


async def live_patch(stage: Stage) -> str:
    """Copy the files again and patch the machine while it runs."""
    await _copy(stage)
    ended = await execute(stage, f"{batch.CACHE}patch-sysvms.sh")
    parts = ended.out.replace("\n", " ").split(":")
    if ended.status:
        raise Fault(ended.why)
    if len(parts) != 2 or "version" not in parts[0]:
        raise Fault(
            f"a server splits at the one colon of `version:SIGNATURE`; this came: {ended.out.strip()!r}"
        )
    signature = (parts[1].split() or [""])[0]
    if stage.signed and (fault := batch.signature_fault(signature, stage.signed)):
        raise Fault(fault)
    return f"version:{signature[:16]}..."


async def reboot(stage: Stage) -> str:
    """Reboot from inside, and see the machine come up again without anybody's help."""
    started = time.monotonic()
    await execute(stage, "systemctl reboot")
    await soon(stage, _restarted(stage.guest), SCRIPT, "it does not go down")
    await soon(stage, _ssh(stage), BOOT, "no SSH server greets")
    up = await soon(stage, _done(stage.guest), BOOT, "no boot_up_done")
    took, idle = set_up(await inside(stage.guest, SET_UP))
    if idle > IDLE:
        raise Fault(f"its set-up took {took:.0f} s, {idle:.0f} of them idle: it waits for an archive again")
    return f"{up}, {time.monotonic() - started:.0f} s in all; its set-up took {took:.0f} s"


def set_up(shown: str) -> tuple[float, float]:
    """Seconds that the set-up's unit took, and how many of them it did nothing (systemd, as SET_UP asks)."""
    told = {key: int(value) for key, value in re.findall(r"^(\w+)=(\d+)$", shown, re.MULTILINE)}
    begin, end = (told.get(f"ExecMain{what}TimestampMonotonic", 0) for what in ("Start", "Exit"))
    took = max(0, end - begin) / 1e6
    return took, took - told.get("CPUUsageNSec", 0) / 1e9


async def _restarted(guest: qemu.Guest) -> str:
    await guest.restarted()
    return ""
