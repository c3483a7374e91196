#!/bin/bash
# Parameters: DRIVERS PACKAGE
kernels=("$ROOT"/usr/lib/modules/*/)
[[ -d ${kernels[0]} && ${#kernels[@]} == 1 ]] ||
    fail "the tree has not one kernel" "keep $PACKAGE in the packages, and no second kernel"
kernel=$(basename "${kernels[0]}")
[[ -x $ROOT/usr/sbin/update-initramfs ]] ||
    fail "the tree has no initramfs-tools" "add initramfs-tools to the packages"
[[ -s $ROOT/boot/vmlinuz-$kernel ]] ||
    fail "the tree has no /boot/vmlinuz-$kernel" "keep $PACKAGE in the packages"

# A driver that is not there would be left out without a word.
in_tree modinfo --set-version "$kernel" --field filename "${DRIVERS[@]}" ||
    fail "kernel $kernel lacks a driver of the list" "read the log of this step"

lay 644 "$FILES/systemvm.conf" /etc/initramfs-tools/conf.d/systemvm.conf
lay 644 "$FILES/blacklist" /etc/modprobe.d/no-floppy.conf
lay 755 "$FILES/hook" /etc/initramfs-tools/hooks/systemvm
in_tree rm -f "/boot/initrd.img-$kernel" # one that a package made, if it did not heed INITRD=No
in_tree update-initramfs -c -k "$kernel"
[[ -s $ROOT/boot/initrd.img-$kernel ]] ||
    fail "update-initramfs made no initramfs" "read the log of this step"

# INITRD=No kept the kernel's package from making the second of these links.
# shellcheck disable=SC2016  # expanded by the inner shell
in_tree sh -euc '
    ln -sfn "boot/vmlinuz-$1" /vmlinuz
    ln -sfn "boot/initrd.img-$1" /initrd.img
    rm -f /vmlinuz.old /initrd.img.old
' sh "$kernel"
note "initramfs of $kernel: $(($(stat -c %s "$ROOT/boot/initrd.img-$kernel") / 1024)) KiB"
