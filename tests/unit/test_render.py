from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from build import keepalived_render
from build.engine import render
from build.engine.settings import Vrrp
from tests.guest import CHECKOUT

TEMPLATE = keepalived_render.TEMPLATE.read_text()


def test_fills_a_template() -> None:
    assert render.render("a {{ x }}\n{% if y %}\n  b\n{% endif %}\n", {"x": 1, "y": True}) == "a 1\n  b\n"


def test_missing_name_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render.render("{{ nothing }}", {})


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "a{", "a}", '"', "a#b", "a!b", "é", "a;b", "$x", "~X"])
def test_word_refuses_what_a_parser_could_take_for_more(value: str) -> None:
    with pytest.raises(render.InvalidValue):
        render.word(value)


@pytest.mark.parametrize("value", ['a"b', "a\nb", "a\\b", "$HOME", "\x07", ""])
def test_quoted_refuses_what_ends_or_changes_a_quotation(value: str) -> None:
    with pytest.raises(render.InvalidValue):
        render.quoted(value)


@settings(deadline=None)
@given(st.text(), st.text())
def test_no_value_adds_a_line_to_keepalived(name: str, secret: str) -> None:
    sane = keepalived_render.sample(keepalived_render.values(Vrrp()))
    before = render.render(TEMPLATE, sane).count("\n")
    try:
        text = render.render(TEMPLATE, {**sane, "router_id": name, "auth_pass": secret})
    except render.InvalidValue:
        return
    assert text.count("\n") == before
    assert f"router_id {name}\n" in text


def test_every_value_reaches_keepalived() -> None:
    vrrp = Vrrp(
        enabled=True,
        router_id="r-1",
        instance="pair",
        state="MASTER",
        interface="eth7",
        virtual_router_id=77,
        priority=200,
        advert_int=9,
        nopreempt=False,
        auth_type="PASS",
        auth_pass="longer-than-8",
        addresses=("10.1.1.1/24", "fd00::1/64", "10.1.2.1/31"),
        check_script="/bin/x",
        check_interval=3,
        notify_master="/bin/m a",
        notify_backup="",
        notify_fault="/bin/f",
    )
    text = render.render(TEMPLATE, keepalived_render.values(vrrp))
    lines = [line.strip() for line in text.splitlines()]
    for line in (
        "router_id r-1",
        "vrrp_instance pair {",
        "state MASTER",
        "interface eth7",
        "virtual_router_id 77",
        "priority 200",
        "advert_int 9",
        "auth_type PASS",
        "auth_pass longer-t",
        "10.1.1.1/24 brd 10.1.1.255 dev eth7",
        "10.1.2.1/31 dev eth7",
        "fd00::1/64 dev eth7",
        'script "/bin/x"',
        "interval 3",
        'notify_master "/bin/m a"',
        'notify_fault "/bin/f"',
        "script_user root",
    ):
        assert line in lines
    assert "nopreempt" not in lines
    assert not any(line.startswith("notify_backup") for line in lines)
    # An IPv6 address may not stand among the IPv4 ones, nor be announced with them.
    assert lines.index("virtual_ipaddress_excluded {") == lines.index("fd00::1/64 dev eth7") - 1


def test_without_check_and_authentication() -> None:
    text = render.render(TEMPLATE, keepalived_render.values(Vrrp(auth_type="none", check_script="")))
    assert "vrrp_script" not in text
    assert "track_script" not in text
    assert "authentication {" not in text


@pytest.mark.parametrize(
    ("interval", "priority", "seconds"),
    [(1, 100, 3.609375), (2, 100, 6.609375), (5, 100, 15.609375), (1, 254, 3.0078125)],
)
def test_failover_bound(interval: int, priority: int, seconds: float) -> None:
    assert keepalived_render.failover_bound(interval, priority) == pytest.approx(seconds)


def test_program_prints_what_the_function_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = keepalived_render.sample(keepalived_render.values(Vrrp()))
    defaults = tmp_path / "d.json"
    defaults.write_text(json.dumps(values))
    status = render.main([str(keepalived_render.TEMPLATE), str(defaults), "advert_int=7", 'router_id="r-9"'])
    assert status == 0
    assert capsys.readouterr().out == render.render(TEMPLATE, {**values, "advert_int": 7, "router_id": "r-9"})


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        ([], 2, "usage"),
        (["template"], 2, "usage"),
        (["{missing}", "{defaults}"], 1, "No such file"),
        (["{template}", "{defaults}", "nonsense"], 1, "NAME=VALUE"),
        (["{template}", "{defaults}", "advertint=2"], 1, "unknown name 'advertint'"),
        (["{template}", "{defaults}", "router_id=a b"], 1, "not one plain word"),
        (["{template}", "{template}"], 1, "render.py"),
    ],
)
def test_program_refuses(
    argv: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = tmp_path / "d.json"
    defaults.write_text(json.dumps(keepalived_render.sample(keepalived_render.values(Vrrp()))))
    names = {
        "{template}": str(keepalived_render.TEMPLATE),
        "{defaults}": str(defaults),
        "{missing}": str(tmp_path / "no"),
    }
    assert render.main([names.get(word, word) for word in argv]) == status
    assert said in capsys.readouterr().err


def test_renderer_needs_nothing_of_ours() -> None:
    source = (CHECKOUT / "build/engine/render.py").read_text()
    assert "from build" not in source
    assert "import build" not in source
