"""The reader of write logs: entries as Linux' documentation of dm-log-writes has them."""

from __future__ import annotations

import random
import struct
from itertools import chain
from pathlib import Path

import pytest

from tests.boot.write_log import PIECE, cut, epochs, lay, replay

WRITE, FLUSH, DISCARD = 0, 1, 4


def entry(sector: int, data: bytes = b"", flags: int = WRITE, sectors: int = 0) -> bytes:
    head = struct.pack("<4Q", sector, sectors or len(data) // 512, flags, 0)
    return head.ljust(512, b"\0") + data


def written(path: Path, *entries: bytes, magic: int = 0x6A736677736872) -> Path:
    head = struct.pack("<QQQI", magic, 1, len(entries), 512)
    path.write_bytes(head.ljust(512, b"\0") + b"".join(entries))
    return path


def blocks(letter: bytes, count: int = 1) -> bytes:
    return letter * (PIECE * count)


def test_writes_are_told_apart_by_flushes_and_replayed_in_order(tmp_path: Path) -> None:
    log = written(
        tmp_path / "log",
        *(entry(8, blocks(b"a")), entry(8, blocks(b"b")), entry(0, flags=FLUSH)),
        *(entry(0, flags=DISCARD, sectors=8), entry(0, flags=FLUSH)),
        *(entry(0, blocks(b"c")), entry(0, flags=FLUSH)),
    )
    found = epochs(log)
    assert [len(one) for one in found] == [2, 1]
    first, disk = tmp_path / "first", tmp_path / "disk"
    first.write_bytes(blocks(b"x") + bytes(2 * PIECE))
    for start in (0, 3 * PIECE):
        lay(first, disk, start)
    replay(log, chain(*found[:1]), disk, 3 * PIECE)
    assert disk.read_bytes() == first.read_bytes() + blocks(b"x") + blocks(b"b") + bytes(PIECE)
    replay(log, chain(*found), disk)
    assert disk.read_bytes()[: 3 * PIECE] == blocks(b"c") + blocks(b"b") + bytes(PIECE)


def test_a_cut_keeps_any_pieces_of_what_was_not_flushed(tmp_path: Path) -> None:
    log = written(tmp_path / "log", entry(0, blocks(b"a", 8)), entry(64, b"b" * 512), entry(0, flags=FLUSH))
    ((whole, short),) = epochs(log)
    dice = random.Random(7)
    seen = {tuple(write.offset for write in cut([whole, short], dice)) for _ in range(200)}
    assert () in seen
    assert (*range(0, 8 * PIECE, PIECE), 64 * 512) in seen
    assert any(0 not in one and PIECE in one for one in seen)
    assert len(seen) > 20


def test_what_is_no_log_or_does_not_end_with_a_flush_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        epochs(written(tmp_path / "foreign", magic=1))
    with pytest.raises(AssertionError, match="not counted"):
        epochs(written(tmp_path / "open", entry(0, b"a" * 512)))
