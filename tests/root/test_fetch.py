"""Packages into the shared cache: over cut lines, from mirrors that lie, onto disks that are full."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build import wire
from build.agent.events import Failure
from build.agent.verbs import fetch
from tests import mirror
from tests.agent import Agent, Refused
from tests.mirror import Mirror

pytestmark = pytest.mark.root
Events = list[dict[str, Any]]
SIZES = {"big": 3 << 20, "small": 1000, "tiny": 1}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Mirror, str]]:
    """A pool of files; what is in them does not matter here."""
    archive = Mirror.__new__(Mirror)
    archive.root, archive.asked, archive.headers, archive.faults = tmp_path / "pool", [], [], {}
    archive.root.mkdir()
    for name, size in SIZES.items():
        (archive.root / f"{name}.deb").write_bytes(os.urandom(size))
    with archive.served() as url:
        yield archive, url


@pytest.fixture
def packages(served: tuple[Mirror, str]) -> list[dict[str, Any]]:
    archive, url = served
    return [
        {
            "name": name,
            "version": "1:2",
            "arch": "all",
            "size": size,
            "sha256": hashlib.sha256((archive.root / f"{name}.deb").read_bytes()).hexdigest(),
            "url": f"{url}/{name}.deb",
            "essential": False,
        }
        for name, size in SIZES.items()
    ]


@pytest.fixture
def bring(tmp_path: Path, packages: list[dict[str, Any]]) -> Callable[..., tuple[wire.Fetched, Events]]:
    def run(**changes: Any) -> tuple[wire.Fetched, Events]:
        events: Events = []
        request = wire.Fetch(**{"packages": tuple(packages), "debs": str(tmp_path / "debs"), **changes})
        answer = fetch.run(request, lambda kind, **fields: events.append({"event": kind, **fields}))
        return answer, events

    return run


Bring = Callable[..., tuple[wire.Fetched, Events]]
Served = tuple[Mirror, str]


def test_what_comes_is_whole_and_counted(bring: Bring, served: Served, tmp_path: Path) -> None:
    answer, events = bring()
    assert answer.bytes == sum(SIZES.values())
    assert [Path(path).name for path in answer.paths] == [f"{name}_1%3a2_all.deb" for name in SIZES]
    for path, name in zip(answer.paths, SIZES, strict=True):
        assert Path(path).read_bytes() == (served[0].root / f"{name}.deb").read_bytes()
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert done == sorted(done)
    assert done[-1] == sum(SIZES.values())
    assert len(list((tmp_path / "debs").iterdir())) == len(SIZES)


def test_what_is_there_is_not_fetched_again(bring: Bring, served: Served) -> None:
    bring()
    served[0].asked.clear()
    answer, _ = bring()
    assert answer.bytes == 0
    assert served[0].asked == []


def test_what_root_has_is_copied_unless_it_is_damaged(
    bring: Bring, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ROOTS", tmp_path / "roots")
    answer, _ = bring(debs=str(tmp_path / "roots"))
    damaged = Path(answer.paths[0])
    damaged.write_bytes(bytes(SIZES["big"]))
    served[0].asked.clear()
    answer, _ = bring()
    assert answer.bytes == SIZES["big"]
    assert served[0].asked == ["big.deb"]
    for path, name in zip(answer.paths, SIZES, strict=True):
        assert Path(path).read_bytes() == (served[0].root / f"{name}.deb").read_bytes()
        assert Path(path).parent == tmp_path / "debs"
    assert len(list((tmp_path / "debs").iterdir())) == len(SIZES)


def test_a_damaged_file_of_the_cache_is_fetched_again(bring: Bring, served: Served) -> None:
    answer, _ = bring()
    damaged = Path(answer.paths[0])
    damaged.write_bytes(b"\0" * SIZES["big"])
    served[0].asked.clear()
    again, _ = bring()
    assert served[0].asked == ["big.deb"]
    assert damaged.read_bytes() == (served[0].root / "big.deb").read_bytes()
    assert again.paths == answer.paths


def test_a_cut_line_goes_on_where_it_was_cut(bring: Bring, served: Served) -> None:
    archive, _ = served

    def once(handler: Any, data: bytes) -> None:
        archive.faults.clear()
        mirror.cut(1 << 20)(handler, data)

    archive.faults["big.deb"] = once
    answer, events = bring()
    assert Path(answer.paths[0]).read_bytes() == (archive.root / "big.deb").read_bytes()
    ranges = [headers["Range"] for headers in archive.headers if "Range" in headers]
    assert len(ranges) == 1
    assert 0 < int(ranges[0][6:-1]) <= 1 << 20
    assert max(event["done"] for event in events) == sum(SIZES.values())


def test_what_an_earlier_run_began_is_used(
    bring: Bring, served: Served, packages: list[dict[str, Any]], tmp_path: Path
) -> None:
    part = tmp_path / "debs" / f".{packages[0]['sha256']}.part"
    part.parent.mkdir()
    part.write_bytes((served[0].root / "big.deb").read_bytes()[:12345])
    bring()
    assert "bytes=12345-" in [headers.get("Range") for headers in served[0].headers]
    assert not part.exists()


def test_a_server_without_ranges_starts_over(
    bring: Bring, served: Served, packages: list[dict[str, Any]], tmp_path: Path
) -> None:
    part = tmp_path / "debs" / f".{packages[0]['sha256']}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 12345)

    def whole(handler: Any, data: bytes) -> None:
        handler.answer(200, data)

    served[0].faults["big.deb"] = whole
    answer, _ = bring()
    assert Path(answer.paths[0]).read_bytes() == (served[0].root / "big.deb").read_bytes()


def test_a_wrong_file_is_named_and_not_kept(bring: Bring, served: Served, tmp_path: Path) -> None:
    (served[0].root / "small.deb").write_bytes(b"y" * SIZES["small"])
    with pytest.raises(Failure, match=r"small\.deb is not what was signed") as caught:
        bring()
    assert "another mirror" in caught.value.hint
    assert not (tmp_path / "debs" / "small_1%3a2_all.deb").exists()


def test_a_file_that_grew_is_refused(bring: Bring, served: Served) -> None:
    with (served[0].root / "small.deb").open("ab") as file:
        file.write(b"more")
    with pytest.raises(Failure, match=r"sends too much for small\.deb: more than 1000 bytes"):
        bring()


def test_a_file_that_shrank_is_refused(
    bring: Bring, served: Served, packages: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = served[0].root / "small.deb"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Failure, match=r"small\.deb is not what was signed"):
        bring(packages=packages[1:2])
    assert list((tmp_path / "debs").iterdir()) == [], "the next run starts anew"


def test_a_part_that_reaches_further_than_the_mirrors_file_is_dropped(
    bring: Bring, served: Served, packages: list[dict[str, Any]], tmp_path: Path
) -> None:
    archive, _ = served

    def beyond(handler: Any, data: bytes) -> None:
        handler.answer(*((416, b"") if "Range" in handler.headers else (200, data)))

    archive.faults["small.deb"] = beyond
    part = tmp_path / "debs" / f".{packages[1]['sha256']}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 999)
    answer, _ = bring()
    assert Path(answer.paths[1]).read_bytes() == (archive.root / "small.deb").read_bytes()


def test_a_file_that_is_gone_is_named(bring: Bring, served: Served) -> None:
    (served[0].root / "tiny.deb").unlink()
    with pytest.raises(Failure, match=r"tiny\.deb is not there"):
        bring()


def test_a_busy_server_is_asked_again_and_a_dead_one_named(
    bring: Bring, served: Served, packages: list[dict[str, Any]]
) -> None:
    archive, _ = served

    def once(handler: Any, data: bytes) -> None:
        archive.faults.clear()
        mirror.status(503)(handler, data)

    archive.faults["tiny.deb"] = once
    bring()
    dead = f"http://127.0.0.1:{mirror.closed_port()}"
    lost = [{**package, "sha256": "0" * 64, "url": f"{dead}/debian/pool/x.deb"} for package in packages[:1]]
    with pytest.raises(Failure, match=f"mirror {dead}/debian does not answer"):
        bring(packages=lost)
    with pytest.raises(Failure, match=f"proxy {dead} does not bring"):
        bring(packages=lost, apt_proxy=dead)


def test_a_mirror_may_be_a_folder(bring: Bring, served: Served, packages: list[dict[str, Any]]) -> None:
    local = [{**package, "url": f"file://{served[0].root}/{package['name']}.deb"} for package in packages]
    answer, _ = bring(packages=local)
    assert answer.bytes == sum(SIZES.values())
    assert served[0].asked == []


def test_a_redirect_is_followed(bring: Bring, served: Served, packages: list[dict[str, Any]]) -> None:
    archive, url = served

    def moved(handler: Any, data: bytes) -> None:
        handler.answer(302, b"gone", {"Location": f"{url}/tiny.deb"})

    archive.faults["old.deb"] = moved
    answer, _ = bring(packages=[{**packages[2], "url": f"{url}/old.deb"}])
    assert answer.bytes == 1


def test_a_full_disk_is_told_before_anything_comes(
    served: Served, packages: list[dict[str, Any]], tmp_path: Path
) -> None:
    debs = tmp_path / "debs"
    debs.mkdir()
    mount = f'mount -t tmpfs -o size=1m tmpfs {debs}; exec "$0" "$@"'
    agent = Agent(("unshare", "--mount", "--propagation", "private", "sh", "-c", mount))
    try:
        with pytest.raises(Refused, match="no space for the packages") as caught:
            agent.call("fetch", packages=packages, debs=str(debs), apt_proxy="")
    finally:
        agent.close()
    assert "4 MiB needed, 1 MiB free" in caught.value.message
    assert "LOCATION" in caught.value.hint
    assert served[0].asked == []
