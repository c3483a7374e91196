"""The executor that runs verbs on the hosts they name, with the flags that every verb knows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from invoke import Call, Config, Context, Executor, Exit, Program

from build.engine import command_line
from build.engine.console import Console
from build.engine.errors import BuildError, HostError
from build.engine.hosts.host import Host
from build.engine.hosts.ssh import connect, is_cut

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""


@dataclass(frozen=True)
class Flags:
    """Values of the core flags of one command line, as they are for one host."""

    hosts: tuple[str, ...] = ()
    image: str = ""
    overrides: tuple[str, ...] = ()
    formats: str = ""
    yes: bool = False
    frozen: bool = False
    offline: bool = False
    unlocked: bool = False
    ask_password: bool = False
    rootless: bool = False
    detach: bool = False
    no_fetch: bool = False
    to: str = ""
    debug: bool = False
    quiet: bool = False


def register_flags(
    program: Program, submit_detached: Callable[[HostContext], None], complete: command_line.Complete
) -> None:
    """Give the running `inv` our core flags, and what a shell asks it on Tab.

    With --detach, what the verbs asked for is left to the host by `submit_detached`.
    """
    HostExecutor.submit_detached = staticmethod(submit_detached)
    command_line.teach(program, complete)


class HostContext(Context):
    """What a task gets: Invoke's context, with the host it works on, the flags, and where it may print."""

    def __init__(self, config: Config, host: Host, flags: Flags, console: Console) -> None:
        super().__init__(config)
        self._set(host=host, flags=flags, console=console, state={})


class HostCall(Call):
    """A call that runs in the context it is given."""

    def __init__(self, *args: Any, context: Context, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context = context

    def clone_data(self) -> dict[str, Any]:
        """What a clone needs, too."""
        return {**super().clone_data(), "context": self.context}

    def make_context(self, config: Config, core_parse_result: Any = None) -> Context:
        """Give the context; the second argument is Invoke 3's."""
        return self.context


@dataclass(frozen=True)
class Outcome:
    """How the verbs of a command line ended on one host."""

    host: str
    seconds: float
    error: BuildError | None = None


class HostExecutor(Executor):
    """Run every call, pre- and post-tasks too, on each host of -H; without -H, on this machine."""

    context: HostContext | None = None
    stopped = False
    submit_detached: Callable[[HostContext], None]

    def execute(self, *tasks: Any) -> Any:
        """Run the tasks on the host, or side by side on several: one that fails does not stop the others."""
        flags = read_flags(self.core)
        if flags.detach and self._json_verbs(tasks):
            raise BuildError(
                "--json tells what was made, and --detach does not wait for it",
                "leave one of them out; later: inv status --json",
                command_line.USAGE,
            )
        try:
            if len(flags.hosts) > 1:
                results = self._side_by_side(flags, tasks)
            else:
                results = self._on(flags.hosts[0] if flags.hosts else "", tasks)
            sys.stdout.flush()
            return results
        except KeyboardInterrupt:
            raise BuildError("interrupted", "run it again: finished layers are kept", INTERRUPTED) from None
        except BrokenPipeError:
            # Our reader left (`inv config | head`): there is nobody to tell.
            _discard_output()
            raise Exit(code=141) from None
        except OSError as error:
            if not _output_fails():
                raise
            _discard_output()
            raise BuildError(f"standard output: {error.strerror}", "look at where the output goes") from None

    def _json_verbs(self, tasks: Any) -> int:
        """How many of the tasks print a line of JSON for each host."""
        return len(self.dedupe([call for call in self.normalize(tasks) if call.kwargs.get("json")]))

    def _on(self, name: str, tasks: Any) -> Any:
        """Run the tasks on one host, where each --json prints its line whatever becomes of it.

        Beside these lines nothing goes to standard output then.
        """
        flags, lines = read_flags(self.core, name), self._json_verbs(tasks)
        row = flags.hosts.index(name) if name else 0
        console = Console(name, sys.stderr if lines else sys.stdout, row, flags.quiet)
        try:
            return self._work(name, tasks, flags, console)
        except BuildError as error:
            if console.results < lines:
                console.json(error=error.what, hint=error.hint)
            raise

    def _work(self, name: str, tasks: Any, flags: Flags, console: Console) -> Any:
        """Run the tasks there; errors name the host if it is not this machine, and hints lead there."""
        try:
            with connect(name, self.config) as inner:
                host = Host(name, inner, flags.debug, flags.rootless)
                self.context = HostContext(self.config.clone(), host, flags, console)
                if self.stopped:
                    host.close()
                try:
                    results = super().execute(*tasks)
                    if flags.detach:
                        self.submit_detached(self.context)
                    return results
                finally:
                    self.context = None
                    host.close()
        except BuildError as error:
            raise error.on(name, flags.image) from None
        except Exception as error:
            if not name or not is_cut(error):
                raise
            raise HostError(
                f"the connection to {name} was cut", "run it again: finished layers are kept"
            ) from None

    def _side_by_side(self, flags: Flags, tasks: Any) -> Any:
        """Run the tasks on every host at once, then print how each ended."""
        with ThreadPoolExecutor(len(flags.hosts)) as pool:
            executors = [type(self)(self.collection, self.config, self.core) for _ in flags.hosts]
            ends = [
                pool.submit(executor._outcome, name, tasks)
                for executor, name in zip(executors, flags.hosts, strict=True)
            ]
            try:
                outcomes = [end.result() for end in ends]
            except KeyboardInterrupt:
                for executor in executors:
                    executor._hang_up()
                raise
        rows = [
            (
                end.host,
                "FAIL" if end.error else "ok",
                f"{end.seconds:.1f} s",
                end.error.what if end.error else "",
            )
            for end in outcomes
        ]
        Console(stream=sys.stderr if self._json_verbs(tasks) else sys.stdout).table(
            ("HOST", "RESULT", "TIME", "ERROR"), [(*row[:3], row[3].split("\n")[0]) for row in rows]
        )
        if failed := [end.error for end in outcomes if end.error]:
            codes = {error.code for error in failed}
            what = "\n".join(error.what for error in failed)
            raise BuildError(what, failed[0].hint, codes.pop() if len(codes) == 1 else 1)
        return {}

    def _outcome(self, name: str, tasks: Any) -> Outcome:
        started, error = time.monotonic(), None
        try:
            self._on(name, tasks)
        except BuildError as caught:
            error = caught
        except SystemExit as end:
            error = (
                BuildError(f"{name}: exit status {end.code}", code=int(end.code or 0)) if end.code else None
            )
        except Exception as caught:
            error = BuildError(f"{name}: {type(caught).__name__}: {caught}", "this is a defect: report it")
        return Outcome(name, time.monotonic() - started, error)

    def _hang_up(self) -> None:
        """End what is being done, from another thread: without its client the agent ends, too."""
        self.stopped = True
        if (context := self.context) is not None:
            context.host.close()

    def expand_calls(self, calls: Any) -> list[Call]:
        """Put every call into this host's context."""
        expanded: list[Call] = super().expand_calls(calls)
        if self.context is None:
            return expanded
        return [
            call if isinstance(call, HostCall) else call.clone(into=HostCall, with_={"context": self.context})
            for call in expanded
        ]


def _output_fails() -> bool:
    """Say whether standard output takes nothing any more."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"")
    except OSError:
        return True
    return False


def _discard_output() -> None:
    """Let go of what Python would still write at its end, and complain of."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_flags(core: Any, host: str = "") -> Flags:
    """Read our flags from what Invoke parsed, as they are for this host of -H."""
    args = core[0].args if core else {}

    def given(name: str, default: Any) -> Any:
        return args[name].value if name in args and args[name].value is not None else default

    names = (name.strip() for name in str(given("hosts", "")).split(","))
    hosts = tuple(dict.fromkeys(name for name in names if name))
    if "hosts" in args and args["hosts"].value is not None and not hosts:
        raise BuildError("-H names no host", "write -H HOST")
    image, overrides, formats = (
        values_for_host(given(name, ()), hosts, host) for name, *_ in command_line.REPEATABLE
    )
    return Flags(
        hosts,
        image[-1] if image else "",
        overrides,
        formats[-1] if formats else "",
        bool(given("yes", False)),
        bool(given("frozen", False)),
        bool(given("offline", False)),
        bool(given("unlocked", False)),
        bool(given("ask-password", False)),
        bool(given("rootless", False)),
        bool(given("detach", False)),
        bool(given("no-fetch", False)),
        str(given("to", "")),
        bool(given("debug", False)),
        bool(given("quiet", False)),
    )


def values_for_host(values: Iterable[str], hosts: Sequence[str], host: str) -> tuple[str, ...]:
    """Of values that may begin with `HOST:`, those for this host, without it; its own last: they beat."""
    everybodys, own = [], []
    for value in dict.fromkeys(values):
        whose = max((name for name in hosts if value.startswith(f"{name}:")), key=len, default="")
        if not whose:
            everybodys.append(value)
        elif whose == host:
            own.append(value.removeprefix(f"{whose}:"))
    return (*everybodys, *own)
