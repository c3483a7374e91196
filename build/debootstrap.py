"""The lowest layer: a Debian system of exactly the resolved packages.

The bootstrap tool (mmdebstrap or debootstrap) makes the base system, while all other packages are
unpacked in parallel beside it; dpkg then configures them in one go. Both tools give the same tree.
A set that the parallel way refuses is installed by apt on the same base.
"""

from __future__ import annotations

import json
from pathlib import Path

from build.engine.plan import File, Step
from build.engine.resolution import Resolution
from build.engine.settings import Loaded, Settings
from build.engine.shell import quote, words

TOOLS = Path(__file__).parent / "tools"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
REFUSED = 10
"""What unpack.py ends with when it leaves a set to dpkg."""
LINKS = {"amd64": "bin sbin lib lib64", "i386": "bin sbin lib"}
"""What a merged /usr makes links of."""
ANSWERS = (
    # The package would save the build host's firewall rules into the image.
    "iptables-persistent iptables-persistent/autosave_v4 boolean false",
    "iptables-persistent iptables-persistent/autosave_v6 boolean false",
    "sysstat sysstat/enable boolean true",
    "strongswan-starter strongswan/install_x509_certificate boolean false",
    "libc6 libraries/restart-without-asking boolean false",
    "locales locales/locales_to_be_generated multiselect en_US.UTF-8 UTF-8",
    "locales locales/default_environment_locale select en_US.UTF-8",
    # The disk gets its boot code when it is assembled, never while a package is configured.
    "grub-pc grub-pc/install_devices_empty boolean true",
    "grub-pc grub-pc/install_devices multiselect",
)
"""Answers to the questions of packages, as debconf-set-selections(1) reads them."""


def step(loaded: Loaded, resolution: Resolution) -> Step:
    """Describe the bootstrap of the resolved set; the packages themselves lie in `$DEBS`."""
    settings = loaded.settings
    tools = {
        name: File((TOOLS / name).read_bytes()) for name in ("unpack.py", "follow.py", "nosync.py", "tidy.py")
    }
    files = {
        **tools,
        "lock": File(resolution.lock().encode()),
        "set.json": File(_set(settings, resolution).encode()),
        "answers": File("".join(f"{line}\n" for line in ANSWERS).encode()),
        "debian.sources": File(sources(settings, resolution).encode()),
    }
    values = {"suite": settings.suite, "arch": settings.arch, "tool": settings.bootstrap}
    rest = [package for package in resolution.packages if not package.essential]
    exactly = [f"{package.name}:{_native(package.arch, settings)}={package.version}" for package in rest]
    head = "".join(f"{name}={quote(value)}\n" for name, value in values.items())
    head += f"archs=({words(architectures(settings))})\n"
    head += "".join(["exactly=(\n", *(f"    {quote(name)}\n" for name in exactly), ")\n"])
    base = (package.name for package in resolution.packages if package.essential)
    head += f"base={quote(','.join(base))}\nlinks={quote(LINKS[settings.arch])}\n"
    head += f"total={len(rest)}\nrefused={REFUSED}\n"
    return Step("debootstrap", head + SCRIPT, files, bootstrap=True)


def _native(arch: str, settings: Settings) -> str:
    return settings.arch if arch == "all" else arch


def architectures(settings: Settings) -> list[str]:
    """The image's architecture first, then those that packages are asked for by `name:arch`."""
    foreign = (name.partition(":")[2] for name in settings.package_list if ":" in name)
    return list(dict.fromkeys((settings.arch, *foreign)))


def _set(settings: Settings, resolution: Resolution) -> str:
    packages = [
        {
            "name": package.name,
            "version": package.version,
            "arch": package.arch,
            "file": package.filename,
            "size": package.size,
            "sha256": package.sha256,
            "base": package.essential,
        }
        for package in resolution.packages
    ]
    told = {
        "suite": settings.suite,
        "archs": architectures(settings),
        "asked": sorted(settings.package_list),
        "packages": packages,
    }
    return json.dumps(told, indent=1, sort_keys=True)


def sources(settings: Settings, resolution: Resolution) -> str:
    """The image's own sources list: never the build's proxy, nor a mirror given for the build only."""
    mirror = settings.image_mirror or resolution.default_mirror
    parts = [("", mirror, f"{settings.suite} {settings.suite}-updates")]
    if settings.security:
        parts.append(("\n", security_sibling(mirror), f"{settings.suite}-security"))
    return "".join(
        f"{gap}Types: deb\nURIs: {uri}\nSuites: {suites}\n"
        f"Components: {' '.join(settings.components)}\nSigned-By: {KEYRING}\n"
        for gap, uri, suites in parts
    )


def security_sibling(mirror: str) -> str:
    """Where a mirror keeps its security suites: .../debian-security beside .../debian."""
    return f"{mirror}-security" if mirror.endswith("/debian") else f"{mirror}/debian-security"


SCRIPT = r"""
if [[ -z ${QUIET:-} ]]; then
    # What is cut off is thrown away: nothing in here needs to wait for the disk.
    export QUIET=1
    exec "$PYTHON" -I "$FILES/nosync.py" bash "$0"
fi
command -v "$tool" >/dev/null || fail "$tool is missing on the build host" "install $tool"

export INITRD=No # one initramfs is made later, in a layer of its own
wanted=$FILES/set.json
stage=$ROOT/.stage # beside the tree, so that files are moved and never copied
repository=$WORK/repository
diversions=$ROOT/var/lib/dpkg/diversions

# the mounts of a tool go with it
alone() { unshare --mount --propagation private "$@"; }

make_base() {
    case $tool in
        mmdebstrap)
            # shellcheck disable=SC2016  # expanded by the tool's own shell
            alone mmdebstrap --mode=root --variant=essential --include="$base" --format=directory \
                --architectures="$arch" --skip=check/empty,check/qemu,output/dev \
                --setup-hook='for name in '"$links"'; do mkdir -p "$1/usr/$name"; done' \
                --setup-hook='for name in '"$links"'; do ln -s "usr/$name" "$1/$name"; done' \
                "$suite" "$ROOT" "deb [trusted=yes] copy:$repository $suite main"
            ;;
        debootstrap)
            # "lxc" is how it learns that device nodes cannot be made, as in a user namespace
            container=lxc alone debootstrap --variant=minbase --arch="$arch" --no-check-gpg \
                "$suite" "$ROOT" "file://$repository"
            "$PYTHON" -I "$FILES/unpack.py" restore "$wanted" "$ROOT"
            ;;
    esac
}

# dpkg's or apt's own account of what it does: descriptor 9
configure() {
    # shellcheck disable=SC2094  # the tool writes the file, we read it when it is done
    if ! in_tree "$@" 9> >("$PYTHON" -I "$FILES/follow.py" configure "$total" "$WORK/failed"); then
        fail "a package cannot be installed: $(cat "$WORK/failed" 2>/dev/null || echo "dpkg failed")" \
            "read the log of this step"
    fi
}

prepare_base() {
    make_base
    printf '#!/bin/sh\nexit 101\n' >"$ROOT/usr/sbin/policy-rc.d" # services never start
    chmod 755 "$ROOT/usr/sbin/policy-rc.d"
    printf '%s\n' "${archs[@]}" >"$ROOT/var/lib/dpkg/arch"
    cp "$FILES/answers" "$ROOT/.answers"
    in_tree debconf-set-selections /.answers
    rm "$ROOT/.answers"
    # a key that is there is not made: keys of the build never reach an image
    mkdir -p "$ROOT/etc/ssh"
    touch "$ROOT"/etc/ssh/ssh_host_{rsa,ecdsa,ed25519}_key
}

with_apt() {
    note "a package has to be left to dpkg: starting over with apt"
    find "$ROOT" -mindepth 1 -delete
    rm -rf "$repository"
    "$PYTHON" -I "$FILES/unpack.py" repository "$wanted" "$repository"
    prepare_base
    rm -rf "$repository"
    "$PYTHON" -I "$FILES/unpack.py" repository "$wanted" "$repository" --all
    mkdir -p "$ROOT/.repository/pool"
    cp -r "$repository/dists" "$ROOT/.repository"
    mount --bind "$DEBS" "$ROOT/.repository/pool"
    printf 'deb [trusted=yes] copy:/.repository %s main\n' "$suite" >"$ROOT/.repository/list"
    local options=(-q -y --no-install-recommends -o APT::Sandbox::User=root -o Dpkg::Use-Pty=false
        -o Dir::Etc::SourceList=/.repository/list -o Dir::Etc::SourceParts=/dev/null
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold)
    in_tree apt-get "${options[@]}" update
    configure apt-get "${options[@]}" -o APT::Status-Fd=9 -o APT::Keep-Fds::=9 install "${exactly[@]}"
    umount "$ROOT/.repository/pool"
    rm -r "$ROOT/.repository"
}

"$PYTHON" -I "$FILES/unpack.py" repository "$wanted" "$repository"
nice -n 10 "$PYTHON" -I "$FILES/unpack.py" stage "$wanted" "$stage" & # the base is the longer chain
unpacking=$!
prepare_base
outcome=0
wait "$unpacking" || outcome=$?
if ((outcome == 0)); then
    "$PYTHON" -I "$FILES/unpack.py" merge "$wanted" "$stage" "$ROOT" || outcome=$?
fi
if ((outcome == 0)); then
    rm -rf "$stage"
    cp "$diversions" "$WORK/diversions"
    in_tree sh /var/lib/dpkg/preinst-runner
    rm "$ROOT/var/lib/dpkg/preinst-runner"
    # dpkg would have diverted such files while it unpacked them
    cmp "$diversions" "$WORK/diversions" || outcome=$refused
fi
# dpkg keeps one core busy: another carries what is there to the disk
configure_all() {
    local carrying=
    if [[ -n ${CARRY:-} ]]; then
        nice -n 10 "$PYTHON" -I -B "$CARRY" "$ROOT" "$TARGET" "$WORK/carried" &
        carrying=$!
    fi
    configure dpkg --force-confdef --force-confold --status-fd 9 --configure -a
    [[ -z $carrying ]] || wait "$carrying"
}
case $outcome in
    0) configure_all ;;
    "$refused") with_apt ;;
    *) exit "$outcome" ;;
esac

install -D -m 644 "$FILES/debian.sources" "$ROOT/etc/apt/sources.list.d/debian.sources"
in_tree dpkg --audit >"$WORK/audit"
[[ ! -s $WORK/audit ]] || fail "dpkg finds packages that are not whole" "read the log of this step"
# shellcheck disable=SC2016  # dpkg-query's own variables
in_tree dpkg-query --show -f '${Package} ${Version} ${Architecture} ${db:Status-Status}\n' >"$WORK/installed"
"$PYTHON" -I "$FILES/tidy.py" "$wanted" "$WORK/installed" "$ROOT"
"""
