"""VHD, fixed, for Azure: the disk itself and a footer, as "Prepare Linux for imaging in Azure" wants it.

Whole MiB, no dynamic header (data offset all ones), and a creator by which QEMU takes the size field.
"""

from __future__ import annotations

from typing import BinaryIO

from build.formats import vhd
from build.formats.lib.errors import Unsupported
from build.formats.lib.format import Format, Machine, Options, Target
from build.formats.lib.vhd import make_footer
from build.formats.lib.writer import Units, put
from build.formats.raw import RawWriter

MIB = 1 << 20
LARGEST = 4095 << 30
"""Bytes of the largest disk that Azure starts a system from."""


def check_size(size: int) -> None:
    """Raise Unsupported for a disk that Azure does not take."""
    if size % MIB or not size:
        raise Unsupported(
            f"Azure takes whole MiB, the disk has {size} bytes", "make SIZE whole MiB and build again"
        )
    if size > LARGEST:
        raise Unsupported("Azure takes at most 4095 GiB", "make SIZE smaller")


class FixedWriter:
    """Writes the disk, zeros as holes, and the footer behind it."""

    codec = None

    def __init__(self, file: BinaryIO, size: int) -> None:
        check_size(size)
        self.file, self.size, self.data = file, size, RawWriter(file, size)

    def add(self, index: int, data: bytes, units: Units) -> None:
        """Write what is not zero in a piece."""
        self.data.add(index, data, units)

    def close(self, seed: str) -> None:
        """Write the footer."""
        put(self.file, self.size, make_footer(self.size, "hyperv", seed, fixed=True))


def _write(target: Target, options: Options) -> FixedWriter:
    return FixedWriter(target.file, target.size)


KIND = vhd.KIND
FORMATS = (
    Format(
        name="azure-vhd",
        help="VHD for Azure, fixed",
        kind=KIND,
        file="{imagename}-azure.vhd",
        machine=Machine("ide", "tulip"),  # Hyper-V's generation 1
        write=_write,
        check_size=check_size,
    ),
)
