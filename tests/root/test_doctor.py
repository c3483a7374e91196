"""The doctor and the facts of this host, asked as the client asks them."""

from __future__ import annotations

import http.server
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from build.agent.debian import packages
from tests import ordinary
from tests.agent import Agent, Refused

SETTINGS = {
    "size": 300,
    "suite": "bookworm",
    "arch": "amd64",
    "debian_mirror": "",
    "security_mirror": "",
    "security": True,
    "apt_proxy": "",
    "keyring": "",
    "snapshot": "",
}


class Mirror(http.server.ThreadingHTTPServer):
    """A server that answers every path with the same bytes, and with a clock of its own."""

    body = b""
    skew = 0.0
    after = ""
    """What follows its date."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/debian"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Mirror)
        self.send_response(200 if self.server.body else 404)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        assert isinstance(self.server, Mirror)
        return formatdate(time.time() + self.server.skew, usegmt=True) + self.server.after

    def log_request(self, *_arguments: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.close()


def examine(agent: Agent, location: Path, mode: str = "root", **settings: Any) -> dict[str, dict[str, Any]]:
    """Ask for every row; answers them by name."""
    place = {"location": str(location), "mountpoint": "/mnt/doctor", "mode": mode, "overlay": True}
    wanted = {**SETTINGS, **settings}
    rows = agent.call("doctor", place=place, image=str(location / "x.img"), settings=wanted)
    assert all(set(row) == {"name", "ok", "value", "fix", "needed"} for row in rows)
    assert not [row for row in rows if bool(row["fix"]) == row["ok"]]
    found = {row["name"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_facts_come_whole_and_without_a_child(agent: Agent) -> None:
    known = agent.call("facts")
    assert (known["uid"], known["user"]) == (0, "root")
    assert known["cores"] == len(os.sched_getaffinity(0))
    assert 0 < known["memory_available"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert known["kernel"] == os.uname().release


def test_an_ordinary_user_is_told_apart(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for subids in (True, False):
        tables = tmp_path / f"tables-{subids}"
        tables.mkdir()
        agent = Agent(ordinary.prefix(tables, Path("/nowhere"), subids))
        known = agent.call("facts")
        agent.close()
        assert (known["uid"], known["user"]) == (ordinary.UID, ordinary.NAME)
        assert known["data_dir"] == "/nowhere/.local/share"
        assert known["subids"] is subids


def test_this_host_can_build(agent: Agent, tmp_path: Path, mirror: Mirror) -> None:
    rows = examine(agent, tmp_path, debian_mirror=mirror.url)
    well = {"host", "tools: build", "versions", "privileges", "location", "space", "overlay"}
    assert {name for name, row in rows.items() if row["ok"]} >= well, rows
    assert not rows["kvm"]["needed"]
    assert list(tmp_path.iterdir()) == []


def test_what_debian_lacks_for_xenserver_is_named(agent: Agent, tmp_path: Path, mirror: Mirror) -> None:
    url = {"debian_mirror": mirror.url}
    assert "xenserver" not in examine(agent, tmp_path, **url)
    row = examine(agent, tmp_path, cloudstack_release="4.22.0", **url)["xenserver"]
    assert (row["ok"], row["needed"]) == (True, False)
    assert "xe-guest-utilities (" in row["value"]
    assert "vhd-util (" in row["value"]
    own = {"all": ["xe-guest-utilities"]}
    row = examine(agent, tmp_path, cloudstack_release="4.22.0", packages=own, **url)["xenserver"]
    assert "xe-guest" not in row["value"]


def test_a_user_without_sub_ids_gets_the_command(tmp_path: Path, mirror: Mirror) -> None:
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, ordinary.UID, ordinary.UID)
        agent = Agent(ordinary.prefix(tmp_path, Path(home), subids=False))
        rows = examine(agent, Path(home, "images"), "user", debian_mirror=mirror.url)
        agent.close()
    assert not rows["sub-ids"]["ok"]
    fix = "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 builder"
    assert rows["sub-ids"]["fix"] == fix
    assert not rows["privileges"]["ok"]
    assert rows["location"]["ok"]


def test_a_user_without_uidmap_is_told_that_alone(tmp_path: Path, mirror: Mirror) -> None:
    """As on a Debian 13 that has no uidmap: what is missing is named, nothing that is there is blamed."""
    hide = 'for tool in newuidmap newgidmap; do mount --bind /dev/null /usr/bin/$tool; done; exec "$@"'
    hidden = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", hide, "sh")
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, ordinary.UID, ordinary.UID)
        agent = Agent((*hidden, *ordinary.prefix(tmp_path, Path(home))))
        rows = examine(agent, Path(home, "images"), "user", debian_mirror=mirror.url)
        with pytest.raises(Refused, match="newuidmap is missing"):
            agent.call("location", location=home, mountpoint="", imageloc="", imagename="x", create=True)
        agent.close()
    assert rows["sub-ids"]["ok"]
    assert "newuidmap is missing" in rows["privileges"]["value"]
    assert rows["privileges"]["fix"].endswith("apt-get install --no-install-recommends uidmap")
    assert "uidmap" in rows["tools: build"]["value"]


def test_a_place_that_cannot_be_written_is_named(agent: Agent, mirror: Mirror) -> None:
    rows = examine(agent, Path("/proc/images"), debian_mirror=mirror.url)
    assert not rows["location"]["ok"]
    assert rows["location"]["fix"] == "install -d -o root /proc/images"
    assert not rows["space"]["ok"]
    assert "overlay" not in rows


def test_too_little_space_is_told_with_figures(agent: Agent, tmp_path: Path, mirror: Mirror) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize >> 20
    rows = examine(agent, tmp_path, size=free, debian_mirror=mirror.url)
    assert not rows["space"]["ok"]
    assert rows["space"]["needed"]
    assert "SYSTEMVM_LOCATION" in rows["space"]["fix"]


def test_a_mirror_that_is_none_is_told(agent: Agent, tmp_path: Path, mirror: Mirror) -> None:
    missing = examine(agent, tmp_path, debian_mirror=mirror.url)["mirror"]
    assert (missing["ok"], missing["value"]) == (False, f"{mirror.url} has no suite bookworm")
    mirror.body = b"Origin: Nobody\n"
    unsigned = examine(agent, tmp_path, debian_mirror=mirror.url)["mirror"]
    assert not unsigned["ok"]
    assert "is not a signed file" in unsigned["value"]
    mirror.body = b"-----BEGIN PGP SIGNED MESSAGE-----\n\nDate: x\n-----BEGIN PGP SIGNATURE-----\n"
    mirror.body += b"\n-----END PGP SIGNATURE-----\n"
    forged = examine(agent, tmp_path, debian_mirror=mirror.url)["mirror"]
    assert not forged["ok"]
    assert "signature" in forged["value"]


def test_a_dead_mirror_and_a_dead_proxy_name_their_setting(agent: Agent, tmp_path: Path) -> None:
    dead = examine(agent, tmp_path, debian_mirror="http://127.0.0.1:1/debian")["mirror"]
    assert not dead["ok"]
    assert "debian_mirror" in dead["fix"]
    proxy = examine(
        agent, tmp_path, debian_mirror="http://mirror.invalid/debian", apt_proxy="http://127.0.0.1:1"
    )
    assert not proxy["mirror"]["ok"]
    assert "apt_proxy" in proxy["mirror"]["fix"]


@pytest.mark.parametrize(
    ("skew", "well", "word"), [(0, True, "agrees"), (4000, False, "slow"), (-4000, False, "fast")]
)
def test_the_clock_is_held_against_the_mirrors(
    agent: Agent, tmp_path: Path, mirror: Mirror, skew: float, well: bool, word: str
) -> None:
    mirror.body, mirror.skew = b"whatever", skew
    clock = examine(agent, tmp_path, debian_mirror=mirror.url)["clock"]
    assert clock["ok"] is well
    assert word in clock["value"]
    assert well or clock["fix"].startswith("date --utc --set=")


def test_nothing_of_a_servers_own_writing_gets_into_a_command_for_root(
    agent: Agent, tmp_path: Path, mirror: Mirror
) -> None:
    mirror.body, mirror.skew, mirror.after = b"whatever", 4000, "'; reboot; '"
    fix = examine(agent, tmp_path, debian_mirror=mirror.url)["clock"]["fix"]
    assert "reboot" not in fix
    assert fix.count("'") == 2
    mirror.after = " nonsense" * 9
    mirror.skew = -9e10
    assert "clock" not in examine(agent, tmp_path, debian_mirror=mirror.url)


def test_what_a_cut_off_run_left_is_found(agent: Agent, tmp_path: Path, mirror: Mirror) -> None:
    part = tmp_path / "cache/root/.tweak-0123.part/tree"
    part.mkdir(parents=True)
    (part / "file").write_bytes(b"x" * 3_000_000)
    row = examine(agent, tmp_path, debian_mirror=mirror.url)["leftovers"]
    assert (row["ok"], row["needed"], row["fix"]) == (False, False, "inv clean")
    assert part.is_dir()


def test_the_table_names_packages_that_are_here(agent: Agent) -> None:
    lacking = [f"{need.probe} ({need.package})" for need in packages.missing("build", "boot", "test")]
    assert not lacking, f"run ./inv test, which brings: {', '.join(lacking)}"
