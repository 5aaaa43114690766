"""The way into evaluations: do one, score one again, read one; what comes out is a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from agentmesh.blueprint import draft
from agentmesh.config.load import LoadedMesh, dump, load_mesh
from agentmesh.config.mesh import LlmAgentSpec
from agentmesh.config.presets import PRESETS, CommunicatorSpec
from agentmesh.errors import InputError, UsageError, did_you_mean, listing
from agentmesh.evaluate.findings import Findings, read_findings
from agentmesh.evaluate.folder import Settings, check_resumed, create, digest, made_by, read_settings, write_results
from agentmesh.evaluate.journal import Journal, Row
from agentmesh.evaluate.results import PresetResult, Results
from agentmesh.evaluate.session import SINGLE, Evaluation, Plan, judges, scored, token_budget
from agentmesh.evaluate.summary import summary_markdown
from agentmesh.local import LocalBackend
from agentmesh.suites.samples import Sample, part, read_samples
from agentmesh.suites.scorers import SCORERS
from agentmesh.suites.scorers.base import Scorer
from agentmesh.suites.task import Kind, Task, load_task

if TYPE_CHECKING:
    import pandas as pd

SINGLES = {Kind.MATH: "math-single", Kind.CHOICE: "math-single", Kind.RAG: "rag-single", Kind.CODE: "code-single"}
"""The mesh of one agent that a mesh is compared with, by the task's kind."""


@dataclass(frozen=True)
class Request:
    """What to evaluate; see the command ``agentmesh eval``.

    Args:
        config: a mesh file, or the name of a shipped one.
        task: a task's name, or the path of its folder.
        data: a JSONL file instead of the task's own samples.
        presets: their names; ``single`` stands for one agent alone with the token budget of the whole mesh.
        warmup: samples to learn from, the first ones.
        limit: how many of the others, or a range such as ``10-20``; all if ``None``.
        seed: of the runs.
        epochs: how often each sample runs.
        allow_code: whether code that a model writes may be run.
        fail_on_error: whether a failed sample ends everything.
        resume: an evaluation's folder to go on with.
        runs_dir: where a new folder is made.
        overrides: ``path=value`` texts that change entries of the mesh file.
        libraries: folders searched for names before the shipped ones.
    """

    config: str
    task: str
    data: Path | None = None
    presets: Sequence[str] = ("dense", "linear")
    warmup: int = 8
    limit: str | None = None
    seed: int = 0
    epochs: int = 1
    allow_code: bool = False
    fail_on_error: bool = False
    resume: Path | None = None
    runs_dir: Path = Path("runs")
    overrides: Sequence[str] = ()
    libraries: Sequence[Path] = ()


@final
class Report:
    """A finished evaluation.

    Args:
        path: its folder.
        results: its figures.
        rows: what each sample gave.
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
        """One row for each sample and preset: scores, answer, tokens, time. Needs pandas."""
        try:
            import pandas as pd  # noqa: PLC0415  # nothing else needs it
        except ImportError as error:
            raise UsageError("to_dataframe() needs pandas; pip install pandas") from error
        return pd.DataFrame([_flat(row) for row in self.rows])

    def _preset(self, name: str) -> PresetResult:
        if name not in self.results.presets:
            raise InputError(f"no preset {name!r} was evaluated; there are {listing(self.results.presets)}")
        return self.results.presets[name]


def evaluate(
    request: Request,
    progress: Callable[[str, int, int], None] | None = None,
    started: Callable[[Path, int], Callable[[], None]] | None = None,
) -> Report:
    """Evaluate a mesh on a task. Everything that can be checked is checked before a model is loaded.

    Args:
        request: what to evaluate.
        progress: told how far fetching the model is.
        started: told the folder and the number of runs; gives what is called after each run.

    Raises:
        UsageError: mesh, task, samples or presets do not fit each other.
        RecordError: the folder cannot be written.
        ModelError: the weights cannot be fetched or read.
        RunError: a sample failed and ``fail_on_error`` is set.
    """
    task = load_task(request.task, request.libraries)
    meshes = _meshes(request, task)
    loaded = next(iter(meshes.values()))
    blueprint = draft(loaded)
    warm, samples = part(read_samples(task, request.data), request.warmup, request.limit)
    with ExitStack() as stack:
        scorers = open_scorers(task, stack, allow_code=request.allow_code)
        plan = Plan(
            task, warm, samples, request.presets, request.seed, request.epochs, fail_on_error=request.fail_on_error
        )
        settings = _settings(request, meshes, [*warm, *samples])
        if request.resume is None:
            path = create(request.runs_dir, task.name, settings, dump(loaded.spec), {"seed": request.seed})
        else:
            path = request.resume
            check_resumed(path, settings)
        journal = stack.enter_context(Journal(path / "samples.jsonl"))
        tick = started(path, plan.runs) if started is not None else lambda: None
        evaluation = Evaluation(meshes, plan, scorers, journal, path, tick)
        backend = LocalBackend.open(
            blueprint.model, CommunicatorSpec(preset="dense"), progress, deterministic=blueprint.run.deterministic
        )
        stack.callback(backend.close)
        evaluation.run(backend)
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
    task = load_task(settings.task)
    where = data if data is not None or settings.data is None else Path(settings.data)
    samples = {sample.id: sample for sample in read_samples(task, where)}
    with ExitStack() as stack:
        scorers = open_scorers(task, stack, allow_code=allow_code)
        journal = stack.enter_context(Journal(path / "samples.jsonl"))
        for row in [row for row in journal.rows.values() if not row.error]:
            if row.sample not in samples:
                raise InputError(f"sample {row.sample!r} is no longer in {where or task.folder}; give it with --data")
            journal.append(await scored(row, samples[row.sample], scorers))
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


def _meshes(request: Request, task: Task) -> dict[str, LoadedMesh]:
    """Preset → its mesh: the one that is evaluated, or one agent with as many tokens to write."""
    if not request.presets:
        raise InputError(f"--presets is empty; name some of {listing([*PRESETS, SINGLE])}")
    found: dict[str, LoadedMesh] = {}
    loaded = load_mesh(request.config, overrides=request.overrides, libraries=request.libraries)
    for name in request.presets:
        if name == SINGLE:
            budget = token_budget(draft(loaded))
            own = [each for each in request.overrides if each.startswith(("model", "run", "communicator"))]
            alone = [*own, f"agents.agent.generate.max_tokens={budget}"]
            single = load_mesh(SINGLES[task.spec.kind], overrides=alone, libraries=request.libraries)
            found[name] = _ending(single, task.spec.until)
        elif name in PRESETS:
            found[name] = _ending(loaded, task.spec.until)
        else:
            choices = [*PRESETS, SINGLE]
            raise InputError(
                f"--presets: no preset named {name!r}; there are {listing(choices)}.{did_you_mean(name, choices)}"
            )
    return found


def _ending(loaded: LoadedMesh, until: Sequence[str]) -> LoadedMesh:
    """A mesh whose agents' messages also end at a task's own texts."""
    agents = {
        key: spec.model_copy(
            update={"generate": spec.generate.model_copy(update={"stop": (*spec.generate.stop, *until)})}
        )
        if isinstance(spec, LlmAgentSpec)
        else spec
        for key, spec in loaded.spec.agents.items()
    }
    return replace(loaded, spec=loaded.spec.model_copy(update={"agents": agents}))


def _settings(request: Request, meshes: Mapping[str, LoadedMesh], used: Sequence[Sample]) -> Settings:
    blueprint = draft(meshes[request.presets[0]])
    return Settings(
        task=request.task,
        data=None if request.data is None else str(request.data),
        samples_sha256=digest(used),
        mesh=blueprint.name,
        mesh_sha256=hashlib.sha256("".join(dump(loaded.spec) for loaded in meshes.values()).encode()).hexdigest(),
        model=blueprint.model.name,
        presets=tuple(request.presets),
        warmup=request.warmup,
        limit=request.limit,
        seed=request.seed,
        epochs=request.epochs,
        judges={judge: tuple(nodes) for judge, nodes in judges(blueprint).items()},
    )


def _flat(row: Row) -> dict[str, Any]:
    """A row as one line of a table."""
    calls = row.calls
    return {
        "preset": row.preset,
        "sample": row.sample,
        "epoch": row.epoch,
        **row.scores,
        "answer": row.answer,
        "error": row.error,
        "prompt_tokens": sum(call.prompt_tokens for call in calls),
        "placed": sum(call.placed_exact + call.placed_realigned for call in calls),
        "computed": sum(call.computed for call in calls),
        "output_tokens": sum(call.output_tokens for call in calls),
        "ttft_ms": sum(call.ttft_ms for call in calls),
        "wall_s": row.ended - row.begun,
    }
