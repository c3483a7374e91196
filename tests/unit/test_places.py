"""Places: who is meant by a finding, and what each refuses by itself."""

from __future__ import annotations

import pytest

from build.formats import FORMATS, KINDS
from build.formats.lib import places
from build.formats.lib.findings import Code
from build.formats.lib.places import PLACES, Seen, is_affected, refusals
from build.formats.lib.platforms import (
    CLOUDSTACK,
    ESXI,
    EVERY_IMPORTER,
    HYPERV,
    QEMU,
    TITLES,
    UEFI,
    XCP_NG,
    XEN_ORCHESTRA,
    XENSERVER,
    Affected,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("place", "affects", "counts"),
    [
        ("xcp-ng", (XENSERVER, XCP_NG), True),
        ("xcp-ng", (XEN_ORCHESTRA,), True),
        ("xenserver", (XCP_NG,), False),
        ("vsphere", (Affected("esxi", since="6.5"),), True),
        ("vsphere", (Affected("esxi", only="6.5"),), False),
        ("vsphere", (Affected("esxi", case="without vCenter"),), False),
        ("vsphere", (ESXI,), True),
        ("cloudstack", (Affected("cloudstack", before="4.15"),), False),
        ("cloudstack", (Affected("qemu", before="5.1"), CLOUDSTACK), True),
        ("cloudstack", (Affected("qemu", before="5.1"), Affected("cloudstack", case="on EL7")), False),
        ("hyperv", (HYPERV,), True),
        ("gce", (EVERY_IMPORTER,), True),
        ("gce", (UEFI,), True),
        ("gce", (Affected("importer", case="of templates"),), False),
        ("gce", (), False),
        ("kvm", (QEMU,), True),
    ],
)
def test_who_is_meant(place: str, affects: tuple[Affected, ...], counts: bool) -> None:
    assert is_affected(PLACES[place], affects) is counts


@pytest.mark.parametrize(
    ("affected", "title"),
    [
        (ESXI, "ESXi"),
        (Affected("esxi", since="6.5"), "ESXi 6.5 and later"),
        (Affected("vsphere", only="6.5"), "vSphere 6.5"),
        (Affected("qemu", before="1.1", case="(EL6)"), "QEMU before 1.1 (EL6)"),
        (Affected("reader", case="but GNU tar"), "every reader but GNU tar"),
        (
            Affected("{place}", before="{release}").filled({"place": "esxi", "release": "7.0"}),
            "ESXi before 7.0",
        ),
    ],
)
def test_who_it_is_in_words(affected: Affected, title: str) -> None:
    assert affected.title == title


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
        ("azure", Seen("", "vhd", GIB, {"type": "dynamic"}), places.DYNAMIC),
        ("azure", Seen("", "vhd", GIB + 512, {"type": "fixed"}), places.NOT_WHOLE_MIB),
        ("azure", Seen("", "qcow2", GIB), places.NOT_IMPORTED),
        ("gce", Seen("gz", "gce", GIB + (1 << 20)), places.NOT_WHOLE_GIB),
        ("vsphere", Seen("gz", "ova", GIB), places.NOT_UNPACKED),
        ("cloudstack", Seen("zst", "qcow2", GIB), places.NOT_UNPACKED),
    ],
)
def test_what_each_refuses(place: str, seen: Seen, says: Code) -> None:
    (refusal,) = refusals(PLACES[place], seen)
    assert refusal.code == says
    assert refusal.fix
    assert is_affected(PLACES[place], refusal.affects)


def test_platforms_of_places_are_known() -> None:
    assert {key for place in PLACES.values() for key in place.platforms} <= TITLES.keys()
