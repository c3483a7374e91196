"""Which Debian packages a verb wants on this host, and what each of them brings.

TABLE has two kinds of rows. `verbs SET VERB...` names verbs that want a set of packages; a verb of a
collection counts as its collection, and a step of the recipe (a folder of build/ with a script) wants
`build`. `need SET PROBE PACKAGE WHY...` says that PACKAGE brings PROBE, a command or a file by its absolute
path. The launcher, a shell script, reads these rows from this very file.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from build.agent.process import PATH

TABLE = """
verbs build   mount umount shell resolve lock fetch outdated repro
verbs build   build convert verify boot test bench picture
verbs boot    verify boot rehearse test bench
verbs login   rehearse test bench
verbs test    test bench picture

need build  apt-get     apt         solves the package set
need build  gpgv        gpgv        checks the signature of every InRelease file
need build  /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring  its keys
need build  /etc/ssl/certs/ca-certificates.crt ca-certificates  mirrors over https
need build  mmdebstrap  mmdebstrap  the base of a set that ours leaves to dpkg
need build  debootstrap debootstrap a third way to the same; holds the default mirror's name
need build  newuidmap   uidmap      builds as an ordinary user
need build  unshare     util-linux  private namespaces
need build  mount       mount       overlays in them
need build  xz          xz-utils    .deb files and package indices

need boot   qemu-system-x86_64 qemu-system-x86 runs the image
need boot   qemu-img    qemu-utils  the overlay that keeps the image as it is
need boot   /usr/share/OVMF/OVMF_CODE_4M.fd ovmf  firmware of UEFI guests

need login  ssh         openssh-client  plays a management server's host
need login  ssh-keygen  openssh-client  its throw-away key

need test   shellcheck  shellcheck  every script
need test   sshd        openssh-server  the build host of the remote ring
need test   sudo        sudo        the launcher and the remote host without root
need test   e2fsck      e2fsprogs   an independent reader of the root file system
need test   sfdisk      fdisk       of partition tables
need test   fsck.vfat   dosfstools  of the EFI system partition
need test   mcopy       mtools      of the files in it
need test   sgdisk      gdisk       an independent reader of GPT
need test   vhdiinfo    libvhdi-utils  of VHD
need test   vmdkinfo    libvmdk-utils  of VMDK
need test   qcowinfo    libqcow-utils  of QCOW2
need test   /usr/share/doc/python3-libvhdi/copyright python3-libvhdi  reads what is in a VHD
need test   /usr/bin/7zz 7zip  reads what is in image files, as another reader
need test   /usr/share/doc/python3-libvmdk/copyright python3-libvmdk  in a VMDK
need test   /usr/share/doc/python3-libqcow/copyright python3-libqcow  in a QCOW2
need test   xmllint     libxml2-utils  of OVF
need test   zstd        zstd        of what is packed with it
need test   keepalived  keepalived  fails over for real
need test   conntrackd  conntrackd  beside it
need test   ip          iproute2    networks of the tests' own
need test   nft         nftables    their rules
need test   iptables    iptables    their rules
need test   rsync       rsync       copies trees for comparison
need test   gpg         gpg         signs the tests' own mirror
need test   dpkg-deb    dpkg        builds its packages
need test   apt-ftparchive apt-utils indexes it
need test   git         git         clones the checkout
need test   busybox     busybox     another shell for the launcher
need test   tmux        tmux        looks at a terminal as a person does
need test   man         man-db      shows the manual page
need test   zsh         zsh         completes what is typed
need test   fish        fish        completes what is typed
need test   bzip2       bzip2       the compressor that ours is measured against
"""

RECIPE = Path(__file__).parents[2]
"""Where the folders of the steps lie."""


@dataclass(frozen=True)
class Need:
    """A command, or a file by its absolute path, and the Debian package that brings it."""

    set: str
    probe: str
    package: str
    why: str

    @property
    def here(self) -> bool:
        """Whether this host has it."""
        return Path(self.probe).exists() if "/" in self.probe else bool(shutil.which(self.probe, path=PATH))


@dataclass(frozen=True)
class Table:
    """The verbs that want each set of packages, and the rows of all sets."""

    verbs: dict[str, frozenset[str]]
    needs: tuple[Need, ...]

    def sets(self, verb: str) -> frozenset[str]:
        """Name the sets that a verb wants; `convert.vhd` wants what `convert` wants."""
        step = (RECIPE / verb.replace("-", "_") / "script.bash").is_file()
        wanting = (name for name, verbs in self.verbs.items() if verb.partition(".")[0] in verbs)
        return frozenset([*wanting, *(["build"] if step else [])])

    def of(self, *sets: str) -> tuple[Need, ...]:
        """Rows of these sets."""
        return tuple(need for need in self.needs if need.set in sets)


def parse(text: str) -> Table:
    """Read a table; raises ValueError that names the line which it cannot read."""
    verbs: dict[str, frozenset[str]] = {}
    needs: list[Need] = []
    for number, line in enumerate(text.splitlines(), 1):
        match line.split():
            case []:
                continue
            case ["verbs", name, *names] if names:
                verbs[name] = verbs.get(name, frozenset()) | frozenset(names)
            case ["need", name, probe, package, *why] if why:
                needs.append(Need(name, probe, package, " ".join(why)))
            case _:
                raise ValueError(
                    f"line {number}: neither `verbs SET VERB...` nor `need SET PROBE PACKAGE WHY...`"
                )
    return Table(verbs, tuple(needs))


def missing(*sets: str) -> tuple[Need, ...]:
    """Rows of these sets that this host lacks."""
    return tuple(need for need in parse(TABLE).of(*sets) if not need.here)
