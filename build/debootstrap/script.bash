#!/bin/bash
# Parameters: SUITE ARCH TOOL ARCHS EXACTLY LINKS TOTAL REFUSED
if [[ -z ${QUIET:-} ]]; then
    # What is cut off is thrown away: nothing in here needs to wait for the disk.
    export QUIET=1
    exec "$PYTHON" -I "$FILES/nosync.py" bash "$0"
fi
command -v "$TOOL" >/dev/null || fail "$TOOL is missing on the build host" "install $TOOL"

export REFUSED
export INITRD=No # one initramfs is made later, in a layer of its own
wanted=$FILES/set.json
stage=$ROOT/.stage # beside the tree, so that files are moved and never copied
repository=$WORK/repository
diversions=$ROOT/var/lib/dpkg/diversions

# alone TOOL [ARGUMENT...]: run a tool whose mounts go with it. Its chroot(8) is ours, wherever it looks for it,
# and what is unpacked meanwhile is not for the tree's programs. mmdebstrap wants numbers of one digit for its own
# descriptors.
alone() {
    # shellcheck disable=SC2016  # expanded by the inner shell
    unshare --mount --propagation private sh -euc '
        mount --bind "$FILES/chroot" "$(command -v chroot)"
        mount -t tmpfs -o ro tmpfs "$0"
        exec "$@"
    ' "$stage" "$@" 8<&-
}

# no tool takes a space in the path of a repository
make_base() {
    local neutral=/proc/$$/fd/8
    case $TOOL in
        mmdebstrap)
            # shellcheck disable=SC2016  # expanded by the tool's own shell
            alone mmdebstrap --mode=root --variant=essential --format=directory \
                --architectures="$ARCH" --skip=check/empty,check/qemu,output/dev \
                --setup-hook='for name in '"$LINKS"'; do mkdir -p "$1/usr/$name"; done' \
                --setup-hook='for name in '"$LINKS"'; do ln -s "usr/$name" "$1/$name"; done' \
                "$SUITE" "$ROOT" "deb [trusted=yes] copy:$neutral $SUITE main"
            ;;
        debootstrap)
            # "lxc" is how it learns that device nodes cannot be made, as in a user namespace
            container=lxc alone debootstrap --variant=minbase --arch="$ARCH" --no-check-gpg \
                "$SUITE" "$ROOT" "file://$neutral"
            "$PYTHON" -I "$FILES/unpack.py" restore "$wanted" "$ROOT"
            ;;
    esac
} 8<"$repository"

# dpkg's or apt's own account of what it does: descriptor 9
configure() {
    # shellcheck disable=SC2094  # the tool writes the file, we read it when it is done
    if ! in_tree --fd 9 "$@" 9> >("$PYTHON" -I "$FILES/follow.py" configure "$TOTAL" "$WORK/failed"); then
        fail "a package cannot be installed: $(cat "$WORK/failed" 2>/dev/null || echo "dpkg failed")" \
            "read the log of this step"
    fi
}

prepare_base() {
    make_base
    # Services never start. A key that is there is not made: keys of the build never reach an image.
    # shellcheck disable=SC2016  # expanded by the inner shell
    in_tree sh -euc '
        printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
        printf "%s\n" "$1" | debconf-set-selections
        shift
        printf "%s\n" "$@" >/var/lib/dpkg/arch
        mkdir -p /etc/ssh
        touch /etc/ssh/ssh_host_rsa_key /etc/ssh/ssh_host_ecdsa_key /etc/ssh/ssh_host_ed25519_key
    ' sh "$(cat "$FILES/answers")" "${ARCHS[@]}"
}

with_apt() {
    note "a package has to be left to dpkg: starting over with apt"
    find "$ROOT" -mindepth 1 -delete
    rm -rf "$repository"
    "$PYTHON" -I "$FILES/unpack.py" repository "$wanted" "$repository"
    mkdir "$stage"
    prepare_base
    rmdir "$stage"
    rm -rf "$repository"
    "$PYTHON" -I "$FILES/unpack.py" repository "$wanted" "$repository" --all
    mkdir "$ROOT/.repository" "$ROOT/.repository/pool"
    cp -r "$repository/dists" "$ROOT/.repository"
    mount -o bind,ro "$DEBS" "$ROOT/.repository/pool"
    printf 'deb [trusted=yes] copy:/.repository %s main\n' "$SUITE" >"$ROOT/.repository/list"
    local options=(-q -y --no-install-recommends -o APT::Sandbox::User=root -o Dpkg::Use-Pty=false
        -o Dir::Etc::SourceList=/.repository/list -o Dir::Etc::SourceParts=/dev/null
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold)
    in_tree apt-get "${options[@]}" update
    configure apt-get "${options[@]}" -o APT::Status-Fd=9 -o APT::Keep-Fds::=9 install "${EXACTLY[@]}"
    umount "$ROOT/.repository/pool"
    rm -r "$ROOT/.repository"
}

"$PYTHON" -I "$FILES/unpack.py" repository "$wanted" "$repository"
mkdir "$stage"
nice -n 10 "$PYTHON" -I "$FILES/unpack.py" stage "$wanted" "$stage" "$WORK/unpacked" & # the base is the longer chain
unpacking=$!
prepare_base
outcome=0
wait "$unpacking" || outcome=$?
if ((outcome == 0)); then
    "$PYTHON" -I "$FILES/unpack.py" merge "$wanted" "/${stage##*/}" "$WORK/unpacked" "$ROOT" || outcome=$?
fi
if ((outcome == 0)); then
    rm -rf "$stage"
    cp "$diversions" "$WORK/diversions"
    in_tree sh /var/lib/dpkg/preinst-runner
    rm "$ROOT/var/lib/dpkg/preinst-runner"
    # dpkg would have diverted such files while it unpacked them
    cmp "$diversions" "$WORK/diversions" || outcome=$REFUSED
fi
# dpkg keeps one core busy: another copies what is there to the disk
configure_all() {
    local copying=
    if [[ -n ${COPY_TREE:-} ]]; then
        nice -n 10 "$PYTHON" -I -B "$COPY_TREE" "$ROOT" "$TARGET" "$WORK/copied" &
        copying=$!
    fi
    configure dpkg --force-confdef --force-confold --status-fd 9 --configure -a
    [[ -z $copying ]] || wait "$copying"
}
case $outcome in
    0) configure_all ;;
    "$REFUSED") with_apt ;;
    *) exit "$outcome" ;;
esac

lay 644 "$FILES/debian.sources" /etc/apt/sources.list.d/debian.sources
in_tree dpkg --audit >"$WORK/audit"
[[ ! -s $WORK/audit ]] || fail "dpkg finds packages that are not whole" "read the log of this step"
# shellcheck disable=SC2016  # dpkg-query's own variables
in_tree dpkg-query --show -f '${Package} ${Version} ${Architecture} ${db:Status-Status}\n' >"$WORK/installed"
"$PYTHON" -I "$FILES/tidy.py" "$wanted" "$WORK/installed" "$ROOT"
