"""The build host of the remote ring, one for each worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import buildhost
from tests.buildhost import Buildhost


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildhost]:
    """A running build host."""
    with buildhost.running(tmp_path_factory.mktemp("buildhost")) as host:
        yield host
