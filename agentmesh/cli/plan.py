"""``agentmesh plan``: what each slot of a mesh can share, before any weights are loaded."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agentmesh.blueprint import draft
from agentmesh.cli.options import Config, Format, FormatOption, Libraries, Sets
from agentmesh.config.load import load_mesh
from agentmesh.forecast import forecast


def plan(
    config: Config,
    preset: Annotated[str | None, typer.Option(help="Communicator preset, instead of the file's.")] = None,
    set: Sets = None,
    library: Libraries = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Show the schedule, and for every slot who gives its KV or why it is computed. Loads no model.

    Lengths, warm-up and predicted errors are known in a run only: `agentmesh run` reports them for each call.
    """
    overrides = [*(set or ()), *([f"communicator.preset={preset}"] if preset else ())]
    found = forecast(draft(load_mesh(config, overrides=overrides, libraries=library or ())))
    if format is Format.JSON:
        typer.echo(found.model_dump_json(indent=2))
        return
    table = Table(title=f"plan of {config} under {found.preset}", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("agent", "round", "slot", "KV from", "because"):
        table.add_column(name, no_wrap=True)
    for visit in found.visits:
        if visit.note and not visit.slots:
            table.add_row(visit.node, str(visit.round), "", "", visit.note)
        for slot in visit.slots:
            block = (
                f"{slot.source} (block {slot.block})"
                if slot.shared
                else "sent as text"
                if visit.endpoint
                else "computed"
            )
            table.add_row(visit.node, str(visit.round), slot.slot, block, str(slot.reason))
    console = Console()
    console.print(table)
    for visit in found.visits:
        if visit.note and visit.slots:
            line = f"{visit.node}, round {visit.round}: {visit.note}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in found.given:
        console.print(f"given: {line}", markup=False, highlight=False, soft_wrap=True)
    for line in found.advice:
        console.print(f"advice: {line}", markup=False, highlight=False, soft_wrap=True)
