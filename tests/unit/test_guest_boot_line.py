from __future__ import annotations

import ipaddress
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build.engine import render
from build.verbs import boot_line as params
from tests import guest

boot_line = guest.module("boot_line")
Params = boot_line.Params


def test_parts_at_the_first_equals_sign() -> None:
    assert boot_line.parse("a=1 key=abc== b=x=y") == {"a": "1", "key": "abc==", "b": "x=y"}


def test_last_of_equal_keys_wins() -> None:
    raw = boot_line.parse(guest.ROUTER)
    assert guest.ROUTER.count("advert_int=2") == 3
    assert guest.ROUTER.count("redundant_router=1") == 2
    assert raw["advert_int"] == "2"
    assert boot_line.parse("advert_int=1 advert_int=5")["advert_int"] == "5"


def test_unknown_keys_are_kept_and_lone_words_are_not() -> None:
    assert boot_line.parse("quiet ro future_key=x =y") == {"future_key": "x"}


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,12}", fullmatch=True), st.from_regex(r"[!-~]{0,20}", fullmatch=True)
    )
)
def test_reads_what_was_written(pairs: dict[str, str]) -> None:
    assert boot_line.parse("  ".join(f"{key}={value}" for key, value in pairs.items())) == pairs


@given(st.text())
def test_any_text_gives_documents_that_are_json(text: str) -> None:
    raw = boot_line.parse(text)
    assert json.loads(boot_line.cmd_line_json(raw)) == {"type": "cmdline", "cmd_line": raw}
    merged = json.loads(boot_line.cmdline_json(raw))
    assert merged["id"] == "cmdline"
    assert merged["config"]["redundant_router"] in ("true", "false")


def test_merged_document_has_one_key_a_line() -> None:
    lines = boot_line.cmdline_json(boot_line.parse(guest.ROUTER)).splitlines()
    assert '    "type": "router"' in [line.rstrip(",") for line in lines]
    assert '    "redundant_router": "true",' in lines


def test_endless_line_is_cut() -> None:
    assert len(boot_line.parse("a=" + "x" * 10_000_000)["a"]) < 300_000


@pytest.mark.parametrize(
    "text", ["256.1.1.1", "1.2.3", "10.0.0.1/24", "$(reboot)", "a\x00b", "::1", "\uff11.1.1.1"]
)
def test_wrong_address_is_no_address(text: str) -> None:
    params = Params({"gateway": text})
    assert params.address("gateway") is None
    assert params.complaints


@pytest.mark.parametrize("text", ["", "0.0.0.0", "null"])
def test_absent_address_is_no_complaint(text: str) -> None:
    params = Params({"eth0ip": text})
    assert params.address("eth0ip") is None
    assert not params.complaints


def test_secrets_are_not_shown() -> None:
    params = Params({"keystore_password": "hunter2", "certificate": "hunter3"})
    params.complain("keystore_password", "why")
    params.complain("certificate", "why")
    assert "hunter" not in "".join(params.complaints)


@pytest.mark.parametrize("text", ["YWJjZGU=", "YWJjZGU"])
def test_base64_with_and_without_padding(text: str) -> None:
    assert Params({"k": text}).base64("k") == b"abcde"


@pytest.mark.parametrize("text", ["a", "YW*j", "=====", "ü"])
def test_broken_base64_is_nothing(text: str) -> None:
    params = Params({"k": text})
    try:
        assert params.base64("k") is None
    except ValueError:
        pytest.fail("raised")
    assert params.complaints


@given(st.text(max_size=30))
def test_any_text_is_harmless_to_typed_access(text: str) -> None:
    params = Params(
        dict.fromkeys(
            ("name", "eth0ip", "eth0mask", "eth0ip6", "eth0ip6prelen", "nic_macs", "advert_int"), text
        )
    )
    assert boot_line.HOST_NAME.fullmatch(params.name)
    assert 1 <= params.integer("advert_int", 1, 1, 255) <= 255
    for mac in params.macs:
        assert re.fullmatch(r"[0-9a-f:]{17}", mac)
    for nic in params.nics:
        assert nic.address or nic.address6
    params.base64("name")
    params.networks("eth0ip")


def test_nics() -> None:
    params = Params(
        boot_line.parse(
            "eth0ip=10.1.1.2 eth0mask=255.255.255.0 eth2ip=0.0.0.0 eth2mask=0.0.0.0 eth10ip=192.0.2.1"
        )
    )
    assert [(nic.name, nic.address) for nic in params.nics] == [
        ("eth0", ipaddress.IPv4Interface("10.1.1.2/24")),
        ("eth10", ipaddress.IPv4Interface("192.0.2.1/24")),
    ]


def test_wrong_mask_does_not_lose_the_address() -> None:
    params = Params({"eth0ip": "10.1.1.2", "eth0mask": "255.0.255.0"})
    assert str(params.nic(0).address) == "10.1.1.2/24"
    assert params.complaints


@pytest.mark.parametrize("text", ["06:00:00:00:00:01|06:00:00:00:00:01", "x|y", "06-00-00-00-00-01"])
def test_wrong_list_of_macs_is_no_list(text: str) -> None:
    params = Params({"nic_macs": text})
    assert params.macs == ()
    assert params.complaints


def test_a_line_of_nothing_but_wrong_parameters_is_noted_in_part() -> None:
    params = Params({"mgmtcidr": ",".join(f"net{number}" for number in range(1000))})
    assert params.networks("mgmtcidr") == []
    assert len(params.complaints) == boot_line.MOST


def test_the_guests_package_is_loaded_as_it_lies_and_leads_to_nothing_else() -> None:
    before = list(sys.path)
    roles = params.guest("roles")
    assert roles.__file__ == str(guest.ROOTFS / "usr/local/lib/systemvm/roles.py")
    assert params.guest("roles") is roles
    assert params.guest("render") is render
    assert sys.path == before
    assert str(params.GUEST) not in sys.path
    for name in ("settings", "nothing"):  # the engine's own is no part of it
        with pytest.raises(ModuleNotFoundError):
            params.guest(name)
