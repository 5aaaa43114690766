"""One evaluation: the same samples through a mesh under several presets, one preset after the other.

Warm-up samples run first, computed and observed; then nothing more is learned, so what a sample gives depends on no
sample before it, and an evaluation that was killed goes on to the same figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from agentmesh.blueprint import Blueprint
from agentmesh.config.mesh import LlmAgentSpec
from agentmesh.config.presets import specs
from agentmesh.errors import InputError, RunError, UsageError, listing
from agentmesh.evaluate.choices import with_choices
from agentmesh.evaluate.journal import Journal, Row
from agentmesh.executors import Course, Executor, Job
from agentmesh.suites.prompt import SamplePrompt
from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Output, Scorer
from agentmesh.suites.task import Kind, Task
from agentmesh.turns import together

SINGLE = "single"
"""The name that stands for one agent alone, in the place of a preset."""

NO_TESTS = "# no visible tests"


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Args:
        task: the task.
        warm: samples to learn from.
        samples: samples to measure.
        presets: their names; ``single`` stands for one agent alone.
        seed: of the runs; epoch ``n`` of a sample runs under ``seed + n``.
        epochs: how often each sample runs.
        fail_on_error: whether a failed sample ends everything.
        judge_check: whether judges are asked once more, with their inbox in another order.
    """

    task: Task
    warm: Sequence[Sample]
    samples: Sequence[Sample]
    presets: Sequence[str]
    seed: int = 0
    epochs: int = 1
    fail_on_error: bool = False
    judge_check: bool = True

    @property
    def runs(self) -> int:
        """How many runs that takes at most, the warm-up included."""
        return len(self.presets) * (len(self.warm) + len(self.samples) * self.epochs)


@final
class Evaluation:
    """Runs a plan and keeps its journal.

    Args:
        blueprints: preset → the mesh that runs under it.
        plan: what is evaluated.
        scorers: by name, the primary one first.
        journal: what is done already, and what is done from now on.
        folder: where learned realigners are kept for the case that it is cut off, and for replicas.
        tick: called after each run.

    Raises:
        InputError: the mesh reads inputs that the task does not give, or none of its passages.
    """

    def __init__(
        self,
        blueprints: Mapping[str, Blueprint],
        plan: Plan,
        scorers: Mapping[str, Scorer],
        journal: Journal,
        folder: Path,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._blueprints = blueprints
        self._plan = plan
        self._scorers = scorers
        self._journal = journal
        self._folder = folder
        self._tick = tick
        self._prompt = SamplePrompt(plan.task)
        for blueprint in blueprints.values():
            check_mesh(blueprint, plan.task)

    async def run(self, executor: Executor) -> None:
        """Evaluate everything that is not done yet.

        Args:
            executor: where the samples run; each preset has a communicator of its own there.

        Raises:
            RunError, UsageError: a sample failed, and the plan says to fail then.
            RecordError: the journal cannot be written.
        """
        for preset in self._plan.presets:
            pending = [
                (sample, epoch)
                for sample in self._plan.samples
                for epoch in range(self._plan.epochs)
                if not self._journal.done((preset, sample.id, epoch))
            ]
            for _ in range(len(self._plan.samples) * self._plan.epochs - len(pending)):
                self._tick()
            if not pending:
                continue
            blueprint = self._blueprints[preset]
            name = "dense" if preset == SINGLE else preset
            ready = replace(blueprint, communicator=specs(blueprint.communicator, [name])[name])
            warm = [self._inputs(blueprint, sample) for sample in self._plan.warm]
            course = Course(warm, self._folder / f"learned-{preset}.safetensors")
            await executor.prepare(preset, ready, course, self._tick)
            await together(self._one(executor, preset, sample, epoch) for sample, epoch in pending)

    async def _one(self, executor: Executor, preset: str, sample: Sample, epoch: int) -> None:
        """Run, score and note one sample."""
        seed, blueprint = self._plan.seed + epoch, self._blueprints[preset]
        expected = sample.answer or sample.tests
        about = {"preset": preset, "sample": sample.id, "epoch": epoch, "seed": seed, "expected": expected}
        try:
            begun = time.time()
            job = Job(self._inputs(blueprint, sample), seed, sample.id, check_judges=self._plan.judge_check)
            result = await executor.run(preset, job)
        except (RunError, UsageError) as error:
            self._journal.append(Row(**about, error=f"{type(error).__name__}: {error}"))
            self._tick()
            if self._plan.fail_on_error:
                raise
            return
        ended = time.time() - sum(check.ms for check in result.checks) / 1e3
        row = Row(
            **about,
            begun=max(begun, ended - result.wall_s),
            ended=ended,
            answer=result.answer,
            messages=result.messages,
            calls=result.calls,
            checks=result.checks,
        )
        self._journal.append(await scored(row, sample, self._scorers, judges(blueprint)))
        self._tick()

    def _inputs(self, blueprint: Blueprint, sample: Sample) -> dict[str, str]:
        """A sample as a mesh's inputs."""
        given = {blueprint.main_input: self._prompt.render(sample), "context": sample.passages}
        given["tests"] = sample.visible or NO_TESTS
        return {name: text for name, text in given.items() if name in blueprint.inputs}


async def scored(row: Row, sample: Sample, scorers: Mapping[str, Scorer], judges: Mapping[str, Sequence[str]]) -> Row:
    """A row with its scores and what its judges chose; what it was given before is forgotten."""
    output = Output(row.answer, row.messages)
    found = {name: await scorer.score(sample, output) for name, scorer in scorers.items()}
    read = await with_choices(row, sample, next(iter(scorers.values())), judges)
    return read.model_copy(
        update={
            "scores": {metric: value for one in found.values() for metric, value in one.values.items()},
            "extracted": {name: one.extracted for name, one in found.items()},
            "notes": {name: one.note for name, one in found.items() if one.note},
        }
    )


def check_mesh(blueprint: Blueprint, task: Task) -> None:
    """Compare a mesh's inputs with what a task gives.

    Raises:
        InputError: they do not fit.
    """
    known = {blueprint.main_input, "context", "tests"}
    unknown = sorted(set(blueprint.inputs) - known - set(blueprint.defaults))
    if unknown:
        raise InputError(
            f"mesh {blueprint.name} reads {listing(unknown)}, which no task gives; tasks give the question, `context` "
            "(passages as JSON lines) and `tests` (visible tests)"
        )
    if task.spec.kind is Kind.RAG and "context" not in blueprint.inputs:
        raise InputError(
            f"task {task.name} brings passages, but mesh {blueprint.name} never reads them: give it the input "
            "`context`, and a retriever with `passages: context` (see configs/rag-chain.yaml)"
        )


def judges(blueprint: Blueprint) -> dict[str, list[str]]:
    """Judge → the nodes whose messages it chooses from."""
    return {
        node: sorted({edge.source for edge in blueprint.topology.edges if edge.target == node})
        for node, member in blueprint.members.items()
        if member.is_judge
    }


def token_budget(blueprint: Blueprint) -> int:
    """Tokens that all agents of a mesh may write in one run: what a single agent gets to be compared with it."""
    rounds = blueprint.topology.rounds
    agents = [member.spec for member in blueprint.members.values() if isinstance(member.spec, LlmAgentSpec)]
    return sum(spec.generate.max_tokens for spec in agents) * rounds
