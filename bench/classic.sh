#!/bin/bash
# The classic recipe, for paired timing: debootstrap minbase into a loop-mounted ext4 file, apt-get install
# in the chroot, zero fill of the free space. Prints the seconds of each part and their sum as JSON.
#
#   classic.sh SUITE ARCH MIRROR SECURITY_MIRROR SIZE_MIB FOLDER PACKAGE...
set -Eeuo pipefail
suite=$1 arch=$2 mirror=$3 security=$4 size=$5 folder=$6
shift 6
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

if [[ -z ${CLASSIC_INSIDE:-} ]]; then
    # All mounts, and the loop device with them, go when this namespace ends.
    CLASSIC_INSIDE=1 exec unshare --mount --pid --fork --kill-child --mount-proc --propagation private \
        bash "$0" "$suite" "$arch" "$mirror" "$security" "$size" "$folder" "$@"
fi
mkdir -p "$folder/root"
image=$folder/classic.img root=$folder/root log=$folder/classic.log
exec 4>&1 >"$log" 2>&1
trap 'printf "the classic recipe failed, see %s\n" "$log" >&4' ERR
now() { date +%s.%N; }

started=$(now)
rm -f "$image"
truncate -s "${size}M" "$image"
mkfs.ext4 -q -F "$image"
mount -o loop "$image" "$root"
debootstrap --variant=minbase --arch="$arch" "$suite" "$root" "$mirror"
based=$(now)

printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
cat >"$root/etc/apt/sources.list" <<END
deb $mirror $suite main
deb $mirror $suite-updates main
deb $security $suite-security main
END
cp /etc/resolv.conf "$root/etc/resolv.conf"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
chroot "$root" apt-get -q update
chroot "$root" apt-get -q -y upgrade
chroot "$root" apt-get -q -y --no-install-recommends install "$@"
chroot "$root" apt-get clean
installed=$(now)

umount -R -l "$root/proc" "$root/sys" "$root/dev"
dd if=/dev/zero of="$root/zero" bs=1M status=none || true # ends when the disk is full
sync "$root/zero"
rm "$root/zero"
umount "$root"
ended=$(now)

awk -v a="$started" -v b="$based" -v c="$installed" -v d="$ended" 'BEGIN {
    printf "{\"debootstrap\": %.2f, \"install\": %.2f, \"zero_fill\": %.2f, \"total\": %.2f}\n", b - a, c - b, d - c, d - a
}' >&4
