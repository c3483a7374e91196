"""The faults that show what the rings catch still have a place in the product."""

from __future__ import annotations

import pytest

from tests.cli import CHECKOUT
from tests.mutations import MUTATIONS


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_has_its_place_and_its_tests(name: str) -> None:
    mutation = MUTATIONS[name]
    assert (CHECKOUT / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests:
        assert not test.startswith("tests/") or (CHECKOUT / test).is_file()
