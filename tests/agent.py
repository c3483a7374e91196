"""A client of the agent for tests: the same lines over the same pipes, without the engine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from build import wire
from build.engine import pipeline, plan, script
from build.engine.hosts.session import encode
from build.engine.plan import Layer, Step
from tests.waiting import LONG

CHECKOUT = Path(__file__).resolve().parents[1]
SERVE = (sys.executable, "-I", "-B", str(CHECKOUT / "build/agent/__main__.py"), "serve")


class Refused(Exception):
    """The agent said no."""

    def __init__(self, event: dict[str, Any]) -> None:
        super().__init__(f"{event['message']} / {event['hint']}")
        self.message: str = event["message"]
        self.hint: str = event["hint"]
        self.event = event


class Agent:
    """One agent process; `prefix` runs it as somebody else or somewhere else, `options` are its own."""

    def __init__(self, prefix: Sequence[str] = (), beat: bool = True, options: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, *SERVE, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd="/",
        )
        self.events: list[dict[str, Any]] = []
        self._writing = threading.Lock()
        if beat:
            threading.Thread(target=self._beat, daemon=True).start()
        self.pid = self.until("ready")["pid"]

    def _beat(self) -> None:
        while self.process.poll() is None:
            time.sleep(2)
            try:
                self.write("\n")
            except (OSError, ValueError):
                return

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        with self._writing:
            self.process.stdin.write(text)
            self.process.stdin.flush()

    def send(self, verb: str, **request: Any) -> None:
        self.write(json.dumps({"verb": verb, **wire.dump(request)}) + "\n")

    def until(self, *kinds: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] in kinds:
                return event
            if event["event"] == "failure":
                raise Refused(event)
            self.events.append(event)
        raise AssertionError(f"the agent ended with {self.process.wait()} before {kinds}")

    def call(self, verb: str, **request: Any) -> Any:
        self.send(verb, **request)
        return self.until("result")["value"]

    def close(self) -> None:
        """End its stdin and wait for it to go."""
        assert self.process.stdin is not None
        with self._writing, contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.reap()

    def reap(self) -> None:
        """Wait for an agent that something else ends."""
        assert self.process.stdout is not None
        self.process.wait(LONG)
        self.process.stdout.close()
        with self._writing, contextlib.suppress(OSError, AttributeError):
            self.process.stdin.close()  # type: ignore[union-attr]


def place(location: Path, mode: str = "root", overlay: bool = True, mountpoint: str = "") -> dict[str, Any]:
    target = mountpoint or f"/mnt/test-{os.getpid()}"
    return {"location": str(location), "mountpoint": target, "mode": mode, "overlay": overlay}


def layer_request(where: dict[str, Any], layer: Layer, **more: Any) -> dict[str, Any]:
    return {
        "place": where,
        "key": layer.key,
        "below": list(layer.parents),
        "step": layer.step.name,
        "script": script.render(layer.step.script),
        "files": wire.dump(encode(layer.step.files)),
        "secrets": {},
        "bootstrap": layer.step.bootstrap,
        "epoch": 1_700_000_000,
        "record": pipeline.record(layer),
        **more,
    }


def build(agent: Agent, where: dict[str, Any], steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [agent.call("layer", **layer_request(where, layer)) for layer in plan.layers(steps)]
