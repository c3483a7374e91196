"""An image with a root password: its bytes, who may read it, and where password, hash and secret are not."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hmac
import json
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from build import wire
from build.engine import settings
from build.engine.errors import BuildError
from tests import cli, ordinary
from tests.agent import Agent, Refused
from tests.images import TINY, Built, link, remove, sha256

pytestmark = pytest.mark.root

PASSWORD = "correct horse $battery' staple"
FIT = ("$y$", "$gy$", "$7$", "$2b$", "$2a$", "$2y$", "$6$")
LEGACY = ("$5$", "$1$", "$sha1", "$md5", "_")
ENV = {"SYSTEMVM_PASSWORD": PASSWORD}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@dataclass
class Watch:
    """Looks again and again while a command runs: at modes of the files it makes, and at all processes."""

    location: Path
    modes: dict[str, set[int]] = field(default_factory=dict)
    lines: set[bytes] = field(default_factory=set)
    """Arguments of every process."""
    environments: set[bytes] = field(default_factory=set)
    """Of what agents have started."""

    def look(self) -> None:
        for name in (".tiny.img.part/tiny.img", ".tiny.vhdx.part", "tiny.vhdx"):
            with contextlib.suppress(FileNotFoundError):
                self.modes.setdefault(name, set()).add(mode(self.location / name))
        agents: set[int] = set()
        for entry in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                self.lines.add(line)
                # A child that is about to be another program still has our own line and environment.
                same = line.endswith(b"build/agent/__main__.py\0serve\0--local\0")
                if parent in agents and not same:
                    self.environments.add(Path(f"/proc/{entry}/environ").read_bytes())
                if parent in agents or same:
                    agents.add(entry)


@contextlib.contextmanager
def watching(location: Path) -> Iterator[Watch]:
    watch, over = Watch(location), threading.Event()

    def work() -> None:
        while not over.wait(0.01):
            watch.look()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class Closed:
    """A finished build with a password, and what was seen of it."""

    built: Built
    hashed: str
    shown: str
    watch: Watch
    sha256: str

    @property
    def secret(self) -> bytes:
        return (self.built.location / "secret").read_bytes()


def shadow(flags: tuple[str, ...], env: dict[str, str]) -> str:
    """Root's field in the finished tree."""
    told = cli.succeed("shell", *flags, "--frozen", "--command", "getent shadow root", env=env)
    return told.split(":")[1]


def linked(tiny: Built, location: Path) -> tuple[str, ...]:
    """Make a LOCATION with all layers of an image without a password; answers its flags."""
    link(tiny.location, location)
    return (*TINY, "--frozen", "--set", f"location={location}")


@pytest.fixture(scope="module")
def closed(tiny: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    location = tmp_path_factory.mktemp("closed") / "location"
    flags = linked(tiny, location)
    with watching(location) as watch:
        shown = cli.succeed("build", "--formats", "vhdx", *flags, env=ENV)
    image = location / "tiny.img"
    built = Built(location, image, shown)
    for line in (
        ("config",),
        ("config", "--json"),
        ("plan", "--script"),
        ("plan", "--json"),
        ("why", "seal"),
    ):
        shown += cli.succeed(*line, *flags, env=ENV)
    yield Closed(built, shadow(flags, ENV), shown, watch, sha256(image))
    remove(location, TINY)


def test_the_shadow_entry_is_what_openssl_makes_of_the_password(closed: Closed) -> None:
    _, method, rounds, salt, _ = closed.hashed.split("$")
    line = ["openssl", "passwd", f"-{method}", "-salt", f"{rounds}${salt}", "-stdin"]
    made = subprocess.run(line, input=PASSWORD, capture_output=True, text=True, check=True).stdout.strip()
    assert made == closed.hashed
    ours = base64.b64encode(hmac.digest(closed.secret, b"tiny", "sha256"), b"./")
    assert salt == ours.decode()[:16]


@pytest.mark.parametrize(
    ("prefix", "fit"),
    [(each, True) for each in FIT] + [(each, False) for each in LEGACY],
)
def test_hashes_that_libxcrypt_makes_are_taken_unless_it_calls_them_legacy(prefix: str, fit: bool) -> None:
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt_gensalt.restype = library.crypt.restype = ctypes.c_char_p
    salt = library.crypt_gensalt(prefix.encode(), 0, None, 0)
    assert (library.crypt_checksalt(salt) == 0) == fit
    hashed = library.crypt(PASSWORD.encode(), salt).decode()
    env = {"SYSTEMVM_PASSWORD_HASH": hashed}
    definition = cli.CHECKOUT / TINY[1]
    if fit:
        assert settings.load(definition, env).settings.password_hash.get_secret_value() == hashed
    else:
        with pytest.raises(BuildError, match="not a whole hash"):
            settings.load(definition, env)


def test_it_is_its_owners_alone_from_the_first_byte(tiny: Built, closed: Closed) -> None:
    assert closed.watch.modes == {
        ".tiny.img.part/tiny.img": {0o600},
        ".tiny.vhdx.part": {0o600},
        "tiny.vhdx": {0o600},
    }
    assert mode(closed.built.image) == 0o600
    assert mode(closed.built.location / "secret") == 0o600
    assert mode(tiny.image) == 0o644
    for name in ("tiny.img.json", "tiny.img.sha256", "SHA256SUMS"):
        assert mode(closed.built.location / name) == 0o644


def test_the_lines_that_name_it_say_so(tiny: Built, closed: Closed) -> None:
    named = [line for line in closed.built.output.splitlines() if str(closed.built.image) in line]
    assert len(named) == 2
    assert all("mode 0600: it holds a root password" in line for line in named)
    assert "0600" not in tiny.output


def test_password_hash_and_secret_are_nowhere_else(closed: Closed) -> None:
    secret = closed.secret
    hidden = [
        b"correct horse",  # no quoting touches it
        closed.hashed.encode(),
        secret,
        secret.hex().encode(),
        base64.b64encode(secret),
    ]
    shown = [closed.shown.encode(), *closed.watch.lines, *closed.watch.environments]
    assert len(closed.watch.environments) > 1
    assert any(b"ext4.py" in line for line in closed.watch.lines)
    assert not [text for text in shown for each in hidden if each in text]
    looked = []
    for above, folders, names in os.walk(closed.built.location):
        folders[:] = [
            name for name in folders if not (name == "tree" and "cache" in above) and name != "debs"
        ]
        for path in (Path(above, name) for name in names):
            if path.suffix not in (".img", ".vhdx") and path.name != "secret":
                looked.append(path.name)
                assert not [each for each in hidden if each in path.read_bytes()], path
    assert {"layer.json", "tiny.img.json", "lock", "seal.log", "SHA256SUMS"} <= {*looked}


def test_another_user_is_told_why_it_does_not_boot(tmp_path: Path) -> None:
    tables, image = tmp_path / "tables", tmp_path / "closed.img"
    tables.mkdir()
    image.write_bytes(bytes(1 << 20))
    work = tmp_path / "work"
    work.mkdir(mode=0o777)
    asked = {"guests": [wire.Guest(str(image), "bios")], "memory": 256, "arch": "amd64", "expect": {}}
    for path, closed in ((image, 0o600), (tmp_path, 0o755)):
        path.chmod(closed)
    agent = Agent(ordinary.prefix(tables, tmp_path))
    try:
        with pytest.raises(Refused, match="you may not read") as refused:
            agent.call("verify", **asked, work=str(work))
        assert "as its owner" in refused.value.hint
    finally:
        agent.close()


def test_one_location_gives_the_same_bytes_again_and_its_secret_stays(closed: Closed) -> None:
    secret = closed.secret
    for path in (*closed.built.location.glob("cache/root/seal-*"), closed.built.image):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    told = cli.states(cli.succeed("disk", *closed.built.flags, "--frozen", env=ENV))
    assert (told["minimize"], told["seal"], told["disk"]) == ("cached", "built", "built")
    assert sha256(closed.built.image) == closed.sha256
    assert closed.secret == secret


def test_another_location_gives_another_salt_and_a_hash_gives_the_same_bytes_in_any(
    tiny: Built, closed: Closed, tmp_path: Path
) -> None:
    location = tmp_path / "location"
    flags = linked(tiny, location)
    assert "to build" in cli.succeed("plan", *flags, env=ENV)
    assert "a secret, the header or the epoch changed" in cli.succeed("why", "seal", *flags, env=ENV)
    assert not (location / "secret").exists()
    cli.succeed("seal", *flags, env=ENV)
    assert shadow(flags, ENV).split("$")[3] != closed.hashed.split("$")[3]
    by_hash = {"SYSTEMVM_PASSWORD_HASH": closed.hashed}
    shown = cli.succeed("disk", *flags, env=by_hash)
    assert cli.states(shown)["seal"] == "built"
    assert sha256(location / "tiny.img") == closed.sha256
    assert mode(location / "tiny.img") == 0o600
    assert closed.hashed not in shown + cli.succeed("config", "--json", *flags, env=by_hash)
    told = json.loads((location / "tiny.img.json").read_text())["settings"]
    assert (told["password"], told["password_hash"]) == ("", "(set)")
    remove(location, TINY)


def test_without_the_password_its_files_stay_closed_and_a_new_image_is_open(
    closed: Closed, tiny: Built
) -> None:
    flags = (*closed.built.flags, "--frozen")
    made = closed.built.location / "tiny.vhdx"
    made.unlink()
    cli.succeed("convert.vhdx", *flags)
    assert mode(made) == 0o600
    before = (closed.built.image.stat(), sha256(closed.built.image))
    assert cli.states(cli.succeed("disk", *flags, env=ENV))["disk"] == "cached"
    assert (closed.built.image.stat(), sha256(closed.built.image)) == before
    told = cli.succeed("build", "--formats", "vhdx", *flags)
    assert "0600" not in told
    assert (mode(closed.built.image), mode(made)) == (0o644, 0o644)
    assert sha256(closed.built.image) == sha256(tiny.image)
