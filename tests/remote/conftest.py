"""The build host of the remote ring, one for each worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import buildhost
from tests.buildhost import Buildhost
from tests.images import Built, link, shared
from tests.remote.clients import ALL, FLAGS, provide, run


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildhost]:
    """A running build host."""
    with buildhost.running(tmp_path_factory.mktemp("buildhost")) as host:
        yield host


@pytest.fixture(scope="session")
def ready(tiny: Built, there: Buildhost) -> tuple[str, ...]:
    """A finished build there, linked from the shared one; answers the flags that mean it."""
    link(tiny.location, there.folder / "images/ready")
    return (*FLAGS, "--set", "location=/var/lib/images/ready")


@pytest.fixture(scope="session")
def finished(
    tiny: Built, there: Buildhost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """LOCATIONs of finished builds, to be linked, by the user who may have made them."""

    def build(place: Path) -> None:
        shown, here = provide(tiny, there, "carol", "first")
        run(there, "carol", "build", "--no-fetch", *FLAGS, "--set", f"location={shown}")
        here.rename(place / "location")

    with shared(tmp_path_factory, "carol", build) as place:
        yield {user: place / "location" if user == "carol" else tiny.location for user in ALL}
