"""LOCATION's secret, and the salt and digests that it keys."""

from __future__ import annotations

import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from build import wire
from build.agent import secret
from build.agent.events import Failure, emit
from build.agent.verbs import digest


def test_it_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    first = secret.key(tmp_path, create=True)
    assert len(first) == 32
    assert secret.key(tmp_path, create=True) == secret.key(tmp_path, create=False) == first
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("left", [b"", b"half a secret"], ids=["empty", "half"])
def test_what_a_crash_left_counts_as_none(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(left)
    assert secret.key(tmp_path, create=False) == b""
    made = secret.key(tmp_path, create=True)
    assert (len(made), (tmp_path / "secret").read_bytes()) == (32, made)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("left", [None, b""], ids=["none", "empty"])
def test_all_who_come_at_once_get_the_same(left: bytes | None, tmp_path: Path) -> None:
    for number in range(50):
        location = tmp_path / str(number)
        location.mkdir()
        if left is not None:
            (location / "secret").write_bytes(left)
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(secret.key, [location] * 8, [True] * 8))) == 1


def test_to_look_makes_nothing(tmp_path: Path) -> None:
    assert secret.key(tmp_path, create=False) == secret.key(tmp_path / "none", create=False) == b""
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(32))
    (tmp_path / "secret").symlink_to("other")
    assert secret.key(tmp_path, create=False) == b""
    with pytest.raises(Failure, match=r"cannot use .*/secret") as refused:
        secret.key(tmp_path, create=True)
    assert "remove it" in refused.value.hint
    assert (tmp_path / "other").read_bytes() == bytes(32)


def test_a_salt_is_in_the_alphabet_and_of_secret_and_name() -> None:
    salts = {secret.salt(bytes([key]) * 32, name) for key in range(50) for name in ("systemvm", "other")}
    assert len(salts) == 100
    assert all(re.fullmatch(r"[./0-9A-Za-z]{16}", salt) for salt in salts)
    # RFC 4231, test case 2: HMAC-SHA256 begins with 5bdcc146bf60754e6a042426.
    assert secret.salt(b"Jefe", "what do ya want for nothing?") == "W9zBRr9gdU5qBCQm"
    assert secret.digest(b"Jefe", "what do ya want for nothing?").startswith("5bdcc146bf60754e6a042426")


def test_digests_are_of_this_location_and_need_its_secret(tmp_path: Path) -> None:
    request = wire.Digest(str(tmp_path), {"password-hash": "$6$x"})
    with pytest.raises(Failure, match="secret went away"):
        digest.run(request, emit)
    key = secret.key(tmp_path, create=True)
    assert digest.run(request, emit) == {"password-hash": secret.digest(key, "$6$x")}
