"""What is to be evaluated, and the mesh that runs under each preset, from a file or built in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentmesh.agents.base import Agent, FunctionAgent
from agentmesh.blueprint import Blueprint, Member, draft
from agentmesh.config.load import LoadedMesh, dump, load_mesh, written
from agentmesh.config.mesh import AgentBase, LlmAgentSpec, RemoteModelSpec
from agentmesh.config.presets import PRESETS
from agentmesh.config.topology import PythonRef
from agentmesh.errors import InputError, did_you_mean, listing
from agentmesh.evaluate.session import SINGLE, token_budget
from agentmesh.executors import Executor, Where
from agentmesh.executors.local import LocalExecutor
from agentmesh.local import LocalBackend
from agentmesh.mesh import Mesh
from agentmesh.models import Progress
from agentmesh.suites.task import Kind, Task
from agentmesh.topology import Edge

SINGLES = {Kind.MATH: "math-single", Kind.CHOICE: "math-single", Kind.RAG: "rag-single", Kind.CODE: "code-single"}
"""The mesh of one agent that a mesh is compared with, by the task's kind."""


@dataclass(frozen=True)
class Request:
    """What to evaluate; see the command ``agentmesh eval``.

    Args:
        mesh: a mesh file, the name of a shipped one, or a mesh.
        task: a task's name, or the path of its folder.
        data: a JSONL file instead of the task's own samples.
        presets: their names; ``single`` stands for one agent alone with the token budget of the whole mesh.
        warmup: samples to learn from, the first ones.
        limit: how many of the others, or a range such as ``10-20``; all if ``None``.
        seed: of the runs.
        epochs: how often each sample runs.
        allow_code: whether code that a model writes may be run.
        fail_on_error: whether a failed sample ends everything.
        judge_check: whether judges are asked once more, with their inbox in another order.
        resume: an evaluation's folder to go on with.
        executor: where the samples run, ``local`` or ``ray``.
        replicas: how many copies of the model the executor ``ray`` makes.
        runs_dir: where a new folder is made.
        overrides: ``path=value`` texts that change entries of the mesh file.
        libraries: folders searched for names before the shipped ones.
    """

    mesh: str | Mesh
    task: str
    data: Path | None = None
    presets: Sequence[str] = ("dense", "linear")
    warmup: int = 8
    limit: str | None = None
    seed: int = 0
    epochs: int = 1
    allow_code: bool = False
    fail_on_error: bool = False
    judge_check: bool = True
    resume: Path | None = None
    executor: str = Where.LOCAL
    replicas: int = 1
    runs_dir: Path = Path("runs")
    overrides: Sequence[str] = ()
    libraries: Sequence[Path] = ()


@dataclass(frozen=True)
class Subject:
    """A mesh to evaluate, and how it is written down in the record."""

    blueprint: Blueprint
    text: str


def find_subjects(request: Request, task: Task) -> dict[str, Subject]:
    """Preset → its mesh: the one that is evaluated, or one agent with as many tokens to write.

    Raises:
        ConfigError, TopologyError, NotFoundError: the mesh is wrong.
        InputError: no such preset, a mesh that cannot be evaluated, or overrides for a mesh that has no file.
    """
    if not request.presets:
        raise InputError(f"--presets is empty; name some of {listing([*PRESETS, SINGLE])}")
    found: dict[str, Subject] = {}
    given = _given(request, task.spec.until)
    if isinstance(given.blueprint.model, RemoteModelSpec) and {*request.presets} - {"dense", SINGLE}:
        raise InputError(
            f"--presets {','.join(request.presets)}: the model of mesh {given.blueprint.name} is remote and takes text "
            f"only, so nothing but `dense` and `{SINGLE}` differs there; ask for --presets dense"
        )
    for name in request.presets:
        if name == SINGLE:
            found[name] = _single(request, task, given.blueprint)
        elif name in PRESETS:
            found[name] = given
        else:
            choices = [*PRESETS, SINGLE]
            raise InputError(
                f"--presets: no preset named {name!r}; there are {listing(choices)}.{did_you_mean(name, choices)}"
            )
    return found


def open_executor(request: Request, progress: Progress | None) -> Executor:
    """Where the samples run: on replicas, or here with the mesh's own model where it is loaded.

    Raises:
        UsageError: no such executor, or what it takes is not installed.
        ReplicaError: replicas cannot be made.
    """
    if request.executor not in list(Where):
        hint = did_you_mean(request.executor, Where)
        raise InputError(f"no executor {request.executor!r}; there are {listing(Where)}.{hint}")
    if request.executor == Where.RAY:
        from agentmesh.executors.replicas import RayExecutor  # noqa: PLC0415  # an extra

        return RayExecutor(request.replicas)
    backend = request.mesh.backend if isinstance(request.mesh, Mesh) else None
    return LocalExecutor(backend.engine if isinstance(backend, LocalBackend) else None, progress)


def described(blueprint: Blueprint) -> str:
    """A mesh built in Python as YAML, for its record: node by node, agent objects by their names."""
    topology = blueprint.topology
    return written(
        {
            "name": blueprint.name,
            "model": blueprint.model.model_dump(),
            "topology": {
                "nodes": {node.name: {"group": node.group} for node in topology.nodes},
                "rounds": topology.rounds,
                "edges": [_edge(edge) for edge in topology.edges],
                "output": topology.output,
            },
            "inputs": list(blueprint.inputs),
            "defaults": dict(blueprint.defaults),
            "agents": {node: _member(member) for node, member in blueprint.members.items()},
            "communicator": blueprint.communicator.model_dump(),
            "run": blueprint.run.model_dump(),
        }
    )


def _given(request: Request, until: Sequence[str]) -> Subject:
    if not isinstance(request.mesh, Mesh):
        return _of_file(load_mesh(request.mesh, overrides=request.overrides, libraries=request.libraries), until)
    if request.overrides:
        raise InputError(
            "overrides change entries of a mesh file, and this mesh is an object: build it as it should be"
        )
    return _of_mesh(request.mesh, until)


def _of_file(loaded: LoadedMesh, until: Sequence[str]) -> Subject:
    agents = {key: _ending(spec, until) for key, spec in loaded.spec.agents.items()}
    ended = replace(loaded, spec=loaded.spec.model_copy(update={"agents": agents}))
    return Subject(draft(ended), dump(ended.spec))


def _of_mesh(mesh: Mesh, until: Sequence[str]) -> Subject:
    whole, backend = mesh.blueprint, mesh.backend
    if backend is not None and not isinstance(backend, LocalBackend):
        raise InputError(
            f"mesh {whole.name} was given a {type(backend).__name__}, but an evaluation runs a model of this process "
            "under one preset after the other; give the mesh a model by its name, such as 'random:tiny-llama'"
        )
    model = whole.model if backend is None else whole.model.model_copy(update={"name": backend.name})
    members = {
        node: member if member.spec is None else replace(member, spec=_ending(member.spec, until))
        for node, member in whole.members.items()
    }
    blueprint = replace(whole, members=members, model=model)
    return Subject(blueprint, described(blueprint))


def _single(request: Request, task: Task, whole: Blueprint) -> Subject:
    """One agent alone, with the token budget of the whole mesh; it runs as the mesh does."""
    budget = token_budget(whole)
    if not budget:
        raise InputError(
            f"--presets {SINGLE}: one agent gets as many tokens as all agents of the mesh may write, but mesh "
            f"{whole.name} has none whose `max_tokens` is known"
        )
    own = [each for each in request.overrides if each.startswith(("model", "run", "communicator"))]
    alone = [*own, f"agents.agent.generate.max_tokens={budget}"]
    loaded = load_mesh(SINGLES[task.spec.kind], overrides=alone, libraries=request.libraries)
    single = _of_file(loaded, task.spec.until)
    as_whole = replace(single.blueprint, model=whole.model, run=whole.run, communicator=whole.communicator)
    return replace(single, blueprint=as_whole)


def _ending(spec: AgentBase, until: Sequence[str]) -> AgentBase:
    """An agent whose messages also end at a task's own texts."""
    if not isinstance(spec, LlmAgentSpec):
        return spec
    generate = spec.generate.model_copy(update={"stop": (*spec.generate.stop, *until)})
    return spec.model_copy(update={"generate": generate})


def _member(member: Member) -> dict[str, Any]:
    if member.agent is not None:
        return {"role": member.role, "object": _name(member.agent)}
    assert member.spec is not None, "a member has a specification or an object"
    return {**member.spec.model_dump(), "role": member.role}


def _name(agent: Agent) -> str:
    return agent.name if isinstance(agent, FunctionAgent) else f"{type(agent).__module__}:{type(agent).__qualname__}"


def _edge(edge: Edge) -> dict[str, Any]:
    condition: Any = edge.condition
    if isinstance(condition, PythonRef):
        condition = condition.model_dump()
    shown = {"when": edge.when, "if": condition, "deliver": edge.deliver, "max_visits": edge.max_visits}
    return {"from": edge.source, "to": edge.target, **{key: value for key, value in shown.items() if value is not None}}
