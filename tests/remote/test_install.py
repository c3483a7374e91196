"""`inv -H HOST doctor --install`: a package that is missing there comes from the host's own mirror."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests import cli
from tests.buildhost import HOST, Buildhost
from tests.images import TINY

pytestmark = pytest.mark.remote
PACKAGE = """
set -eu
mount -t overlay -o lowerdir=/usr,upperdir=/run/upper,workdir=/run/below overlay /usr
mount -t tmpfs tmpfs /var/cache/apt; mkdir -p /var/cache/apt/archives/partial
mount -t tmpfs tmpfs /var/log
dpkg --purge --force-depends uidmap
mkdir -p /var/tmp/mirror/tree/DEBIAN /var/tmp/mirror/tree/usr/bin
cd /var/tmp/mirror
for tool in newuidmap newgidmap; do echo '#!/bin/sh' >tree/usr/bin/$tool; chmod 755 tree/usr/bin/$tool; done
printf '%s\\n' 'Package: uidmap' 'Version: 99' 'Architecture: all' >tree/DEBIAN/control
printf '%s\\n' 'Maintainer: t <t@invalid>' 'Description: t' >>tree/DEBIAN/control
dpkg-deb --build tree uidmap.deb
rm -r tree
apt-ftparchive packages . >Packages
rm -rf /etc/apt/sources.list.d; echo 'deb [trusted=yes] file:/var/tmp/mirror ./' >/etc/apt/sources.list
"""


@pytest.fixture
def lacking(there: Buildhost) -> Iterator[Buildhost]:
    """The host without uidmap, and with a mirror that has a newer one."""
    there.inside("mkdir", "-p", "/run/upper", "/run/below")
    there.inside("bash", "-c", PACKAGE)
    yield there
    there.wait_until_idle()
    there.inside("umount", "--lazy", "/usr", "/var/cache/apt", "/var/log")
    there.inside("rm", "-r", "/var/tmp/mirror")


def test_what_is_missing_is_installed_by_root_only(lacking: Buildhost) -> None:
    there = lacking
    line = ("doctor", "--install", *TINY)
    said = cli.refuse("-H", f"carol@{HOST}", "--rootless", *line, prefix=there.prefix, env=there.env)
    assert "only root can install packages" in said
    assert "uidmap" in said.splitlines()[-1]
    with pytest.raises(subprocess.CalledProcessError):
        there.inside("test", "-e", "/usr/bin/newuidmap")
    done = cli.inv("-H", f"alice@{HOST}", *line, prefix=there.prefix, env=there.env)
    assert f"alice@{HOST} | installed: uidmap" in done.stdout, done.stderr
    assert there.inside("dpkg-query", "-W", "-f", "${Version}", "uidmap") == "99"
    again = cli.inv("-H", f"root@{HOST}", *line, prefix=there.prefix, env=there.env)
    assert "installed: nothing was missing" in again.stdout
