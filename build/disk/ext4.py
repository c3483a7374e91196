"""Write the root file system of a planned disk: all but the content of files, whose places it tells.

Usage: ext4.py PLAN.json ASKED.json TREE.json STAGE COPIES.json [GRUB.CFG]

STAGE is all that the tree's e2fsprogs see: `tree`, the empty file `image`, and `inputs` with `mke2fs.conf`,
GRUB.CFG and small files that are needed meanwhile. Without GRUB.CFG no menu goes into the tree. TREE.json is
what layout.py found in the tree; COPIES.json gets a list of what is still missing on the disk, in its
order: `[byte of the disk, bytes, path from the tree's top, byte of the file]`.

mke2fs makes the file system, empty; inodes, folders and the places of all content are ours. They lie from its
start on without a gap, so that an image format finds the rest of the disk free, and are known before a byte
of content is read, so that it is read once. debugfs adds extended attributes and the menu, and e2fsck looks
at all of it. These programs run from the tree through its own dynamic loader: the tree is not their root,
because no mount that a root needs may lie in it. They are not the build host's, whose versions differ.

Sources of what is ours: the kernel's Documentation/filesystems/ext4; for what checksums cover, e2fsprogs'
lib/ext2fs/csum.c. All numbers little-endian.
"""

from __future__ import annotations

import collections
import enum
import itertools
import json
import os
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

if not __package__:  # run as a program: what it shares with others lies beside it
    sys.path.insert(0, os.path.dirname(__file__))

from build import crc32c
from build.disk import inodes, layout, tree
from build.disk.inodes import Extent, Node, Space
from build.disk.layout import GROUP, INODE
from build.disk.tree import BLOCK, Copy

SECTOR = 512
DESCRIPTOR = 64
"""Bytes of a group's descriptor."""
INODES_UNUSED, BLOCKS_UNUSED = 1, 2
"""Flags of a group whose bitmaps are not there yet."""
FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,sparse_super,filetype,extent,64bit,flex_bg,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum"
)
"""All that GRUB 2.06 reads and every suite's e2fsck knows: no orphan_file, no metadata_csum_seed."""
TIMES = ("atime", "ctime", "crtime", "mtime")
UNCOUNTED = "ssv kbytes_written 0"
"""Command for debugfs: forget how much was ever written."""


class Table(enum.IntEnum):
    """Tables of a group, in the order in which its descriptor has them."""

    BLOCK_BITMAP = 0
    INODE_BITMAP = 1
    INODES = 2


class Tools:
    """The tree's e2fsprogs, run from where they lie, behind in_tree's fence; STAGE is read-only to them."""

    def __init__(self, stage: str, asked: Mapping[str, Any], epoch: int) -> None:
        libraries = ":".join(f"/tree/{top}/{asked['triplet']}" for top in ("lib", "usr/lib"))
        self.command = [
            *(sys.executable, "-I", "-S", "-B", os.environ["ENTER"], stage, "--read-only"),
            *(f"/tree/{asked['loader']}", "--inhibit-cache", "--library-path", libraries),
        ]
        self.environment = {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "MKE2FS_CONFIG": "/inputs/mke2fs.conf",
            "E2FSPROGS_FAKE_TIME": str(epoch),
            "E2FSCK_TIME": str(epoch),
            "SOURCE_DATE_EPOCH": str(epoch),
            "E2FSPROGS_LIBMAGIC_SUPPRESS": "1",
        }

    def run(self, name: str, *arguments: str, text: str | None = None) -> str:
        """Run one to its end and return what it printed; ends this program when it fails."""
        done = subprocess.run(
            [*self.command, f"/tree/usr/sbin/{name}", *arguments],
            env=self.environment, input=text, encoding="utf-8", errors="surrogateescape",
            stdin=subprocess.DEVNULL if text is None else None,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout


def make(tools: Tools, place: Mapping[str, Any]) -> None:
    """Make an empty file system inside the image."""
    ids = place["filesystem"]
    extended = {
        "offset": place["start"] * SECTOR,
        "hash_seed": ids["hash_seed"],
        "resize": ids["growth"],
        "root_owner": "0:0",
        # The image is new and reads as zeros: nothing has to be zeroed, now or at first boot.
        "lazy_journal_init": 1,
        "lazy_itable_init": 0,
    }
    tools.run(
        "mke2fs", "-q", "-F", "-t", "ext4", "-O", FEATURES, "-b", "4096", "-I", "256", "-m", "0",
        "-e", "remount-ro", "-N", str(ids["inodes"]), "-J", f"size={ids['journal']}",
        "-L", ids["label"], "-U", ids["uuid"],
        "-E", ",".join(f"{key}={value}" for key, value in extended.items()),
        "/image", str(ids["blocks"]),
    )  # fmt: skip


class FileSystem:
    """An empty file system, as mke2fs leaves it, at a byte of a disk."""

    def __init__(self, disk: BinaryIO, offset: int) -> None:
        self.disk, self.offset = disk, offset
        self.head = bytearray(self.read(1024, 1024))
        self.blocks = self._number("<I", 0x04)
        self.inodes_per_group = self._number("<I", 0x28)
        self.reserved = self._number("<H", 0xCE)
        self.groups = layout.ceil(self.blocks, GROUP)
        self.seed = crc32c.register(self.head[0x68:0x78])
        self.descriptors = bytearray(self.read(BLOCK, self.groups * DESCRIPTOR))
        tables = self._tables()
        self.used = [self._used_blocks(group, tables.get(group, 0)) for group in range(self.groups)]
        """Blocks of each group that mke2fs uses, a bit each; those past the end of the file system count."""

    def _number(self, form: str, place: int) -> int:
        return int(struct.unpack_from(form, self.head, place)[0])

    def read(self, place: int, length: int) -> bytes:
        """Bytes of the file system."""
        self.disk.seek(self.offset + place)
        return self.disk.read(length)

    def write(self, place: int, content: bytes | bytearray | memoryview) -> None:
        """Write bytes of the file system."""
        self.disk.seek(self.offset + place)
        self.disk.write(content)

    def located(self, group: int, table: Table) -> int:
        """Block in which a group has a table."""
        low, high = struct.unpack_from("<I28xI", self.descriptors, group * DESCRIPTOR + 4 * table)
        return int(low | high << 32)

    def inode_place(self, number: int) -> int:
        """Byte of an inode."""
        group, index = divmod(number - 1, self.inodes_per_group)
        return self.located(group, Table.INODES) * BLOCK + index * INODE

    def first_block(self, number: int) -> int:
        """Where the content of an inode begins."""
        (high, low) = struct.unpack_from("<HI", self.read(self.inode_place(number) + 0x28, 60), 18)
        return int(low | high << 32)

    def flags(self, group: int) -> int:
        """What a group's descriptor says of its bitmaps."""
        return int(struct.unpack_from("<H", self.descriptors, group * DESCRIPTOR + 0x12)[0])

    def _tables(self) -> dict[int, int]:
        """Bits of the blocks of each group in which tables lie, be they its own or another's."""
        found: dict[int, int] = {}
        lengths = {Table.INODES: layout.ceil(self.inodes_per_group * INODE, BLOCK)}
        for group, table in itertools.product(range(self.groups), Table):
            home, bit = divmod(self.located(group, table), GROUP)
            found[home] = found.get(home, 0) | (1 << lengths.get(table, 1)) - 1 << bit
        return found

    def _used_blocks(self, group: int, tables: int) -> int:
        if not self.flags(group) & BLOCKS_UNUSED:
            return int.from_bytes(self.read(self.located(group, Table.BLOCK_BITMAP) * BLOCK, BLOCK), "little")
        first = 0
        if layout.has_superblock(group):
            first = (1 << 1 + layout.ceil(len(self.descriptors), BLOCK) + self.reserved) - 1
        beyond = max(0, (group + 1) * GROUP - self.blocks)
        return first | tables | ((1 << beyond) - 1 << GROUP - beyond)

    def settle(self, used: Sequence[int], last_inode: int, folders: Sequence[int]) -> None:
        """Write what is in use: bitmaps, descriptors, superblock, and the copies of the last two.

        `used` has the blocks of each group, `folders` the inodes of all folders; inodes are in use up to the
        last one.
        """
        per_group = self.inodes_per_group
        counts = collections.Counter((number - 1) // per_group for number in folders)
        for group, blocks in enumerate(used):
            inodes_ = min(max(last_inode - group * per_group, 0), per_group)
            self._settle_group(group, blocks, inodes_, counts[group])
        free = GROUP * self.groups - sum(each.bit_count() for each in used)
        free_inodes = self.groups * self.inodes_per_group - last_inode
        struct.pack_into("<II", self.head, 0x0C, free & 0xFFFFFFFF, free_inodes)
        struct.pack_into("<I", self.head, 0x158, free >> 32)
        for group in filter(layout.has_superblock, range(self.groups)):
            struct.pack_into("<H", self.head, 0x5A, group)
            struct.pack_into("<I", self.head, 0x3FC, crc32c.register(self.head[:0x3FC]))
            start = group * GROUP * BLOCK
            self.write(start + (0 if group else 1024), self.head)
            self.write(start + BLOCK, self.descriptors)

    def _settle_group(self, group: int, blocks: int, inodes_: int, folders: int) -> None:
        flags, touched = self.flags(group), inodes_ or blocks != self.used[group]
        if touched:
            flags &= ~BLOCKS_UNUSED
        if inodes_:
            flags &= ~INODES_UNUSED
        count = self.inodes_per_group
        numbers = (1 << inodes_) - 1 | (1 << GROUP - count) - 1 << count
        sums = [0, 0]
        if not flags & BLOCKS_UNUSED:
            sums[0] = self._write_bitmap(group, Table.BLOCK_BITMAP, blocks, BLOCK)
        if not flags & INODES_UNUSED:
            sums[1] = self._write_bitmap(group, Table.INODE_BITMAP, numbers, count // 8)
        described = bytearray(self.descriptors[group * DESCRIPTOR : (group + 1) * DESCRIPTOR])
        unused = count - inodes_
        # Counts of a group have no upper halves: none is over GROUP.
        struct.pack_into("<4H", described, 0x0C, GROUP - blocks.bit_count(), unused, folders, flags)
        struct.pack_into("<4H", described, 0x18, sums[0] & 0xFFFF, sums[1] & 0xFFFF, unused, 0)
        struct.pack_into("<2H", described, 0x38, sums[0] >> 16, sums[1] >> 16)
        own = crc32c.register(struct.pack("<I", group), self.seed)
        struct.pack_into("<H", described, 0x1E, crc32c.register(described, own) & 0xFFFF)
        self.descriptors[group * DESCRIPTOR : (group + 1) * DESCRIPTOR] = described

    def _write_bitmap(self, group: int, table: Table, bits: int, summed: int) -> int:
        content = bits.to_bytes(BLOCK, "little")
        self.write(self.located(group, table) * BLOCK, content)
        return crc32c.register(content[:summed], self.seed)


def populate(system: FileSystem, nodes: Sequence[Node], epoch: int) -> list[Copy]:
    """Write a tree without the content of its files; returns where that belongs, in the order of the disk."""
    free = Space(system.used)
    folders = [node for node in nodes if node.entry.kind == stat.S_IFDIR]
    place_folders(system, folders, free)
    copies: list[Copy] = []
    for node in nodes:
        entry = node.entry
        if entry.kind == stat.S_IFREG:
            node.size, node.extents = entry.size, inodes.place(entry.runs, free)
            copies += (copy(system.offset, node, extent) for extent in node.extents)
        elif entry.kind == stat.S_IFLNK:
            target = os.fsencode(entry.target)
            node.size = len(target)
            if node.size < layout.SHORT_LINK:
                node.inner = target
            else:
                node.extents = inodes.place([(0, 1)], free)
                system.write(node.extents[0].first * BLOCK, target)
        elif entry.kind in (stat.S_IFCHR, stat.S_IFBLK):
            node.inner = inodes.device(entry.device)
        if node.extents or entry.kind == stat.S_IFREG:
            for number, content in inodes.extent_tree(node, free, system.seed):
                system.write(number * BLOCK, content)
    write_inodes(system, nodes, epoch)
    system.settle(free.used, nodes[-1].number, [inodes.LOST, *(node.number for node in folders)])
    return copies


def place_folders(system: FileSystem, folders: Sequence[Node], free: Space) -> None:
    """Give each folder its blocks, and write them."""
    contents = [inodes.folder_blocks(node) for node in folders]
    numbers = [
        node.number
        for node, content in zip(folders, contents, strict=True)
        for _ in range(len(content) // BLOCK)
    ]
    summed = memoryview(inodes.summed_folders(b"".join(contents), numbers, system.seed))
    for node, content in zip(folders, contents, strict=True):
        node.size, count = len(content), len(content) // BLOCK
        first: list[Extent] = []
        if node.number == inodes.ROOT:  # mke2fs gave it its first block
            first = [Extent(0, system.first_block(inodes.ROOT), 1)]
        node.extents = first + inodes.place([(len(first), count)], free)
        for extent in node.extents:
            system.write(extent.first * BLOCK, summed[: extent.length * BLOCK])
            summed = summed[extent.length * BLOCK :]


def copy(offset: int, node: Node, extent: Extent) -> Copy:
    """What has to be copied for an extent of a file."""
    start = extent.logical * BLOCK
    length = min(extent.length * BLOCK, node.size - start)
    return offset + extent.first * BLOCK, length, node.path, start


def write_inodes(system: FileSystem, nodes: Sequence[Node], epoch: int) -> None:
    """Write the inodes of a tree, the one of its top in place of that of the empty file system."""
    top, *rest = (inodes.inode(node, epoch) for node in nodes)
    system.write(system.inode_place(inodes.ROOT), inodes.with_checksums(top, inodes.ROOT, system.seed))
    summed = inodes.with_checksums(b"".join(rest), inodes.FIRST, system.seed)
    number = inodes.FIRST
    while summed:
        count = system.inodes_per_group - (number - 1) % system.inodes_per_group
        system.write(system.inode_place(number), summed[: count * INODE])
        number, summed = number + count, summed[count * INODE :]


def attributes(nodes: Sequence[Node], root: str, folder: str) -> Iterator[str]:
    """Commands for debugfs that give each inode its extended attributes, by name; values go into `folder`."""
    for node in nodes:
        for index, name in enumerate(node.entry.attributes):
            file_name = f"value-{node.number}-{index}"
            with open(os.path.join(folder, file_name), "wb") as file:
                file.write(os.getxattr(os.path.join(root, node.path), name, follow_symlinks=False))
            yield f'ea_set -f /inputs/{file_name} <{node.number}> "{name}"'


def add_file(root: str, folder: str, name: str, source: str, epoch: int) -> Iterator[str]:
    """Commands that put one more file into a folder right below an existing one."""
    above, _, last = folder.rpartition("/")
    if not os.path.isdir(f"{root}{folder}"):
        yield f"cd {above}"
        yield f"mkdir {last}"
        yield from (f"sif {folder} {time} @{epoch}" for time in TIMES)
    yield f"cd {folder}"
    yield f"write {source} {name}"
    yield from (
        f"sif {name} {field} {value}" for field, value in (("mode", "0100644"), ("uid", 0), ("gid", 0))
    )
    yield from (f"sif {name} {time} @{epoch}" for time in TIMES)
    yield "cd /"


def edit(tools: Tools, target: str, commands: Sequence[str]) -> None:
    """Run commands of debugfs, which tells of errors on its output only."""
    said = tools.run("debugfs", "-w", "-f", "/dev/stdin", target, text="\n".join(commands) + "\n")
    silent = re.compile(r"debugfs( 1\.|: )|Allocated inode: |$")
    if wrong := [line for line in said.splitlines() if not silent.match(line)]:
        sys.exit("debugfs: " + wrong[0])


def main(plan_path: str, asked_path: str, tree_path: str, stage: str, copies: str, grub: str = "") -> None:
    """Make, fill and check the file system."""
    with open(plan_path, encoding="utf-8") as file:
        plan = json.load(file)
    with open(asked_path, encoding="utf-8") as file:
        asked = json.load(file)
    place = next(row for row in plan["partitions"] if row["role"] == "root")
    offset, epoch = place["start"] * SECTOR, plan["epoch"]
    root, image, folder = (os.path.join(stage, name) for name in ("tree", "image", "inputs"))
    target = f"/image?offset={offset}"
    tools = Tools(stage, asked, epoch)
    os.truncate(image, plan["size"])
    make(tools, place)
    nodes = inodes.collect(tree.read(tree_path))
    with open(image, "r+b") as disk:
        missing = populate(FileSystem(disk, offset), nodes, epoch)
    with open(copies, "w", encoding="utf-8") as file:
        file.write(json.dumps(missing))
    commands = [UNCOUNTED, *attributes(nodes, root, folder)]
    if grub:
        commands += add_file(root, "/boot/grub", "grub.cfg", f"/inputs/{grub}", epoch)
    edit(tools, target, commands)
    tools.run("e2fsck", "-fn", target)


if __name__ == "__main__":
    main(*sys.argv[1:])
