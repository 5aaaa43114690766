"""A server under load: many clients at once for a long time, who come with all kinds of requests and go when they like.

    make load MINUTES=10                       # or: python tests/load.py --minutes 10 --clients 32
    python tests/load.py --minutes 8 --model smollm2-135m --clients 4 --leaving 0 --words 400     # times

``agentmesh serve`` runs as a process and offers the same agents twice, without sharing (``dense``) and with it
(``sharing``); the clients turn to one of them for some seconds, then to the other, so that both are timed in one run.
Every request must be answered or refused, nothing may be at work when all have gone, and memory must stay flat. What is
wrong ends it with a message that says what, and exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from serving import command
from soak import LEGS_NEEDED, SoakError, check_growth

STUCK_SECONDS = 120.0
QUESTIONS = 400  # as many different ones, because a tokenizer remembers thousands of them, and its memory is not ours
REFUSALS = (429, 503)
WORDS = ("pears", "boxes", "seven", "how", "many", "left", "river", "each", "of", "them")
KEYS = {"ann": "key-of-ann-0123456789", "bob": "key-of-bob-0123456789", "metrics": "key-of-metrics-0123"}
MESHES = ("dense", "sharing")
MESH = """version: 1
name: {name}
model: {model}
topology: {{use: fully-connected, agents: 3}}
agents:
  agent:
    role: [Writer, Critic, Editor]
    system: You are the {{{{ role }}}} of a small team that answers questions together, and you are careful.
    prompt: |
      {{{{ question }}}}

      {{% for message in inbox %}}
      {{{{ message }}}}
      {{% endfor %}}

      Write your answer.
    generate: {{max_tokens: {tokens}}}
communicator: {{preset: {preset}, min_tokens: 8, max_kl: 1e6}}
"""


@dataclass(frozen=True)
class Plan:
    """What is done to a server.

    Attributes:
        seconds: how long.
        clients: how many at once.
        model: its name.
        leaving: share of the requests whose client goes away in the middle.
        words: of the longest question.
        tokens: of every message.
        leg_seconds: how long one mesh is asked before the other one is.
        seed: of everything that is drawn.
        options: of ``agentmesh serve``.
    """

    seconds: float = 60.0
    clients: int = 32
    model: str = "random:tiny-llama"
    leaving: float = 0.3
    words: int = 40
    tokens: int = 16
    leg_seconds: float = 10.0
    seed: int = 0
    options: tuple[str, ...] = ("--max-runs", "8", "--max-queue", "20", "--max-tenant-runs", "20", "--wait", "5")


@dataclass
class Tally:
    """How requests ended, and times to first tokens by mesh: of answers at the client, and of model calls; seconds."""

    ends: Counter[str] = field(default_factory=Counter)
    rss: list[int] = field(default_factory=list)
    answers: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    calls: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def line(self, seconds: float) -> str:
        """One line about all of it."""
        count = " ".join(f"{name} {number:,}" for name, number in sorted(self.ends.items()))
        return f"{seconds / 60:6.1f} min  {count}  RSS {self.rss[-1] / 2**20:,.0f} MiB"

    def times(self) -> list[str]:
        """p50 and p95 of both times, without and with sharing."""
        lines = []
        for what, found in (("answer", self.answers), ("model call", self.calls)):
            for mesh in MESHES:
                if len(found[mesh]) > 1:
                    cuts = statistics.quantiles(found[mesh], n=20, method="inclusive")
                    lines.append(
                        f"TTFT of {what}, {mesh}: p50 {cuts[9]:.3f} s, p95 {cuts[18]:.3f} s, n {len(found[mesh])}"
                    )
        return lines


class Client:
    """One of many: asks, listens, and sometimes goes away."""

    def __init__(
        self, http: httpx.AsyncClient, plan: Plan, questions: Sequence[str], draw: random.Random, tally: Tally
    ) -> None:
        self._http = http
        self._questions = questions
        self._plan = plan
        self._draw = draw
        self._tally = tally
        self._headers = {"Authorization": f"Bearer {KEYS[draw.choice(['ann', 'bob'])]}"}
        self.timed = False

    async def ask(self, mesh: str) -> None:
        """One request from its beginning to its end, whichever it is.

        Raises:
            SoakError: it did not end, or ended as it must not.
        """
        kinds = {self._streamed: 5, self._whole: 3, self._followed: 3, self._left_alone: 1, self._nonsense: 1}
        (kind,) = self._draw.choices(list(kinds), list(kinds.values()))
        leaves = self._draw.random() < self._plan.leaving
        task = asyncio.ensure_future(kind(mesh))
        done, _ = await asyncio.wait({task}, timeout=self._draw.expovariate(2.0) if leaves else STUCK_SECONDS)
        if not done:
            task.cancel()
            await asyncio.wait({task})
            if not leaves:
                raise SoakError(f"a request is stuck: {kind.__name__} of {mesh} had no end in {STUCK_SECONDS:g} s")
            self._tally.ends["left"] += 1
            return
        self._tally.ends[task.result()] += 1
        if task.result() == "refused":
            await asyncio.sleep(self._draw.uniform(0.0, 2.0))

    def _chat(self, mesh: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self._draw.choice(self._questions)}]
        body = {"model": mesh, "messages": messages, "seed": self._draw.randint(0, 9), **more}
        return {"url": "/v1/chat/completions", "json": body, "headers": self._headers}

    async def _whole(self, mesh: str) -> str:
        answer = await self._http.post(**self._chat(mesh))
        if answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]:
            return "answered"
        return _refused(answer)

    async def _streamed(self, mesh: str) -> str:
        begun, first, last = time.perf_counter(), None, ""
        async with self._http.stream("POST", **self._chat(mesh, stream=True)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return _refused(answer)
            async for line in answer.aiter_lines():
                last = line or last
                if first is None and _content(line):
                    first = time.perf_counter() - begun
        if last != "data: [DONE]" or first is None:
            raise SoakError(f"a stream of {mesh} ended with {last!r}")
        if self.timed:
            self._tally.answers[mesh].append(first)
            await self._hear(mesh, answer.headers["x-agentmesh-run"])
        return "streamed"

    async def _start(self, mesh: str) -> httpx.Response:
        body = {"inputs": {"question": self._draw.choice(self._questions)}}
        return await self._http.post(f"/api/meshes/{mesh}/runs", json=body, headers=self._headers)

    async def _followed(self, mesh: str) -> str:
        answer = await self._start(mesh)
        if answer.status_code != 201:
            return _refused(answer)
        kind, last = await self._hear(mesh, answer.json()["run"])
        if kind != "end" or last not in ("run.finished", ""):  # no event at all where it waited in vain
            raise SoakError(f"the events of a run of {mesh} ended with {last!r}, {kind!r}")
        return "followed"

    async def _hear(self, mesh: str, run: str) -> tuple[str, str]:
        """Listen to a run to its end; its last two events."""
        kind, last = "", ""
        async with self._http.stream("GET", f"/api/runs/{run}/events", headers=self._headers) as events:
            async for line in events.aiter_lines():
                if line.startswith("event: "):
                    last, kind = kind, line.removeprefix("event: ")
                elif self.timed and kind == "model.first_token" and line.startswith("data: "):
                    self._tally.calls[mesh].append(json.loads(line[6:])["ttft_ms"] / 1e3)
        return kind, last

    async def _left_alone(self, mesh: str) -> str:
        answer = await self._start(mesh)
        return "left alone" if answer.status_code == 201 else _refused(answer)

    async def _nonsense(self, mesh: str) -> str:
        wrong = self._draw.choice([self._chat(mesh, n=3), self._chat("nobody"), self._chat(mesh, messages=[])])
        answer = await self._http.post(**wrong)
        if answer.status_code not in (400, 404):
            raise SoakError(f"a wrong request got {answer.status_code}: {answer.text[:200]}")
        return "told why not"


def _content(line: str) -> str:
    """The text in a line of a stream."""
    chunk = json.loads(line[6:]) if line.startswith("data: {") else {"choices": [{"delta": {}}]}
    return chunk["choices"][0]["delta"].get("content") or ""


def _refused(answer: httpx.Response) -> str:
    """The end of a request that was not answered.

    Raises:
        SoakError: it was not refused either.
    """
    if answer.status_code not in REFUSALS or not answer.headers.get("retry-after"):
        raise SoakError(
            f"expected an answer, or a refusal with Retry-After; got {answer.status_code}: {answer.text[:300]}"
        )
    return "refused"


async def leg(clients: list[Client], mesh: str, seconds: float) -> None:
    """Let all clients ask one mesh for a while, and let all of them end."""
    until = time.monotonic() + seconds

    async def asks(client: Client) -> None:
        while time.monotonic() < until:
            await client.ask(mesh)

    await _together([asks(client) for client in clients])


async def _together(work: list[Coroutine[Any, Any, None]]) -> None:
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def rest(http: httpx.AsyncClient) -> None:
    """Wait until nothing is at work.

    Raises:
        SoakError: something stays.
    """
    until = time.monotonic() + STUCK_SECONDS
    while True:
        text = (await http.get("/metrics", headers={"Authorization": f"Bearer {KEYS['metrics']}"})).text
        left = [line for line in text.splitlines() if line.startswith("agentmesh_num_requests_") and line[-3:] != "0.0"]
        if not left:
            break
        if time.monotonic() > until:
            raise SoakError(f"slots are stuck when all clients have gone: {left}")
        await asyncio.sleep(0.05)
    for name in ("ann", "bob"):
        runs = (await http.get("/api/runs", headers={"Authorization": f"Bearer {KEYS[name]}"})).json()["runs"]
        ended = ("done", "cancelled")
        odd = [row for row in runs if row["status"] not in ended and "for its turn" not in (row["error"] or "")]
        if odd:
            raise SoakError(f"runs are left that neither ended nor were refused: {odd[:2]}")


async def visit(url: str, server: psutil.Process, plan: Plan, report: float) -> Tally:
    """Load a server that runs already; see ``load``."""
    draw, tally = random.Random(plan.seed), Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=plan.clients)
    async with httpx.AsyncClient(base_url=url, timeout=STUCK_SECONDS, limits=limits) as http:
        questions = [" ".join(draw.choices(WORDS, k=draw.randint(1, plan.words))) for _ in range(QUESTIONS)]
        clients = [Client(http, plan, questions, random.Random(draw.random()), tally) for _ in range(plan.clients)]
        begun = shown = time.monotonic()
        while time.monotonic() - begun < plan.seconds:
            for mesh in MESHES:
                await leg(clients, mesh, plan.leg_seconds)
                await rest(http)
                tally.rss.append(server.memory_info().rss)
                if time.monotonic() - shown > report:
                    shown = time.monotonic()
                    print(tally.line(shown - begun), flush=True)
            for client in clients:
                client.timed = True  # links are learned in the first legs
            check_growth(tally.rss)
        print(tally.line(time.monotonic() - begun), *tally.times(), sep="\n", flush=True)
    return tally


def load(plan: Plan, report: float = 60.0) -> Tally:
    """Load a server for a while.

    Args:
        plan: how, and how long.
        report: seconds between two printed lines.

    Raises:
        SoakError: a request was neither answered nor refused, a slot is stuck, memory grows, or the server does not
            end in order.
    """
    presets = dict(zip(MESHES, ("dense", "linear"), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, preset in presets.items():
            files.append(Path(folder) / f"{name}.yaml")
            files[-1].write_text(MESH.format(name=name, model=plan.model, tokens=plan.tokens, preset=preset))
        environment = {"AGENTMESH_API_KEYS": ",".join(f"{name} {key}" for name, key in KEYS.items())}
        with command(*files, *plan.options, environment=environment) as (url, process):
            tally = asyncio.run(visit(url, psutil.Process(process.pid), plan, report))
            process.send_signal(signal.SIGTERM)
            code = process.wait(STUCK_SECONDS)
    if code != 0:
        raise SoakError(f"the server ended with code {code} after SIGTERM; expected 0")
    return tally


def main() -> int:
    """Load a server as the command line says; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--clients", type=int, default=32, help="how many at once (32)")
    parser.add_argument("--model", default="random:tiny-llama", help="a model's name (random:tiny-llama)")
    parser.add_argument("--leaving", type=float, default=0.3, help="share of clients who go away (0.3)")
    parser.add_argument("--words", type=int, default=40, help="of the longest question (40)")
    parser.add_argument("--leg", type=float, default=10.0, help="seconds on one mesh before the other one (10)")
    parser.add_argument("--tokens", type=int, default=16, help="of every message (16)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    given = parser.parse_args()
    seconds = given.minutes * 60
    plan = Plan(seconds, given.clients, given.model, given.leaving, given.words, given.tokens, given.leg, given.seed)
    try:
        tally = load(plan)
    except SoakError as error:
        print(f"load failed: {error}", file=sys.stderr)
        return 1
    memory = "memory flat" if len(tally.rss) >= LEGS_NEEDED else "too short to say anything of memory"
    print(f"load passed: {sum(tally.ends.values()):,} requests, none lost, no slot stuck, {memory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
