"""The scheduler: walks the unrolled graph, runs what is ready, and ends with every visit done, skipped or failed.

It knows topology and agents. It knows no tensors and no prompts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from agentmesh.agents.base import Agent, Answer, Generates, Turn, contents_of
from agentmesh.checks import Checks
from agentmesh.config.topology import PythonRef
from agentmesh.errors import NodeError, UsageError
from agentmesh.events import (
    EdgeTaken,
    Event,
    JudgeChecked,
    MessageRecord,
    NodeFailed,
    NodeFinished,
    NodeRetrying,
    NodeSkipped,
    NodeStarted,
)
from agentmesh.prompt import Content, ContentKind, Exchange, Message, Reader, said
from agentmesh.topology import Edge, Topology, Visit, conditions

Key = tuple[str, int]


@dataclass(frozen=True)
class Worker:
    """A node's agent with its role and limits.

    Args:
        agent: what acts.
        role: its role's name.
        retry: how often a failed visit is tried again.
        timeout: seconds one attempt may take; ``None`` for no limit.
        kind: what its text is to its readers.
        exact: whether it may read exact KV only.
        remembers: whether its next prompt begins with this one.
        judge: whether it chooses from what it reads.
    """

    agent: Agent
    role: str
    retry: int = 0
    timeout: float | None = None
    kind: ContentKind = ContentKind.MESSAGE
    exact: bool = False
    remembers: bool = False
    judge: bool = False


@dataclass
class Walk:
    """One run of a mesh over its graph. Owns the run's messages and every agent's memory, and dies with the run.

    Args:
        topology: the graph.
        workers: node → worker.
        inputs: the run's inputs.
        model: generates for the agents.
        emit: takes the run's events.
        predicates: edge conditions written in Python, by reference.
        count_tokens: length of a text in tokens, for text that no model generated.
        reader: names the run to those who keep KV for it.
        checks: asks judges once more when the run is over; ``None`` for not at all.
    """

    topology: Topology
    workers: Mapping[str, Worker]
    inputs: Mapping[str, Content]
    model: Generates
    emit: Callable[[Event], None]
    predicates: Mapping[str, Callable[[Message], bool]]
    count_tokens: Callable[[str], int]
    reader: Reader = field(default_factory=Reader)
    checks: Checks | None = None
    messages: dict[Key, Message] = field(default_factory=dict)
    _memory: dict[str, list[Exchange]] = field(default_factory=dict)
    _taken: Counter[int] = field(default_factory=Counter)
    _tasks: dict[Key, asyncio.Task[None]] = field(default_factory=dict)
    _waiting: dict[Key, Visit] = field(default_factory=dict)

    async def run(self) -> list[Message]:
        """All messages in the order of the unrolled graph.

        Raises:
            NodeError: a node failed for good; the others are cancelled first.
        """
        visits = self.topology.unroll()
        self._waiting = {(visit.node, visit.round): visit for visit in visits}
        ahead: asyncio.Task[None] | None = None
        try:
            for visit in visits:
                task = self._tasks[visit.node, visit.round] = asyncio.create_task(self._visit(visit, ahead))
                ahead = task if self.reader.sees is not None else None
            await asyncio.gather(*self._tasks.values())
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        order = [(visit.node, visit.round) for visit in visits]
        return [self.messages[key] for key in order if key in self.messages]

    async def check_judges(self) -> None:
        """Ask every judge once more about its last inbox, in another order; see ``checks``."""
        if self.checks is None:
            return
        for turn in self.checks.turns():
            check = await self.checks.ask(turn, partial(self._attempt, self.workers[turn.node]))
            self.emit(JudgeChecked(check=check))

    async def _visit(self, visit: Visit, ahead: asyncio.Task[None] | None) -> None:
        """Wait for what the visit depends on, and for one that comes ahead of it in any case; run it or skip it.

        Deterministic runs have their visits one after the other: what a visit can share must not hang on which of its
        siblings is through already.
        """
        needed = [(delivery.source, delivery.source_round) for delivery in visit.inbox]
        before = [self._tasks[key] for key in (*needed, (visit.node, visit.round - 1)) if key in self._tasks]
        before += [] if ahead is None else [ahead]
        if before:
            await asyncio.wait(before)
        for task in before:
            task.result()  # a failed visit fails what depends on it
        inbox = tuple(
            message
            for delivery in visit.inbox
            if (message := self._deliver(visit, delivery.order, delivery.source_round))
        )
        del self._waiting[visit.node, visit.round]
        if visit.inbox and not inbox:
            reason = "no message reached it"
            self.emit(NodeSkipped(node=visit.node, round=visit.round, reason=reason))
            return
        self.messages[visit.node, visit.round] = await self._attempts(visit, inbox)

    def _deliver(self, visit: Visit, order: int, source_round: int) -> Message | None:
        """The message an edge carries now; ``None`` where there is none or its condition keeps it back."""
        edge = self.topology.edges[order]
        message = self.messages.get((edge.source, source_round))
        if message is None:
            return None
        taken = (edge.max_visits is None or self._taken[order] < edge.max_visits) and self._open(edge, message)
        self._taken[order] += taken
        self.emit(EdgeTaken(source=edge.source, target=edge.target, round=visit.round, taken=taken))
        if not taken:
            return None
        contents = tuple(replace(content, deliver=edge.deliver.value) for content in message.contents)
        return replace(message, contents=contents)

    def _awaited(self, visit: Visit) -> dict[str, int]:
        """How many visits are still to come before each content, by origin, is read again."""
        found: dict[str, int] = {}
        for steps, later in enumerate(self._waiting.values(), 1):
            origins = [content.origin for content in self.inputs.values()]
            for delivery in later.inbox:
                message = self.messages.get((delivery.source, delivery.source_round))
                if message is None:
                    origins.append(self._origin(delivery.source, delivery.source_round))
                else:
                    origins += [content.origin for content in message.contents]
            if later.node == visit.node and self.workers[visit.node].remembers:
                origins.append(self._origin(visit.node, visit.round))
            for origin in origins:
                found.setdefault(origin, steps)
        return found

    def _origin(self, node: str, round_: int) -> str:
        return said(self.workers[node].kind, node, round_)

    def _open(self, edge: Edge, message: Message) -> bool:
        if edge.condition is None:
            return True
        if isinstance(edge.condition, PythonRef):
            return bool(self.predicates[edge.condition.python](message))
        facts = {"text": message.text, "role": message.role, "node": message.node}
        return conditions.holds(edge.condition, **facts, round_=message.round, tokens=self._length(message))

    async def _attempts(self, visit: Visit, inbox: tuple[Message, ...]) -> Message:
        """Try a visit as often as its node allows."""
        worker = self.workers[visit.node]
        if worker.judge and self.checks is not None:
            self.checks.note(self._turn(visit, inbox, 0))
        for attempt in range(worker.retry + 1):
            role = worker.role
            self.emit(NodeStarted(node=visit.node, round=visit.round, role=role, attempt=attempt))
            answer, error = await self._attempt(worker, self._turn(visit, inbox, attempt))
            if error is None:
                return self._finish(visit, worker, answer)
            if attempt == worker.retry or isinstance(error, UsageError):
                break
            text = f"{type(error).__name__}: {error}"
            self.emit(NodeRetrying(node=visit.node, round=visit.round, attempt=attempt + 1, error=text))
        kind, text = type(error).__name__, str(error) or "no message"
        self.emit(NodeFailed(node=visit.node, round=visit.round, error_type=kind, error=text))
        tried = f" after {attempt + 1} attempts" if attempt else ""
        where = f"{visit.node} (round {visit.round})"
        raise NodeError(f"{where} failed{tried}: {kind}: {text}", node=visit.node, round_=visit.round) from error

    async def _attempt(self, worker: Worker, turn: Turn) -> tuple[Answer, BaseException | None]:
        """One attempt: an answer, or the error that ended it."""
        task = asyncio.ensure_future(worker.agent.act(turn))
        try:
            done, _ = await asyncio.wait({task}, timeout=worker.timeout)
            if not done:
                limit = f"{worker.timeout:g} s"
                return "", TimeoutError(f"took longer than its limit of {limit}; raise `timeout` or ask for less")
            error = task.exception()
            return ("", error) if error else (task.result(), None)
        finally:
            task.cancel()
            await asyncio.wait({task})

    def _turn(self, visit: Visit, inbox: tuple[Message, ...], attempt: int) -> Turn:
        return Turn(
            visit.node,
            self.workers[visit.node].role,
            visit.round,
            self.topology.rounds,
            self.inputs,
            inbox,
            self._memory.setdefault(visit.node, []),
            attempt,
            replace(
                self.reader,
                consumer=visit.node,
                exact=self.workers[visit.node].exact,
                awaited=self._awaited(visit),
                held=frozenset() if self.checks is None else self.checks.held,
            ),
            self.model,
        )

    def _finish(self, visit: Visit, worker: Worker, answer: Answer) -> Message:
        contents = contents_of(answer, worker.kind, self._origin(visit.node, visit.round))
        message = Message(visit.node, worker.role, visit.round, contents)
        record = MessageRecord(
            node=visit.node, role=worker.role, round=visit.round, text=message.text, tokens=self._length(message)
        )
        self.emit(NodeFinished(message=record))
        return message

    def _length(self, message: Message) -> int:
        return sum(
            self.count_tokens(content.text) if content.tokens is None else len(content.tokens)
            for content in message.contents
        )
