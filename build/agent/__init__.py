"""What runs on the build host: standard library only, shipped as files, speaks JSON events.

One agent process serves one `inv` run on one host. It reads requests from stdin, one JSON object a
line, and writes events to stdout, one JSON object a line. Each verb is a module of `build.agent.verbs`
with `run(request, emit) -> result`:

- `request` is the dataclass of `build.wire` for this verb, and the result of the type that it names;
- `emit(kind, **fields)` sends an event while it works: `work` (name, last), `progress` (label, done, total),
  `note` (text), or a verb's own kind;
- `Failure(message, hint)` is the one way to fail.

Children are started through `build.agent.process` only, so that they die with the agent, and the
agent ends when its client goes away: end of its stdin, or 10 s without a beat.
"""
