"""What a build and a conversion tell programs of the files that they made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from build import wire
from build.engine import plan
from build.engine.plan import Layer
from build.engine.resolution import Package, Resolution
from build.verbs import artifacts
from build.verbs.build import result

if TYPE_CHECKING:
    from build.engine.pipeline import Build

SUMS = {"md5": "0" * 32, "sha256": "1" * 64, "sha512": "2" * 128}


def converted(**changed: Any) -> wire.Converted:
    """A conversion to one file, with a text of CloudStack's beside it."""
    sizes = {"size": 5, "allocated": 4096, "virtual_size": 1 << 21}
    file = {
        "file": "x.vhd",
        "format": "vhd",
        "state": "built",
        "seconds": 1.5,
        **sizes,
        **SUMS,
        "writer": "w",
    }
    return wire.Converted(({**file, **changed},), "/images", {"metadata.ini": "[x]"}, 1 << 21, "3" * 64, 1.6)


@pytest.mark.parametrize(("state", "seconds"), [("built", 1.5), ("cached", 0.0)])
def test_a_row_says_where_a_file_lies_there_and_here_and_how_long_it_took_now(
    state: str, seconds: float
) -> None:
    here = {"/images/x.vhd": "/home/me/dist/x.vhd", "/images/metadata.ini": "/home/me/dist/metadata.ini"}
    told = artifacts.converted(converted(state=state), here)
    assert told == {
        "artifacts": [
            {
                "path": "/images/x.vhd",
                "here": "/home/me/dist/x.vhd",
                "manifest": "/images/x.vhd.json",
                "format": "vhd",
                "state": state,
                "size": 5,
                "allocated": 4096,
                "virtual_size": 1 << 21,
                **SUMS,
                "seconds": seconds,
            }
        ],
        "beside": [{"path": "/images/metadata.ini", "here": "/home/me/dist/metadata.ini"}],
    }


def test_what_stays_on_the_host_is_not_here() -> None:
    told = artifacts.converted(converted(), {})
    assert [row["here"] for row in (*told["artifacts"], *told["beside"])] == [None, None]


@dataclass
class Resolved:
    """Stands for a build whose layers and disk are there."""

    layers: tuple[Layer, ...]
    resolution: Resolution
    ended: dict[str, tuple[str, float]]
    lock: object = None
    lock_file: Path = Path("/checkout/config/x.amd64.lock")


@pytest.mark.parametrize("locked", [False, True])
def test_a_build_tells_of_every_step_and_of_the_exact_set(locked: bool) -> None:
    layers = tuple(plan.layers([plan.Step("one", "true", bootstrap=True), plan.Step("two", "true")]))
    packages = (Package("b", "2", "all", "bb", 1, ""), Package("a", "1-1", "amd64", "aa", 1, ""))
    ended = {"one": ("cached", 0.0), "two": ("built", 1.25), "disk": ("built", 3.0)}
    build = Resolved(layers, Resolution(packages, 1700000000, 0), ended, locked or None)
    disk = {"size": 1 << 20, "allocated": 4096, "sha256": "4" * 64, "table": {}}
    made = wire.Disk("built", 3.0, "/images/x.img", {"key": "disk-1", "disk": disk})
    told = result(cast("Build", build), made, None, {"/images/x.img": "/home/me/x.img"})
    assert told == {
        "image": "/images/x.img",
        "here": "/home/me/x.img",
        "manifest": "/images/x.img.json",
        "size": 1 << 20,
        "allocated": 4096,
        "sha256": "4" * 64,
        "steps": [
            {"step": "one", "key": layers[0].key, "state": "cached", "seconds": 0.0},
            {"step": "two", "key": layers[1].key, "state": "built", "seconds": 1.25},
            {"step": "disk", "key": "disk-1", "state": "built", "seconds": 3.0},
        ],
        "package_set": {
            "sha256": hashlib.sha256(b"a 1-1 amd64 aa\nb 2 all bb\n").hexdigest(),
            "packages": 2,
            "epoch": 1700000000,
            "lock": "/checkout/config/x.amd64.lock" if locked else None,
        },
        "artifacts": [],
        "beside": [],
    }
    files = converted()
    more = result(cast("Build", build), made, files, {})
    assert more == {**told, "here": None, **artifacts.converted(files, {})}
