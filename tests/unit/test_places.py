"""Places: who is meant by a finding, and what each refuses by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from build.formats import FORMATS, KINDS
from build.formats.lib.places import EVERYBODY, PLACES, Seen, minds, refusals

FORMATS_FOLDER = Path(__file__).resolve().parents[2] / "build/formats"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("place", "refused_by", "counts"),
    [
        ("xcp-ng", "XenServer, XCP-ng", True),
        ("xcp-ng", "Xen Orchestra", True),
        ("xenserver", "XCP-ng", False),
        ("vsphere", "ESXi 6.5 and later", True),
        ("vsphere", "ESXi 6.5", False),
        ("cloudstack", "CloudStack before 4.15", False),
        ("cloudstack", "QEMU before 5.1, CloudStack", True),
        ("hyperv", "Hyper-V", True),
        ("gce", "every importer", True),
        ("gce", "UEFI", True),
        ("gce", "", False),
        ("aws", "AWSome", False),
    ],
)
def test_who_is_meant(place: str, refused_by: str, counts: bool) -> None:
    assert minds(PLACES[place], refused_by) is counts


@pytest.mark.parametrize("place", PLACES)
def test_each_place_takes_what_is_made_for_it(place: str) -> None:
    row = FORMATS[PLACES[place].best]
    assert row.kind.name in PLACES[place].takes
    assert PLACES[place].source
    assert set(PLACES[place].takes) <= {*KINDS}
    outer = "gz" if row.file.endswith("gz") else ""
    facts = {"type": "fixed"} if "azure" in row.name else {}
    seen = Seen(outer, row.kind.name, 4 * GIB, facts)
    assert list(refusals(PLACES[place], seen)) == []


@pytest.mark.parametrize(
    ("place", "seen", "says"),
    [
        ("azure", Seen("", "vhd", GIB, {"type": "dynamic"}), "a dynamic VHD"),
        ("azure", Seen("", "vhd", GIB + 512, {"type": "fixed"}), "not whole MiB"),
        ("azure", Seen("", "qcow2", GIB), "does not import qcow2"),
        ("gce", Seen("gz", "gce", GIB + (1 << 20)), "not whole GiB"),
        ("vsphere", Seen("gz", "ova", GIB), "does not unpack gz"),
        ("cloudstack", Seen("zst", "qcow2", GIB), "does not unpack zst"),
    ],
)
def test_what_each_refuses(place: str, seen: Seen, says: str) -> None:
    (refusal,) = refusals(PLACES[place], seen)
    assert says in refusal.text
    assert refusal.fix
    assert minds(PLACES[place], refusal.refused_by)


def test_findings_name_places_that_are_known() -> None:
    """Every name in capitals that a reader of a format uses for who refuses is one of the table."""
    known = {name for place in PLACES.values() for name in place.names} | {*EVERYBODY, "Vagrant"}
    constants = re.compile(r'^[A-Z][A-Z_]* = "([A-Z][A-Za-z-]+(?:, [A-Z][A-Za-z-]+)*)"$', re.M)
    for path in FORMATS_FOLDER.rglob("*.py"):
        for value in constants.findall(path.read_text(encoding="utf-8")):
            assert path.stem == "format" or set(value.split(", ")) <= known or value == "Vagrantfile", (
                path.name
            )
