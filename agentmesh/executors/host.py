"""What a replica is: a local executor in a process of its own.

Its answers travel to another process. Errors do not travel well, so a failure comes back as a value.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from agentmesh import errors
from agentmesh.blueprint import Blueprint
from agentmesh.communicator.linkstate import Taught
from agentmesh.errors import AgentmeshError, NodeError, ReplicaError
from agentmesh.events import Event
from agentmesh.executors.base import Course, Inputs, Job
from agentmesh.executors.local import LocalExecutor
from agentmesh.local import LocalBackend
from agentmesh.results import RunResult

Result = TypeVar("Result")

KEPT = "learned.safetensors"


@dataclass(frozen=True)
class Failure:
    """An error of ours, as it travels."""

    kind: str
    text: str
    node: str = ""
    round: int = 0

    @staticmethod
    def of(error: AgentmeshError) -> Failure:
        """An error's facts."""
        if isinstance(error, NodeError):
            return Failure(NodeError.__name__, str(error), error.node, error.round)
        return Failure(type(error).__name__, str(error))

    def error(self) -> AgentmeshError:
        """The error again; one of a kind that only the other process knows becomes a ``ReplicaError``."""
        if self.kind == NodeError.__name__:
            return NodeError(self.text, node=self.node, round_=self.round)
        kind = vars(errors).get(self.kind)
        if isinstance(kind, type) and issubclass(kind, AgentmeshError):
            return kind(self.text)
        return ReplicaError(f"{self.kind}: {self.text}")


@dataclass(frozen=True)
class Ready:
    """A mesh that is ready: what its model is, and how many runs of it may overlap."""

    model: dict[str, str]
    width: int


async def outcome(work: Coroutine[Any, Any, Result]) -> Result | Failure:
    """What comes of some work, or the failure that ended it."""
    try:
        return await work
    except AgentmeshError as error:
        return Failure.of(error)


@final
class Host:
    """Owns the executor of one replica for as long as its process lives. What may fail answers with a failure then."""

    def __init__(self) -> None:
        self._local = LocalExecutor()
        self._pupils: dict[str, LocalBackend] = {}

    async def adds_up(self, blueprint: Blueprint) -> bool | Failure:
        """Whether replicas can teach each other what a mesh learns; opens the model."""

        async def work() -> bool:
            return self._local.adds_up(blueprint)

        return await outcome(work())

    async def observe(self, blueprint: Blueprint, samples: Sequence[Inputs]) -> tuple[Failure | None, list[Taught]]:
        """What samples teach, in their order; a failure comes apart, so that nobody fetches the rest to see it."""
        found = await outcome(self._local.observe(blueprint, samples))
        return (found, []) if isinstance(found, Failure) else (None, found)

    async def enrol(self, name: str, blueprint: Blueprint) -> None:
        """Begin to learn for a mesh, with nothing."""
        self._pupils[name] = self._local.pupil(blueprint)

    async def learn(self, name: str, *taught: list[Taught]) -> None:
        """Learn what was observed, part by part."""
        for part in taught:
            self._pupils[name].learn(part)

    async def graduate(self, name: str, blueprint: Blueprint) -> bytes:
        """All that was learned for a mesh, as ``save_realigners`` writes it; empty where it was nothing."""
        pupil = self._pupils.pop(name)
        if not pupil.knows_links:
            return b""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / KEPT
            pupil.save_realigners(path, blueprint.digests)
            return path.read_bytes()

    async def prepare(
        self, name: str, blueprint: Blueprint, samples: Sequence[Inputs] | None, learned: bytes | None
    ) -> Ready | Failure:
        """Make a mesh ready.

        Args:
            name: what it is called from now on.
            blueprint: the mesh.
            samples: its course; ``None`` for a mesh that learns as it runs.
            learned: what the course has taught already, elsewhere; ``None`` to take it here.
        """

        async def work() -> Ready:
            with tempfile.TemporaryDirectory() as folder:
                kept = Path(folder) / KEPT
                if learned:
                    kept.write_bytes(learned)
                course = None if samples is None else Course(samples, kept, taken=learned is not None)
                await self._local.prepare(name, blueprint, course)
            mesh = self._local.mesh(name)
            return Ready(mesh.load().describe(), mesh.width)

        return await outcome(work())

    async def run(self, name: str, job: Job) -> RunResult | Failure:
        """Run a mesh once."""
        return await outcome(self._local.run(name, job))

    async def close(self) -> None:
        """Write what is to outlive this process, and free the rest."""
        await self._local.close()

    async def stream(self, name: str, job: Job) -> AsyncIterator[Event | RunResult | Failure]:
        """Run a mesh once: its events as they happen, then what comes of it."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        task = asyncio.create_task(outcome(self._local.run(name, job, sinks=(queue.put_nowait,))))
        task.add_done_callback(lambda _task: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            yield await task
        finally:
            task.cancel()
