"""Command lines, read in this very process: which verbs run, in which order, where, and with which flags."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import invoke.main
import pytest
from invoke import Context, Program

from build import verbs
from build.engine import pipeline, remote
from build.engine.errors import BuildError, HostError
from build.engine.remote import Flags, HostContext

CHECKOUT = Path(__file__).resolve().parents[2]
CHAIN = [
    "mount",
    "debootstrap",
    "initramfs",
    "tweak",
    "minimize",
    "keepalived-render",
    "seal",
    "disk",
    "build",
]


@dataclass
class Answer:
    """What came of a command line: its calls by host, the flags that they saw, and what was printed."""

    code: int = 0
    calls: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)
    flags: list[Flags] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    hint: str = ""
    """Every verb of build.verbs fails with this hint, if there is one."""
    out: str = ""
    err: str = ""

    @property
    def verbs(self) -> list[str]:
        """Names of the verbs that ran, in order."""
        return [name for _, name, _ in self.calls]

    @property
    def flag(self) -> Flags:
        """The flags, which every call must have seen alike."""
        (only,) = set(self.flags)
        return only


@dataclass
class Recorder:
    """Stands for a build: notes what a verb asks of it."""

    context: HostContext
    answer: Answer

    def note(self, name: str, *arguments: Any) -> None:
        self.answer.calls.append((self.context.host.name, name, arguments))
        self.answer.flags.append(self.context.flags)

    def ensure(self, name: str) -> None:
        self.note(name)

    def disk(self) -> None:
        self.note("disk")

    def mount(self) -> None:
        self.note("mount")


def takes_a_build(function: Callable[..., Any]) -> bool:
    return next(iter(inspect.signature(function).parameters), "") in ("build", "context")


Inv = Callable[..., Answer]


@pytest.fixture
def inv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Inv:
    """Run `inv` with these arguments; no verb does anything but be noted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(CHECKOUT)

    def call(*argv: str, fail: str = "", hint: str = "") -> Answer:
        answer = Answer(hint=hint)
        monkeypatch.delitem(sys.modules, "tasks", raising=False)
        stock = invoke.main.program
        program = Program(
            name=stock.name, binary=stock.binary, binary_names=stock.binary_names, version=stock.version
        )
        monkeypatch.setattr(invoke.main, "program", program)
        monkeypatch.setattr(pipeline, "of", lambda context: Recorder(context, answer))
        monkeypatch.setattr(remote, "connect", connection(answer, fail))
        for _, module in inspect.getmembers(verbs, inspect.ismodule):
            for name, verb in inspect.getmembers(module, inspect.isfunction):
                if verb.__module__ == module.__name__ and takes_a_build(verb):
                    monkeypatch.setattr(module, name, noted(name.replace("_", "-"), answer))
        try:
            program.run(["inv", *argv])
        except SystemExit as end:
            answer.code = int(end.code or 0)
        answer.out, answer.err = capsys.readouterr()
        return answer

    return call


def connection(answer: Answer, fail: str) -> Callable[..., Any]:
    @contextmanager
    def connect(name: str, config: Any) -> Iterator[Context]:
        answer.opened.append(name)
        if name and name == fail:
            raise HostError(f"cannot reach build host {name!r}", f"try: ssh {name} true")
        yield Context(config.clone())

    return connect


def noted(name: str, answer: Answer) -> Callable[..., int]:
    def verb(build: Any, *arguments: Any) -> int:
        recorder = build if isinstance(build, Recorder) else Recorder(build, answer)
        recorder.note(name, *arguments)
        if answer.hint:
            raise BuildError("it cannot be done", answer.hint)
        return 0

    return verb


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("boot",), "error: it cannot be done\n  hint: run: inv build\n"),
        (("boot", "-H", "h"), "error: h: it cannot be done\n  hint: run: inv -H h build\n"),
        (
            ("-H", "h", "boot", "--image", "h:config/tiny.yaml"),
            "error: h: it cannot be done\n  hint: run: inv -H h --image config/tiny.yaml build\n",
        ),
        (
            ("boot", "--image", "a b.yaml"),
            "error: it cannot be done\n  hint: run: inv --image 'a b.yaml' build\n",
        ),
    ],
)
def test_a_hint_leads_to_where_the_verb_failed(inv: Inv, argv: tuple[str, ...], told: str) -> None:
    answer = inv(*argv, hint="run: inv build")
    assert answer.code == 1
    assert answer.err == told


# --- where it runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "hosts", "chain"),
    [
        ((), [""], CHAIN),
        (("build",), [""], CHAIN),
        (("-H", "h", "build"), ["h"], CHAIN),
        (("-Hh", "build"), ["h"], CHAIN),
        (("--hosts", "h", "build"), ["h"], CHAIN),
        (("--hosts=h", "build"), ["h"], CHAIN),
        (("build", "-H", "h"), ["h"], CHAIN),
        (("build", "-Hh"), ["h"], CHAIN),
        (("build", "--hosts=h"), ["h"], CHAIN),
        (("-H", "h"), ["h"], CHAIN),
        (("-Hh",), ["h"], CHAIN),
        (("-H", "h", "-d", "build"), ["h"], CHAIN),
        (("-dHh", "build"), ["h"], CHAIN),
        (("-H", "root@h:2222", "tweak"), ["root@h:2222"], CHAIN[:4]),
        (("tweak", "minimize", "-H", "h"), ["h"], CHAIN[:5]),
        (("-H", "h", "minimize", "tweak"), ["h"], CHAIN[:5]),
        (("debootstrap",), [""], CHAIN[:2]),
        (("keepalived-render", "-H", "h"), ["h"], CHAIN[:6]),
        (("disk", "build"), [""], CHAIN),
        (("config",), [""], ["config"]),
        (("-H", "h", "config"), ["h"], ["config"]),
        (("config", "plan", "-H", "h"), ["h"], ["config", "plan"]),
        (("-H", "a,b", "config"), ["a", "b"], ["config"]),
        (("-H", " a, b,", "config"), ["a", "b"], ["config"]),
        (("-c", "tasks", "-H", "h", "plan"), ["h"], ["plan"]),
    ],
    ids=str,
)
def test_every_verb_of_a_line_runs_once_on_each_host(
    inv: Inv, argv: tuple[str, ...], hosts: list[str], chain: list[str]
) -> None:
    answer = inv(*argv)
    assert (answer.code, answer.err) == (0, "")
    assert sorted(answer.opened) == hosts  # several work side by side
    done = {host: [name for on, name, _ in answer.calls if on == host] for host in answer.opened}
    assert done == dict.fromkeys(hosts, chain)


@pytest.mark.parametrize(
    "argv", [("config", "-H"), ("-H",), ("-H", "", "config"), ("-H", " , ", "config")], ids=str
)
def test_a_host_that_is_not_named_is_never_this_machine(inv: Inv, argv: tuple[str, ...]) -> None:
    answer = inv(*argv)
    assert answer.code != 0
    assert answer.calls == []
    assert answer.err
    assert "Traceback" not in answer.err


def test_a_host_out_of_reach_fails_in_two_lines(inv: Inv) -> None:
    answer = inv("-H", "h", "build", fail="h")
    assert (answer.code, answer.calls) == (1, [])
    assert answer.err == "error: cannot reach build host 'h'\n  hint: try: ssh h true\n"


def test_one_host_out_of_reach_does_not_stop_the_others(inv: Inv) -> None:
    answer = inv("-H", "a,h,b", "config", fail="h")
    assert answer.code == 1
    assert sorted(host for host, _, _ in answer.calls) == ["a", "b"]
    assert "cannot reach build host 'h'" in answer.err


# --- lines for programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [("build",), ("convert",), ("convert.all",), ("convert.vhd",), ("config",)])
def test_several_hosts_print_their_table_beside_the_lines_of_json(inv: Inv, argv: tuple[str, ...]) -> None:
    told = {
        "host": "h",
        "error": "cannot reach build host 'h'",
        "hint": "try: ssh h true",
    }
    answer = inv("-H", "a,h", *argv, "--json", fail="h")
    assert answer.code == 1
    assert [json.loads(line) for line in answer.out.splitlines()] == [told]
    rows = [line.split()[:2] for line in answer.err.splitlines()]
    assert rows[:3] == [["HOST", "RESULT"], ["a", "ok"], ["h", "FAIL"]]
    assert "error: cannot reach build host 'h'" in answer.err
    plain = inv("-H", "a,h", *argv, fail="h")
    assert [line.split()[:2] for line in plain.out.splitlines()] == rows[:3]


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (("config", "--json"), 1),
        (("config",), 0),
        (("config", "plan", "--json"), 1),
        (("plan", "--json", "config"), 1),
        (("plan", "--json", "config", "--json"), 1),
    ],
    ids=str,
)
def test_a_verb_that_fails_prints_its_line_all_the_same(inv: Inv, argv: tuple[str, ...], lines: int) -> None:
    answer = inv(*argv, hint="run: inv build")
    assert answer.code == 1
    told = {"host": "", "error": "it cannot be done", "hint": "run: inv build"}
    assert [json.loads(line) for line in answer.out.splitlines()] == [told] * lines
    assert answer.err == "error: it cannot be done\n  hint: run: inv build\n"


def test_what_is_left_to_a_host_has_no_result_to_print(inv: Inv) -> None:
    answer = inv("build", "--json", "--detach")
    assert (answer.code, answer.calls, answer.out) == (2, [], "")
    assert "--detach does not wait for it\n  hint: leave one of them out" in answer.err


# --- the flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (("config",), Flags()),
        (("--yes", "config"), Flags(yes=True)),
        (("config", "--yes"), Flags(yes=True)),
        (("--frozen", "config", "--debug"), Flags(frozen=True, debug=True)),
        (("config", "--quiet"), Flags(quiet=True)),
        (("-d", "config"), Flags(debug=True)),
        (("--ask-password", "config"), Flags(ask_password=True)),
        (("--image", "config/tiny.yaml", "config"), Flags(image="config/tiny.yaml")),
        (("config", "--image=my image.yaml"), Flags(image="my image.yaml")),
        (("--set", "a=1", "config"), Flags(overrides=("a=1",))),
        (("--set", "a=1", "--set", "b=2", "config"), Flags(overrides=("a=1", "b=2"))),
        (("--set", "a=1", "config", "--set=b=2"), Flags(overrides=("a=1", "b=2"))),
        (("config", "--set", "a=x y\nz", "--set", "b=-H"), Flags(overrides=("a=x y\nz", "b=-H"))),
        (("config", "--set=a=1,2", "-H", "h"), Flags(hosts=("h",), overrides=("a=1,2",))),
        (("-H", "h", "--yes", "--image", "i", "config"), Flags(hosts=("h",), image="i", yes=True)),
        (("-H", "h", "config", "plan", "--yes"), Flags(hosts=("h",), yes=True)),
    ],
    ids=str,
)
def test_flags_are_known_to_every_verb_in_any_position(inv: Inv, argv: tuple[str, ...], flags: Flags) -> None:
    answer = inv(*argv)
    assert (answer.code, answer.err) == (0, "")
    assert answer.flag == flags


def test_what_is_meant_for_one_host_is_seen_by_that_host_alone(inv: Inv) -> None:
    hosts = "-H", "a,b,root@b:2222"
    own = (
        *("--set", "b:arch=i386", "--set", "arch=amd64", "--set", "root@b:2222:size=3000"),
        *("--image", "b:other.yaml", "--image", "all.yaml", "--formats", "a:vhd"),
    )
    for line in ((*hosts, *own, "config"), ("config", *own, *hosts)):
        answer = inv(*line)
        assert (answer.code, answer.err) == (0, "")
        seen = dict(zip((host for host, _, _ in answer.calls), answer.flags, strict=True))
        assert {host: flags.overrides for host, flags in seen.items()} == {
            "a": ("arch=amd64",),
            "b": ("arch=amd64", "arch=i386"),
            "root@b:2222": ("arch=amd64", "size=3000"),
        }
        assert [seen[host].image for host in ("a", "b")] == ["all.yaml", "other.yaml"]
        assert [seen[host].formats for host in ("a", "b")] == ["vhd", ""]


def test_a_flag_of_one_line_is_not_there_in_the_next(inv: Inv) -> None:
    assert inv("--set", "a=1", "-H", "h", "config").flag.overrides == ("a=1",)
    assert inv("config").flag == Flags()


# --- what a verb is given --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        (("plan",), ("plan", (False, False))),
        (("plan", "--script"), ("plan", (True, False))),
        (("why", "tweak"), ("why", ("tweak", False))),
        (("why", "tweak", "-H", "h"), ("why", ("tweak", False))),
        (("why", "-H", "h", "tweak"), ("why", ("tweak", False))),
        (("why", "help"), ("why", ("help", False))),
        (("mount", "--keep"), ("mount", (True,))),
        (("shell", "--at", "tweak", "--command", "ls -l 'a b'"), ("shell", ("tweak", "ls -l 'a b'"))),
        (("boot", "--uefi", "--memory", "512"), ("boot", (True, "512"))),
        (("boot",), ("boot", (False, "256"))),
        (("verify", "--memory=300", "--report", "out.json"), ("verify", ("300", "out.json", False))),
        (("verify", "--json"), ("verify", ("256", "", True))),
        (("config", "--json"), ("config", (True,))),
        (("doctor", "--json"), ("doctor", (False, False, True))),
        (("doctor", "--cache"), ("doctor", (False, True, False))),
        (("status", "--json"), ("status", (True,))),
        (("convert", "--json", "--formats", "vhd"), ("convert", ("vhd", "", "", True))),
        (("convert.all",), ("convert", ("", "", "", False))),
        (("convert.vhd", "--from", "x.ova", "--json"), ("convert", ("vhd", "x.ova", "", True))),
        (("inspect", "--json", "x.vhd"), ("inspect", ("x.vhd", "", "", False, True))),
        (("params", "--type", "router", "--set", "a.b=2"), ("params", ("router",))),
        (("--set", "a.b=2", "params", "router"), ("params", ("router",))),
        (("params", "--set", "a.b=2", "--type", "router"), ("params", ("router",))),
        (("render", "--params", "type=router name=x"), ("render", ("type=router name=x", "kvm"))),
        (("render", "type=router", "--hypervisor=vmware"), ("render", ("type=router", "vmware"))),
        (("register",), ("register", ("", "-1", "", False))),
        (("register", "--zone", "-1", "--url", "http://f"), ("register", ("http://f", "-1", "", False))),
        (
            ("register", "--upgrade", "--endpoint=https://c/client/api", "-H", "h"),
            ("register", ("", "-1", "https://c/client/api", True)),
        ),
        (("clean",), ("clean", ("parts", False, False))),
        (("clean", "--cache", "--dry-run"), ("clean", ("cache", True, False))),
        (("clean", "--all"), ("clean", ("all", False, False))),
        (("test", "--ring", "unit"), ("test", ("unit", "", "", ""))),
    ],
    ids=str,
)
def test_arguments_reach_their_verb(
    inv: Inv, argv: tuple[str, ...], call: tuple[str, tuple[Any, ...]]
) -> None:
    answer = inv(*argv)
    assert (answer.code, answer.err) == (0, "")
    assert [(name, given) for _, name, given in answer.calls] == [call]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_build_is_asked_for_its_line_once_its_disk_is_there(inv: Inv, flags: tuple[str, ...]) -> None:
    answer = inv("build", *flags)
    assert answer.verbs == CHAIN
    assert answer.calls[-1] == ("", "build", (bool(flags),))


def test_formats_reach_the_build(inv: Inv) -> None:
    assert inv("build", "--formats", "vhd,ova").flag.formats == "vhd,ova"
    assert inv("--formats", "vhd", "convert").flag.formats == "vhd"


# --- what runs nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (("--list",), "keepalived-render"),
        (("-l", "-H", "h"), "keepalived-render"),
        (("-H", "h", "--list"), "keepalived-render"),
        (("--help",), "Usage: inv"),
        (("-H", "h", "--help"), "--set"),
        (("--help", "clean"), "Only list."),
        (("help",), "--ask-password"),
        (("help", "clean"), "Everything below LOCATION."),
        (("clean", "-h"), "--dry-run"),
        (("clean", "--all", "--help"), "--dry-run"),
        (("--set", "a=b", "why", "--help"), "Usage: inv why STEP"),
        (("version",), "inv "),
        (("-H", "h", "--version"), "inv "),
        (("-lHh",), "keepalived-render"),
    ],
    ids=str,
)
def test_help_runs_nothing(inv: Inv, argv: tuple[str, ...], shown: str) -> None:
    answer = inv(*argv)
    assert answer.code == 0
    assert answer.calls == []
    assert shown in answer.out


@pytest.mark.parametrize(
    ("argv", "what", "hint"),
    [
        (("biuld",), "there is no verb 'biuld'", "did you mean build?"),
        (("convert.vhds",), "there is no verb 'convert.vhds'", "did you mean convert.vhd?"),
        (("-H", "h", "nonsense"), "there is no verb 'nonsense'", "see them all: inv --list"),
        (("build", "nonsense"), "there is no verb 'nonsense'", "see them all: inv --list"),
        (("size=300",), "'size=300' is no verb", "to change a setting, write --set size=300"),
        (("help", "bild"), "there is no verb 'bild'", "did you mean build?"),
        (("build", "--nonsense"), "build has no flag --nonsense", "see: inv help build"),
        (("--nonsense", "build"), "inv has no flag --nonsense", "see: inv help"),
        (("boot", "--memroy", "300"), "boot has no flag --memroy", "did you mean --memory?"),
        (("build", "--froze"), "build has no flag --froze", "did you mean --frozen?"),
        (("--keep", "mount"), "inv has no flag --keep", "write it behind its verb: mount"),
        (("--dry", "build"), "inv has no flag --dry", "see: inv help"),
        (("build", "-x"), "build has no flag -x", "see: inv help build"),
        (("why",), "why lacks STEP", "see: inv help why"),
        (("why", "--set", "a=b"), "why lacks STEP", "see: inv help why"),
        (("params",), "params lacks TYPE", "see: inv help params"),
        (("render",), "render lacks PARAMS", "see: inv help render"),
        (("config", "--image"), "--image lacks its value", "see: inv help config"),
        (("config", "--set"), "--set lacks its value", "see: inv help config"),
        (("--set", "--frozen", "config"), "--set lacks its value", "see: inv help"),
        (("-H",), "-H lacks its value", "see: inv help"),
        (("build", "--yes=no"), "--yes takes no value", "write --yes alone"),
    ],
    ids=str,
)
def test_a_line_that_makes_no_sense_runs_nothing(
    inv: Inv, argv: tuple[str, ...], what: str, hint: str
) -> None:
    answer = inv(*argv)
    assert (answer.code, answer.calls, answer.out) == (2, [], "")
    assert answer.err == f"error: {what}\n  hint: {hint}\n"


def test_every_verb_tells_in_one_line_what_it_does(inv: Inv) -> None:
    import tasks

    for name in tasks.namespace.task_names:
        assert (tasks.namespace[name].__doc__ or "").strip().splitlines()[0].endswith("."), name


@pytest.mark.parametrize("text", ["much", "", "-5", "63", "1.5", "0x100", "\u0662\u0665\u0666", "9" * 20])
def test_a_memory_that_is_no_number_of_mib_is_refused(text: str) -> None:
    with pytest.raises(BuildError) as caught:
        verbs.enter.mebibytes(text)
    assert caught.value.hint == "write --memory 256"
