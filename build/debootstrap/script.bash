#!/bin/bash
# Parameters: SUITE ARCH TOOL ARCHS EXACTLY LINKS DEFERRED WARMED MODULES TOTAL REFUSED
if [[ -z ${QUIET:-} ]]; then
    # What is cut off is thrown away: nothing in here needs to wait for the disk.
    export QUIET=1
    exec "$PYTHON" -I "$FILES/nosync.py" bash "$0"
fi

need_tool() {
    [[ $TOOL == builtin ]] || command -v "$TOOL" >/dev/null ||
        fail "$TOOL is missing on the build host" "install $TOOL"
}
need_tool

export REFUSED
export INITRD=No # one initramfs is made later, in a layer of its own
wanted=$FILES/set.json
stage=$ROOT/.stage # beside the tree, so that files are moved and never copied
late=$ROOT/.late   # the same for what is unpacked while dpkg configures
repository=$WORK/repository
diversions=$ROOT/var/lib/dpkg/diversions

# unseen COMMAND [ARGUMENT...]: run what must not see, let alone change, the packages that are unpacked meanwhile
unseen() {
    # shellcheck disable=SC2016  # expanded by the inner shell
    unshare --mount --propagation private sh -euc '
        for folder in "$0/.stage" "$0/.late"; do
            [ ! -d "$folder" ] || mount -t tmpfs -o ro tmpfs "$folder"
        done
        exec "$@"
    ' "$ROOT" "$@"
}

# beside COMMAND [ARGUMENT...]: in_tree, while packages are unpacked
beside() { unseen "$PYTHON" -I -S -B "$ENTER" "$ROOT" "$@" </dev/null; }

# alone TOOL [ARGUMENT...]: run a bootstrap tool. Its chroot(8) is ours, wherever it looks for it. mmdebstrap wants
# numbers of one digit for its own descriptors.
alone() {
    # shellcheck disable=SC2016  # expanded by the inner shell
    unseen sh -euc 'mount --bind "$FILES/chroot" "$(command -v chroot)"; exec "$@" 8<&-' sh "$@"
}

# run_preinsts WHERE: of what has just been entered into dpkg's database
run_preinsts() {
    "$1" sh /var/lib/dpkg/preinst-runner
    rm "$ROOT/var/lib/dpkg/preinst-runner"
}

# what can be done of the base before there is a tree
begin_base() {
    if [[ $TOOL == builtin ]]; then
        "$PYTHON" -I "$FILES/unpack.py" base "$wanted" "$ROOT" "$WORK/base"
    else
        "$PYTHON" -I "$FILES/unpack.py" repository "$wanted" "$repository"
    fi
}

# the base by ourselves: dpkg, which is in it, learns of the packages that are unpacked, and configures them
configure_base() {
    "$PYTHON" -I "$FILES/unpack.py" begin "$wanted" "$ROOT" "$WORK/base"
    run_preinsts beside
    beside dpkg --force-confdef --force-confold --configure -a
}

# the base by another tool; none takes a space in the path of a repository
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
    rm -f "$ROOT/etc/resolv.conf" # the build host's, which systemd-resolved would keep a copy of
} 8<"$repository"

# dpkg's or apt's own account of what it does: descriptor 9
configure() {
    # shellcheck disable=SC2094  # the tool writes the file, we read it when it is done
    if ! beside --fd 9 "$@" 9> >("$PYTHON" -I "$FILES/follow.py" configure "$TOTAL" "$WORK"); then
        fail "a package cannot be installed: $(cat "$WORK/failed" 2>/dev/null || echo "dpkg failed")" \
            "read the log of this step"
    fi
}

prepare_base() {
    if [[ $TOOL == builtin ]]; then configure_base; else make_base; fi
    # Services never start. A key that is there is not made: keys of the build never reach an image.
    # shellcheck disable=SC2016  # expanded by the inner shell
    beside sh -euc '
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
    begin_base
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

# take_in FOLDER NOTES: move into the tree what was unpacked in a folder of it, and run its preinsts; sets `outcome`
take_in() {
    "$PYTHON" -I "$FILES/unpack.py" merge "$wanted" "/${1##*/}" "$2" "$ROOT" || outcome=$?
    if ((outcome == 0)); then
        rm -rf "$1"
        cp "$diversions" "$WORK/diversions"
        run_preinsts beside
        # dpkg would have diverted such files while it unpacked them
        cmp "$diversions" "$WORK/diversions" || outcome=$REFUSED
    fi
}

outcome=0
begin_base || outcome=$?
if ((outcome == REFUSED)); then
    TOOL=mmdebstrap
    need_tool
fi
can_wait=()
if [[ $TOOL == builtin ]]; then can_wait=("$WORK/late.json"); fi
if ((outcome == 0)); then
    mkdir "$stage"
    # the base is the longer chain
    nice -n 10 "$PYTHON" -I "$FILES/unpack.py" stage "$wanted" "$stage" "$WORK/unpacked" "${can_wait[@]}" &
    unpacking=$!
    prepare_base
    wait "$unpacking" || outcome=$?
fi
unpacking=
if ((outcome == 0)) && [[ -e $WORK/late.json ]]; then
    mkdir "$late"
    nice -n 10 "$PYTHON" -I "$FILES/unpack.py" stage "$WORK/late.json" "$late" "$WORK/late" &
    unpacking=$!
fi
if ((outcome == 0)); then
    take_in "$stage" "$WORK/unpacked"
fi

everything=(dpkg --force-confdef --force-confold --status-fd 9 --configure -a)
# dpkg keeps one core busy: another does what nobody waits for
configure_quickly() {
    mkdir "$ROOT/.later"
    cp "$FILES/later" "$FILES/warm" "$ROOT/.later"
    # shellcheck disable=SC2016  # expanded by the inner shell
    in_tree sh -euc '
        program=later
        for name in "$@"; do
            if [ "$name" = -- ]; then
                program=warm
            elif command -v "$name" >/dev/null; then
                ln -s "$program" "/.later/$name"
                [ "$program" = warm ] || : >"/.later/$name.queue"
            fi
        done
        # Scripts with questions start debconf by its full path; another implementation of it has another one.
        ln -s warm /.later/frontend
        if [ ! -e /usr/lib/cdebconf ]; then
            mkdir /usr/lib/cdebconf
            ln -s /.later/frontend /usr/lib/cdebconf/debconf
        fi
    ' sh "${DEFERRED[@]}" -- "${WARMED[@]}"
    for name in "${DEFERRED[@]}"; do
        if [[ -e $ROOT/.later/$name.queue ]]; then
            beside sh /.later/later run "$name" &
            working+=("$!")
        fi
    done
    # shellcheck disable=SC2016  # expanded by the inner shell
    configure sh -c '
        /.later/warm serve $0 9>&- &
        [ ! -L /usr/lib/cdebconf/debconf ] || export DEBCONF_USE_CDEBCONF=1
        PATH=/.later:$PATH exec "$@"
    ' "${MODULES[*]}" "${everything[@]}"
    if [[ -n $unpacking ]]; then
        wait "$unpacking" || outcome=$?
        if ((outcome == 0)); then take_in "$late" "$WORK/late"; fi
        # shellcheck disable=SC2016  # expanded by the inner shell
        if ((outcome == 0)); then configure sh -c 'PATH=/.later:$PATH exec "$@"' sh "${everything[@]}"; fi
    fi
    in_tree sh -euc '[ ! -L /usr/lib/cdebconf/debconf ] || rm -r /usr/lib/cdebconf'
    : >"$ROOT/.later/done"
    if ((outcome)); then
        wait "${working[@]}" # before they lose the tree
        working=()
    fi
}
working=()
if ((outcome == 0)); then
    if [[ $TOOL == builtin ]]; then configure_quickly; else configure "${everything[@]}"; fi
fi
case $outcome in
    0) ;;
    "$REFUSED") with_apt ;;
    *) exit "$outcome" ;;
esac

lay 644 "$FILES/debian.sources" /etc/apt/sources.list.d/debian.sources
in_tree dpkg --audit >"$WORK/audit"
[[ ! -s $WORK/audit ]] || fail "dpkg finds packages that are not whole" "read the log of this step"
# shellcheck disable=SC2016  # dpkg-query's own variables
in_tree dpkg-query --show -f '${Package} ${Version} ${Architecture} ${db:Status-Status}\n' >"$WORK/installed"
for each in "${working[@]}"; do
    wait "$each"
done
rm -rf "$ROOT/.later"
"$PYTHON" -I "$FILES/tidy.py" "$wanted" "$WORK/installed" "$ROOT"
