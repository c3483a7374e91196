"""The verbs and their order; what they do stands in build/.

Flags that every verb knows, before or after it, stand in build/engine/command_line.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import accumulate

from build.engine.handover import hand_over

hand_over()

from invoke import Collection, Task, task
from invoke.main import program

from build import STEPS, verbs
from build.engine import pipeline, recipe
from build.engine.remote import HostContext, register_flags
from build.formats import FAMILIES, FORMATS
from build.formats.lib.places import PLACES
from build.wire import SURROUNDINGS

register_flags(program, pipeline.submit_detached, verbs.completion.candidates)


JSON = "Print one line of JSON instead (docs/json.md)."
REPORT = "Write the report here (default: beside the image, or in --to)."


@task(help={"json": JSON})
def config(c: HostContext, json: bool = False) -> None:
    """Show every setting with its value and where it comes from."""
    verbs.show.config(pipeline.of(c), json)


@task(help={"script": "Print the text that will run, step by step.", "json": JSON})
def plan(c: HostContext, script: bool = False, json: bool = False) -> None:
    """Show the steps, their keys and what is cached; changes nothing."""
    verbs.show.plan(pipeline.of(c), script, json)


@task(positional=["step"], help={"step": "A step of the recipe.", "json": JSON})
def why(c: HostContext, step: str, json: bool = False) -> None:
    """Tell which input of a step changed since it was last built."""
    verbs.show.why(pipeline.of(c), step, json)


@task(
    help={
        "install": "Install the Debian packages that are missing there (root or sudo).",
        "cache": "Read every layer in full, and take damaged ones out of use.",
        "json": JSON,
    }
)
def doctor(c: HostContext, install: bool = False, cache: bool = False, json: bool = False) -> None:
    """Check the build host and print the one command that fixes each gap."""
    verbs.doctor.doctor(pipeline.of(c), install, cache, json)


@task
def resolve(c: HostContext) -> None:
    """Ask the mirror for the exact package set."""
    verbs.build.resolve(pipeline.of(c))


@task(
    positional=[],
    optional=["update"],
    auto_shortflags=False,
    help={
        "update": "Renew it: all of it, or these packages (a,b) and what they need.",
        "dry-run": "Only show what would change.",
        "json": JSON,
    },
)
def lock(c: HostContext, update: str = "", dry_run: bool = False, json: bool = False) -> None:
    """Write down the exact package set, beside the image definition; every build then uses it."""
    names = update if isinstance(update, str) else ""
    verbs.lock.lock(pipeline.of(c), bool(update), names, dry_run, json)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "locks": "Of these locks (files, a,b) instead of the image's own.",
        "check": "Only compare what is there with what should be.",
        "prune": "Remove what is damaged, or of none of these locks.",
        "json": JSON,
    },
)
def fetch(
    c: HostContext, locks: str = "", check: bool = False, prune: bool = False, json: bool = False
) -> None:
    """Bring the packages to LOCATION/debs, for builds without a network (--offline)."""
    verbs.lock.fetch(pipeline.of(c), locks, check, prune, json)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "file": "A lock, or an image file of any format (default: the image's lock).",
        "disk": "Which disk of it is looked at, where it holds several (default: 1).",
        "json": JSON,
    },
)
def outdated(c: HostContext, file: str = "", disk: str = "", json: bool = False) -> None:
    """Tell which packages of a lock or an image have security updates; exit status 10 if any has."""
    if status := verbs.outdated.outdated(pipeline.of(c), file, disk, json):
        sys.exit(status)


@task(
    positional=[],
    auto_shortflags=False,
    help={"vary": f"Only these (a,b): {', '.join(SURROUNDINGS)}.", "json": JSON},
)
def repro(c: HostContext, vary: str = "", json: bool = False) -> None:
    """Build a second time from nothing, with everything around it changed, and compare the bytes."""
    verbs.repro.repro(pipeline.of(c), vary, json)


@task(help={"keep": "Mount the finished tree on the host itself (root only), until `inv umount`."})
def mount(c: HostContext, keep: bool = False) -> None:
    """Prove that this host can mount a tree at MOUNTPOINT, in a sandbox."""
    verbs.build.mount(pipeline.of(c), keep)


@task
def umount(c: HostContext) -> None:
    """Take away what `inv mount --keep` mounted."""
    verbs.build.umount(pipeline.of(c))


def step_task(name: str, before: Task[Callable[..., None]]) -> Task[Callable[[HostContext], None]]:
    """Make the verb of one step of the recipe; the one before it goes first."""

    def run(c: HostContext) -> None:
        pipeline.of(c).ensure(name)

    run.__doc__ = recipe.summary(name)
    return Task(run, name=name, pre=[before])


steps = list(accumulate(STEPS, lambda before, name: step_task(name, before), initial=mount))[1:]


@task(pre=[steps[-1]])
def disk(c: HostContext) -> None:
    """Assemble the raw disk image."""
    pipeline.of(c).disk()


@task(default=True, pre=[disk], help={"json": JSON})
def build(c: HostContext, json: bool = False) -> None:
    """Build the image: everything from the mirror to the raw disk, and the formats asked for."""
    verbs.build.build(pipeline.of(c), json)


SOURCE = {
    "from": "Any image file, not our raw image: of any format and maker, also packed or in an OVA.",
    "disk": "Which disk of it, where it holds several (default: 1).",
    "json": JSON,
}


@task(name="all", default=True, positional=[], auto_shortflags=False, help=SOURCE)
def convert_all(c: HostContext, from_: str = "", disk: str = "", json: bool = False) -> None:
    """Convert the raw image to every format of its definition, or to --formats a,b,c, in one reading."""
    verbs.convert.convert(pipeline.of(c), c.flags.formats, from_, disk, json)


def convert_to(name: str) -> Task[Callable[..., None]]:
    """Make the verb of one format or of a family of them."""

    def run(c: HostContext, from_: str = "", disk: str = "", json: bool = False) -> None:
        verbs.convert.convert(pipeline.of(c), name, from_, disk, json)

    made = [FORMATS[each].help for each in FAMILIES.get(name, (name,))]
    run.__doc__ = f"Convert to {' and '.join(made)}."
    return Task(run, name=name, positional=[], auto_shortflags=False, help=SOURCE)


convert = Collection("convert", convert_all, *map(convert_to, (*FORMATS, *FAMILIES)))


@task(
    positional=["file"],
    help={
        "file": "Any image file; with --explain the code of a finding.",
        "for": f"Say what this place would refuse: {', '.join(PLACES)} (several: a,b).",
        "disk": "Which disk of it is looked at, where it holds several (default: 1).",
        "content": "Print the SHA-256 of what a guest would see, too.",
        "explain": "Say what a code means instead (docs/findings.md): inv inspect --explain OVA009.",
        "json": JSON,
    },
)
def inspect(
    c: HostContext,
    file: str,
    for_: str = "",
    disk: str = "",
    content: bool = False,
    explain: bool = False,
    json: bool = False,
) -> None:
    """Say what an image file is, of any maker, and which hypervisor would refuse it and why."""
    if explain:
        print(verbs.inspect.explain(file))
        return
    verbs.inspect.inspect(pipeline.of(c), file, for_, disk, content, json)


@task(
    positional=["file"],
    auto_shortflags=False,
    help={
        "file": "An OVA, of VirtualBox or any other maker; it is only read.",
        "output": "The new file (default: NAME-vsphere.ova beside it). It must not be there.",
        "json": JSON,
    },
)
def repair(c: HostContext, file: str, output: str = "", json: bool = False) -> None:
    """Make an OVA into one that vSphere imports, and say what was changed."""
    verbs.repair.repair(pipeline.of(c), file, output, json)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "url": "Folder that you serve the files from (default: the setting download_url).",
        "zone": "Id of the zone, with --upgrade (default: -1, all zones).",
        "endpoint": "Call https://HOST/client/api, with CLOUDSTACK_KEY and CLOUDSTACK_SECRET.",
        "upgrade": "For a server that will be upgraded to this release; not for one that has it.",
    },
)
def register(
    c: HostContext, url: str = "", zone: str = "-1", endpoint: str = "", upgrade: bool = False
) -> None:
    """Print the calls that make the converted files known to CloudStack; with --endpoint make them."""
    verbs.register.register(pipeline.of(c), url, zone, endpoint, upgrade)


@task(help={"json": JSON})
def status(c: HostContext, json: bool = False) -> None:
    """Tell of the build that was left to the host by --detach, and who holds LOCATION."""
    verbs.jobs.status(pipeline.of(c), json)


@task
def attach(c: HostContext) -> None:
    """Follow the build that was left to the host, from where it is, and bring home what it made."""
    verbs.jobs.attach(pipeline.of(c))


@task
def cancel(c: HostContext) -> None:
    """End the build that was left to the host; finished layers are kept."""
    verbs.jobs.cancel(pipeline.of(c))


@task(help={"type": "router, consoleproxy ...; --set KEY=VALUE says what differs from the default."})
def params(c: HostContext, type: str) -> None:
    """Print the boot line that a management server composes for a system VM."""
    verbs.params.params(pipeline.of(c), type)


@task(
    positional=["params"],
    help={"params": "The boot line.", "hypervisor": "kvm, xen-pv, xen-hvm, vmware, hyperv or virtualbox."},
)
def render(c: HostContext, params: str, hypervisor: str = "kvm") -> None:
    """Show, without a VM, every file that the guest writes from a boot line."""
    verbs.params.render(pipeline.of(c), params, hypervisor)


@task(
    positional=[],
    help={"at": "Layer to look at (default: the finished tree).", "command": "Run this instead of a shell."},
)
def shell(c: HostContext, at: str = "", command: str = "") -> None:
    """Open a shell in the finished tree or at any layer; changes are thrown away."""
    sys.exit(verbs.enter.shell(pipeline.of(c), at, command))


@task(help={"uefi": "Boot under UEFI (default: BIOS).", "memory": "MiB."})
def boot(c: HostContext, uefi: bool = False, memory: str = "256") -> None:
    """Boot the image on this terminal (serial); nothing is written to it. Ctrl-A X ends."""
    sys.exit(verbs.enter.boot(pipeline.of(c), uefi, memory))


@task(help={"memory": "MiB.", "report": REPORT, "json": JSON})
def verify(c: HostContext, memory: str = "256", report: str = "", json: bool = False) -> None:
    """Boot the image under each firmware and check it from inside."""
    verbs.verify.verify(pipeline.of(c), memory, report, json)


@task(
    positional=[],
    help={
        "type": "router (default), vpcrouter, consoleproxy ...; or all.",
        "scripts": "cloud-scripts.tgz (default: in /usr/share/cloudstack-common/vms, where it is).",
        "agent": "agent.zip (default: beside the scripts).",
        "patch": "patch-sysvms.sh (default: beside the scripts).",
        "documents": "Folder of documents for routers (default: config/rehearsal).",
        "redundant": "Play a pair of routers and a failover.",
        "memory": "MiB of each machine.",
        "report": REPORT,
    },
)
def rehearse(
    c: HostContext,
    type: str = "",
    scripts: str = "",
    agent: str = "",
    patch: str = "",
    documents: str = "",
    redundant: bool = False,
    memory: str = "256",
    report: str = "",
) -> None:
    """Boot the image and play a management server's part against it, step by step."""
    verbs.rehearse.rehearse(
        pipeline.of(c), type, (scripts, agent, patch), documents, redundant, memory, report
    )


@task(
    name="clean",
    help={
        "cache": "Layers that the current plan does not reach, too.",
        "all": "Everything below LOCATION.",
        "dry-run": "Only list.",
        "json": JSON,
    },
)
def clean(
    c: HostContext, cache: bool = False, all: bool = False, dry_run: bool = False, json: bool = False
) -> None:
    """Remove leftover parts; with --cache and --all more."""
    what = "all" if all else "cache" if cache else "parts"
    verbs.clean.clean(pipeline.of(c), what, dry_run, json)


@task(positional=["shell"], help={"shell": "bash, zsh or fish."})
def completion(c: HostContext, shell: str) -> None:
    """Print the script that teaches a shell to complete `inv`."""
    print(verbs.completion.script(shell), end="")


@task
def manual(c: HostContext) -> None:
    """Print the manual page; read it with `inv manual | man -l -`."""
    print(verbs.manual.page(namespace), end="")


@task(
    positional=[],
    help={
        "ring": "unit, golden, root, boot, remote, or soak (the long ones); default: all but soak.",
        "k": "Only tests whose name matches.",
        "seconds": "Of soak, a random slice that takes so long.",
        "seed": "What chooses it, and the moments of its cases (default: another one each time).",
    },
    auto_shortflags=False,
)
def test(c: HostContext, ring: str = "", k: str = "", seconds: str = "", seed: str = "") -> None:
    """Run the tests; as an ordinary user, first those that need root, with sudo."""
    verbs.checks.test(c, ring, k, seconds, seed)


@task
def picture(c: HostContext) -> None:
    """Draw the picture of a build in README anew, from a real run of the tiny image."""
    verbs.checks.picture(c)


@task(
    positional=[],
    help={"name": "build, convert or remote.", "pairs": "Runs of each side; the median ratio counts."},
)
def bench(c: HostContext, name: str = "build", pairs: str = "3") -> None:
    """Measure against the classic ways, in ratios."""
    verbs.checks.bench(c, name, pairs)


namespace = Collection(
    config,
    plan,
    why,
    doctor,
    resolve,
    lock,
    fetch,
    outdated,
    repro,
    mount,
    umount,
    *steps,
    disk,
    convert,
    inspect,
    repair,
    register,
    build,
    status,
    attach,
    cancel,
    params,
    render,
    shell,
    boot,
    verify,
    rehearse,
    clean,
    completion,
    manual,
    test,
    bench,
    picture,
)
