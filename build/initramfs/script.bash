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

install -D -m 644 "$FILES/systemvm.conf" "$ROOT/etc/initramfs-tools/conf.d/systemvm.conf"
install -D -m 644 "$FILES/blacklist" "$ROOT/etc/modprobe.d/no-floppy.conf"
install -D -m 755 "$FILES/hook" "$ROOT/etc/initramfs-tools/hooks/systemvm"
rm -f "$ROOT/boot/initrd.img-$kernel" # one that a package made, if it did not heed INITRD=No
in_tree update-initramfs -c -k "$kernel"
[[ -s $ROOT/boot/initrd.img-$kernel ]] ||
    fail "update-initramfs made no initramfs" "read the log of this step"

# INITRD=No kept the kernel's package from making the second of these links.
ln -sfn "boot/vmlinuz-$kernel" "$ROOT/vmlinuz"
ln -sfn "boot/initrd.img-$kernel" "$ROOT/initrd.img"
rm -f "$ROOT/vmlinuz.old" "$ROOT/initrd.img.old"
note "initramfs of $kernel: $(($(stat -c %s "$ROOT/boot/initrd.img-$kernel") / 1024)) KiB"
