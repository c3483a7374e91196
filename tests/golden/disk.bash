# systemvm
STUB=usr/lib/systemd/boot/efi/linuxx64.efi.stub
GRUB=usr/lib/grub/i386-pc
PREFIX='(,gpt3)/boot/grub'
GRUB_MODULES=(
    biosdisk
    part_gpt
    ext2
    normal
    linux
    boot
    serial
    terminal
    test
    echo
    keystatus
    minicmd
    ls
    cat
    halt
    reboot
    search
    search_fs_uuid
    search_label
    gzio
)
# tiny
# i386
STUB=
PREFIX='(,gpt2)/boot/grub'
# uefi
GRUB=
PREFIX='(,gpt2)/boot/grub'
