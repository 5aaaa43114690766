"""Whole runs of a mesh under load: presets and concurrencies against one call at a time.

Every measurement is the same questions through the same mesh. Its warm-up questions come first and are not timed;
without them nothing could be shared. The baseline answers the same calls with transformers' ``generate``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from agentmesh.bench.baseline import GenerateBackend
from agentmesh.bench.data import Question
from agentmesh.bench.figures import Baseline, Load, Percentiles, Throughput, refused
from agentmesh.bench.rig import DENSE
from agentmesh.blueprint import draft
from agentmesh.config.load import LoadedMesh
from agentmesh.config.presets import settings, specs
from agentmesh.engine.embedded import Progress
from agentmesh.engine.generation import Spent
from agentmesh.engine.profile import Profiles
from agentmesh.errors import InputError
from agentmesh.local import LocalBackend
from agentmesh.mesh import Mesh
from agentmesh.results import RunResult

BASELINE = "transformers generate, one at a time"
WARMUP_OF_BASELINE = 1


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        presets: by name.
        widths: how many runs overlap.
        warmup: questions before the clock starts.
        limit: questions that are timed.
        baseline: how many of them the baseline answers.
    """

    presets: Sequence[str]
    widths: Sequence[int]
    warmup: int
    limit: int
    baseline: int

    @property
    def ticks(self) -> int:
        """How many questions are answered in all."""
        loads = len(self.presets) * len(self.widths)
        return loads * (self.warmup + self.limit) + (self.baseline + WARMUP_OF_BASELINE if self.baseline else 0)


def measure(
    mesh_of: Callable[[int], LoadedMesh],
    questions: Sequence[Question],
    plan: Plan,
    *,
    profiles: Profiles | None = None,
    progress: Progress | None,
    tick: Callable[[], None],
) -> Throughput:
    """Measure a mesh under load.

    Args:
        mesh_of: concurrency → the mesh.
        questions: the warm-up's first.
        plan: what is measured.
        profiles: where profiles go; without it none are taken.
        progress: told how far fetching the model is.
        tick: called after each question.

    Raises:
        InputError: the mesh keeps KV in a store, or its realigners were made for something else.
    """
    blueprint = draft(mesh_of(1))
    if blueprint.communicator.store is not None:
        raise InputError(
            "a store would hand what one preset has kept to the next one; measure without: "
            "--set communicator.store=null"
        )
    warm, timed = questions[: plan.warmup], questions[plan.warmup :][: plan.limit]
    chosen = specs(blueprint.communicator, plan.presets)
    opened = LocalBackend.open(blueprint.local_model(), DENSE, progress, deterministic=blueprint.run.deterministic)
    loaded = opened.engine.loaded
    baseline, runs = None, []
    with opened.engine as engine:
        if plan.baseline:
            baseline = _baseline(mesh_of(1), GenerateBackend(engine), timed[: plan.baseline], tick)
        for width in plan.widths:
            for name, spec in chosen.items():
                backend = LocalBackend(engine, spec)
                if blueprint.realigners is not None and backend.adds_up:
                    backend.load_realigners(blueprint.realigners, blueprint.digests)
                runs.append(_load(mesh_of(width), backend, warm, timed, name, width, tick, profiles=profiles))
    return Throughput(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        settings={"warmup": plan.warmup, "limit": plan.limit, "baseline": plan.baseline, "presets": settings(chosen)},
        baseline=baseline,
        runs=tuple(runs),
    )


def _baseline(
    loaded: LoadedMesh, backend: GenerateBackend, questions: Sequence[Question], tick: Callable[[], None]
) -> Baseline:
    mesh = Mesh.from_loaded(loaded, model=backend)
    _answer(mesh, questions[:WARMUP_OF_BASELINE], tick)
    backend.decode_s, backend.decoded = 0.0, 0
    results, wall = _answer(mesh, questions, tick)
    return Baseline(
        name=BASELINE,
        questions=len(questions),
        tokens_per_s=_output(results) / wall,
        decode_tokens_per_s=backend.decoded / max(backend.decode_s, 1e-9),
        samples_per_min=60 * len(questions) / wall,
    )


def _load(
    loaded: LoadedMesh,
    backend: LocalBackend,
    warm: Sequence[Question],
    timed: Sequence[Question],
    name: str,
    width: int,
    tick: Callable[[], None],
    *,
    profiles: Profiles | None,
) -> Load:
    mesh, engine = Mesh.from_loaded(loaded, model=backend), backend.engine
    _answer(mesh, warm, tick)
    engine.core.spent, backend.peak_bytes = Spent(), 0
    title = f"{name}, {width} at once"
    with profiles.of(engine, title) if profiles else nullcontext():
        results, wall = _answer(mesh, timed, tick)
    spent, calls = engine.core.spent, [call for result in results for call in result.calls]
    placed, slots = sum(call.placed_slots for call in calls), sum(call.slot_tokens for call in calls)
    return Load(
        preset=name,
        concurrency=width,
        at_once=mesh.width,
        tokens_per_s=_output(results) / wall,
        decode_tokens_per_s=spent.decoded / max(spent.decode_s, 1e-9),
        samples_per_min=60 * len(timed) / wall,
        prefill_share=spent.prefill_s / wall,
        decode_share=spent.decode_s / wall,
        keep_share=spent.keep_s / wall,
        placed_share=placed / slots if slots else 0.0,
        calls_shareable=sum(call.slot_tokens > 0 for call in calls),
        calls_shared=sum(call.placed_slots > 0 for call in calls),
        reasons=refused(call.plan for call in calls),
        peak_bytes=backend.peak_bytes,
        ttft_ms=Percentiles.of([call.ttft_ms for call in calls]),
        wall_s=wall,
        profile=profiles.taken[title] if profiles else None,
    )


def _answer(mesh: Mesh, questions: Sequence[Question], tick: Callable[[], None]) -> tuple[list[RunResult], float]:
    """Answer questions, as many at once as the mesh allows: the results and the seconds that took."""
    samples = [question.inputs(mesh.blueprint) for question in questions]
    begun = time.perf_counter()
    return asyncio.run(mesh.arun_all(samples, tick)), time.perf_counter() - begun


def _output(results: Sequence[RunResult]) -> int:
    return sum(call.output_tokens for result in results for call in result.calls)
