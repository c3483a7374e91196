#!/bin/bash
set -Eeuo pipefail
shopt -s inherit_errexit
umask 022
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL=C.UTF-8 TZ=UTC DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true HOME=/root
trap 'tell error "$?" "$BASH_COMMAND"' ERR

# Lines for the builder go to descriptor 3; everything else is log.
tell() {
    local IFS=$'\t' line
    line="$*"
    printf '%s\n' "${line//$'\n'/ }" >&3
}

# progress LABEL DONE TOTAL
progress() { tell progress "$1" "$2" "$3"; }

# note TEXT: a line for the user
note() { tell note "$1"; }

# fail MESSAGE [HINT]
fail() {
    trap - ERR
    tell fail "$1" "${2:-}"
    exit 1
}

# apply_overlay: lay the overlay files of this step over the tree
apply_overlay() {
    "$PYTHON" -I "$FILES/apply_overlay.py" "$ROOT" "$FILES/tree" "$FILES/table.json" 2>"$WORK/refused" ||
        fail "$(cat "$WORK/refused")" "change the overlay so that it fits the tree"
}

# in_tree COMMAND [ARGUMENT...]: run a command in the tree, in mounts and processes of its own
in_tree() {
    # shellcheck disable=SC2016  # expanded by the inner bash
    unshare --mount --pid --fork --kill-child --propagation private bash -euc '
        mount -t proc proc "$ROOT/proc"
        mount --rbind /sys "$ROOT/sys"
        mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
        for node in null zero full random urandom tty; do
            : >"$ROOT/dev/$node"
            mount --bind "/dev/$node" "$ROOT/dev/$node"
        done
        mkdir "$ROOT/dev/pts" "$ROOT/dev/shm"
        mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$ROOT/dev/pts"
        ln -s pts/ptmx "$ROOT/dev/ptmx"
        ln -s /proc/self/fd "$ROOT/dev/fd"
        ln -s /proc/self/fd/0 "$ROOT/dev/stdin"
        ln -s /proc/self/fd/1 "$ROOT/dev/stdout"
        ln -s /proc/self/fd/2 "$ROOT/dev/stderr"
        for folder in run tmp; do
            mount -t tmpfs -o mode=1777 tmpfs "$ROOT/$folder"
        done
        chmod 755 "$ROOT/run"
        mkdir "$ROOT/run/lock"
        # Folders of the host are not for the tree: initramfs-tools writes a ROOT into what it makes.
        root=$ROOT
        unset ROOT FILES WORK TMPDIR SECRETS PYTHON DEBS OUT COPY_TREE TARGET
        cd /
        exec chroot "$root" "$@"
    ' in_tree "$@" </dev/null 3>&-
}
