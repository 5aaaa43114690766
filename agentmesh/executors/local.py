"""Runs in this process: one loaded model, and a communicator of its own for each mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from agentmesh.blueprint import Blueprint
from agentmesh.communicator.linkstate import Taught
from agentmesh.config.mesh import RemoteModelSpec
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.loop import Engine
from agentmesh.executors.base import Course, Inputs, Job
from agentmesh.local import LocalBackend
from agentmesh.mesh import Mesh
from agentmesh.models import Progress
from agentmesh.results import RunResult
from agentmesh.stream import Sink

DENSE = "dense"


@final
class LocalExecutor:
    """Runs meshes here. Owns the model that it loads for the first of them, until ``close``.

    Args:
        engine: a model at work, instead of loading one; it stays open.
        progress: told how far fetching a model is.
    """

    def __init__(self, engine: Engine | None = None, progress: Progress | None = None) -> None:
        self._given = engine
        self._progress = progress
        self._opened: LocalBackend | None = None
        self._meshes: dict[str, Mesh] = {}

    def engine(self, blueprint: Blueprint) -> Engine:
        """The model at work; the first mesh that needs it says which.

        Raises:
            ModelError: the weights cannot be fetched or read.
            InputError: the mesh's model is remote.
        """
        if self._given is not None:
            return self._given
        if self._opened is None:
            spec, exact = CommunicatorSpec(preset=DENSE), blueprint.run.deterministic
            self._opened = LocalBackend.open(blueprint.local_model(), spec, self._progress, deterministic=exact)
        return self._opened.engine

    def mesh(self, name: str) -> Mesh:
        """A mesh that is ready."""
        return self._meshes[name]

    async def prepare(
        self, name: str, blueprint: Blueprint, course: Course | None, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Make a mesh ready; see ``Executor``."""
        if course is None or isinstance(blueprint.model, RemoteModelSpec):
            mesh = Mesh.from_blueprint(blueprint)
            mesh.load(self._progress)
            for _ in course.samples if course is not None else ():
                tick()
        else:
            mesh = Mesh.from_blueprint(blueprint, model=await self._taught(blueprint, course, tick))
        self._meshes[name] = mesh

    async def _taught(self, blueprint: Blueprint, course: Course, tick: Callable[[], None]) -> LocalBackend:
        """A backend that has learned from a course and learns no more."""
        spec, digests = blueprint.communicator, blueprint.digests
        ready = self.pupil(blueprint)
        taken = course.taken or course.kept.is_file() or not ready.communicator.learns
        if taken:
            for _ in course.samples:
                tick()
        if course.kept.is_file():
            ready.load_realigners(course.kept, digests)
        elif course.samples and not taken:
            warm = self._observer(blueprint)
            await Mesh.from_blueprint(blueprint, model=warm).arun_all(course.samples, tick)
            ready.communicator.adopt(warm.communicator)
            if warm.knows_links:
                warm.save_realigners(course.kept, digests)
        ready.communicator.freeze()
        if course.samples and spec.preset != DENSE:
            # The mesh's fixed texts are kept before the first measured sample, in every process that goes on.
            await Mesh.from_blueprint(blueprint, model=ready).arun(course.samples[0])
        return ready

    def pupil(self, blueprint: Blueprint) -> LocalBackend:
        """A backend that has learned nothing, to learn what others have observed."""
        return LocalBackend(self.engine(blueprint), blueprint.communicator)

    def _observer(self, blueprint: Blueprint) -> LocalBackend:
        """A backend that computes and observes whatever it runs."""
        warm = self.pupil(blueprint)
        warm.observe_only(on=True)
        return warm

    def adds_up(self, blueprint: Blueprint) -> bool:
        """Whether what different samples teach a mesh can be added up; see ``observe``."""
        return self.pupil(blueprint).adds_up

    async def observe(self, blueprint: Blueprint, samples: Sequence[Inputs]) -> list[Taught]:
        """What samples teach, in their order, for another executor to learn from.

        Raises:
            RunError, UsageError: one of them failed.
        """
        warm = self._observer(blueprint)
        found = warm.collect()
        await Mesh.from_blueprint(blueprint, model=warm).arun_all(samples)
        return found

    async def run(self, name: str, job: Job, sinks: Sequence[Sink] = ()) -> RunResult:
        """Run a mesh once; see ``Executor``."""
        return await self._meshes[name].arun(
            job.inputs, seed=job.seed, sample=job.sample, sinks=sinks, check_judges=job.check_judges
        )

    async def close(self) -> None:
        """Free the model, unless it was given."""
        if self._given is None:
            for mesh in self._meshes.values():
                mesh.close()
            if self._opened is not None:
                self._opened.close()
        self._opened = None
        self._meshes.clear()
