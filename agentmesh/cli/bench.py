"""``agentmesh bench``: measurements that the documentation quotes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agentmesh.cli.options import Format, FormatOption
from agentmesh.config.base import Frozen
from agentmesh.config.mesh import Dtype, ModelSpec
from agentmesh.display import fetching
from agentmesh.errors import InputError

app = typer.Typer(help="Measure the engine; ratios within one run, medians.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="A model's name, as in a mesh file.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of weights and KV.")]
Repeat = Annotated[int, typer.Option(min=1, help="Measured rounds; medians are reported.")]


@app.command("prefix")
def prefix(
    model: Model = "smollm2-135m",
    dtype: DtypeOption = Dtype.FLOAT32,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 2000,
    seen: Annotated[int, typer.Option(min=1, help="Tokens of its beginning that were seen before.")] = 1500,
    repeat: Repeat = 5,
    format: FormatOption = Format.TEXT,
) -> None:
    """Time to first token of a prompt whose beginning was seen before: prefix against dense."""
    if seen >= prompt:
        raise InputError(f"--seen {seen} must be less than --prompt {prompt}: the last token is always computed")
    from agentmesh import bench  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    with _bars(repeat + 1) as (progress, tick):
        figures = bench.prefix(
            _spec(model, dtype), prompt=prompt, seen=seen, repeats=repeat, progress=progress, tick=tick
        )
    _show(figures, format)


@app.command("decode")
def decode(
    model: Model = "smollm2-135m",
    dtype: DtypeOption = Dtype.FLOAT32,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 512,
    output: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    repeat: Repeat = 5,
    format: FormatOption = Format.TEXT,
) -> None:
    """Decoding speed of one sequence: arena against transformers' generate."""
    from agentmesh import bench  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    with _bars(repeat + 1) as (progress, tick):
        figures = bench.decode(
            _spec(model, dtype), prompt=prompt, output=output, repeats=repeat, progress=progress, tick=tick
        )
    _show(figures, format)


def _spec(model: str, dtype: Dtype) -> ModelSpec:
    try:
        return ModelSpec(name=model, dtype=dtype)
    except ValidationError as error:
        raise InputError("--model is empty; give a model's name, such as smollm2-135m") from error


@contextmanager
def _bars(rounds: int) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[], None]]]:
    """Progress of fetching the model, and of the measured rounds."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bars, fetching(console, quiet=True) as progress:
        task = bars.add_task("measuring", total=rounds)
        yield progress, lambda: bars.advance(task)


def _show(figures: Frozen, format: Format) -> None:
    if format is Format.JSON:
        typer.echo(figures.model_dump_json(indent=2))
        return
    table = Table(show_header=False)
    for name, value in figures.model_dump().items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console().print(table)
