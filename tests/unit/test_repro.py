"""The command line of the second build that `inv repro` makes."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from build.engine.settings import Settings
from build.verbs import repro

if TYPE_CHECKING:
    from build.engine.pipeline import Build


def test_the_second_build_has_its_own_paths_and_the_keyring_of_the_first() -> None:
    """Also where the first one's lies in its LOCATION, and has a dollar sign in its name."""
    overrides = ("location=/a$$b", "KEYRING=$LOCATION/keys.gpg", "imageloc=$LOCATION/x.img", "size=300")
    build = SimpleNamespace(
        definition=Path("/checkout/config/x.yaml"),
        flags=SimpleNamespace(overrides=overrides, unlocked=False),
        settings=Settings(location="/a$b", keyring="/a$b/keys.gpg", size=300),
    )
    words = list(repro._line(cast("Build", build), ("vhd", "raw")))
    assert words[:5] == ["build", "--offline", "--formats", "vhd,raw", "--image"]
    given = [word for before, word in itertools.pairwise(words) if before == "--set"]
    assert given[-1] == "keyring=/a$$b/keys.gpg"  # the last one counts
    assert set(given[:-1]) == {"KEYRING=$LOCATION/keys.gpg", "size=300"}
