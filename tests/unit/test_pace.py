"""How long work took last time: noted when it ends well, read whatever stands there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from build.agent import pace, store
from build.verbs import jobs

Told = list[dict[str, Any]]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def emit(told: Told) -> Callable[..., None]:
    return lambda kind, **fields: told.append({"event": kind, **fields})


def test_the_second_run_knows_the_first(tmp_path: Path, told: Told, emit: Callable[..., None]) -> None:
    with pace.work(tmp_path, "tweak", emit) as follow:
        follow("progress", label="files", done=1, total=2)
    with pace.work(tmp_path, "tweak", emit):
        pass
    first, progress, second = told
    assert first == {"event": "work", "name": "tweak", "last": None}
    assert progress == {"event": "progress", "label": "files", "done": 1, "total": 2}
    assert second["last"] >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["paces.json"]


def test_work_of_one_name_is_told_apart(tmp_path: Path, told: Told, emit: Callable[..., None]) -> None:
    (tmp_path / "paces.json").write_text(json.dumps({"convert vhd": 40, "convert ova vhd": 90}))
    for what in ("vhd", "ova vhd", "raw"):
        with pace.work(tmp_path, "convert", emit, what):
            pass
    assert [(event["name"], event["last"]) for event in told] == [
        ("convert", 40.0),
        ("convert", 90.0),
        ("convert", None),
    ]


def test_what_failed_is_no_run(tmp_path: Path, emit: Callable[..., None]) -> None:
    with pytest.raises(ZeroDivisionError), pace.work(tmp_path, "tweak", emit):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tweak": "x"}', '{"tweak": null}', "\x00\xff"])
def test_a_file_that_holds_nonsense_counts_as_none(
    text: str, tmp_path: Path, told: Told, emit: Callable[..., None]
) -> None:
    (tmp_path / "paces.json").write_text(text)
    with pace.work(tmp_path, "tweak", emit):
        pass
    assert told[0]["last"] is None
    assert set(json.loads((tmp_path / "paces.json").read_text())) == {"tweak"}


def test_without_a_location_nothing_is_kept(told: Told, emit: Callable[..., None]) -> None:
    with pace.work(None, "convert", emit) as follow:
        follow("note", text="x")
    assert told == [{"event": "note", "text": "x"}]


def test_the_lock_says_what_goes_on(tmp_path: Path, emit: Callable[..., None]) -> None:
    store.lock(tmp_path, emit, "inv tweak")
    with pace.work(tmp_path, "tweak", emit) as follow:
        follow("progress", label="files", done=1, total=4)
        said = json.loads((tmp_path / "lock").read_text())
        assert (said["what"], said["work"]["name"], said["work"]["total"]) == ("inv tweak", "tweak", 4)
    assert json.loads((tmp_path / "lock").read_text())["work"] is None
    assert (tmp_path / "lock").stat().st_size == store.SIZE


@pytest.mark.parametrize(
    ("work", "says"),
    [
        ({"name": "seal", "since": 100, "last": None}, "seal, 00:20 so far"),
        ({"name": "seal", "since": 100, "last": 61.4}, "seal, 00:20 so far (01:01 last time)"),
        (
            {"name": "disk", "label": "checksum", "done": 1, "total": 3, "since": 100, "last": 4000},
            "disk: checksum 33%, 00:20 so far (1:06:40 last time)",
        ),
        (
            {"name": "convert", "label": "convert", "done": 3, "total": 3, "since": 130},
            "convert 100%, 00:00 so far",
        ),
    ],
    ids=str,
)
def test_status_says_it_in_words(work: dict[str, Any], says: str) -> None:
    assert jobs.describe(work, 120.0) == says
