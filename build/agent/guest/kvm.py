"""Say whether /dev/kvm really runs guests, by running one.

A device that opens and even runs real mode proves little: there are hosts whose KVM interprets a
guest's kernel instruction by instruction, so that no system ever comes up. The probe is a firmware of
316 bytes that goes from reset to long mode, counts to 2^26, takes an exception, enters ring 3, comes
back by a software interrupt and reports through QEMU's isa-debug-exit. Natively that is under 0.1 s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from build.agent import process
from build.agent.guest.qemu import PROGRAM

LIMIT = 1.5
"""Seconds for start and end of QEMU and the guest."""

DONE = 33
"""QEMU's exit status when the guest writes 0x10 to isa-debug-exit: (0x10 << 1) | 1."""

_CODE = """
    fa                          cli                          16 bit, from the reset vector, CS = F000
    fc                          cld
    31c0                        xor ax, ax
    8ec0                        mov es, ax
    8ed0                        mov ss, ax
    bc0070                      mov sp, 0x7000
    bf0010                      mov di, 0x1000               clear 0x1000-0x67ff: tables, IDT, GDT, TSS
    b90058                      mov cx, 0x5800
    f3aa                        rep stosb
    26c70600100720              mov word es:[0x1000], 0x2007  page tables: 2 MiB mapped one to one, for all
    26c70600200730              mov word es:[0x2000], 0x3007
    26c70600308700              mov word es:[0x3000], 0x0087
    bef800                      mov si, gdt
    bf0050                      mov di, 0x5000               the TSS gets marked, so the GDT must be in RAM
    b93800                      mov cx, 7 * 8
    2ef3a4                      rep movsb es:[di], cs:[si]
    2e660f01163001              lgdt cs:[gdtr]
    2e660f011e3601              lidt cs:[idtr]
    66b820000000                mov eax, CR4.PAE
    0f22e0                      mov cr4, eax
    66b800100000                mov eax, 0x1000
    0f22d8                      mov cr3, eax
    66b9800000c0                mov ecx, EFER
    0f32                        rdmsr
    0d0001                      or ax, EFER.LME
    0f30                        wrmsr
    66b811000080                mov eax, CR0.PG | CR0.ET | CR0.PE
    0f22c0                      mov cr0, eax
    66ea72000f000800            jmp far 0x08:0xf0072
    b810000000                  mov eax, 0x10                64 bit
    8ed0                        mov ss, eax
    bc00700000                  mov esp, 0x7000
    b828000000                  mov eax, 0x28
    0f00d8                      ltr ax
    b900000004                  mov ecx, 1 << 26             no time at all, unless each step is interpreted
    ffc9                        dec ecx
    75fc                        jnz -2
    c7042560400000da000800      mov dword [0x4060], 0x000800da  gate 6: undefined instruction
    c7042564400000008e0f00      mov dword [0x4064], 0x000f8e00
    c7042500480000ea000800      mov dword [0x4800], 0x000800ea  gate 0x80, for ring 3
    c704250448000000ee0f00      mov dword [0x4804], 0x000fee00
    c704250460000000700000      mov dword [0x6004], 0x7000   the TSS's stack for ring 0
    0f0b                        ud2
    6a23                        push 0x23                    to ring 3
    6800680000                  push 0x6800
    6a02                        push 2
    6a1b                        push 0x1b
    68e1000f00                  push 0xf00e1
    48cf                        iretq
    4883042402                  add qword [rsp], 2           the exception's handler: go on behind ud2
    48cf                        iretq
    b810000000                  mov eax, 0x10                ring 3
    0fa2                        cpuid
    cd80                        int 0x80
    b010                        mov al, 0x10                 ring 0 again: done
    e6f4                        out 0xf4, al
    f4                          hlt
    ebfd                        jmp -1
    0f1f8000000000              nop                          up to a multiple of 8
    0000000000000000            gdt: nothing
    00000000009b2000            08: code, 64 bit, ring 0
    ffff00000093cf00            10: data, ring 0
    0000000000fb2000            18: code, 64 bit, ring 3
    ffff000000f3cf00            20: data, ring 3
    6700006000890000            28: TSS at 0x6000
    0000000000000000
    370000500000                gdtr: 7 entries at 0x5000
    ff0f00400000                idtr: 256 gates at 0x4000
"""


def firmware() -> bytes:
    """Return the probe's guest: a ROM of 64 KiB that the CPU finds at its reset vector."""
    code = bytes.fromhex("".join(line.split()[0] for line in _CODE.strip().splitlines()))
    jump = bytes.fromhex("ea000000f0")  # jmp far F000:0000, at 16 bytes below the top
    return code.ljust(0xFFF0, b"\xf4") + jump.ljust(16, b"\xf4")


def probe(accel: str = "kvm", limit: float = LIMIT) -> str:
    """Run the guest with this accelerator; return why it did not get to its end, or an empty string."""
    cpu = "host" if accel == "kvm" else "qemu64"
    with process.nameless(firmware()) as rom, process.nameless() as complaints:
        argv = [
            *(PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc"),
            *("-accel", accel, "-cpu", cpu, "-m", "16", "-bios", f"/proc/self/fd/{rom}", "-no-reboot"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
        ]
        child = process.start(argv, stdout=subprocess.DEVNULL, stderr=complaints, pass_fds=(rom,))
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            return "it runs a guest's kernel too slowly to be of use, or not at all"
        finally:
            process.stop(child)
        told = os.pread(complaints, 1 << 16, 0).decode(errors="replace")
    if child.returncode == DONE:
        return ""
    lines = [line for line in told.strip().splitlines() if "warning:" not in line]
    return lines[0].removeprefix(f"{PROGRAM}: ") if lines else f"QEMU ended with status {child.returncode}"


def missing() -> str:
    """Return why KVM runs no guests here, empty when it does. Takes under 2 s."""
    if not Path("/dev/kvm").exists():
        return "no /dev/kvm"
    if not shutil.which(PROGRAM, path=process.PATH):
        return f"{PROGRAM} is missing"
    return probe()


def accelerator() -> str:
    """Return `kvm` where it runs guests, else `tcg`."""
    return "tcg" if missing() else "kvm"
