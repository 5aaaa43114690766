"""Running and finished runs. A run belongs to a tenant, goes on if nobody listens, and ends whatever happens."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from bisect import bisect_right
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, Protocol, final

from agentmesh.config.base import Choice
from agentmesh.config.mesh import AnswerSpec
from agentmesh.events import CallRecord, Event, FirstToken, ModelFinished, NodeFinished, TokenText
from agentmesh.results import RunResult, Usage, usage_of
from agentmesh.serve.limits import Gate, Limits, Ticket
from agentmesh.serve.meshes import Served
from agentmesh.serve.problems import SERVER, RefusedError, refusal
from agentmesh.stream import Sink

log = logging.getLogger("agentmesh.serve")


class Status(Choice):
    """How far a run is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Noted:
    """One event of a run, as it is sent and kept."""

    seq: int
    type: str
    data: str


@dataclass(frozen=True)
class Order:
    """What a run is asked to do, and by whom."""

    served: Served
    inputs: Mapping[str, str]
    tenant: str = ""
    seed: int | None = None
    answer: AnswerSpec | None = None


@dataclass(eq=False)
class Run:
    """One run. Changed by ``Runs`` alone; others read it and follow its events.

    ``speaking`` is set when a first token or message is out, ``ended`` when nothing more will come; ``calls`` are its
    model calls without their plans, which the events hold.
    """

    order: Order
    id: str = field(default_factory=lambda: f"run-{uuid.uuid4().hex}")
    came: float = field(default_factory=time.perf_counter)
    begun: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    status: Status = Status.RUNNING
    answer: str | None = None
    error: RefusedError | None = None
    wall_s: float | None = None
    calls: list[CallRecord] = field(default_factory=list)
    nbytes: int = 0
    speaking: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _events: list[Noted] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, event: Event) -> None:
        """Keep an event."""
        if isinstance(event, ModelFinished):
            self.calls.append(event.call.model_copy(update={"plan": ()}))
        note = Noted(event.seq, event.type, event.model_dump_json())
        self._events.append(note)
        self.nbytes += len(note.data)
        if isinstance(event, FirstToken | NodeFinished):
            self.speaking.set()
        self._wake()

    def end(
        self, status: Status, took_s: float, *, answer: str | None = None, error: RefusedError | None = None
    ) -> None:
        """Note how it ended. Streamed text goes: the messages hold it."""
        self.status, self.wall_s, self.answer, self.error = status, took_s, answer, error
        streamed = TokenText.model_fields["type"].default
        self._events = [note for note in self._events if note.type != streamed]
        self.nbytes = sum(len(note.data) for note in self._events)
        self.speaking.set()
        self.ended.set()
        self._wake()

    async def follow(self, after: int, beat_s: float) -> AsyncIterator[Noted | None]:
        """Its events behind a number, as they come, until it has ended; ``None`` where none came for a while."""
        while True:
            changed, over = self._changed, self.ended.is_set()
            for note in self._events[bisect_right(self._events, after, key=lambda one: one.seq) :]:
                yield note
                after = note.seq
            if over:
                return
            if not changed.is_set():
                waiting = asyncio.ensure_future(changed.wait())
                try:
                    done, _ = await asyncio.wait({waiting}, timeout=beat_s)
                finally:
                    waiting.cancel()
                if not done:
                    yield None

    @property
    def age_s(self) -> float:
        """Seconds since it was asked for."""
        return time.perf_counter() - self.came

    @property
    def usage(self) -> Usage:
        """Of its model calls that have ended."""
        return usage_of(self.calls)

    def row(self) -> dict[str, Any]:
        """It in a list of runs."""
        usage = self.usage
        shared = sum(call.placed_exact + call.placed_realigned > 0 for call in self.calls)
        return {
            "run": self.id,
            "mesh": self.order.served.name,
            "status": self.status,
            "begun": self.begun.isoformat(),
            "wall_s": self.wall_s,
            "answer": self.answer,
            "error": None if self.error is None else str(self.error),
            "calls": usage.calls,
            "calls_shared": shared,
            "tokens_placed": usage.placed_exact + usage.placed_realigned,
            "tokens_computed": usage.computed,
        }

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Watcher(Protocol):
    """Hears of all runs."""

    def heard(self, run: Run, event: Event) -> None:
        """Something happened in a run."""

    def over(self, run: Run) -> None:
        """A run has ended; it may never have begun."""


@final
class Runs:
    """Owns all runs of a server. Everything happens on one event loop.

    Args:
        limits: how many, how long, and how much of them is kept.
        gate: who may begin.
        watchers: hear of all runs.
    """

    def __init__(self, limits: Limits, gate: Gate, watchers: Sequence[Watcher] = ()) -> None:
        self._limits = limits
        self._gate = gate
        self._watchers = tuple(watchers)
        self._kept: dict[str, dict[str, Run]] = {}
        self._tasks: dict[Run, asyncio.Task[RunResult]] = {}
        self._conductors: set[asyncio.Task[None]] = set()
        self.closing = False

    async def start(self, order: Order) -> Run:
        """Begin a run, or let it wait for its turn.

        Raises:
            InputError, RequestTooLongError: its inputs are wrong.
            RefusedError: an input is missing, there is no room, or the server is about to stop.
        """
        if self.closing:
            raise RefusedError(503, "the server is about to stop", kind=SERVER, code="closing", retry_after=5)
        ticket = self._gate.claim(order.tenant)  # first: counting tokens is work, which a full server does not take on
        with ExitStack() as undo:
            undo.callback(self._gate.close, ticket, None)
            inputs = await order.served.complete(order.inputs, self._limits.input_tokens)
            undo.pop_all()
        run = Run(replace(order, inputs=inputs))
        self._kept.setdefault(order.tenant, {})[run.id] = run
        work = self._tasks[run] = asyncio.ensure_future(self._work(run, ticket))
        conductor = asyncio.ensure_future(self._conduct(run, ticket, work))
        self._conductors.add(conductor)
        conductor.add_done_callback(self._conductors.discard)
        return run

    def of(self, tenant: str) -> list[Run]:
        """A tenant's runs, newest first."""
        return list(reversed(self._kept.get(tenant, {}).values()))

    def find(self, tenant: str, name: str) -> Run:
        """One of a tenant's runs.

        Raises:
            RefusedError: it has none of that name.
        """
        run = self._kept.get(tenant, {}).get(name)
        if run is None:
            raise RefusedError(404, f"no run {name!r}; GET /api/runs lists those that are kept", code="run_not_found")
        return run

    def cancel(self, run: Run) -> None:
        """Stop a run; nothing happens where it has ended."""
        if run in self._tasks:
            self._tasks[run].cancel()

    def cancel_all(self) -> None:
        """Stop every run."""
        for run in list(self._tasks):
            self.cancel(run)

    async def drain(self) -> None:
        """Take no more runs, let those that are there end, and cancel them when their time is over."""
        self.closing = True
        if self._conductors:
            await asyncio.wait(self._conductors, timeout=self._limits.drain_s)
        self.cancel_all()
        if self._conductors:
            await asyncio.wait(self._conductors)

    async def _work(self, run: Run, ticket: Ticket) -> RunResult:
        """Wait for the run's turn, and run."""
        await self._gate.turn(ticket)
        order = run.order
        sinks: list[Sink] = [run.take]
        sinks += [partial(watcher.heard, run) for watcher in self._watchers]
        return await order.served.mesh.arun(
            order.inputs, seed=order.seed, sinks=sinks, tenant=order.tenant, answer=order.answer
        )

    async def _conduct(self, run: Run, ticket: Ticket, work: asyncio.Task[RunResult]) -> None:
        """Watch over a run until it has ended, and give back what it held."""
        done, _ = await asyncio.wait({work}, timeout=self._limits.run_s)
        if not done:
            work.cancel()
            await asyncio.wait({work})
        took = run.age_s
        self._gate.close(ticket, took)
        del self._tasks[run]
        if not done:
            limit = f"the run took longer than this server's limit of {self._limits.run_s:g} s"
            run.end(Status.FAILED, took, error=RefusedError(504, limit, kind=SERVER, code="timeout"))
        elif work.cancelled():
            run.end(Status.CANCELLED, took, error=RefusedError(410, "the run was cancelled", code="run_cancelled"))
        elif error := work.exception():
            why = refusal(error)
            if why.status == 500:
                log.error("run %s of %s failed", run.id, run.order.served.name, exc_info=error)
            run.end(Status.FAILED, took, error=why)
        else:
            run.end(Status.DONE, took, answer=work.result().answer)
        for watcher in self._watchers:
            watcher.over(run)
        self._forget(run.order.tenant)

    def _forget(self, tenant: str) -> None:
        """Drop a tenant's oldest finished runs beyond what is kept."""
        kept = self._kept[tenant]
        finished = [run for run in kept.values() if run.ended.is_set()]
        nbytes = sum(run.nbytes for run in finished)
        for number, run in enumerate(finished):
            if len(finished) - number <= self._limits.history and nbytes <= self._limits.history_bytes:
                break
            nbytes -= run.nbytes
            del kept[run.id]
