"""The verbs and their order; what they do stands in build/.

Core flags, known to every verb, before or after it: -H HOST, --image FILE, --set KEY=VALUE,
--formats A,B, --yes, --frozen, --ask-password, --debug; for a build host also --to DIR, --no-fetch,
--detach, --rootless.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from build.engine.handover import hand_over

hand_over()

from invoke import Collection, Task, task
from invoke.main import program

from build.convert import FORMATS
from build.engine import pipeline, verbs
from build.engine.remote import HostContext, teach

teach(program)


@task
def config(c: HostContext) -> None:
    """Show every setting with its value and where it comes from."""
    verbs.config(pipeline.of(c))


@task(help={"script": "Print the text that will run, step by step."})
def plan(c: HostContext, script: bool = False) -> None:
    """Show the steps, their keys and what is cached; changes nothing."""
    verbs.plan(pipeline.of(c), script)


@task(positional=["step"])
def why(c: HostContext, step: str) -> None:
    """Tell which input of a step changed since it was last built."""
    verbs.why(pipeline.of(c), step)


@task(help={"install": "Install the Debian packages that are missing there (root or sudo)."})
def doctor(c: HostContext, install: bool = False) -> None:
    """Check the build host and print the one command that mends each gap."""
    verbs.doctor(pipeline.of(c), install)


@task
def resolve(c: HostContext) -> None:
    """Ask the mirror for the exact package set."""
    verbs.resolve(pipeline.of(c))


@task(help={"keep": "Mount the finished tree on the host itself (root only), until `inv umount`."})
def mount(c: HostContext, keep: bool = False) -> None:
    """Prove that this host can mount a tree at MOUNTPOINT, in a sandbox."""
    verbs.mount(pipeline.of(c), keep)


@task
def umount(c: HostContext) -> None:
    """Take away what `inv mount --keep` mounted."""
    verbs.umount(pipeline.of(c))


@task(pre=[mount])
def debootstrap(c: HostContext) -> None:
    """Install the packages into the lowest layer."""
    pipeline.of(c).ensure("debootstrap")


@task(pre=[debootstrap])
def tweak(c: HostContext) -> None:
    """Make the initramfs, lay the overlay over the tree and set it up."""
    pipeline.of(c).ensure("tweak")


@task(pre=[tweak])
def minimize(c: HostContext) -> None:
    """Remove bulk, and prove that nothing broke."""
    pipeline.of(c).ensure("minimize")


@task(name="keepalived-render", pre=[minimize])
def keepalived_render(c: HostContext) -> None:
    """Render the VRRP set-up and print the failover bound."""
    verbs.keepalived_render(pipeline.of(c))


@task(pre=[keepalived_render])
def seal(c: HostContext) -> None:
    """Remove what must never ship and set the root password."""
    pipeline.of(c).ensure("seal")


@task(pre=[seal])
def disk(c: HostContext) -> None:
    """Assemble the raw disk image."""
    pipeline.of(c).disk()


@task(default=True, pre=[disk])
def build(c: HostContext) -> None:
    """Build the image: everything from the mirror to the raw disk, and the formats asked for."""
    verbs.build(pipeline.of(c))


@task(name="all", default=True)
def convert_all(c: HostContext) -> None:
    """Convert the raw image to every format of its definition, or to --formats a,b,c, in one reading."""
    verbs.convert(pipeline.of(c), c.flags.formats)


def convert_to(name: str) -> Task[Callable[[HostContext], None]]:
    """Make the verb of one format."""

    def run(c: HostContext) -> None:
        verbs.convert(pipeline.of(c), name)

    run.__doc__ = f"Convert to {FORMATS[name].help}."
    return Task(run, name=name)


convert = Collection("convert", convert_all, *map(convert_to, FORMATS))


@task(positional=["file"])
def inspect(c: HostContext, file: str) -> None:
    """Say what an image file is, of any maker, and which hypervisor would refuse it and why."""
    verbs.inspect(pipeline.of(c), file)


@task
def status(c: HostContext) -> None:
    """Tell of the build that was left to the host by --detach, and who holds LOCATION."""
    verbs.status(pipeline.of(c))


@task
def attach(c: HostContext) -> None:
    """Follow the build that was left to the host, from where it is, and bring home what it made."""
    verbs.attach(pipeline.of(c))


@task
def cancel(c: HostContext) -> None:
    """End the build that was left to the host; finished layers are kept."""
    verbs.cancel(pipeline.of(c))


@task(help={"type": "router or vpcrouter; --set KEY=VALUE says what differs from the default."})
def params(c: HostContext, type: str) -> None:
    """Print the boot line that a management server composes for a router."""
    verbs.params(pipeline.of(c), type)


@task(
    positional=["params"],
    help={"params": "The boot line.", "hypervisor": "kvm, xen-pv, xen-hvm, vmware, hyperv or virtualbox."},
)
def render(c: HostContext, params: str, hypervisor: str = "kvm") -> None:
    """Show, without a VM, every file that the guest writes from a boot line."""
    verbs.render(pipeline.of(c), params, hypervisor)


@task(
    positional=[],
    help={"at": "Layer to look at (default: the finished tree).", "command": "Run this instead of a shell."},
)
def shell(c: HostContext, at: str = "", command: str = "") -> None:
    """Open a shell in the finished tree or at any layer; changes are thrown away."""
    sys.exit(verbs.shell(pipeline.of(c), at, command))


@task(help={"uefi": "Boot under UEFI (default: BIOS).", "memory": "MiB."})
def boot(c: HostContext, uefi: bool = False, memory: str = "256") -> None:
    """Boot the image on this terminal (serial); nothing is written to it. Ctrl-A X ends."""
    sys.exit(verbs.boot(pipeline.of(c), uefi, memory))


@task(help={"memory": "MiB.", "json": "Write the result here, too."})
def verify(c: HostContext, memory: str = "256", json: str = "") -> None:
    """Boot the image under each firmware and check it from inside."""
    verbs.verify(pipeline.of(c), memory, json)


@task(
    name="clean",
    help={
        "cache": "Layers that the current plan does not reach, too.",
        "all": "Everything below LOCATION.",
        "dry-run": "Only list.",
    },
)
def clean(c: HostContext, cache: bool = False, all: bool = False, dry_run: bool = False) -> None:
    """Remove leftover parts; with --cache and --all more."""
    verbs.clean(pipeline.of(c), "all" if all else "cache" if cache else "parts", dry_run)


@task(
    positional=[],
    help={"ring": "unit, golden, root, boot or remote; default: all.", "k": "Only tests whose name matches."},
)
def test(c: HostContext, ring: str = "", k: str = "") -> None:
    """Run the tests; as an ordinary user, first those that need root, with sudo."""
    verbs.test(c, ring, k)


@task(
    positional=[],
    help={"name": "build, convert or remote.", "pairs": "Runs of each side; the median ratio counts."},
)
def bench(c: HostContext, name: str = "build", pairs: str = "3") -> None:
    """Measure against the classic ways, in ratios."""
    verbs.bench(c, name, pairs)


namespace = Collection(
    config,
    plan,
    why,
    doctor,
    resolve,
    mount,
    umount,
    debootstrap,
    tweak,
    minimize,
    keepalived_render,
    seal,
    disk,
    convert,
    inspect,
    build,
    status,
    attach,
    cancel,
    params,
    render,
    shell,
    boot,
    verify,
    clean,
    test,
    bench,
)
