"""Write the root file system of a planned disk with the target suite's own e2fsprogs.

Usage: ext4.py PLAN.json ASKED.json STAGE [GRUB.CFG]

STAGE is all that the tree's e2fsprogs see: `tree`, the empty file `image`, and `inputs` with `mke2fs.conf`,
GRUB.CFG and small files that are needed meanwhile. Without GRUB.CFG no menu goes into the tree.

Prints progress, `LABEL<TAB>DONE<TAB>TOTAL` a line, in bytes. The programs run from the tree through its
own dynamic loader: the tree is not their root, because no mount that a root needs may lie in it. They are
not the build host's, because each version lays a file system out a little differently.

mke2fs takes over what a tree holds; left over are times that tell when it was built, and the order in
which a build host's file system lists extended attributes. Both are settled by debugfs: no time is later
than SOURCE_DATE_EPOCH. Places of fields: kernel documentation, ext4 disk layout.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

SECTOR = 512
FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,sparse_super,filetype,extent,64bit,flex_bg,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum"
)
"""All that GRUB 2.06 reads and every suite's e2fsck knows: no orphan_file, no metadata_csum_seed."""
INODE_TIMES = {"atime": (0x08, 0x8C), "ctime": (0x0C, 0x84), "crtime": (0x90, 0x94), "mtime": (0x10, 0x88)}
"""Offsets of seconds and of the extra word (nanoseconds and two more bits of seconds) in an inode."""
ATTRIBUTE_NAMES = {
    1: "user.",
    2: "system.posix_acl_access",
    3: "system.posix_acl_default",
    4: "trusted.",
    6: "security.",
    7: "system.",
}
"""What an attribute's name begins with, by its index."""
UNCOUNTED = "ssv kbytes_written 0"
"""Command for debugfs: forget how much was ever written, which tells how the tree lay on the host's disk."""
BLOCK = 4096
ROOT_INODE = 2
FIRST_FREE = 11


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
    """Make the file system inside the image and copy the tree into it."""
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
        "-d", "/tree", "/image", str(ids["blocks"]),
    )  # fmt: skip


class Watch(threading.Thread):
    """Tell how many bytes of the image are written while another program writes them."""

    def __init__(self, image: str, label: str, total: int) -> None:
        super().__init__(daemon=True)
        self.image, self.label, self.total = image, label, total
        self.over = threading.Event()

    def run(self) -> None:
        """Look twice a second until told to stop."""
        while not self.over.wait(0.5):
            report(self.label, min(os.stat(self.image).st_blocks * 512, self.total), self.total)

    def stop(self) -> None:
        """End, with all of it done."""
        self.over.set()
        self.join()
        report(self.label, self.total, self.total)


def report(label: str, done: int, total: int) -> None:
    """One line of progress."""
    print(label, done, total, sep="\t", flush=True)


def inodes(disk: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of every inode in use of the file system at this byte offset."""
    disk.seek(offset + 1024)
    block = disk.read(1024)
    (total,) = struct.unpack_from("<I", block, 0x00)
    (log_size,) = struct.unpack_from("<I", block, 0x18)
    (per_group,) = struct.unpack_from("<I", block, 0x28)
    (inode_size,) = struct.unpack_from("<H", block, 0x58)
    (descriptor_size,) = struct.unpack_from("<H", block, 0xFE)
    size = 1024 << log_size
    disk.seek(offset + size)
    descriptors = disk.read(total // per_group * descriptor_size)
    for group in range(total // per_group):
        place = group * descriptor_size
        table_low, unused_low = struct.unpack_from("<8xI16xH", descriptors, place)
        table_high, unused_high = struct.unpack_from("<40xI6xH", descriptors, place)
        unused = unused_low | unused_high << 16
        disk.seek(offset + (table_low | table_high << 32) * size)
        table = disk.read((per_group - unused) * inode_size)
        for index in range(per_group - unused):
            inode = table[index * inode_size : (index + 1) * inode_size]
            mode, links = struct.unpack_from("<H", inode, 0)[0], struct.unpack_from("<H", inode, 0x1A)[0]
            number = group * per_group + index + 1
            if mode and links and (number >= FIRST_FREE or number == ROOT_INODE):
                yield number, inode


def settle_times(number: int, inode: bytes, epoch: int) -> Iterator[str]:
    """Commands for debugfs that set an inode's times to the epoch; an older modification stays as it was."""
    for name, (place, extra) in INODE_TIMES.items():
        (seconds,) = struct.unpack_from("<I", inode, place)
        # Read without its sign: a time before 1970 has no business in an image either.
        if seconds > epoch or (name != "mtime" and seconds != epoch):
            yield f"sif <{number}> {name} @{epoch}"
        if struct.unpack_from("<I", inode, extra)[0]:
            yield f"sif <{number}> {name}_extra 0"


def attributes(disk: BinaryIO, offset: int, inode: bytes) -> dict[str, bytes]:
    """Extended attributes of an inode, from its own end and its outer block; values as they lie there."""
    start = 128 + int(struct.unpack_from("<H", inode, 0x80)[0])
    found: dict[str, bytes] = {}
    if inode[start : start + 4] == b"\0\0\x02\xea":
        found |= entries(inode[start + 4 :], 0)
    low, high = struct.unpack_from("<I10xH", inode, 0x68)
    if outer := low | high << 32:
        disk.seek(offset + outer * BLOCK)
        found |= entries(disk.read(BLOCK), 32)
    return found


def entries(area: bytes, place: int) -> dict[str, bytes]:
    """Read a list of attributes that begins at `place`; values are found from the start of the area."""
    found: dict[str, bytes] = {}
    while area[place : place + 4] != bytes(4):
        length, index, value, size = struct.unpack_from("<BBH4xI", area, place)
        name = area[place + 16 : place + 16 + length].decode(errors="surrogateescape")
        found[ATTRIBUTE_NAMES[index] + name] = area[value : value + size]
        place += 16 + -(-length // 4) * 4
    return found


def settle_attributes(number: int, found: Mapping[str, bytes], folder: str) -> Iterator[str]:
    """Commands for debugfs that give an inode its attributes anew, by name; their values go into `folder`."""
    if len(found) < 2:
        return
    yield from (f'ea_rm <{number}> "{name}"' for name in sorted(found))
    for index, (name, value) in enumerate(sorted(found.items())):
        file_name = f"value-{number}-{index}"
        with open(os.path.join(folder, file_name), "wb") as file:
            file.write(value)
        yield f'ea_set -r -f /inputs/{file_name} <{number}> "{name}"'


def settle_root(status: os.stat_result, epoch: int) -> Iterator[str]:
    """Commands that give the top directory what mke2fs does not take over."""
    yield f"sif <{ROOT_INODE}> mode 0{status.st_mode:o}"
    yield f"sif <{ROOT_INODE}> uid {status.st_uid}"
    yield f"sif <{ROOT_INODE}> gid {status.st_gid}"
    yield f"sif <{ROOT_INODE}> mtime @{min(int(status.st_mtime), epoch)}"


def add_file(root: str, folder: str, name: str, source: str, epoch: int) -> Iterator[str]:
    """Commands that put one more file into a folder right below an existing one."""
    above, _, last = folder.rpartition("/")
    if not os.path.isdir(f"{root}{folder}"):
        yield f"cd {above}"
        yield f"mkdir {last}"
        yield from (f"sif {folder} {time} @{epoch}" for time in INODE_TIMES)
    yield f"cd {folder}"
    yield f"write {source} {name}"
    yield from (
        f"sif {name} {field} {value}" for field, value in (("mode", "0100644"), ("uid", 0), ("gid", 0))
    )
    yield from (f"sif {name} {time} @{epoch}" for time in INODE_TIMES)
    yield "cd /"


def edit(tools: Tools, target: str, commands: Sequence[str]) -> None:
    """Run commands of debugfs, which tells of errors on its output only."""
    said = tools.run("debugfs", "-w", "-f", "/dev/stdin", target, text="\n".join(commands) + "\n")
    silent = re.compile(r"debugfs( 1\.|: )|Allocated inode: |$")
    if wrong := [line for line in said.splitlines() if not silent.match(line)]:
        sys.exit("debugfs: " + wrong[0])


def main(plan_path: str, asked_path: str, stage: str, grub: str = "") -> None:
    """Make, settle and check the file system."""
    with open(plan_path, encoding="utf-8") as file:
        plan = json.load(file)
    with open(asked_path, encoding="utf-8") as file:
        asked = json.load(file)
    place = next(row for row in plan["partitions"] if row["role"] == "root")
    offset, epoch = place["start"] * SECTOR, plan["epoch"]
    root, image, folder = (os.path.join(stage, name) for name in ("tree", "image", "inputs"))
    target = f"/image?offset={offset}"
    tools = Tools(stage, asked, epoch)
    with open(image, "wb") as disk:
        disk.truncate(plan["size"])
    watch = Watch(image, "root file system", plan["tree"]["blocks"] * 4096)
    watch.start()
    make(tools, place)
    watch.stop()
    commands = [UNCOUNTED]
    with open(image, "rb") as disk:
        for number, inode in inodes(disk, offset):
            commands += settle_attributes(number, attributes(disk, offset, inode), folder)
            commands += settle_times(number, inode, epoch)
    if grub:
        commands += add_file(root, "/boot/grub", "grub.cfg", f"/inputs/{grub}", epoch)
    commands += settle_root(os.stat(root), epoch)
    edit(tools, target, commands)
    tools.run("e2fsck", "-fn", target)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads the progress was killed: so are we
    main(*sys.argv[1:])
