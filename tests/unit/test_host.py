"""What the facade sends and reads, without a process."""

from __future__ import annotations

import ast
import io
import tarfile

import pytest

from build.engine.console import Console, size
from build.engine.errors import BuildError, HostError
from build.engine.hosts import host, session
from build.engine.password import crypt

pytestmark = pytest.mark.unit


def test_the_outbox_gives_requests_whole_and_beats_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    outbox = session._Outbox()
    assert outbox.read(1) is None
    outbox.put("x" * 70000)
    assert [len(outbox.read(1) or ""), len(outbox.read(1) or "")] == [65536, 4464]
    assert outbox.read(1) is None
    now[0] += session.BEAT
    assert outbox.read(1) == "\n"
    assert outbox.read(1) is None
    outbox.end()
    assert outbox.read(1) == ""


def test_lines_are_whole_however_they_arrive() -> None:
    got: list[str] = []
    stream = session._Lines(got.append)
    for piece in ("on", "e\ntw", "o\n", "\nthree"):
        stream.write(piece)
    assert got == ["one", "two", ""]


def test_the_pack_is_the_same_every_time_and_holds_the_agent() -> None:
    packed = host.pack(host.agent())
    assert packed == host.pack(host.agent())
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        names = archive.getnames()
        init = archive.extractfile("build/__init__.py")
        assert init is not None
        assert not [
            node for node in ast.parse(init.read()).body if isinstance(node, ast.ImportFrom | ast.Import)
        ]
    assert {"build/agent/__main__.py", "build/agent/sandbox.py", "build/formats/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith(("/", "..")) or not name.endswith(".py")]
    assert len(names) == len(set(names)) > 10


def test_passwords_hash_the_same_and_never_show() -> None:
    first = crypt("geheim $x'", "salt")
    assert first == crypt("geheim $x'", "salt")
    assert first.startswith("$6$rounds=50000$salt$")
    assert "geheim" not in first
    assert len({first, crypt("geheim $x'", "other"), crypt("other", "salt")}) == 3


def test_the_console_is_plain_when_it_is_not_a_terminal() -> None:
    stream = io.StringIO()
    console = Console("bh", stream)
    console.progress("work", 1, 2)
    console.step("built", "tweak", 1.25)
    console.table(("A", "B"), [("x", "long"), ("yy", "z")])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "bh | built   tweak                1.2s"
    assert lines[1:] == ["bh | A   B", "bh | x   long", "bh | yy  z"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert size(count) == text


def test_errors_on_a_host_name_it_and_lead_there() -> None:
    told = BuildError("there is no image", "run: inv build").on("bh")
    assert (told.what, told.hint) == ("bh: there is no image", "run: inv -H bh build")
    assert HostError("cannot reach bh", "try: ssh bh true", 7).on("bh").message.count("bh") == 2
    assert BuildError("there is no image").on("e").what == "e: there is no image", "a name may be any word"
    assert BuildError("x", code=7).on("bh").code == 7


def test_a_sudo_password_does_not_show_in_what_holds_it() -> None:
    assert "geheim" not in repr(host.Sudo(("sudo",), "geheim"))
