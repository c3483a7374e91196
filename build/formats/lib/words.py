"""Tables of whole numbers as image files have them, of either byte order."""

from __future__ import annotations

import sys
from array import array
from typing import Literal

Order = Literal["little", "big"]


def pack_words(table: array[int], order: Order) -> bytes:
    """A table's bytes in a file of this byte order."""
    return _swapped(array(table.typecode, table), order).tobytes()


def read_words(typecode: Literal["H", "I", "Q"], data: bytes, order: Order) -> array[int]:
    """Read a table from a file of this byte order; ValueError when it ends within a number."""
    return _swapped(array(typecode, data), order)


def _swapped(table: array[int], order: Order) -> array[int]:
    if sys.byteorder != order:
        table.byteswap()
    return table
