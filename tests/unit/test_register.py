"""What `inv register` makes of its flags and of manifests, before anything is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from build import wire
from build.engine import cloudstack
from build.engine.errors import BuildError
from build.engine.pipeline import Build
from build.engine.settings import Settings
from build.verbs import convert, register

URL = "https://files.example/systemvm"
ENDPOINT = "https://cloud.example/client/api"
SECRET = "the-secret-4567"


def build(states: dict[str, str], formats: str = "", **values: Any) -> Build:
    """A build whose host has files in such states, by format; the others are missing."""
    settings = Settings.model_validate({"cloudstack_release": "4.22.0", **values})

    def ask(request: wire.Made) -> tuple[wire.Artifact, ...]:
        assert request.folder == "/images"
        names = {convert.file_name(name, settings): name for name in cloudstack.FORMATS}
        told = {"name": "n", "ostype": "Other Linux (64-bit)", "requireshvm": True, "bits": 64}
        artifact = {"format": "x", **({} if "old" in states else {"register": told})}
        rows = [(file, states.get(names[file], "missing")) for file in request.files]
        return tuple(
            wire.Artifact(file, state, {**artifact, "file": file} if state == "made" else {})
            for file, state in rows
        )

    return cast(
        Build,
        SimpleNamespace(
            settings=settings,
            flags=SimpleNamespace(formats=formats),
            host=SimpleNamespace(ask=ask),
            prospect=SimpleNamespace(place=SimpleNamespace(location="/images")),
            console=SimpleNamespace(line=print),
        ),
    )


def refused(made: Build, url: str = URL, zone: str = "-1", endpoint: str = "", upgrade: bool = False) -> str:
    with pytest.raises(BuildError) as caught:
        register.register(made, url, zone, endpoint, upgrade)
    assert caught.value.hint
    assert len(str(caught.value.message).splitlines()) == 2
    return str(caught.value.message)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"endpoint": "ftp://h/client/api"}, "--endpoint 'ftp://h/client/api' is no URL of HTTP"),
        ({"endpoint": "ftp://h/client/api"}, "hint: write --endpoint https://h/client/api"),
        ({"endpoint": "cloud.example"}, "is no URL of HTTP\n  hint: write --endpoint https://cloud.example"),
        ({"url": "files.example:8080/x/"}, "hint: write --url https://files.example:8080/x/"),
        ({"endpoint": "http://"}, "is no URL of HTTP\n  hint: write --endpoint https://HOST/..."),
        ({"endpoint": "http://h:x/"}, "is no URL of HTTP\n  hint: write --endpoint https://HOST/..."),
        ({"endpoint": "http://h:0/"}, "is no URL of HTTP\n  hint: write --endpoint https://HOST/..."),
        ({"endpoint": "http://h\u00e4/"}, "is no URL of HTTP\n  hint: write --endpoint https://HOST/..."),
        ({"endpoint": "http://h/\n"}, "'http://h/\\n' is no URL of HTTP"),
        ({"endpoint": f"https://me:{SECRET}@h/"}, "a user, a query or a fragment is not allowed there"),
        ({"endpoint": f"https://h/?secret={SECRET}"}, "a user, a query or a fragment is not allowed there"),
        ({"url": "file:///srv"}, "--url 'file:///srv' is no URL of HTTP"),
        ({"url": "http://h/a b"}, "is no URL of HTTP"),
        ({"url": ""}, "no URL tells where the files are served from"),
        ({"zone": "1"}, "a system template is for all zones"),
        ({"zone": "x y", "upgrade": True}, "--zone 'x y' is no zone's id"),
    ],
)
def test_what_is_wrong_with_the_flags(
    given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDSTACK_KEY", "key")
    monkeypatch.setenv("CLOUDSTACK_SECRET", SECRET)
    said = refused(build({"qcow2": "made"}), **given)
    assert says in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (build({}), "nothing is converted for CloudStack yet"),
        (build({"qcow2": "made"}, "vhd"), "systemvm.vhd is not converted yet\n  hint: run: inv convert.vhd"),
        (build({"qcow2": "made", "ova": "changed"}), "systemvm.ova was changed after it was made"),
        (build({"qcow2": "made", "old": ""}), "systemvm.qcow2 was made for no release of CloudStack"),
        (build({"qcow2": "made"}, "qcow2,vmdk"), "CloudStack has no system template in vmdk"),
        (build({"qcow2": "made"}, cloudstack_release=""), "this image is for no release of CloudStack"),
        (build({"qcow2": "made"}, arch="i386"), "this image is for no release of CloudStack"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_the_files(made: Build, says: str) -> None:
    assert says in refused(made)


@pytest.mark.parametrize(
    "missing", ["CLOUDSTACK_KEY", "CLOUDSTACK_SECRET", "CLOUDSTACK_KEY and CLOUDSTACK_SECRET"]
)
def test_keys_that_are_not_set(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLOUDSTACK_KEY", "CLOUDSTACK_SECRET"):
        monkeypatch.setenv(name, "" if name in missing else "given")
    assert f"error: {missing} " in refused(build({"qcow2": "made"}), endpoint=ENDPOINT)


def test_files_that_are_there_are_registered_and_the_others_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    register.register(build({"vhd": "made"}), f"{URL}/", "-1", "", False)
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "listOsTypes 'description=Other Linux (64-bit)'"
    assert second == (
        "registerTemplate name=n requireshvm=true bits=64 templatetype=SYSTEM "
        f"url={URL}/systemvm.vhd zoneid=-1 ostypeid=ID"
    )
    assert last.startswith("nothing was called")


def test_an_upgrade_takes_one_zone_and_no_system_type() -> None:
    artifact = {"file": "a.vhd", "register": {"name": "n", "ostype": "x"}}
    (found,) = register.templates([artifact], URL, "1a-2b", upgrade=True)
    assert found.params == {"name": "n", "url": f"{URL}/a.vhd", "zoneid": "1a-2b"}
