"""Which compressors a host loads, what pip is asked for where the client's own do not fit, and what comes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import shlex
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from build.engine import compressors
from build.engine.errors import BuildError
from build.engine.hosts import host

CHECKOUT = Path(__file__).resolve().parents[2]
DEBIAN_12 = {
    "version": [3, 11, 2],
    "implementation": "cpython",
    "machine": "x86_64",
    "libc": ["glibc", "2.36"],
    "uid": 0,
}
ELSEWHERE = [
    pytest.param({"implementation": "pypy"}, id="pypy"),
    pytest.param({"libc": ["musl", "1.2"]}, id="musl"),
    pytest.param({"libc": ["", ""]}, id="unknown libc"),
]


def wheel(name: str, files: dict[str, bytes]) -> bytes:
    """A wheel as pip brings it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in {f"{name}-1.dist-info/WHEEL": b"Wheel-Version: 1.0\n", **files}.items():
            archive.writestr(path, content)
    return buffer.getvalue()


WHEELS = {
    "deflate-1-x.whl": wheel("deflate", {"deflate/__init__.py": b"1", "deflate/_d.abi3.so": b"2"}),
    "zlib_ng-1-x.whl": wheel("zlib_ng", {"zlib_ng/zlib_ng.so": b"3", "zlib_ng/zlib_ng.pyi": b"4"}),
}
MODULES = {"deflate/__init__.py": b"1", "deflate/_d.abi3.so": b"2", "zlib_ng/zlib_ng.so": b"3"}
PINNED = " ".join(f"--hash=sha256:{hashlib.sha256(content).hexdigest()}" for content in WHEELS.values())


@pytest.mark.parametrize(
    ("tag", "loads"),
    [
        ("cp311-cp311-manylinux_2_17_x86_64", True),
        ("cp311-cp311-manylinux2014_x86_64", True),
        ("cp38-abi3-manylinux_2_28_x86_64", True),
        ("cp312-cp312-manylinux_2_17_x86_64", False),
        ("cp310-cp310-manylinux_2_17_x86_64", False),
        ("cp312-abi3-manylinux_2_17_x86_64", False),
        ("cp311-cp311-manylinux_2_17_aarch64", False),
        ("cp311-cp311-manylinux_2_39_x86_64", False),
        ("cp311-cp311-musllinux_1_2_x86_64", False),
        ("cp311-cp311-macosx_11_0_arm64", False),
        ("pp311-pypy311_pp73-manylinux_2_17_x86_64", False),
    ],
)
def test_a_wheel_goes_where_its_tag_says(tag: str, loads: bool) -> None:
    assert (tag in compressors.tags(DEBIAN_12)) == loads


@pytest.mark.parametrize("changed", ELSEWHERE)
def test_where_no_wheel_of_linux_loads_pip_is_asked_for_none(changed: dict[str, Any]) -> None:
    assert not compressors.tags({**DEBIAN_12, **changed})
    assert not compressors.asked({**DEBIAN_12, **changed})


def test_the_clients_own_are_judged_by_what_their_wheels_say(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "Tag: cp311-cp311-manylinux_2_17_x86_64\nTag: cp311-cp311-manylinux2014_x86_64\n"
    texts = {"zlib-ng": told, "deflate": told.replace("cp311-cp311", "cp311-abi3")}
    monkeypatch.setattr(
        importlib.metadata,
        "distribution",
        lambda name: SimpleNamespace(read_text=lambda _file: texts[name]),
    )
    assert compressors.fit(DEBIAN_12)
    assert not compressors.fit({**DEBIAN_12, "version": [3, 13, 5]})
    assert not compressors.fit({**DEBIAN_12, "machine": "aarch64"})
    texts["deflate"] = "Tag: cp311-abi3-macosx_11_0_arm64\n"
    assert not compressors.fit(DEBIAN_12)


def test_pip_is_asked_for_the_hosts_python_and_every_older_c_library() -> None:
    asked = compressors.asked({**DEBIAN_12, "version": [3, 13, 5], "machine": "aarch64"})
    assert asked[:4] == [
        "--implementation=cp",
        "--python-version=3.13",
        "--abi=cp313",
        "--platform=manylinux_2_36_aarch64",
    ]
    assert {"--platform=manylinux_2_17_aarch64", "--platform=manylinux2014_aarch64"} <= set(asked)
    assert "--platform=manylinux_2_37_aarch64" not in asked


def test_an_old_name_needs_its_c_library() -> None:
    old = compressors.platforms({**DEBIAN_12, "libc": ["glibc", "2.12"]})
    assert "manylinux2010_x86_64" in old
    assert "manylinux2014_x86_64" not in old


def test_the_lock_pins_both_for_every_python_alike() -> None:
    """A line with a marker would be judged by the client's Python, not by the host's."""
    pinned = compressors.pins((CHECKOUT / "requirements.lock").read_text())
    heads = [line for line in pinned.splitlines() if not line.startswith(" ")]
    names = {name: importlib.metadata.version(name) for name in ("deflate", "zlib-ng")}
    assert heads == [f"{name}=={version} \\" for name, version in names.items()]
    assert pinned.count("--hash=sha256:") > 40
    assert pinned == compressors.pins((CHECKOUT / "requirements-dev.lock").read_text())


def test_what_is_installed_is_shipped_whole() -> None:
    names = compressors.installed()
    assert any(name.startswith("zlib_ng/zlib_ng.") and name.endswith(".so") for name in names)
    assert any(name.startswith("deflate/") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.startswith(("/", "..")) or "dist-info" in name]


def test_wheels_count_when_they_are_all_there_and_as_pinned() -> None:
    deflate, zlib_ng = WHEELS.values()
    assert compressors.unpacked([deflate, zlib_ng], PINNED) == MODULES
    assert compressors.unpacked([b"of another lock", deflate, zlib_ng], PINNED) == MODULES
    assert compressors.unpacked([zlib_ng], PINNED) == {}
    assert compressors.unpacked([deflate, zlib_ng[:-1]], PINNED) == {}


def test_the_name_of_a_kind_is_no_path() -> None:
    assert compressors.kind(DEBIAN_12) == "cp311-x86_64-glibc2.36"
    assert "/" not in compressors.kind({**DEBIAN_12, "machine": "../../x"})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: first\nERROR: No matching distribution found for deflate==0.9.0\n", "No matching"),
        ("ERROR: THESE PACKAGES DO NOT MATCH\n    deflate:\n        Got        abc\n", "THESE PACKAGES"),
        ("/x/python: No module named pip\n", "/x/python: No module named pip"),
        ("", "pip said nothing"),
    ],
)
def test_what_pip_gave_as_its_reason_is_found(said: str, reason: str) -> None:
    assert compressors.reason(said).startswith(reason)


class Line:
    """A connection that notes what is run on this machine, and has pip bring what it is told to."""

    def __init__(self, brings: dict[str, bytes], said: str = "") -> None:
        self.brings = brings
        self.said = said
        self.ran: list[list[str]] = []

    def local(self, line: str, **_options: Any) -> Any:
        self.ran.append(shlex.split(line))
        (folder,) = [word.removeprefix("--dest=") for word in self.ran[-1] if word.startswith("--dest=")]
        for name, content in self.brings.items():
            Path(folder, name).write_bytes(content)
        return SimpleNamespace(ok=not self.said, stderr=self.said)


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a client whose own compressors fit nowhere."""
    monkeypatch.setattr(host, "STOCK", tmp_path / "wheels")
    monkeypatch.setattr(host, "pinned", lambda: PINNED)
    monkeypatch.setattr(compressors, "fit", lambda _remote_python: False)
    return tmp_path / "wheels"


def at(line: Line, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> tuple[host.Host, list[host.Files]]:
    """A host over this connection, and what is put there."""
    there, put = host.Host("bh", line), []

    def bring(self: host.Host, _kind: str, files: host.Files) -> str:
        put.append(files)
        return "/there"

    monkeypatch.setattr(host.Host, "_bring", bring)
    monkeypatch.setitem(there.__dict__, "_remote_python", {**DEBIAN_12, **changed})
    return there, put


def test_what_does_not_fit_is_fetched_once(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(WHEELS)
    for _ in range(2):
        there, put = at(line, monkeypatch)
        assert there.ensure_compressors("layer") == {}
        assert (
            there.ensure_compressors("convert")
            == there.ensure_compressors("inspect")
            == {"compressors": "/there"}
        )
        assert [set(files) for files in put] == [set(MODULES)]
    assert len(line.ran) == 1
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:", "--abi=cp311"} <= set(line.ran[0])
    assert [path.name for path in stock.iterdir()] == ["cp311-x86_64-glibc2.36"]


def test_what_was_kept_and_is_broken_is_fetched_anew(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(WHEELS)
    at(line, monkeypatch)[0].ensure_compressors("convert")
    (stock / "cp311-x86_64-glibc2.36" / "deflate-1-x.whl").write_bytes(b"")
    for _ in range(2):
        at(line, monkeypatch)[0].ensure_compressors("convert")
    assert len(line.ran) == 2


def test_a_failing_pip_is_one_clear_error(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, put = at(Line({}, "ERROR: No matching distribution found for deflate==1\n"), monkeypatch)
    with pytest.raises(BuildError) as caught:
        there.ensure_compressors("convert")
    assert caught.value.what == (
        "bh: no compressors for its Python 3.11 on x86_64: No matching distribution found for deflate==1"
    )
    assert "PIP_INDEX_URL" in caught.value.hint
    assert not put
    assert not list(stock.iterdir())


@pytest.mark.parametrize("changed", ELSEWHERE)
def test_a_host_for_which_there_are_none_is_told_so(
    changed: dict[str, Any], stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(WHEELS)
    there, _ = at(line, monkeypatch, **changed)
    with pytest.raises(BuildError, match="no compressors for its Python") as caught:
        there.ensure_compressors("convert")
    assert "Debian 12 or 13" in caught.value.hint
    assert not line.ran


def test_this_machine_needs_nothing_besides() -> None:
    assert host.Host("", Line({})).ensure_compressors("convert") == {}
