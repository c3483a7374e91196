"""Boot an image on this terminal: its serial line is the screen, and nothing is written to the image.

Ctrl-A X ends the guest, Ctrl-A C changes to QEMU's monitor and back; Ctrl-C goes to the guest.
"""

from __future__ import annotations

from pathlib import Path

from build import wire
from build.agent import process
from build.agent.guest import kvm, media, qemu


def argv(request: wire.Boot, accel: str) -> list[str]:
    """Return QEMU's command line; with snapshot=on every write goes to a file without a name."""
    image = Path(request.image).absolute()
    media.need(image)
    options = {
        "if": "none",
        "id": "disk",
        "format": "raw",
        "snapshot": "on",
        "file.driver": "file",
        "file.filename": str(image).replace(",", ",,"),
    }
    return [
        *qemu.hardware(qemu.machine(wire.dump(request), request.firmware, accel)),
        *("-drive", ",".join(f"{key}={value}" for key, value in options.items())),
        *("-chardev", "stdio,id=terminal,mux=on,signal=off", "-serial", "chardev:terminal"),
        *("-mon", "chardev=terminal,mode=readline"),
    ]


def command(request: wire.Boot) -> tuple[list[str], dict[str, str]]:
    """Return what to execute on the terminal, and the variables it needs beside the usual ones."""
    qemu.need(qemu.PROGRAM)
    Path(request.work).mkdir(exist_ok=True)
    line = argv(request, kvm.accelerator())
    return process.tied(line), {"TMPDIR": str(Path(request.work).absolute())}
