"""What runs on the build host: standard library only, shipped as files, speaks JSON events.

One agent process serves one `inv` run on one host. It reads requests from stdin, one JSON object a
line, and writes events to stdout, one JSON object a line. Each verb is a module of this package
with `run(request, emit) -> result`:

- `request` is a dict of plain JSON values;
- `emit(kind, **fields)` sends an event while it works: `progress` (label, done, total), `note` (text),
  `finding` (what a checker found), or a verb's own kind;
- the return value (plain JSON) is the result; `Failure(message, hint)` is the one way to fail.

Children are started through `build.agent.process` only, so that they die with the agent, and the
agent ends when its client goes away: end of its stdin, or 10 s without a beat.
"""
