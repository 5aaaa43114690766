"""``agentmesh runs``: look at the records of runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from agentmesh.cli.options import DEFAULT_RUNS, Format, FormatOption, RunsDir
from agentmesh.display import calls_table
from agentmesh.events import ModelFinished, NodeFinished, RunFailed, RunFinished
from agentmesh.record import find_run, outcome, read_events
from agentmesh.record import runs as run_folders

app = typer.Typer(help="List and show recorded runs.", no_args_is_help=True)


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


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A run's folder, its name or the end of it, or `last`.")] = "last",
    runs_dir: RunsDir = DEFAULT_RUNS,
    format: FormatOption = Format.TEXT,
) -> None:
    """Show one run: its messages, model calls and answer."""
    path = find_run(runs_dir, name)
    events = list(read_events(path))
    if format is Format.JSON:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        found = {"run": path.name, "outcome": outcome(path), "manifest": manifest}
        typer.echo(json.dumps({**found, "events": [event.model_dump(mode="json") for event in events]}, indent=2))
        return
    typer.echo(f"{path.name}: {outcome(path)}")
    for event in events:
        if isinstance(event, NodeFinished):
            said = event.message
            typer.echo(f"\n{said.node} ({said.role}), round {said.round}, {said.tokens} tokens:\n{said.text}")
    Console().print(calls_table([event.call for event in events if isinstance(event, ModelFinished)]))
    for event in events:
        if isinstance(event, RunFinished):
            typer.echo(f"answer: {event.answer}")
        elif isinstance(event, RunFailed):
            typer.echo(f"failed: {event.error}")
