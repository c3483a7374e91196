"""Keys: what changes them, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build.engine import pipeline
from build.engine.plan import File, Step, layers

pytestmark = pytest.mark.unit

A = Step("a", "true", {"f": File(b"1")}, bootstrap=True)
B = Step("b", "echo b", secrets=("password-hash",))
C = Step("c", "echo c")


def keys(*steps: Step, common_prefix: str = "", **secrets: str) -> list[str]:
    named = {name.replace("_", "-"): value for name, value in secrets.items()}
    return [layer.key for layer in layers(steps, common_prefix, named)]


def test_keys_carry_the_name_and_chain_over_what_is_below() -> None:
    a, b, c = layers([A, B, C])
    assert [layer.key.split("-")[0] for layer in (a, b, c)] == ["a", "b", "c"]
    assert c.parents == (a.key, b.key)
    assert c.chain == (a.key, b.key, c.key)


@pytest.mark.parametrize(
    "other",
    [
        Step("a", "true ", {"f": File(b"1")}, bootstrap=True),
        Step("a", "true", {"f": File(b"2")}, bootstrap=True),
        Step("a", "true", {"g": File(b"1")}, bootstrap=True),
        Step("a", "true", {"f": File(b"1", 0o755)}, bootstrap=True),
        Step("a", "true", {"f": File(b"1")}),
        Step("x", "true", {"f": File(b"1")}, bootstrap=True),
    ],
)
def test_any_change_below_changes_every_key_above(other: Step) -> None:
    before, after = keys(A, B, C), keys(other, B, C)
    assert not set(before) & set(after)


def test_a_change_above_leaves_what_is_below() -> None:
    before, after = keys(A, B, C), keys(A, Step("b", "echo other"), C)
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def test_secrets_enter_only_where_they_are_named() -> None:
    before, after = keys(A, B, C), keys(A, B, C, password_hash="digest")
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert keys(A, C) == keys(A, C, password_hash="digest")


def test_the_salt_is_in_every_key() -> None:
    assert not set(keys(A, B)) & set(keys(A, B, common_prefix="epoch"))


@given(
    st.lists(st.tuples(st.text(), st.binary()), max_size=4),
    st.lists(st.tuples(st.text(), st.binary()), max_size=4),
)
def test_different_files_never_share_a_key(
    one: list[tuple[str, bytes]], two: list[tuple[str, bytes]]
) -> None:
    first, second = ({name: File(content) for name, content in files} for files in (one, two))
    same = keys(Step("a", "", first)) == keys(Step("a", "", second))
    assert same == (first == second)


def test_why_names_each_input_that_differs() -> None:
    stored = pipeline.record(layers([A, Step("b", "echo b", {"x": File(b"1"), "gone": File(b"")})])[1])
    now = layers([C, Step("b", "echo new", {"x": File(b"2"), "new": File(b"")})])[1]
    told = pipeline.why(now, stored)
    assert told[0].startswith("below: a-")
    assert told[1:] == ["script: changed", "file 'gone': removed", "file 'new': added", "file 'x': changed"]
