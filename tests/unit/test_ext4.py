"""The root file system as bytes: what is placed where, and how inodes, folders and extents are written."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build import crc32c
from build.disk import inodes, tree
from build.disk.inodes import Extent, Node, Space
from build.disk.layout import GROUP
from build.disk.tree import BLOCK, WINDOW, Entry

SEED = 0x12345678


def entry(name: str = "file", mode: int = stat.S_IFREG | 0o644, **values: object) -> Entry:
    plain = Entry(name, mode, 0, 0, 0, 0, 0, "", [], "", {})
    return plain._replace(**values)  # type: ignore[arg-type]


@given(st.binary(min_size=1, max_size=600), st.integers(1, 40))
def test_many_checksums_at_once_are_those_of_each(content: bytes, width: int) -> None:
    count = len(content) // width
    rows = content[: count * width]
    first = crc32c.start(SEED, count)
    planes = crc32c.registers(rows, width, width - 1, first)
    for row in range(count):
        alone = crc32c.register(rows[row * width : (row + 1) * width - 1], SEED)
        assert int.from_bytes(bytes(plane[row] for plane in planes), "little") == alone


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["data", "zeros", "hole"]), max_size=6), st.integers(0, 70_000))
def test_holes_follow_from_content_alone(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], rest: int
) -> None:
    """Zeros that are written and zeros that are not are the same file."""
    folder = tmp_path_factory.mktemp("holes")
    length = WINDOW * BLOCK
    sparse, dense = folder / "sparse", folder / "dense"
    with sparse.open("wb") as one, dense.open("wb") as other:
        for kind in kinds:
            part = b"x".rjust(length, b"\0") if kind == "data" else bytes(length)
            other.write(part)
            if kind == "hole":
                one.seek(length, os.SEEK_CUR)
            else:
                one.write(part)
        end = one.tell() + rest
        one.truncate(end)
        other.write(bytes(rest))
    runs = tree.data_runs(str(sparse), end)
    assert runs == tree.data_runs(str(dense), end)
    kept = {block // WINDOW for start, stop in runs for block in range(start, stop)}
    small = end <= (WINDOW - 1) * BLOCK
    assert kept == ({0} if small and end else {n for n, kind in enumerate(kinds) if kind == "data"})
    assert all(stop <= -(-end // BLOCK) for _, stop in runs)


def test_a_tree_is_found_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b", "a", "a/d", "a/c", "lost+found", "a/lost+found"):
        (tmp_path / name).mkdir()
    (tmp_path / "lost+found/file").touch()
    (tmp_path / "b/one").write_bytes(b"1")
    os.link(tmp_path / "b/one", tmp_path / "a/two")
    found = tree.scan(str(tmp_path))
    assert list(found.folders) == ["", "a", "a/c", "a/d", "a/lost+found", "b"]
    names = {folder: [each.name for each in entries] for folder, entries in found.folders.items()}
    assert names[""] == ["a", "b"]
    assert names["a"] == ["c", "d", "lost+found", "two"]
    assert found.folders["a"][3].inode == found.folders["b"][0].inode != ""
    kept = tmp_path / "tree.json"
    tree.write(found, str(kept))
    assert tree.read(str(kept)) == found._replace(
        folders={
            folder: [each._replace(runs=[list(run) for run in each.runs]) for each in entries]  # type: ignore[misc]
            for folder, entries in found.folders.items()
        }
    )


def test_names_that_are_no_text_come_back_as_they_were(tmp_path: Path) -> None:
    name = b"latin \xe9\xff"
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    kept = tmp_path.with_name("tree.json")
    tree.write(tree.scan(str(tmp_path)), str(kept))
    assert [os.fsencode(each.name) for each in tree.read(str(kept)).folders[""]] == [name]


def test_hard_links_share_an_inode_and_folders_are_counted_by_those_in_them(tmp_path: Path) -> None:
    (tmp_path / "folder/in/it").mkdir(parents=True)
    (tmp_path / "one").touch()
    os.link(tmp_path / "one", tmp_path / "folder/two")
    nodes = inodes.collect(tree.scan(str(tmp_path)))
    told = {node.path: (node.number, node.links) for node in nodes}
    assert told == {
        "": (2, 4),  # of itself, of lost+found and of one folder: . and ..
        "folder": (12, 3),
        "one": (13, 2),
        "folder/in": (14, 3),
        "folder/in/it": (15, 2),
    }
    folder = next(node for node in nodes if node.path == "folder")
    assert folder.names == [(b"in", 14, 2), (b"two", 13, 1)]


def test_space_is_given_away_from_the_start_and_around_what_is_used() -> None:
    space = Space([0b1110_0011, (1 << GROUP) - 1, 0])
    assert space.take(2) == [(2, 2)]
    assert space.take(3) == [(4, 1), (8, 2)]
    assert space.used[0] == 0b11_1111_1111
    rest = space.take(GROUP)
    assert rest == [(10, GROUP - 10), (2 * GROUP, 10)]
    with pytest.raises(IndexError):
        space.take(GROUP)


def entries_of(node: bytes) -> tuple[int, list[tuple[int, ...]]]:
    """Depth of a node of an extent tree, and its rows."""
    magic, count, most, depth = struct.unpack_from("<4H", node)
    assert magic == 0xF30A
    assert count <= most
    form = "<IIHxx" if depth else "<IHHI"
    return depth, [struct.unpack_from(form, node, 12 + 12 * row) for row in range(count)]


@pytest.mark.parametrize(("extents", "depth"), [(0, 0), (4, 0), (5, 1), (1360, 1), (1361, 2), (5000, 2)])
def test_every_extent_is_found_from_the_inode(extents: int, depth: int) -> None:
    node = Node(entry(), "file", 77, extents=[Extent(2 * n, 1000 + 3 * n, 1) for n in range(extents)])
    blocks = dict(inodes.extent_tree(node, Space([0]), SEED))
    assert len(blocks) == node.outer

    def leaves(content: bytes) -> list[tuple[int, ...]]:
        deep, rows = entries_of(content)
        if not deep:
            return rows
        below = [leaves(blocks[number]) for _, number, _ in rows]
        assert [part[0][0] for part in below] == [row[0] for row in rows]
        return [row for part in below for row in part]

    assert entries_of(node.inner)[0] == depth
    assert leaves(node.inner) == [(each.logical, 1, 0, each.first) for each in node.extents]
    own = crc32c.register(struct.pack("<II", 77, 0), SEED)
    for content in blocks.values():
        assert struct.unpack("<I", content[-4:])[0] == crc32c.register(content[:-4], own)


@given(st.lists(st.binary(min_size=1, max_size=255), max_size=80))
def test_a_folder_has_every_name_once_and_none_over_a_blocks_end(names: list[bytes]) -> None:
    listed = [(name, 100 + number, 1) for number, name in enumerate(names)]
    node = Node(entry(mode=stat.S_IFDIR | 0o755), "folder", 50, parent=2, names=listed)
    content = inodes.folder_blocks(node)
    found = []
    for start in range(0, len(content), BLOCK):
        place = start
        while place < start + BLOCK - 12:
            number, length, size, kind = struct.unpack_from("<IHBB", content, place)
            assert length % 4 == 0
            assert length >= 8 + size
            found.append((content[place + 8 : place + 8 + size], number, kind))
            place += length
        assert place == start + BLOCK - 12
        assert content[place:][:12] == b"\0\0\0\0\x0c\0\0\xde\0\0\0\0"
    assert found == [(b".", 50, 2), (b"..", 2, 2), *listed]


@pytest.mark.parametrize("seconds", [0, 1_700_000_000, (1 << 31) - 1, 1 << 31, 4_102_444_800, (1 << 33) + 5])
def test_times_are_those_of_the_kernels_reading(seconds: int) -> None:
    """Its rule: the lower 32 bits with their sign, and two bits of the extra field above them."""
    content = inodes.inode(Node(entry(changed=seconds), "file", 12), seconds)
    for place, extra in ((0x08, 0x8C), (0x0C, 0x84), (0x10, 0x88), (0x90, 0x94)):
        (low,) = struct.unpack_from("<i", content, place)
        (high,) = struct.unpack_from("<I", content, extra)
        assert low + ((high & 3) << 32) == seconds
        assert high >> 2 == 0


def test_no_time_is_later_than_the_epoch_or_before_1970() -> None:
    for changed, told in ((5, 5), (11, 10), (-1, 10)):
        content = inodes.inode(Node(entry(changed=changed), "file", 12), 10)
        assert struct.unpack_from("<iii", content, 0x08) == (10, 10, told)


@pytest.mark.parametrize(
    ("major", "minor", "inner"),
    [(8, 1, "01080000"), (1, 300, "000000002c011000"), (259, 3, "0000000003030100")],
)
def test_device_numbers_are_written_as_the_kernel_does(major: int, minor: int, inner: str) -> None:
    assert inodes.device(os.makedev(major, minor)).hex() == inner


def test_owners_and_sizes_have_upper_halves() -> None:
    node = Node(
        entry(uid=0x12345678, gid=0x9ABCDEF0, mode=stat.S_IFREG | 0o4755), "f", 12, size=(5 << 32) + 7
    )
    content = inodes.inode(node, 0)
    assert struct.unpack_from("<HHI", content) == (0o104755, 0x5678, 7)
    assert struct.unpack_from("<H", content, 0x18) == (0xDEF0,)
    assert struct.unpack_from("<I", content, 0x6C) == (5,)
    assert struct.unpack_from("<HH", content, 0x78) == (0x1234, 0x9ABC)
