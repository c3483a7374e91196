#!/bin/sh
# Installs Debian packages on this host, as root: install.sh PACKAGE...
#
# No service that they bring is started or enabled, then or by a later upgrade: for as long as apt
# runs, a preset of systemd's says that a new unit is off. Debian's maintainer scripts enable by
# preset and start only what is enabled. Where sysvinit runs, RUNLEVEL makes invoke-rc.d refuse.
set -eu

preset=/run/systemd/system-preset/00-systemvm-builder-$$.preset
# shellcheck disable=SC2317  # the trap calls it
forget() {
    rm -f "$preset"
    rmdir "${preset%/*}" /run/systemd 2>/dev/null || true
}
trap forget EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "${preset%/*}"
echo 'disable *' >"$preset"

export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 RUNLEVEL=1 PREVLEVEL=N
apt() { apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 "$@" </dev/null; }
apt update || echo 'note: apt-get update failed; trying with the lists that are there' >&2
apt install -y --no-install-recommends -- "$@"
