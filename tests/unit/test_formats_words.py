"""Tables of numbers in files of either byte order."""

from __future__ import annotations

from array import array

import pytest

from build.formats.lib.words import Order, pack_words, read_words


@pytest.mark.parametrize(
    ("order", "data"),
    [("little", b"\x01\0\0\0\x02\x03\0\0"), ("big", b"\0\0\0\x01\0\0\x03\x02")],
)
def test_a_table_is_what_the_file_says_and_stays_as_it_is(order: Order, data: bytes) -> None:
    table = read_words("I", data, order)
    assert list(table) == [1, 0x302]
    assert pack_words(table, order) == data
    assert table == array("I", [1, 0x302])


def test_a_table_that_ends_within_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        read_words("Q", bytes(12), "big")
