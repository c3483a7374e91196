"""The fuzzer's targets: whole inputs please them, broken ones end as they declare. Soak looks for more."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.fuzz import seeds
from tests.fuzz.targets import TARGETS, pack, play, spread


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[bytes]]:
    return seeds.of_all(tmp_path_factory.mktemp("seeds"))


def test_every_target_has_small_seeds_the_same_each_time(
    inputs: Mapping[str, list[bytes]], tmp_path: Path
) -> None:
    assert inputs.keys() == TARGETS.keys()
    assert inputs == seeds.of_all(tmp_path)
    assert sum(len(data) for each in inputs.values() for data in each) < 200_000


@pytest.mark.parametrize("name", TARGETS)
def test_whole_inputs_end_without_an_error(name: str, inputs: Mapping[str, list[bytes]]) -> None:
    for data in inputs[name]:
        TARGETS[name][0](data)


@pytest.mark.parametrize("name", TARGETS)
def test_broken_inputs_end_as_declared(name: str, inputs: Mapping[str, list[bytes]]) -> None:
    dice = random.Random(name)
    for _ in range(60):
        data = bytearray(dice.choice(inputs[name]))
        for _ in range(dice.randint(1, 6)):
            place, width = dice.randrange(len(data)), dice.choice((1, 2, 4, 8))
            data[place : place + width] = dice.choice((dice.randbytes(width), b"\xff" * width, bytes(width)))
        play(name, bytes(data[: len(data) if dice.random() < 0.7 else dice.randrange(len(data))]))


def test_what_a_target_does_not_declare_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "boot", (lambda data: [][len(data)], (ValueError,)))
    with pytest.raises(IndexError):
        play("boot", b"x")


def test_a_sparse_file_is_packed_and_spread() -> None:
    content = bytes(1 << 20) + b"x" * 70_000 + bytes(5000) + b"y" + bytes(2 << 20)
    packed = pack(content)
    assert len(packed) < 72_000
    with spread(packed) as reader:
        assert reader.read(0, reader.size) == content
        assert reader.allocated() < 100_000
