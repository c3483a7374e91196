"""What an image definition may ask of its formats; the defaults suit the oldest supported host."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


class Qcow2(_Part):
    """How the QCOW2 for KVM is written."""

    version: Annotated[int, Field(ge=2, le=3)] = 2
    """2 is read by every KVM host, 3 (compat 1.1) by QEMU 1.1 and later."""
    compression: Literal["deflate", "zstd", "none"] = "deflate"
    """zstd needs version 3 and QEMU 5.1; its bytes depend on the build host's libzstd."""


class Ovf(_Part):
    """The virtual machine that an OVA describes."""

    hardware_version: Annotated[int, Field(ge=7, le=22)] = 13
    """vmx-13 is ESXi 6.5; a host refuses a newer version than its own and takes every older one."""
    guest_os: str = ""
    """VMware's name of the guest system; empty means Debian 10 of the image's arch, which ESXi 6.5 knows."""
    memory: Annotated[int, Field(ge=64, le=1 << 20)] = 256
    """MiB."""
    cpus: Annotated[int, Field(ge=1, le=128)] = 1
    controller: Literal["lsilogic", "pvscsi"] = "lsilogic"
    firmware: Literal["bios", "efi"] = "bios"
    networks: tuple[str, ...] = ()
    """Names of networks, one card each. CloudStack wants none: it adds its own cards."""


class Options(_Part):
    """All of it."""

    qcow2: Qcow2 = Qcow2()
    ovf: Ovf = Ovf()
