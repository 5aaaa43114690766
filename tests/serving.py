"""A server for tests: in a thread of this process, or as the command that people start."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from agentmesh import Mesh
from agentmesh.backend import Completion, Listener
from agentmesh.config.mesh import GenerateSpec
from agentmesh.prompt import Content, Prompt, Reader
from agentmesh.serve.app import Service, make_app
from agentmesh.serve.meshes import Served
from agentmesh.serve.server import bound
from agentmesh.testing import ScriptedModel

PATIENCE_S = 60.0
AGENTS = {
    "agent.1": {"role": "Solver", "prompt": "{{ question }}", "generate": {"max_tokens": 24}},
    "agent.2": {"role": "Checker", "prompt": "{{ question }}\n{{ inbox[0] }}", "generate": {"max_tokens": 20}},
}


class HeldModel:
    """A scripted model whose calls wait until they may go on, and that notes which were cancelled."""

    def __init__(self, replies: Callable[[str], str]) -> None:
        self.scripted = ScriptedModel(replies)
        self.go = threading.Event()
        self.begun = 0
        self.cancelled = 0
        self.name, self.preset, self.width = "held", "dense", 64
        self.tokenizer = self.scripted.tokenizer

    def describe(self) -> dict[str, str]:
        return self.scripted.describe()

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        self.begun += 1
        try:
            while not self.go.is_set():  # noqa: ASYNC110  # it is set by another thread
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await self.scripted.complete(prompt, generate, seed, listener)

    async def ingest(self, contents: Sequence[Content], tenant: str) -> int:
        return 0

    async def begin(self, reader: Reader) -> None:
        pass

    async def release(self, run: str) -> None:
        pass

    def close(self) -> None:
        pass


def offered(model: Any, name: str = "pair", **changes: Any) -> dict[str, Served]:
    """A mesh of two agents in a chain, as a server offers it."""
    given: dict[str, Any] = {"agents": AGENTS, "topology": {"use": "chain", "agents": 2}, **changes}
    return {name: Served(Mesh(model=model, name=name, **given), "Two agents in a chain.")}


@dataclass
class InThread:
    """A server that runs in a thread, and its runs."""

    url: str
    app: Any
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def metric(self, name: str) -> float:
        """One number of the metrics; the sum over labels."""
        text = self.http.get("/metrics").text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))

    def start(self, question: str = "What?", mesh: str = "pair") -> str:
        """Begin a native run; its name."""
        answer = self.http.post(f"/api/meshes/{mesh}/runs", json={"inputs": {"question": question}})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["run"])

    def row(self, run: str) -> dict[str, Any]:
        return dict(self.http.get(f"/api/runs/{run}").json())


@contextmanager
def serving(service: Service, **settings: Any) -> Iterator[InThread]:
    """Serve for the time of the block."""
    app = make_app(service)
    with bound("127.0.0.1", 0) as listen:
        config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=10, **settings)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listen]})
        thread.start()
        made = InThread(f"http://127.0.0.1:{listen.getsockname()[1]}", app)
        try:
            eventually(lambda: server.started)
            yield made
        finally:
            made.http.close()
            server.should_exit = True
            thread.join(PATIENCE_S)
    assert not thread.is_alive()


def eventually(true: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait until something is true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


@contextmanager
def command(
    *arguments: object, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``agentmesh serve`` as a process, from the moment it serves; its address and the process."""
    line = [sys.executable, "-m", "agentmesh", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    ) as process:
        try:
            assert process.stderr is not None
            said = []
            for text in process.stderr:
                said.append(text)
                if found := re.search(r"serving .* at (http://\S+)", text):
                    drained = threading.Thread(target=lambda: said.extend(process.stderr or ()))
                    drained.start()
                    yield found[1], process
                    break
            else:
                raise AssertionError(f"it never served: {''.join(said)}")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Type, content and number of each server-sent event."""
    found: dict[str, str] = {}
    for line in lines:
        if not line and found:
            yield found.get("event", ""), json.loads(found["data"]), found.get("id", "")
            found = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            found[name] = value
