#!/bin/bash
# Parameters: STUB (empty: no UEFI) GRUB (empty: no BIOS) PREFIX GRUB_MODULES
# tool NAME ARGUMENT...: run a tool of this step
tool() { "$PYTHON" -I -B "$FILES/$1" "${@:2}"; }

# No root was needed for this: device nodes of a tree that root built would be the only difference.
# The kernel fills /dev by itself.
mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"

# shellcheck disable=SC2016  # expanded by the inner shell
in_tree sh -c 'for name in /vmlinuz /initrd.img; do readlink -e "$name" || echo; done' >"$WORK/links"
{ read -r kernel && read -r initramfs; } <"$WORK/links"
[ -n "$kernel" ] || fail "the tree has no kernel at /vmlinuz" "add a kernel package, or fix the link"
[ -n "$initramfs" ] ||
    fail "the tree has no initramfs at /initrd.img" "fix the link, or make it: update-initramfs -c -k all"
version="${kernel##*/vmlinuz-}"
[ "${initramfs##*/}" = "initrd.img-$version" ] ||
    fail "/vmlinuz leads to $kernel and /initrd.img to $initramfs" "let both lead to one version"
[ ! -e "$ROOT/boot/grub/grub.cfg" ] ||
    fail "the tree brings its own /boot/grub/grub.cfg" "take it out; set kernel_cmdline"
[ -x "$ROOT/usr/sbin/mke2fs" ] || fail "the tree has no mke2fs" "add e2fsprogs to the packages"

boots=("$WORK/vmlinuz" "$WORK/${initramfs##*/}" "${STUB:+$WORK/stub}")
in_tree lsinitramfs "$initramfs" >"$WORK/initramfs" &
listing=$!
in_tree cat "$kernel" >"${boots[0]}" &
reading=$!
if [ -n "$STUB" ]; then
    in_tree cat "/$STUB" >"$WORK/stub" ||
        fail "the tree has no stub for UEFI" "add systemd-boot-efi to the packages"
fi
if [ -n "$GRUB" ]; then
    in_tree cat "/$GRUB/boot.img" >"$WORK/boot.img" ||
        fail "the tree has no GRUB for BIOS" "add grub-pc-bin to the packages"
fi
in_tree cat "$initramfs" >"${boots[1]}"
wait "$reading"
if ! refused="$(tool layout.py "$FILES/disk.json" "$ROOT" "${boots[@]}" "$WORK")"; then
    [ -n "$refused" ] || refused=$'the disk cannot be laid out\tread the log of this step'
    fail "${refused%%$'\t'*}" "${refused#*$'\t'}"
fi

# The tree's own programs write the root file system. They see the tree, what else goes into it, and the image.
stage=$WORK/stage
mkdir -p "$stage"/{dev,proc,run,sys,tmp,tree,inputs}
touch "$OUT" "$stage/image"
mount --rbind "$ROOT" "$stage/tree"
mount --bind "$OUT" "$stage/image"
cp "$FILES/mke2fs.conf" "$stage/inputs"

menu=()
if [ -n "$GRUB" ]; then
    device="$(cut -d' ' -f1 "$WORK/cmdline")"
    sed "s/@ROOT@/$device/" "$FILES/grub.cfg" >"$stage/inputs/grub.cfg"
    grep -qF " $device " "$stage/inputs/grub.cfg"
    menu=(grub.cfg)
fi
# An image that is cut off is thrown away: one wait for the disk, at the end, is enough.
"$PYTHON" -I -B "$FILES/nosync.py" "$PYTHON" -I -B "$FILES/ext4.py" \
    "$WORK/plan.json" "$FILES/disk.json" "$WORK/tree.json" "$stage" "$WORK/copies.json" "${menu[@]}" &
writing=$!

if [ -n "$STUB" ]; then
    printf '%s' "$version" >"$WORK/uname"
    in_tree cat /usr/lib/os-release >"$WORK/os-release"
    # The kernel comes last: it unpacks itself over what follows.
    tool uki.py "$WORK/stub" "$WORK/linux.efi" .osrel="$WORK/os-release" .cmdline="$WORK/cmdline" \
        .uname="$WORK/uname" .initrd="${boots[1]}" .linux="${boots[0]}"
    tool fat.py "$WORK/plan.json" "$OUT" EFI/BOOT/BOOTX64.EFI="$WORK/linux.efi"
fi
if [ -n "$GRUB" ]; then
    in_tree grub-mkimage --format=i386-pc --prefix="$PREFIX" "${GRUB_MODULES[@]}" >"$WORK/core.img"
    tool bios.py "$WORK/plan.json" "$OUT" "$WORK/boot.img" "$WORK/core.img"
fi
tool gpt.py "$WORK/plan.json" "$OUT"
if ! wait "$listing" || ! grep -qx init "$WORK/initramfs"; then
    fail "the initramfs $initramfs is damaged" "make it anew: update-initramfs -u"
fi
grep -q "lib/modules/$version/" "$WORK/initramfs" ||
    fail "the initramfs $initramfs holds no module for $version" "make it anew: update-initramfs -u"
wait "$writing"
tool fill.py "$WORK/plan.json" "$OUT" "$WORK/copies.json" "$ROOT" "$OUT.json" |
    while IFS=$'\t' read -r label reached total; do
        progress "$label" "$reached" "$total"
    done
