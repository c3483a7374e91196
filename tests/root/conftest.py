"""What several files of the root ring have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mirror
from tests.mirror import Key


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Key]:
    """A key that signs a file's own mirrors."""
    mirror.make_tools_present()
    made = Key(tmp_path_factory.mktemp("key") / "home")
    yield made
    made.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for packages, open to the ordinary user, too."""
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o755)
    return folder
