"""``agentmesh models``: fetch and list models."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from agentmesh.cli.options import Format, FormatOption
from agentmesh.display import fetching
from agentmesh.errors import NotFoundError, did_you_mean, listing

app = typer.Typer(help="Fetch and list models.", no_args_is_help=True)


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="The model to fetch.")] = "smollm2-135m",
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of what is there.")] = False,
) -> None:
    """Fetch a model into the cache folder and convert it; repairs a broken one. Safe to interrupt and repeat."""
    from agentmesh.engine import embedded  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    if name not in embedded.EMBEDDED:
        hint = did_you_mean(name, embedded.EMBEDDED)
        raise NotFoundError(f"no model {name!r} to fetch; there are {listing(embedded.EMBEDDED)}.{hint}")
    with fetching(Console(stderr=True), quiet=False) as progress:
        typer.echo(str(embedded.ensure(name, progress, verify=verify)))


@app.command("ls")
def ls(
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte instead of sizes.")] = False,
    format: FormatOption = Format.TEXT,
) -> None:
    """List what `model:` in a mesh may name, and the state of the cache."""
    from agentmesh.engine import catalog, embedded  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    rows = [
        {"name": name, "state": str(embedded.state(name, verify=verify)), "path": str(embedded.folder(name))}
        for name in embedded.EMBEDDED
    ]
    rows += [{"name": f"random:{family}", "state": "made on the spot", "path": ""} for family in catalog.FAMILIES]
    if format is Format.JSON:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['name']:<22} {row['state']:<16} {row['path']}".rstrip())
    typer.echo("also: a Hub repository (org/name), a local folder with config.json, a .gguf file")
