"""A mesh: agents on a communication graph, a communicator, a model. The public way in.

It loads its model at its first run, and frees it when it is closed::

    with Mesh.from_yaml("demo.yaml") as mesh:
        print(mesh.run(question="…").answer)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import networkx as nx

from agentmesh.agents.base import Agent
from agentmesh.backend import Backend
from agentmesh.blueprint import Blueprint, draft
from agentmesh.config.load import LoadedMesh, load_mesh, mesh_from_dict
from agentmesh.config.mesh import AnswerSpec
from agentmesh.events import Event
from agentmesh.models import Models, Progress
from agentmesh.results import RunResult
from agentmesh.runner import Asked, Runner
from agentmesh.stream import Sink
from agentmesh.topology import Topology
from agentmesh.turns import LAG, Turns, refuse_inside_loop, together


@final
class Mesh:
    """Runs a blueprint. Owns the model and everything kept for it, from the first run until ``close``.

    Args:
        agents: group or node → what a mesh file says of an agent, an ``Agent`` object, or a function under ``@agent``.
        topology: a shipped topology's name, a dict as in a mesh file, a ``Topology``, or a networkx digraph.
        model: a name, a dict as in a mesh file, or a backend such as ``testing.ScriptedModel``.
        communicator: a preset's name or a dict as in a mesh file.
        inputs: names of the inputs a run gives, or name → its default (``None``: a run must give it).
        run: as ``run:`` in a mesh file.
        name: for people.

    Raises:
        ConfigError, TopologyError, NotFoundError: the mesh is wrong; nothing was loaded.
    """

    def __init__(
        self,
        *,
        agents: Mapping[str, Any],
        topology: str | Mapping[str, Any] | Topology | nx.DiGraph,
        model: str | Mapping[str, Any] | Backend = "smollm2-135m",
        communicator: str | Mapping[str, Any] = "prefix",
        inputs: Sequence[str] | Mapping[str, str | None] = ("question",),
        run: Mapping[str, Any] | None = None,
        name: str = "mesh",
    ) -> None:
        objects = {key: value for key, value in agents.items() if isinstance(value, Agent)}
        written = {key: value for key, value in agents.items() if key not in objects}
        graph = _as_topology(topology)
        given = isinstance(model, str | Mapping)
        data = {
            "version": 1,
            "name": name,
            "model": model if given else {},
            "topology": topology if graph is None else {"nodes": {"node": {}}, "output": "node"},
            "inputs": list(inputs),
            "defaults": {k: v for k, v in inputs.items() if v is not None} if isinstance(inputs, Mapping) else {},
            "agents": {**written, **{key: {"prompt": "an object"} for key in objects}},
            "communicator": communicator,
            "run": dict(run or {}),
        }
        self._setup(draft(mesh_from_dict(data), graph, objects), None if given else model)

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        libraries: Sequence[Path] = (),
        model: Backend | None = None,
    ) -> Mesh:
        """A mesh from its file, by path or shelf name.

        Args:
            path: the file.
            overrides: ``path=value`` texts that change entries of the file.
            libraries: folders searched for names before the shipped ones.
            model: a backend instead of the file's model.

        Raises:
            ConfigError, TopologyError, NotFoundError: the file is wrong; nothing was loaded.
        """
        return cls.from_loaded(load_mesh(path, overrides=overrides, libraries=libraries), model=model)

    @classmethod
    def from_loaded(
        cls, loaded: LoadedMesh, *, model: Backend | None = None, agents: Mapping[str, Agent] | None = None
    ) -> Mesh:
        """A mesh from a file that was read already; see ``from_yaml``. ``agents`` take the place of the file's."""
        return cls.from_blueprint(draft(loaded, objects=agents), model=model)

    @classmethod
    def from_blueprint(cls, blueprint: Blueprint, *, model: Backend | None = None) -> Mesh:
        """A mesh that was checked already, such as another mesh's ``blueprint``; agent objects are shared with it."""
        mesh = cls.__new__(cls)
        Mesh._setup(mesh, blueprint, model)
        return mesh

    def _setup(self, blueprint: Blueprint, backend: Any) -> None:
        self.blueprint = blueprint
        self._models = Models(blueprint, backend)
        self._runner = Runner(blueprint, self._models)
        store = blueprint.communicator.store
        tenant = store.tenant if store is not None else ""
        self._turns = Turns(lambda: self.width, deterministic=blueprint.run.deterministic, tenant=tenant)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def graph(self) -> nx.MultiDiGraph:
        """The communication graph as a plain networkx graph."""
        return self.blueprint.topology.graph

    @property
    def backend(self) -> Backend | None:
        """The model at work: the one that was given or loaded; ``None`` before it is loaded."""
        return self._models.own

    def load(self, progress: Progress | None = None, *, beside: Backend | None = None) -> Backend:
        """Load the model now instead of at the first run; remote ones are reached when they are first asked.

        Args:
            progress: told how far fetching and converting are.
            beside: what another mesh has loaded for the same model; its weights and its thread serve both then.

        Raises:
            ModelError: the weights cannot be fetched or read.
            InputError: the mesh's realigners were made for something else, its store is no folder, or the key of a
                remote model is not set.
            UsageError: a model is remote, and the library that it takes is not installed.
        """
        return self._models.open(progress, beside)

    def close(self) -> None:
        """Free the model and all KV; the mesh loads again if it is run again."""
        self._models.close()

    def ingest(self, tick: Callable[[int, int], None] | None = None, *, tenant: str = "") -> int:
        """Make and keep the KV of all documents that agents may hand out, so that their first readers share it, too.

        Args:
            tick: told after each document how many are done, and of how many.
            tenant: whose runs may use it; see ``arun``.

        Returns:
            How many were kept; the others are too short, beyond the budget, or the preset places no documents.

        Raises:
            UsageError: an event loop is running here already.
            InputError: no name for a tenant.
        """
        refuse_inside_loop("`await asyncio.to_thread(mesh.ingest)` instead of `mesh.ingest()`")
        tenant = self._turns.tenant(tenant)
        backend = self.load()
        contents = self._runner.corpus()

        async def keep() -> int:
            kept = 0
            for number, content in enumerate(contents, 1):
                kept += await backend.ingest([content], tenant)
                if tick is not None:
                    tick(number, len(contents))
            return kept

        return asyncio.run(keep())

    def run(self, inputs: Mapping[str, str] | None = None, **named: Any) -> RunResult:
        """Run once and wait for the result; inputs as a dict or by name. Other arguments as ``arun``."""
        refuse_inside_loop("`await mesh.arun(…)` instead of `mesh.run(…)`")
        return asyncio.run(self.arun(inputs, **named))

    async def arun(
        self,
        inputs: Mapping[str, str] | None = None,
        *,
        seed: int | None = None,
        sample: str = "",
        sinks: Sequence[Sink] = (),
        check_judges: bool = False,
        tenant: str = "",
        answer: AnswerSpec | None = None,
        **named: str,
    ) -> RunResult:
        """Run once; runs beyond ``run.concurrency`` of one mesh wait for their turn.

        Args:
            inputs: the run's inputs by name.
            seed: of this run; the mesh's own where not given.
            sample: a name for this run in its events.
            sinks: called with every event, in order.
            check_judges: whether each judge acts once more when the run is over, with its inbox in an order drawn from
                seed and sample; what it says then is in the result's ``checks`` alone.
            tenant: for whom it is. What is kept and learned for one tenant is never used for another: neither KV nor
                time to first token tell what others have asked.
            answer: what the run asks of the output node's message in the last round, over its own ``generate``.
            named: more inputs.

        Raises:
            InputError: the inputs are not what the mesh reads, or no name for a tenant.
            NodeError: an agent failed for good.
            RunError: the run has no answer.
        """
        given = self.blueprint.all_inputs({**(inputs or {}), **named})
        run_seed = self.blueprint.run.seed if seed is None else seed
        async with self._turns.turn(tenant) as reader:
            asked = Asked(given, run_seed, sample, reader, check_judges, answer)
            return await self._runner.run(self.load(), asked, sinks)

    @property
    def width(self) -> int:
        """How many runs may overlap: as ``run.concurrency`` says, or what the loaded models serve well at once.

        Deterministic ones use what was learned ``LAG`` runs before them, so no more of them do.
        """
        run = self.blueprint.run
        self.load()
        wanted = run.concurrency
        width = min(backend.width for backend in self._models.all()) if wanted == "auto" else wanted
        return min(width, LAG) if run.deterministic else width

    async def arun_all(
        self, samples: Iterable[Mapping[str, str]], tick: Callable[[], None] = lambda: None
    ) -> list[RunResult]:
        """Run once for each of many inputs, as many at once as the mesh is wide; the first failure cancels the others.

        Args:
            samples: inputs by name, for each run.
            tick: called when a run has ended.

        Returns:
            Results in the order of the samples.
        """

        async def one(given: Mapping[str, str]) -> RunResult:
            result = await self.arun(given)
            tick()
            return result

        return await together(one(given) for given in samples)

    async def stream(self, inputs: Mapping[str, str] | None = None, **named: Any) -> AsyncIterator[Event]:
        """Run once and yield its events as they happen; arguments as ``arun``. Leaving the loop cancels the run."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        sinks = (*named.pop("sinks", ()), queue.put_nowait)
        task = asyncio.create_task(self.arun(inputs, sinks=sinks, **named))
        task.add_done_callback(lambda _task: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await task
        finally:
            task.cancel()
            await asyncio.wait({task})


def _as_topology(topology: Any) -> Topology | None:
    if isinstance(topology, Topology):
        return topology
    return Topology.from_graph(topology) if isinstance(topology, nx.Graph) else None
