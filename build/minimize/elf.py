"""Find programs and libraries of a tree that would not start.

Reads each ELF file's own DT_NEEDED, DT_RPATH and DT_RUNPATH (System V ABI, "Dynamic Section") and looks
for the libraries where ld.so(8) does: there, in ld.so.conf's folders and in the default ones. One pass
over the tree instead of one `ldd` a file, and nothing of the tree is run.
"""

from __future__ import annotations

import errno
import glob
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

DT_NEEDED, DT_STRTAB, DT_STRSZ, DT_RPATH, DT_RUNPATH = 1, 5, 10, 15, 29
PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3

MULTIARCH = {(2, 62): "x86_64-linux-gnu", (1, 3): "i386-linux-gnu", (2, 183): "aarch64-linux-gnu"}
"""Folder of the default libraries by ELF class and machine (e_machine: 62 x86-64, 3 386, 183 AArch64)."""

WHERE = ("usr", "opt", "bin", "sbin", "lib", "lib64", "etc", "root", "srv")
SKIPPED = ("usr/lib/modules", "lib/modules", "usr/lib/debug", "usr/share/doc", "usr/lib/grub", "usr/src")
"""Folders without anything that ld.so loads."""


@dataclass(frozen=True)
class Elf:
    """What ld.so needs to know of a file."""

    kind: tuple[int, int]
    interpreter: str
    needed: tuple[str, ...]
    paths: tuple[str, ...]


class NotElf(Exception):
    """The file is no ELF file that ld.so could load, or it is cut off."""


def parse(data: bytes | mmap.mmap) -> Elf:
    """Read an ELF image; raises NotElf."""
    try:
        return _parse(data)
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise NotElf(str(error)) from None


def _parse(data: bytes | mmap.mmap) -> Elf:
    if data[:4] != b"\x7fELF" or data[4] not in (1, 2) or data[5] not in (1, 2):
        raise NotElf("no ELF header")
    wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
    machine = struct.unpack_from(order + "H", data, 18)[0]
    offset = struct.unpack_from(order + ("Q" if wide else "I"), data, 32 if wide else 28)[0]
    size, count = struct.unpack_from(order + "HH", data, 54 if wide else 42)
    segments = [_segment(data, offset + number * size, wide, order) for number in range(count)]
    interpreter = next(
        (
            data[at : at + length].rstrip(b"\0").decode()
            for kind, at, _, length in segments
            if kind == PT_INTERP
        ),
        "",
    )
    dynamic = next((data[at : at + length] for kind, at, _, length in segments if kind == PT_DYNAMIC), b"")
    entry = struct.Struct(order + ("qQ" if wide else "iI"))
    entries = list(entry.iter_unpack(dynamic[: len(dynamic) // entry.size * entry.size]))
    values = dict(reversed(entries))
    if DT_STRTAB not in values:
        return Elf((data[4], machine), interpreter, (), ())
    table = _file_offset(segments, values[DT_STRTAB])
    strings = data[table : table + values.get(DT_STRSZ, 0)]

    def name(at: int) -> str:
        return strings[at : strings.index(b"\0", at)].decode()

    needed = tuple(name(value) for tag, value in entries if tag == DT_NEEDED)
    paths = tuple(
        part
        for tag, value in entries
        if tag in (DT_RPATH, DT_RUNPATH)
        for part in name(value).split(":")
        if part
    )
    return Elf((data[4], machine), interpreter, needed, paths)


def _segment(data: bytes | mmap.mmap, at: int, wide: bool, order: str) -> tuple[int, int, int, int]:
    """Type, file offset, virtual address and file size of a program header."""
    if wide:
        kind, _, offset, address, _, length = struct.unpack_from(order + "IIQQQQ", data, at)
    else:
        kind, offset, address, _, length = struct.unpack_from(order + "IIIII", data, at)
    return kind, offset, address, length


def _file_offset(segments: Iterable[tuple[int, int, int, int]], address: int) -> int:
    for kind, offset, start, length in segments:
        if kind == PT_LOAD and start <= address < start + length:
            return offset + address - start
    raise NotElf("string table outside the file")


class Tree:
    """Paths of a tree as the image sees them: an absolute link starts at the tree's own root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._kinds: dict[str, tuple[int, int] | None] = {}
        self._real: dict[str, str | None] = {}

    def real(self, path: str, depth: int = 0) -> str | None:
        """Follow the links of a path; None when it leads nowhere."""
        if path not in self._real:
            self._real[path] = self._follow(path, depth)
        return self._real[path]

    def _follow(self, path: str, depth: int) -> str | None:
        above, _, name = path.rpartition("/")
        folder = self.real(above, depth) if above else "/"
        if folder is None or name in ("", "."):
            return folder
        if name == "..":
            return os.path.dirname(folder)
        here = f"{folder.rstrip('/')}/{name}"
        try:
            target = os.readlink(self.root + here)
        except OSError as error:
            return here if error.errno == errno.EINVAL else None  # EINVAL: it is there, and no link
        return self.real(os.path.join(folder, target), depth + 1) if depth < 40 else None

    def kind(self, path: str) -> tuple[int, int] | None:
        """ELF class and machine of a file, or None."""
        if path not in self._kinds:
            real = self.real(path)
            self._kinds[path] = self._read_kind(real) if real else None
        return self._kinds[path]

    def _read_kind(self, real: str) -> tuple[int, int] | None:
        try:
            with open(self.root + real, "rb") as file:
                head = file.read(20)
        except OSError:
            return None
        if len(head) < 20 or head[:4] != b"\x7fELF":
            return None
        return head[4], struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)[0]

    def configured(self, path: str = "/etc/ld.so.conf", depth: int = 0) -> list[str]:
        """Folders that ld.so.conf(5) and the files it includes name."""
        real = self.real(path)
        if real is None or depth > 4:
            return []
        found: list[str] = []
        with open(self.root + real, encoding="utf-8", errors="replace") as file:
            for line in file:
                text = line.partition("#")[0].strip()
                if text.startswith("include"):
                    pattern = os.path.join(os.path.dirname(path), text.split(None, 1)[1])
                    for name in sorted(glob.glob(self.root + pattern)):
                        found += self.configured(name[len(self.root) :], depth + 1)
                elif text:
                    found.append(text.split("=")[0])
        return found

    def executables(self) -> Iterator[str]:
        """Regular files that begin as ELF does."""
        for top in WHERE:
            if os.path.islink(os.path.join(self.root, top)):
                continue
            yield from self._below(f"/{top}")

    def _below(self, folder: str) -> Iterator[str]:
        try:
            entries = list(os.scandir(self.root + folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            inside = f"{folder}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if inside[1:] not in SKIPPED:
                    yield from self._below(inside)
            elif entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                if status.st_size > 52 and (status.st_mode & 0o111 or ".so" in entry.name):
                    yield inside


@dataclass
class Report:
    """What a check found."""

    count: int = 0
    gaps: list[str] = field(default_factory=list)
    """A line for each library that is nowhere."""
    used: set[str] = field(default_factory=set)
    """Every file that the others cannot start without."""


def _folders(tree: Tree, path: str, elf: Elf, configured: list[str]) -> list[str]:
    """Where ld.so looks for the libraries of a file, in its order."""
    origin = os.path.dirname(tree.real(path) or path)
    own = [
        part.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", origin).replace("$LIB", "lib")
        for part in elf.paths
    ]
    arch = MULTIARCH.get(elf.kind, "")
    default = [f"/lib/{arch}", f"/usr/lib/{arch}", "/lib64", "/usr/lib64", "/lib", "/usr/lib"]
    # A plug-in finds in its program what lies beside it (a JVM's libraries, for one).
    beside = [] if elf.interpreter else [origin, f"{origin}/server", os.path.dirname(origin)]
    return [*own, *configured, *default, *beside]


def check(root: str) -> Report:
    """Check every ELF file of a tree."""
    tree = Tree(root.rstrip("/"))
    configured = tree.configured()
    report = Report()
    for path in tree.executables():
        try:
            elf = _open(tree.root + path)
        except NotElf as error:
            report.gaps.append(f"{path}: broken ELF file ({error})")
            continue
        if elf is None:
            continue
        report.count += 1
        report.used.add(path)
        if elf.interpreter:
            real = tree.real(elf.interpreter)
            if real is None:
                report.gaps.append(f"{path}: no program interpreter {elf.interpreter}")
            report.used.update((elf.interpreter, real) if real else ())
        folders = _folders(tree, path, elf, configured) if elf.needed else []
        for name in elf.needed:
            places = [name] if "/" in name else [f"{folder}/{name}" for folder in folders]
            place = next((place for place in places if tree.kind(place) == elf.kind), None)
            if place is None:
                report.gaps.append(f"{path}: {name} is nowhere")
            else:
                report.used.update((place, tree.real(place) or place))
    return report


def _open(path: str) -> Elf | None:
    with open(path, "rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse(data)


def main() -> int:
    """Print what is missing; 0 nothing, 1 something.

    `check ROOT USED` looks at every ELF file and notes in USED what they need; `recheck ROOT USED` sees
    whether all of that is still there.
    """
    verb, root, noted = sys.argv[1:4]
    if verb == "recheck":
        with open(noted, encoding="utf-8", errors="surrogateescape") as file:
            gone = [path for path in file.read().split("\0") if path and not os.path.lexists(root + path)]
        print("\n".join([*gone, f"{len(gone)} files are gone"]))
        return 1 if gone else 0
    report = check(root)
    with open(noted, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\0".join(sorted(report.used)))
    print("\n".join([*report.gaps, f"{report.count} ELF files, {len(report.gaps)} gaps"]))
    return 1 if report.gaps else 0


if __name__ == "__main__":
    sys.exit(main())
