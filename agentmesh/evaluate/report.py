"""The way into evaluations: do one, score one again, read one; what comes out is a report."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, final

from agentmesh.errors import InputError, UsageError, listing
from agentmesh.evaluate.export import sample_table
from agentmesh.evaluate.findings import Findings, read_findings
from agentmesh.evaluate.folder import (
    Settings,
    check_resumed,
    create,
    digest,
    made_by,
    read_settings,
    samples_for,
    write_results,
)
from agentmesh.evaluate.journal import Journal, Row
from agentmesh.evaluate.results import PresetResult, Results
from agentmesh.evaluate.session import Evaluation, Plan, judges, scored
from agentmesh.evaluate.subjects import Request, Subject, find_subjects, open_executor
from agentmesh.evaluate.summary import summary_markdown
from agentmesh.models import Progress
from agentmesh.suites.samples import Sample, part, read_samples
from agentmesh.suites.scorers import SCORERS
from agentmesh.suites.scorers.base import Scorer
from agentmesh.suites.task import Task, load_task
from agentmesh.turns import refuse_inside_loop

if TYPE_CHECKING:
    import pandas as pd

Started = Callable[[Path, int], Callable[[], None]]
"""Told the folder and the number of runs; gives what is called after each run."""


@final
class Report:
    """A finished evaluation.

    Args:
        path: its folder.
        results: its figures.
        rows: what each sample gave, in the order in which they ended.
    """

    def __init__(self, path: Path, results: Results, rows: Sequence[Row]) -> None:
        self.path = path
        self.results = results
        self.rows = rows

    def score(self, preset: str, metric: str | None = None) -> float:
        """A metric's value; the primary one's where none is named.

        Raises:
            InputError: no such preset or metric.
        """
        one = self._preset(preset)
        if metric is None:
            metric = next(iter(one.metrics), "")
        if metric not in one.metrics:
            raise InputError(f"no metric {metric!r}; there are {listing(one.metrics)}")
        return one.metrics[metric].value

    def assert_score_at_least(self, least: float, *, preset: str = "linear", metric: str | None = None) -> None:
        """Fail a test where a preset scores less.

        Raises:
            AssertionError: it does.
        """
        found = self.score(preset, metric)
        if found < least:
            raise AssertionError(f"{preset} scores {found:.3f} in {self.results.task}, expected at least {least}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each sample, preset and epoch; columns as in `agentmesh runs export --help`. Needs pandas."""
        try:
            import pandas as pd  # noqa: PLC0415  # nothing else needs it
        except ImportError as error:
            raise UsageError("to_dataframe() needs pandas; pip install pandas") from error
        return pd.DataFrame(sample_table(self.rows))

    def _preset(self, name: str) -> PresetResult:
        if name not in self.results.presets:
            raise InputError(f"no preset {name!r} was evaluated; there are {listing(self.results.presets)}")
        return self.results.presets[name]


def evaluate(request: Request, progress: Progress | None = None, started: Started | None = None) -> Report:
    """Evaluate a mesh on a task, and wait for the report; see ``aevaluate``.

    Raises:
        UsageError: also where an event loop is running already.
    """
    refuse_inside_loop("`await agentmesh.evaluate.aevaluate(…)` instead of `evaluate(…)`")
    return asyncio.run(aevaluate(request, progress, started))


async def aevaluate(request: Request, progress: Progress | None = None, started: Started | None = None) -> Report:
    """Evaluate a mesh on a task. Everything that can be checked is checked before a model is loaded.

    Args:
        request: what to evaluate.
        progress: told how far fetching the model is.
        started: told the folder and the number of runs; gives what is called after each run.

    Raises:
        UsageError: mesh, task, samples or presets do not fit each other.
        RecordError: the folder cannot be written.
        ModelError: the weights cannot be fetched or read.
        ReplicaError: replicas cannot be made, or keep dying.
        RunError: a sample failed and ``fail_on_error`` is set.
    """
    task = load_task(request.task, request.libraries)
    subjects = find_subjects(request, task)
    subject = subjects[request.presets[0]]
    warm, samples = part(read_samples(task, request.data), request.warmup, request.limit)
    with ExitStack() as stack:
        scorers = open_scorers(task, stack, allow_code=request.allow_code)
        plan = Plan(
            task,
            warm,
            samples,
            request.presets,
            request.seed,
            request.epochs,
            fail_on_error=request.fail_on_error,
            judge_check=request.judge_check,
        )
        settings = _settings(request, subjects, [*warm, *samples])
        if request.resume is not None:
            check_resumed(request.resume, settings)
        executor = open_executor(request, progress)
        try:
            facts = {"seed": request.seed, "executor": request.executor, "replicas": request.replicas}
            exact = subject.blueprint.run.deterministic
            path = request.resume or create(
                request.runs_dir, task.name, settings, subject.text, facts, deterministic=exact
            )
            journal = stack.enter_context(Journal(path / "samples.jsonl"))
            tick = started(path, plan.runs) if started is not None else lambda: None
            blueprints = {preset: found.blueprint for preset, found in subjects.items()}
            await Evaluation(blueprints, plan, scorers, journal, path, tick).run(executor)
        finally:
            await executor.close()
        return finish(path, settings, list(journal.rows.values()))


async def rescore(path: Path, *, allow_code: bool = False, data: Path | None = None) -> Report:
    """Score an evaluation again without generating anything.

    Args:
        path: its folder.
        allow_code: whether code that a model wrote may be run.
        data: where its samples are now, if they were moved.

    Raises:
        UsageError: its task or samples are not there any more, or have changed.
        RecordError: it is no folder of an evaluation.
    """
    settings = read_settings(path)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(path / "samples.jsonl"))
        rows = [row for row in journal.rows.values() if not row.error]
        task, samples = samples_for(settings, rows, data)
        scorers = open_scorers(task, stack, allow_code=allow_code)
        for row in rows:
            journal.append(await scored(row, samples[row.sample], scorers, settings.judges))
        return finish(path, settings, list(journal.rows.values()))


def read_report(path: Path) -> Report:
    """An evaluation from its folder.

    Raises:
        RecordError: it is no folder of an evaluation.
    """
    found = read_findings(path)
    return Report(path, found.results, found.rows)


def finish(path: Path, settings: Settings, rows: Sequence[Row]) -> Report:
    """Work out the figures, and write them into the folder."""
    found = Findings.of(settings, rows)
    write_results(path, found.results, summary_markdown(found, made_by(path)[0]))
    return Report(path, found.results, rows)


def open_scorers(task: Task, stack: ExitStack, *, allow_code: bool) -> dict[str, Scorer]:
    """A task's scorers, closed with the stack.

    Raises:
        UsageError: one of them runs code that a model wrote, which was not allowed.
    """
    found = {name: SCORERS[name]() for name in task.spec.scorers}
    unsafe = [name for name, scorer in found.items() if scorer.runs_code]
    if unsafe and not allow_code:
        raise UsageError(
            f"task {task.name} runs code that a model wrote (scorer {listing(unsafe)}), in the sandbox of this machine "
            "(`agentmesh doctor` says how well it contains code). Allow it with --allow-code-execution"
        )
    for scorer in found.values():
        stack.callback(scorer.close)
    return found


def _settings(request: Request, subjects: Mapping[str, Subject], used: Sequence[Sample]) -> Settings:
    blueprint = subjects[request.presets[0]].blueprint
    found = judges(blueprint)
    return Settings(
        task=request.task,
        data=None if request.data is None else str(request.data),
        samples_sha256=digest(used),
        mesh=blueprint.name,
        mesh_sha256=hashlib.sha256("".join(found.text for found in subjects.values()).encode()).hexdigest(),
        model=blueprint.model.name,
        presets=tuple(request.presets),
        warmup=request.warmup,
        limit=request.limit,
        seed=request.seed,
        epochs=request.epochs,
        judges={judge: tuple(nodes) for judge, nodes in found.items()},
        judge_check=request.judge_check and bool(found),
    )
