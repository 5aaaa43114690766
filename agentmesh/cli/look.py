"""Commands that read files and print: validate, graph, schema, ls, cp. None of them loads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from agentmesh import library as shelf
from agentmesh.blueprint import draft, slot_warnings
from agentmesh.cli.options import Format, FormatOption, Libraries, Sets
from agentmesh.config.load import load_mesh, load_topology
from agentmesh.config.load import schema as file_schema
from agentmesh.config.yaml import read
from agentmesh.errors import ConfigError, NotFoundError, UsageError
from agentmesh.graphview import render
from agentmesh.parts import check_parts
from agentmesh.topology import Topology


def validate(
    configs: Annotated[list[str], typer.Argument(help="Mesh files, or names of shipped ones.")],
    set: Sets = None,
    library: Libraries = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Check mesh files: keys, values, graph, templates, and that what they name is there. Loads no model.

    All files are checked, whatever is found in one of them; exit code 2 where something is wrong.
    """
    rows: list[dict[str, Any]] = []
    errors = Console(stderr=True)
    for config in configs:
        try:
            blueprint = draft(load_mesh(config, overrides=set or (), libraries=library or ()))
            check_parts(blueprint)
        except UsageError as error:
            rows.append({"config": config, "ok": False, "error": str(error)})
            if format is Format.TEXT:
                errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
            continue
        warnings = slot_warnings(blueprint)
        rows.append({"config": config, "ok": True, "nodes": len(blueprint.members), "warnings": warnings})
        if format is Format.TEXT:
            topology = blueprint.topology
            typer.echo(f"{config}: ok ({len(topology.nodes)} nodes, {topology.rounds} round(s), {topology.name})")
            for warning in warnings:
                typer.echo(f"  advice: {warning}")
    if format is Format.JSON:
        typer.echo(json.dumps(rows, indent=2))
    if not all(row["ok"] for row in rows):
        raise typer.Exit(UsageError.exit_code)


def graph(
    file: Annotated[str, typer.Argument(help="A mesh or topology: file, or shipped name.")],
    format: Annotated[str, typer.Option("--format", help="ascii, dot, json or mermaid.")] = "ascii",
    unrolled: Annotated[bool, typer.Option("--unrolled", help="Show every round's visits (node@round).")] = False,
    set: Sets = None,
    library: Libraries = None,
) -> None:
    """Draw a communication graph as text."""
    typer.echo(render(_topology(file, tuple(set or ()), tuple(library or ())), format, unrolled=unrolled))


def _topology(file: str, set: tuple[str, ...], libraries: tuple[Path, ...]) -> Topology:
    """The graph of a mesh, or of a topology with its default parameters."""
    try:
        path = shelf.find("topologies", file, libraries=libraries)
    except NotFoundError:
        return draft(load_mesh(file, overrides=set, libraries=libraries)).topology
    if "agents" in read(path).root.value:
        return draft(load_mesh(path, overrides=set, libraries=libraries)).topology
    spec, name = load_topology(file, libraries=libraries)
    if set:
        raise ConfigError("--set changes meshes; this is a topology file: change `params` in a mesh that uses it")
    return Topology.from_spec(spec, {}, name)


def schema(
    kind: Annotated[str, typer.Argument(help="mesh or topology")] = "mesh",
) -> None:
    """Print the JSON Schema of mesh or topology files, for editors.

    Save it and point editors at it with a first line: # yaml-language-server: $schema=mesh.schema.json
    """
    if kind not in ("mesh", "topology"):
        raise NotFoundError(f"no schema {kind!r}; there are mesh, topology")
    typer.echo(json.dumps(file_schema(kind), indent=2, ensure_ascii=False))


def ls(
    kind: Annotated[str, typer.Argument(help="configs, topologies, tasks; nothing for all.")] = "",
    library: Libraries = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """List the shipped meshes and topologies, and those of your libraries."""
    kinds = [kind] if kind else ["configs", "topologies", "tasks"]
    rows = []
    for each in kinds:
        for name, path in shelf.names(each, tuple(library or ())).items():
            about = str(read(path).root.value.get("about", ""))
            rows.append({"kind": each, "name": name, "about": about, "path": str(path)})
    if format is Format.JSON:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        typer.echo(f"{row['kind']:<11} {row['name']:<22} {row['about']}")


def cp(
    name: Annotated[str, typer.Argument(help="A shipped mesh or topology, such as debate.")],
    destination: Annotated[Path, typer.Argument(help="A folder, or the new file.")] = Path(),
    library: Libraries = None,
) -> None:
    """Copy a shipped mesh or topology to change it. Never overwrites."""
    libraries = tuple(library or ())
    kinds = [kind for kind in ("configs", "topologies") if name in shelf.names(kind, libraries)]
    typer.echo(str(shelf.copy(kinds[0] if kinds else "configs", name, destination, libraries=libraries)))
