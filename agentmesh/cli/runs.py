"""``agentmesh runs``: look at the records of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from agentmesh.cli.options import DEFAULT_RUNS, Format, FormatOption, RunsDir
from agentmesh.config.base import Choice
from agentmesh.display import calls_table
from agentmesh.events import Event, ModelFinished, NodeFinished, RunCancelled, RunFailed, RunFinished
from agentmesh.record import find_run, has_events, outcome, read_events
from agentmesh.record import runs as run_folders

if TYPE_CHECKING:
    from agentmesh.evaluate.results import Results


class Export(Choice):
    """What an evaluation is written as."""

    CSV = "csv"
    JSONL = "jsonl"
    EVALPLUS = "evalplus"


app = typer.Typer(help="List, show, compare and export recorded runs.", no_args_is_help=True)


@app.command("ls")
def ls(runs_dir: RunsDir = DEFAULT_RUNS, format: FormatOption = Format.TEXT) -> None:
    """List runs, oldest first, and how each ended."""
    rows = [{"run": path.name, "outcome": outcome(path)} for path in run_folders(runs_dir)]
    if format is Format.JSON:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['run']:<48} {row['outcome']}")
    if not rows:
        typer.echo(f"no runs in {runs_dir}; `agentmesh run demo -i question=…` makes one")


@app.command("compare")
def compare(
    first: Annotated[str, typer.Argument(help="An evaluation's folder, its name or the end of it, or `last`.")],
    second: Annotated[str, typer.Argument(help="The evaluation that it is compared with.")],
    runs_dir: RunsDir = DEFAULT_RUNS,
    format: FormatOption = Format.TEXT,
) -> None:
    """Compare two evaluations preset by preset, on the samples that both answered.

    Example: agentmesh runs compare last 3f9c1a2b
    """
    from agentmesh.evaluate.comparison import compare as work  # noqa: PLC0415  # keeps `agentmesh --help` light
    from agentmesh.evaluate.tables import comparison_table  # noqa: PLC0415

    found = work(find_run(runs_dir, first), find_run(runs_dir, second))
    if format is Format.JSON:
        typer.echo(found.model_dump_json(indent=2))
    else:
        Console().print(comparison_table(found))


@app.command("export")
def export(
    run: Annotated[str, typer.Argument(help="An evaluation's folder, its name or the end of it, or `last`.")] = "last",
    format: Annotated[Export, typer.Option("--format", help="Tables, or evalplus' samples.")] = Export.CSV,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write to; `export` in the evaluation's if not given."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Where the samples are now, if they were moved (evalplus).")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Write an evaluation as tables that pandas and other programs read, or as programs that evalplus tests.

    Example: agentmesh runs export last --format csv -o tables

    csv, jsonl: samples.FORMAT has one row for each sample, preset and epoch:
    preset, sample, epoch, seed, one column for each metric (0 to 1), answer,
    extracted (what the first scorer took for the answer), note (why it is
    wrong), error, calls, prompt_tokens, placed, computed, output_tokens and
    ttft_ms (sums over its calls), wall_s, chosen and chosen_shuffled (the
    candidates of each judge, as JSON).

    calls.FORMAT has one row for each model call: preset, sample, epoch, node,
    round, prompt_tokens = placed_exact + placed_realigned + computed,
    slot_tokens (shareable), placed_slots, output_tokens, queue_ms, ttft_ms,
    decode_ms, learn_ms, finish (stop, length or context), parts_ms (where TTFT
    went, as JSON), audit_kl (nats), audit_flip, endpoint_cached (tokens that a
    remote model had cached).

    evalplus: evalplus-PRESET.jsonl has task_id and solution, a whole program,
    for each answer. Then: evalplus.evaluate --dataset humaneval --samples FILE
    (it wants every problem of its data set).
    """
    from agentmesh.evaluate.export import write_programs, write_tables  # noqa: PLC0415  # keeps `agentmesh --help` light

    path = find_run(runs_dir, run)
    target = path / "export" if output is None else output
    if format is Export.EVALPLUS:
        files = write_programs(path, target, data)
    else:
        files = write_tables(path, target, "csv" if format is Export.CSV else "jsonl")
    for file in files:
        typer.echo(str(file))


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A run's folder, its name or the end of it, or `last`.")] = "last",
    runs_dir: RunsDir = DEFAULT_RUNS,
    format: FormatOption = Format.TEXT,
) -> None:
    """Show one run: its messages, model calls and answer; of an evaluation, its figures so far."""
    path = find_run(runs_dir, name)
    known = {"run": path.name, "outcome": outcome(path)}
    evaluation = not has_events(path)
    if format is Format.JSON:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if evaluation:
            more: dict[str, Any] = {"results": _results(path).model_dump(mode="json")}
        else:
            more = {"events": [event.model_dump(mode="json") for event in read_events(path)]}
        typer.echo(json.dumps({**known, "manifest": manifest, **more}, indent=2))
        return
    typer.echo(f"{path.name}: {known['outcome']}")
    if evaluation:
        from agentmesh.evaluate.tables import results_table  # noqa: PLC0415  # keeps `agentmesh --help` light

        Console().print(results_table(_results(path)))
        typer.echo(f"a page with every sample: agentmesh report {path}")
    else:
        _show_run(list(read_events(path)))


def _results(path: Path) -> Results:
    from agentmesh.evaluate.report import read_report  # noqa: PLC0415  # keeps `agentmesh --help` light

    return read_report(path).results


def _show_run(events: Sequence[Event]) -> None:
    """Messages, calls, and how it ended."""
    for event in events:
        if isinstance(event, NodeFinished):
            said = event.message
            typer.echo(f"\n{said.node} ({said.role}), round {said.round}, {said.tokens} tokens:\n{said.text}")
    calls = [event.call for event in events if isinstance(event, ModelFinished)]
    if calls:
        Console().print(calls_table(calls))
    for event in events:
        if isinstance(event, RunFinished):
            typer.echo(f"answer: {event.answer}")
        elif isinstance(event, RunFailed):
            typer.echo(f"failed: {event.error}")
        elif isinstance(event, RunCancelled):
            typer.echo(f"cancelled after {event.wall_s:.1f} s; {len(calls)} model call(s) had ended by then")
