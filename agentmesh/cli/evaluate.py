"""``agentmesh eval``, ``score`` and ``report``: a suite's samples through a mesh, under several presets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from agentmesh.cli.options import (
    DEFAULT_RUNS,
    Config,
    Deterministic,
    ExecutorOption,
    Format,
    FormatOption,
    Libraries,
    RunsDir,
    Sets,
)
from agentmesh.cli.parsing import parts
from agentmesh.display import counting, fetching
from agentmesh.executors import Where
from agentmesh.record import find_run

if TYPE_CHECKING:
    from agentmesh.evaluate.report import Report

AllowCode = Annotated[
    bool,
    typer.Option("--allow-code-execution", help="Run code that the model writes, in the sandbox (see `doctor`)."),
]
Run = Annotated[str, typer.Argument(help="An evaluation's folder, its name or the end of it, or `last`.")]


def evaluate(
    config: Config,
    task: Annotated[str, typer.Option(help="A task's name (see `agentmesh ls tasks`), or its folder.")],
    data: Annotated[Path | None, typer.Option(help="A JSONL file instead of the task's own samples.")] = None,
    presets: Annotated[str, typer.Option(help="Separated by commas; `single`: one agent alone.")] = "dense,linear",
    warmup: Annotated[int, typer.Option(min=0, help="Samples to learn from, the first ones; not measured.")] = 8,
    limit: Annotated[str | None, typer.Option(help="How many of the others, or a range such as 10-20.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the runs.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="How often each sample runs, under seeds from --seed on.")] = 1,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Runs at once, instead of the file's.")] = None,
    allow_code_execution: AllowCode = False,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="End when a sample fails, instead of going on without it.")
    ] = False,
    judge_check: Annotated[
        bool,
        typer.Option(
            help="Ask each judge once more when a sample is done, with its inbox in another order: does its choice "
            "depend on the order? Costs one call of each judge a sample, and the others wait for it: measure times "
            "with --no-judge-check."
        ),
    ] = True,
    deterministic: Deterministic = False,
    executor: ExecutorOption = Where.LOCAL,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model for --executor ray.")] = 1,
    resume: Annotated[str | None, typer.Option(help="Go on with an evaluation that was cut off.")] = None,
    set: Sets = None,
    library: Libraries = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    format: FormatOption = Format.TEXT,
) -> None:
    """Run a suite's samples through a mesh under several presets, and compare them in pairs.

    Example: agentmesh eval math-fully-connected --task math-mini --presets dense,linear --limit 20
    """
    from agentmesh.evaluate.report import evaluate as work  # noqa: PLC0415  # keeps `agentmesh --help` free of torch
    from agentmesh.evaluate.subjects import Request  # noqa: PLC0415

    overrides = [*(set or ()), *([f"run.concurrency={concurrency}"] if concurrency else ())]
    overrides += ["run.deterministic=true"] if deterministic else []
    request = Request(
        mesh=config,
        task=task,
        data=data,
        presets=parts(presets),
        warmup=warmup,
        limit=limit,
        seed=seed,
        epochs=epochs,
        allow_code=allow_code_execution,
        fail_on_error=fail_on_error,
        judge_check=judge_check,
        resume=None if resume is None else find_run(runs_dir, resume),
        executor=executor,
        replicas=replicas,
        runs_dir=runs_dir,
        overrides=overrides,
        libraries=library or (),
    )
    console = Console(stderr=True)
    with ExitStack() as shown, fetching(console, quiet=True) as progress:
        folders: list[Path] = []

        def started(path: Path, runs: int) -> Callable[[], None]:
            folders.append(path)
            console.print(f"{path}; if it is cut off: --resume {path.name}", soft_wrap=True, highlight=False)
            return shown.enter_context(counting(console, "samples", runs))

        try:
            report = work(request, progress, started)
        except KeyboardInterrupt:
            for path in folders:
                console.print(f"cut off; to go on, the same command with --resume {path.name}", highlight=False)
            raise
    _show(report, format)


def score(
    run: Run = "last",
    data: Annotated[Path | None, typer.Option(help="Where the samples are now, if they were moved.")] = None,
    allow_code_execution: AllowCode = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    format: FormatOption = Format.TEXT,
) -> None:
    """Score an evaluation's answers again, without generating anything.

    Example: agentmesh score last
    """
    from agentmesh.evaluate.report import rescore  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    path = find_run(runs_dir, run)
    _show(asyncio.run(rescore(path, allow_code=allow_code_execution, data=data)), format)


def report(
    run: Run = "last",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page's file, instead of report.html in the folder.")
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Write an evaluation as one HTML page that opens anywhere, and as Markdown.

    The page shows scores with their intervals, presets compared in pairs, what was reused and why, where the time went,
    and every sample with its prompts coloured by what was placed and what was computed.

    Example: agentmesh report last --output compared.html
    """
    from agentmesh.evaluate.page import write_report  # noqa: PLC0415  # keeps `agentmesh --help` fast

    for path in write_report(find_run(runs_dir, run), output):
        typer.echo(path)


def _show(report: Report, format: Format) -> None:
    from agentmesh.evaluate.tables import results_table  # noqa: PLC0415  # as above

    if format is Format.JSON:
        typer.echo(report.results.model_dump_json(indent=2))
    else:
        Console().print(results_table(report.results))
        typer.echo(f"folder: {report.path}")
        typer.echo(f"a page with every sample: agentmesh report {report.path}")
