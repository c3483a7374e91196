"""The EFI system partition, read back from its bytes alone."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build.disk import fat

SECTORS = 36 * 2048
EPOCH = 1_700_000_001


def written(files: dict[str, bytes], sectors: int = SECTORS, start: int = 8, epoch: int = EPOCH) -> bytes:
    disk = io.BytesIO(bytes((start + sectors) * 512))
    fat.write(disk, start, sectors, 0x1234ABCD, "ESP", epoch, files)
    image = disk.getvalue()
    assert len(image) == (start + sectors) * 512
    assert not any(image[: start * 512])
    return image[start * 512 :]


def listed(image: bytes) -> dict[str, bytes]:
    """Every file by its path, following the chains of the first table."""
    size, per, reserved, tables = struct.unpack_from("<HBHB", image, 11)
    fat_sectors, root = struct.unpack_from("<I4xI", image, 36)
    data = (reserved + tables * fat_sectors) * size
    table = image[reserved * size :]

    def chain(cluster: int) -> bytes:
        content = b""
        while cluster < 0x0FFFFFF8:
            content += image[data + (cluster - 2) * per * size :][: per * size]
            (cluster,) = struct.unpack_from("<I", table, cluster * 4)
            assert cluster >= 2
        return content

    def walk(cluster: int, above: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        folder = chain(cluster)
        for place in range(0, len(folder), 32):
            name, attributes = struct.unpack_from("<11sB", folder, place)
            if name[0] in (0, ord(".")) or attributes == fat.VOLUME:
                continue
            stem, suffix = name[:8].decode().rstrip(), name[8:].decode().rstrip()
            path = above + (f"{stem}.{suffix}" if suffix else stem)
            high, _, _, low, length = struct.unpack_from("<HHHHI", folder, place + 20)
            first = high << 16 | low
            if attributes == fat.DIRECTORY:
                found |= walk(first, f"{path}/")
            else:
                found[path] = chain(first)[:length] if length else b""
        return found

    return walk(root, "")


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["EFI/BOOT/BOOTX64.EFI", "A", "EFI/B.TXT", "EFI/BOOT/Z9", "D/E/F"]),
        st.binary(max_size=3000),
        max_size=5,
    )
)
def test_files_come_back(files: dict[str, bytes]) -> None:
    assert listed(written(files)) == files


def test_both_tables_and_the_count_of_free_clusters_agree() -> None:
    image = written({"EFI/BOOT/BOOTX64.EFI": b"x" * 5000})
    (fat_sectors,) = struct.unpack_from("<I", image, 36)
    first, second = (image[(32 + copy * fat_sectors) * 512 :][: fat_sectors * 512] for copy in (0, 1))
    assert first == second
    shape = fat.geometry(SECTORS)
    entries = struct.unpack_from(f"<{shape.clusters + 2}I", first)
    assert struct.unpack_from("<II", image, 512 + 488) == (entries[2:].count(0), entries.index(0))
    assert image[:512] == image[6 * 512 : 7 * 512]
    assert struct.unpack_from("<I11s8s", image, 67) == (0x1234ABCD, b"ESP        ", b"FAT32   ")


def test_equal_inputs_give_equal_bytes_and_the_time_is_the_given_one() -> None:
    files = {"EFI/BOOT/BOOTX64.EFI": b"x"}
    assert written(files) == written(files)
    assert written(files) != written(files, epoch=EPOCH + 2)
    assert fat.stamp(0) == fat.stamp(315532800) == (0x21, 0)
    assert fat.stamp(1 << 40) == fat.stamp(4354819198)
    # 2023-11-14 22:13:21
    assert fat.stamp(EPOCH) == (43 << 9 | 11 << 5 | 14, 22 << 11 | 13 << 5 | 10)


@pytest.mark.parametrize("mib", [36, 64, 100, 512, 4096])
def test_every_size_is_fat32_and_holds_its_own_tables(mib: int) -> None:
    shape = fat.geometry(mib * 2048)
    assert shape.clusters >= fat.LEAST_CLUSTERS
    assert shape.fat_sectors * 128 >= shape.clusters + 2
    assert shape.data % 8 == 0
    assert shape.data + shape.clusters * shape.per_cluster <= mib * 2048


@pytest.mark.parametrize(
    "name", ["boot", "BOOT/long.text", "TOOLONGNAME", "A.B.C", "", "A//B", "Ü", ".", ".."]
)
def test_a_name_fat_cannot_hold_plainly_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"8\.3"):
        fat.tree({name: b""})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fat.geometry(32 * 2048)
    with pytest.raises(ValueError, match="do not fit"):
        written({"A": bytes(37 << 20)})
    with pytest.raises(ValueError, match="a file and a folder"):
        fat.tree({"A": b"", "A/B": b""})
    with pytest.raises(ValueError, match="too many"):
        written({f"F{number}": b"" for number in range(20)})
