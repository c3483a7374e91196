"""What is sent of a file, and what is made of it on the other side."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build import wire
from build.agent.events import Failure, emit
from build.agent.verbs import send
from build.engine import fetch
from build.engine.fetch import Sink, is_here
from build.engine.hosts.host import Host

pytestmark = pytest.mark.unit
MIB = 1 << 20
PIECES = st.lists(
    st.tuples(st.sampled_from(["hole", "zeros", "text", "noise"]), st.integers(1, 3 * MIB)), max_size=6
)


def write(path: Path, pieces: list[tuple[str, int]]) -> None:
    with path.open("wb") as file:
        for kind, size in pieces:
            if kind == "hole":
                file.seek(size, os.SEEK_CUR)
            else:
                data = {
                    "zeros": bytes(size),
                    "text": (b"0123456789\n" * size)[:size],
                    "noise": os.urandom(size),
                }
                file.write(data[kind])
        file.truncate(sum(size for _, size in pieces))


@settings(max_examples=25, deadline=None)
@given(pieces=PIECES, share=st.floats(0, 1))
def test_what_arrives_is_what_was_sent_from_any_offset_on(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[str, int]], share: float
) -> None:
    folder = tmp_path_factory.mktemp("send")
    source, part = folder / "source", folder / "part"
    write(source, pieces)
    whole = source.read_bytes()
    have = int(len(whole) * share)
    part.write_bytes(whole[:have])
    digest = hashlib.sha256(whole[:have])
    with source.open("rb") as file, part.open("a+b", buffering=0) as target:
        sink = Sink(target.fileno(), have, digest)
        frames = list(send.frames(file.fileno(), have))
        for head, data in frames:
            offset, plain, packed = send.HEAD.unpack(head)
            assert packed == len(data) <= plain or not plain
            sink.take(offset, plain, data)
        sink.finish(len(whole))
    assert part.read_bytes() == whole
    assert digest.hexdigest() == hashlib.sha256(whole).hexdigest()
    assert send.HEAD.unpack(frames[-1][0]) == (len(whole), 0, 0)


def test_holes_and_zeros_are_not_sent(tmp_path: Path) -> None:
    write(tmp_path / "f", [("hole", 64 * MIB), ("text", MIB), ("zeros", 4 * MIB), ("hole", 64 * MIB)])
    with (tmp_path / "f").open("rb") as file:
        frames = [send.HEAD.unpack(head) for head, _ in send.frames(file.fileno(), 0)]
    assert [(offset, plain) for offset, plain, _ in frames] == [(64 * MIB, MIB), (133 * MIB, 0)]
    assert sum(packed for _, _, packed in frames) < MIB // 10


@pytest.mark.parametrize(
    ("offset", "plain", "data"),
    [(0, 10, b"short"), (0, 5, b"x" * 5), (8, 20, b"no zlib stream")],
    ids=["cut off", "before what is there", "broken"],
)
def test_a_broken_stream_is_told_so(tmp_path: Path, offset: int, plain: int, data: bytes) -> None:
    with (tmp_path / "part").open("a+b", buffering=0) as target:
        sink = Sink(target.fileno(), 4, hashlib.sha256())
        sink.take(offset, plain, data)
        with pytest.raises((ValueError, zlib.error), match=r"stream|decompress"):
            sink.finish(100)


def test_a_file_is_here_only_as_long_as_it_is_the_very_same(tmp_path: Path) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(b"data")
    os.utime(file, ns=(7, 7))
    artifact = wire.Sent("/there/disk.img", 4, 7, "0" * 64, {"key": "a"})
    assert not is_here(artifact, tmp_path)
    (tmp_path / "disk.img.json").write_text(json.dumps(artifact.manifest, indent=2, sort_keys=True) + "\n")
    assert is_here(artifact, tmp_path)
    assert not is_here(wire.Sent("/there/disk.img", 4, 7, "0" * 64, {"key": "b"}), tmp_path)
    os.utime(file, ns=(8, 8))
    assert not is_here(artifact, tmp_path)


@pytest.mark.parametrize("left", [None, 0o644], ids=["new", "over what an earlier run left"])
@pytest.mark.parametrize(("there", "here"), [(0o644, 0o644), (0o640, 0o600), (0o600, 0o600)])
def test_what_is_private_there_is_private_here_from_its_first_byte(
    there: int, here: int, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, home, seen = tmp_path / "disk.img", tmp_path / "home", []
    file.write_bytes(b"data")
    file.chmod(there)
    stamp = {"size": 4, "mtime_ns": file.stat().st_mtime_ns}
    told = json.dumps({"file": stamp, "disk": {"sha256": hashlib.sha256(b"data").hexdigest()}})
    (tmp_path / "disk.img.json").write_text(told)
    (artifact,) = send.run(wire.Send((str(file),)), emit)
    if left:
        home.mkdir()
        part = home / f".disk.img.{artifact.sha256[:16]}.part"
        part.touch()
        part.chmod(left)

    def receive(_host: object, _artifact: wire.Sent, fd: int, _progress: object) -> None:
        seen.append(stat.S_IMODE(os.fstat(fd).st_mode))
        os.write(fd, b"data")

    monkeypatch.setattr(fetch, "_receive", receive)
    fetch.fetch(cast(Host, None), artifact, home, lambda *_: None)
    assert [*seen, stat.S_IMODE((home / "disk.img").stat().st_mode)] == [here, here]
    assert (home / "disk.img").read_bytes() == b"data"


def test_a_file_that_was_changed_there_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data")
    (tmp_path / "f.json").write_text('{"file": {"size": 4, "mtime_ns": 1}, "disk": {"sha256": "0"}}')
    with pytest.raises(Failure, match="was changed"):
        send.run(wire.Send((str(tmp_path / "f"),)), emit)
