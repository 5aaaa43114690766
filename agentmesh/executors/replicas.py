"""Runs on replicas of the model, each in a Ray actor of its own, on this machine or on several.

A whole run goes to the replica with the least to do, so KV never leaves a process. A replica that dies is replaced, and
its runs begin again wherever there is room; a run counts when its result is here, so none is lost, and none twice. What
meshes learn is observed on all replicas and added up on one of them in the order of the samples, which gives what one
process would have learned; all of them begin with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, final

from agentmesh.blueprint import Blueprint
from agentmesh.errors import ReplicaError
from agentmesh.events import Warned
from agentmesh.executors.base import Course, Job
from agentmesh.executors.cluster import Cluster, LostError
from agentmesh.executors.host import Failure, Ready
from agentmesh.record import disk, write_whole
from agentmesh.results import RunResult
from agentmesh.stream import Sink
from agentmesh.turns import together

Result = TypeVar("Result")

TRIES = 4
"""How often a run, or what all replicas do together, may lose a replica before it fails."""

TOGETHER = 2
"""How many of these tries a run has beside others; then it gets a replica to itself, and takes nobody along."""

ROUND = 4
"""Samples that a replica observes before what they teach is added up: findings are large, so few are kept at once."""

PARTING_SECONDS = 90.0
"""How long replicas may write what is to outlive them."""


@dataclass
class Seat:
    """The place of one replica, whose actor changes when it dies.

    Args:
        actor: its handle.
        load: how much of its width is taken.
        ready: names of meshes that are ready there.
    """

    actor: Any
    load: int = 0
    ready: set[str] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class Prepared:
    """What a new replica is told of a mesh: references to the blueprint, its course, and what that has taught."""

    blueprint: Any
    samples: Any
    learned: Any


@final
class RayExecutor:
    """Runs meshes on replicas. Owns their actors until ``close``.

    Args:
        replicas: how many copies of the model.

    Raises:
        UsageError: Ray is not installed.
        ReplicaError: Ray cannot be started or reached, or has fewer processors than replicas.
    """

    def __init__(self, replicas: int) -> None:
        self._count = replicas
        self._cluster = Cluster(replicas)
        self._seats: list[Seat] = []
        self._model: Blueprint | None = None
        self._prepared: dict[str, Prepared] = {}
        self._room = asyncio.Condition()
        self._apart = 0
        self._keeps = False
        self.ready: dict[str, Ready] = {}

    async def prepare(
        self, name: str, blueprint: Blueprint, course: Course | None, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Make a mesh ready on every replica; see ``Executor``.

        Raises:
            ReplicaError: replicas keep dying.
            UsageError: an agent of the mesh cannot be sent to another process.
        """
        blueprint = replace(blueprint, folder=blueprint.folder.resolve())
        sent = self._cluster.share(blueprint)
        self._keeps |= course is None and blueprint.communicator.store is not None
        if self._model is None:
            self._model = blueprint
            self._seats = [Seat(self._cluster.actor(blueprint)) for _ in range(self._count)]
        learned = None
        if course is not None:
            learned = await _steadily(lambda _number: self._learned(name, sent, course))
            for _ in course.samples:
                tick()
        samples = None if course is None else course.samples
        self._prepared[name] = Prepared(sent, samples, None if learned is None else self._cluster.share(learned))
        await _steadily(lambda _number: together(self._furnish(seat, name) for seat in self._seats))

    async def run(self, name: str, job: Job, sinks: Sequence[Sink] = ()) -> RunResult:
        """Run a mesh once on the replica with the least to do; see ``Executor``.

        Raises:
            ReplicaError: the run lost its replica again and again.
        """

        async def attempt(number: int) -> RunResult:
            async with self._seat(name, alone=number > TOGETHER) as seat:
                await self._furnish(seat, name)
                return await self._run_at(seat, name, job, sinks)

        def lost(error: LostError) -> None:
            for sink in sinks:
                sink(Warned(text=f"the run lost its replica and begins again: {error}"))

        return await _steadily(attempt, lost)

    async def close(self) -> None:
        """End all replicas, and Ray where it was started here; meshes with a store have time to write."""
        if self._keeps:
            parting = (self._cluster.ask(seat.actor.close.remote()) for seat in self._seats)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*parting, return_exceptions=True), PARTING_SECONDS)
        for seat in self._seats:
            self._cluster.end(seat.actor)
        self._seats.clear()
        self._cluster.close()

    async def _learned(self, name: str, blueprint: Any, course: Course) -> bytes | None:
        """What a course teaches, in ``course.kept`` from now on; ``None`` where each replica has to take it itself."""
        if course.kept.is_file():
            return course.kept.read_bytes()
        first = self._seats[0]
        if not course.samples or not await self._ask(first, "adds_up", blueprint):
            return None
        await self._ask(first, "enrol", name, blueprint)
        for begin in range(0, len(course.samples), ROUND * self._count):
            cuts = [begin + ROUND * number for number in range(self._count)]
            parts = [(seat, course.samples[cut : cut + ROUND]) for seat, cut in zip(self._seats, cuts, strict=True)]
            found = await together(self._observe(seat, blueprint, samples) for seat, samples in parts if samples)
            await self._ask(first, "learn", name, *found)
        learned: bytes = await self._ask(first, "graduate", name, blueprint)
        if learned:
            with disk(course.kept):
                write_whole(course.kept, learned)
        return learned

    async def _observe(self, seat: Seat, blueprint: Any, samples: Sequence[Any]) -> Any:
        """A reference to what samples teach, which goes from one replica to another without coming here."""
        failed, found = seat.actor.observe.options(num_returns=2).remote(blueprint, samples)
        await self._answer(seat, seat.actor, failed)
        return found

    async def _furnish(self, seat: Seat, name: str) -> None:
        """Make a mesh ready on one replica, if it is not."""
        async with seat.lock:
            if name not in seat.ready:
                told = self._prepared[name]
                self.ready[name] = await self._ask(seat, "prepare", name, told.blueprint, told.samples, told.learned)
                seat.ready.add(name)

    async def _run_at(self, seat: Seat, name: str, job: Job, sinks: Sequence[Sink]) -> RunResult:
        """One attempt at a run on one replica."""
        if not sinks:
            result: RunResult = await self._ask(seat, "run", name, job)
            return result
        actor = seat.actor
        try:
            async for found in self._cluster.stream(actor.stream.options(num_returns="streaming").remote(name, job)):
                if isinstance(found, Failure):
                    raise found.error()
                if isinstance(found, RunResult):
                    return found
                for sink in sinks:
                    sink(found)
        except LostError:
            self._replace(seat, actor)
            raise
        raise ReplicaError("a replica ended a run without a result")

    async def _ask(self, seat: Seat, method: str, *arguments: Any) -> Any:
        """Let a replica do something.

        Raises:
            LostError: it died; there is a new one in its place.
            AgentmeshError: it failed.
        """
        actor = seat.actor
        return await self._answer(seat, actor, getattr(actor, method).remote(*arguments))

    async def _answer(self, seat: Seat, actor: Any, reference: Any) -> Any:
        try:
            return _checked(await self._cluster.ask(reference))
        except LostError:
            self._replace(seat, actor)
            raise

    def _replace(self, seat: Seat, died: Any) -> None:
        """Put a new actor in the place of one that died, unless that was done already."""
        if seat.actor is died and self._model is not None:
            self._cluster.end(died)
            seat.actor, seat.ready = self._cluster.actor(self._model), set()

    @asynccontextmanager
    async def _seat(self, name: str, *, alone: bool = False) -> AsyncIterator[Seat]:
        """The replica with the least to do, as soon as it has room; others stand back for a run that is to be alone."""
        width = self.ready[name].width
        share = width if alone else 1
        async with self._room:
            self._apart += alone
            try:
                await self._room.wait_for(
                    lambda: self._idlest.load + share <= width and (alone or not self._apart),
                )
            finally:
                self._apart -= alone
                self._room.notify_all()
            seat = self._idlest
            seat.load += share
        try:
            yield seat
        finally:
            seat.load -= share
            async with self._room:
                self._room.notify_all()

    @property
    def _idlest(self) -> Seat:
        return min(self._seats, key=lambda seat: seat.load)


def _checked(answer: Any) -> Any:
    """An answer; a failure is raised."""
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


async def _steadily(
    work: Callable[[int], Awaitable[Result]], lost: Callable[[LostError], None] = lambda _error: None
) -> Result:
    """Do something, again where a replica is lost meanwhile; it is told which try this is, from 1.

    Raises:
        ReplicaError: that happens too often.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return await work(tries)
        except LostError as error:
            lost(error)
            if tries == TRIES:
                raise ReplicaError(
                    f"{TRIES} replicas died over it, the last one because: {error}. It may need more memory than there "
                    "is: use fewer replicas, or a smaller `communicator.budget`"
                ) from error
