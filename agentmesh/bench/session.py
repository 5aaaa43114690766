"""One measurement from its settings to its figures: loads the model, runs the bench, closes the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import psutil
from pydantic import ValidationError

from agentmesh.bench import fidelity as fidelity_bench
from agentmesh.bench import scaling as scaling_bench
from agentmesh.bench import ttft as ttft_bench
from agentmesh.bench.data import Passages, Question, dense_runs, stand_ins
from agentmesh.bench.figures import Fidelity, Scaling, Times
from agentmesh.bench.rig import DENSE, Recording
from agentmesh.blueprint import draft
from agentmesh.config.load import LoadedMesh
from agentmesh.config.mesh import ModelSpec
from agentmesh.config.presets import CommunicatorSpec, specs
from agentmesh.engine.embedded import Progress
from agentmesh.engine.loading import load
from agentmesh.engine.loop import BATCH, Engine, at_once
from agentmesh.engine.probe import Level, probe
from agentmesh.errors import InputError, UnsupportedModelError
from agentmesh.local import LocalBackend
from agentmesh.mesh import Mesh

LAYOUTS = tuple(layout.value for layout in ttft_bench.Layout)

MEMORY_SHARE = 0.6
"""Of the memory that is free, what all stores of a bench may hold together; the rest is for calls."""


def fidelity(
    loaded: LoadedMesh,
    questions: Sequence[Question],
    names: Sequence[str],
    sizes: tuple[int, int],
    passages: Passages | None,
    *,
    corpus: bool,
    progress: Progress | None,
    tick: Callable[[], None],
) -> Fidelity:
    """Measure presets on a mesh; see ``bench.fidelity``.

    Args:
        loaded: the mesh.
        questions: at least as many as are needed; those whose context is too short for the passages are left out.
        names: presets.
        sizes: questions that are observed, and that are measured.
        passages: what takes the place of the mesh's retrievers.
        corpus: whether passages are kept before they are read.
        progress: of fetching the model.
        tick: called after each question.

    Raises:
        UnsupportedModelError: the model's KV cannot be moved.
        InputError: the passages do not fit the mesh or the questions.
    """
    blueprint = draft(loaded)
    given = stand_ins(blueprint, passages)
    backend = _backend(blueprint.local_model(), progress, at_once(deterministic=blueprint.run.deterministic))
    recording = Recording(backend)
    with Mesh.from_loaded(loaded, model=recording, agents=given) as mesh:
        fitting = passages.fitting(questions, sum(sizes), backend.tokenizer) if passages else questions[: sum(sizes)]
        stores = fidelity_bench.stores(names)
        ungated = blueprint.communicator.model_copy(update={"cost_gate": False})  # nothing is timed here
        chosen = {name: _affordable(spec, stores) for name, spec in specs(ungated, names).items()}
        runs = dense_runs(mesh, recording, fitting, given, passages)
        return fidelity_bench.measure(backend, runs, chosen, sizes[0], corpus=corpus, tick=tick)


def ttft(
    model: ModelSpec,
    names: Sequence[str],
    setting: ttft_bench.Setting,
    warmup: int,
    repeat: int,
    *,
    base: CommunicatorSpec,
    progress: Progress | None,
    tick: Callable[[], None],
) -> Times:
    """Time presets; see ``bench.ttft``, and ``timed`` for their settings.

    Raises:
        UnsupportedModelError: the model's KV cannot be moved.
        InputError: sizes beyond the model's context.
    """
    backend = _backend(model, progress)
    try:
        longest = max(
            len(call.prompt.tokens) + len(call.message)
            for layout in {ttft_bench.layout_of(name, setting) for name in names}
            for call in ttft_bench.round_of_calls(backend.tokenizer, setting, layout, 0)
        )
        backend.engine.check(longest)
        return ttft_bench.measure(
            backend, _affordable(base, len(names)), names, setting, warmup=warmup, repeat=repeat, tick=tick
        )
    finally:
        backend.close()


def scaling(
    model: ModelSpec, grid: scaling_bench.Grid, *, budget: str, progress: Progress | None, tick: Callable[[], None]
) -> Scaling:
    """Time prompts of growing length; see ``bench.scaling``.

    Raises:
        UnsupportedModelError: the model's KV cannot be moved.
        InputError: lengths beyond the model's context, or a budget that is no size.
    """
    base = _settings("linear", budget).model_copy(update={"max_kl": math.inf, "audit": 0.0, "cost_gate": False})
    backend = _backend(model, progress)
    try:
        backend.engine.check(max(grid.lengths))
        return scaling_bench.measure(backend, base, grid, tick)
    finally:
        backend.close()


def timed(loaded: LoadedMesh | None, budget: str, names: Sequence[str], *, cost_gate: bool) -> CommunicatorSpec:
    """What presets are timed with: a mesh's limits, and its choices for its own preset; without a mesh the defaults.

    Args:
        loaded: the mesh, of which nothing but the communicator matters.
        budget: bytes that each preset may keep where there is no mesh to say it.
        names: presets, maybe with a layout.
        cost_gate: whether they compute where that is faster; a mesh may say no, too.

    Raises:
        InputError: a budget that is no size, or a mesh whose own preset would not be measured.
    """
    own = draft(loaded).communicator if loaded else _settings("dense", budget)
    if loaded and own.preset not in {name.partition("@")[0] for name in names}:
        raise InputError(
            f"--presets {','.join(names)}: the mesh has {own.preset!r}, whose choices would not be timed; "
            f"add {own.preset}, or leave --mesh out"
        )
    return own.model_copy(update={"cost_gate": cost_gate and own.cost_gate})


def setting(
    agents: int, question: int, prefix: int, output: int, layout: str, passages: str | None, *, corpus: bool
) -> ttft_bench.Setting:
    """Sizes of a TTFT measurement.

    Raises:
        InputError: no such layout, no such sizes of passages, or a corpus without passages.
    """
    cut = None if passages is None else Passages.parse(passages)
    if corpus and cut is None:
        raise InputError("--corpus keeps passages before they are read; say how many with --passages, such as 4x256")
    try:
        return ttft_bench.Setting(agents, question, prefix, output, ttft_bench.Layout(layout), cut, corpus)
    except ValueError as error:
        raise InputError(f"--layout {layout!r}: expected role-first or role-last") from error


def _settings(preset: str, budget: str) -> CommunicatorSpec:
    try:
        return CommunicatorSpec.model_validate({"preset": preset, "budget": budget})
    except ValidationError as error:
        raise InputError(f"--budget {budget!r}: expected a size such as 4GiB") from error


def _affordable(spec: CommunicatorSpec, stores: int) -> CommunicatorSpec:
    """Settings with which that many stores fit into memory at once; figures say under what budget they were taken."""
    share = int(psutil.virtual_memory().available * MEMORY_SHARE) // stores
    return spec.model_copy(update={"budget": min(spec.budget, share)})


def _backend(model: ModelSpec, progress: Progress | None, batch: int = BATCH) -> LocalBackend:
    """A backend whose model lives on this thread, since a rig runs it here; see ``Engine`` for ``batch``."""
    loaded = load(model, progress)
    support = probe(loaded.model, loaded.step)
    backend = LocalBackend(Engine(loaded, support, batch), DENSE)
    if support.level is not Level.REALIGN:
        backend.close()
        raise UnsupportedModelError(f"{backend.name} cannot share slots: {support.reason}; measure another model")
    return backend
