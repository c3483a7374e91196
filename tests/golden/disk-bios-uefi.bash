# tool NAME ARGUMENT...: run a tool of this step
tool() { "$PYTHON" -I -B "$FILES/$1" "${@:2}"; }

# shown COMMAND ARGUMENT...: run a command and pass its progress on
shown() {
    "$@" | while IFS=$'\t' read -r label reached total; do
        progress "$label" "$reached" "$total"
    done
}

# No root was needed for this: device nodes of a tree that root built would be the only difference.
# The kernel fills /dev by itself.
mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"

kernel="$(in_tree readlink -e /vmlinuz)" ||
    fail "the tree has no kernel at /vmlinuz" "add a kernel package, or mend the link"
initramfs="$(in_tree readlink -e /initrd.img)" ||
    fail "the tree has no initramfs at /initrd.img" "mend the link, or make it: update-initramfs -c -k all"
version="${kernel##*/vmlinuz-}"
[ "${initramfs##*/}" = "initrd.img-$version" ] ||
    fail "/vmlinuz leads to $kernel and /initrd.img to $initramfs" "let both lead to one version"
[ ! -e "$ROOT/boot/grub/grub.cfg" ] ||
    fail "the tree brings its own /boot/grub/grub.cfg" "take it out; set kernel_cmdline"
[ -x "$ROOT/usr/sbin/mke2fs" ] || fail "the tree has no mke2fs" "add e2fsprogs to the packages"

stub="$ROOT/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
[ -f "$stub" ] || fail "the tree has no stub for UEFI" "add systemd-boot-efi to the packages"

[ -f "$ROOT/usr/lib/grub/i386-pc/boot.img" ] ||
    fail "the tree has no GRUB for BIOS" "add grub-pc-bin to the packages"

boots=("$ROOT$kernel" "$ROOT$initramfs" "$stub")
in_tree lsinitramfs "$initramfs" >"$WORK/initramfs" &
listing=$!
if ! refused="$(tool layout.py "$FILES/disk.json" "$ROOT" "${boots[@]}" "$WORK")"; then
    [ -n "$refused" ] || refused=$'the disk cannot be laid out\tread the log of this step'
    fail "${refused%%$'\t'*}" "${refused#*$'\t'}"
fi
if ! wait "$listing" || ! grep -qx init "$WORK/initramfs"; then
    fail "the initramfs $initramfs is damaged" "make it anew: update-initramfs -u"
fi
grep -q "lib/modules/$version/" "$WORK/initramfs" ||
    fail "the initramfs $initramfs holds no module for $version" "make it anew: update-initramfs -u"

in_tree grub-mkimage --format=i386-pc --prefix='(,gpt3)/boot/grub' \
    biosdisk part_gpt ext2 normal linux boot serial terminal test echo \
    keystatus minicmd ls cat halt reboot search search_fs_uuid search_label gzio >"$WORK/core.img"
device="$(cut -d' ' -f1 "$WORK/cmdline")"
sed "s/@ROOT@/$device/" "$FILES/grub.cfg" >"$WORK/grub.cfg"
grep -qF " $device " "$WORK/grub.cfg"

printf '%s' "$version" >"$WORK/uname"
# The kernel comes last: it unpacks itself over what follows.
tool uki.py "$stub" "$WORK/linux.efi" .osrel="$ROOT/usr/lib/os-release" .cmdline="$WORK/cmdline" \
    .uname="$WORK/uname" .initrd="$ROOT$initramfs" .linux="$ROOT$kernel"

menu=("$WORK/grub.cfg")

# An image that is cut off is thrown away: one wait for the disk, at the end, is enough.
quickly() { tool nosync.py "$PYTHON" -I -B "$FILES/$1" "${@:2}"; }
shown quickly ext4.py "$WORK/plan.json" "$FILES/disk.json" "$ROOT" "$OUT" "$FILES/mke2fs.conf" \
    "$WORK" "${menu[@]}"

tool fat.py "$WORK/plan.json" "$OUT" EFI/BOOT/BOOTX64.EFI="$WORK/linux.efi"

tool bios.py "$WORK/plan.json" "$OUT" "$ROOT/usr/lib/grub/i386-pc/boot.img" "$WORK/core.img"

tool gpt.py "$WORK/plan.json" "$OUT"
shown tool digest.py "$WORK/plan.json" "$OUT" "$OUT.json"
