"""``agentmesh bench``: measurements that the documentation quotes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from agentmesh.cli.options import (
    DEFAULT_TRACE,
    Config,
    Format,
    FormatOption,
    Libraries,
    ProfileOption,
    Sets,
    TraceOption,
)
from agentmesh.cli.parsing import DEFAULT_BUDGET, budgeted, counts, model_spec, preset_names, shares
from agentmesh.cli.profiling import profiling, show_profiles
from agentmesh.config.base import Frozen
from agentmesh.config.load import LoadedMesh, load_mesh
from agentmesh.config.mesh import Decode, Dtype
from agentmesh.display import counting, fetching
from agentmesh.errors import InputError
from agentmesh.tables import fidelity_table, scaling_table, throughput_table, ttft_table

if TYPE_CHECKING:
    from agentmesh.engine.profile import Profiles

app = typer.Typer(help="Measure the engine; ratios within one run, medians.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="A model's name, as in a mesh file.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of weights and KV.")]
Presets = Annotated[str, typer.Option(help="Presets to compare, separated by commas.")]
Corpus = Annotated[
    bool, typer.Option("--corpus", help="Keep each passage behind a neutral header before anybody reads it.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        help=f"Bytes each preset may keep, or less where memory is short [what the mesh says, else {DEFAULT_BUDGET}]."
    ),
]
Plot = Annotated[Path | None, typer.Option(help="Write a PNG plot to this file.")]
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
    from agentmesh.bench import speed  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    with _bars(repeat + 1) as (progress, tick):
        figures = speed.prefix(
            model_spec(model, dtype), prompt=prompt, seen=seen, repeats=repeat, progress=progress, tick=tick
        )
    _show(figures, format, _rows(figures))


@app.command("decode")
def decode(
    model: Model = "smollm2-135m",
    dtype: DtypeOption = Dtype.FLOAT32,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 512,
    output: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    decode: Annotated[Decode, typer.Option(help="Weights that decode: the model's own, or copies.")] = Decode.AUTO,
    repeat: Repeat = 5,
    profile: ProfileOption = False,
    trace: TraceOption = DEFAULT_TRACE,
    format: FormatOption = Format.TEXT,
) -> None:
    """Decoding speed of one sequence: arena against transformers' generate, with the model's own weights.

    Example: agentmesh bench decode --prompt 512 --output 64 --profile --trace decode.json
    """
    with profiling(trace if profile else None) as profiles, _bars(repeat + 1) as (progress, tick):
        from agentmesh.bench import speed  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

        figures = speed.decode(
            model_spec(model, dtype, decode),
            prompt=prompt,
            output=output,
            repeats=repeat,
            profiles=profiles,
            progress=progress,
            tick=tick,
        )
    _show(figures, format, _rows(figures), profiles)


@app.command("fidelity")
def fidelity(
    config: Config,
    data: Annotated[Path, typer.Option(help="JSONL file: a question on each line, other inputs by name, its context.")],
    warmup: Annotated[int, typer.Option(min=1, help="Questions that are only observed.")] = 20,
    limit: Annotated[int, typer.Option(min=1, help="Questions that are measured.")] = 40,
    presets: Presets = "prefix,rotate,epic,kvcomm,linear,blend",
    passages: Annotated[
        str | None, typer.Option(help="COUNTxTOKENS: passages cut from the context take the retriever's place.")
    ] = None,
    corpus: Corpus = False,
    budget: Budget = None,
    set: Sets = None,
    library: Libraries = None,
    plot: Plot = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Distance of the presets' answers from dense: KL of next-token distributions over the dense continuation.

    Example: agentmesh bench fidelity math-fully-connected --data gsm8k.jsonl --warmup 20 --limit 40
    """
    loaded = budgeted(config, set or (), library or (), budget)
    from agentmesh.bench import data as questions_of  # noqa: PLC0415  # keeps `agentmesh --help` free of torch
    from agentmesh.bench import session  # noqa: PLC0415

    names = preset_names(presets)
    found = questions_of.read_questions(data, warmup + limit)
    cut = None if passages is None else questions_of.Passages.parse(passages)
    with _bars(warmup + limit) as (progress, tick):
        figures = session.fidelity(
            loaded, found, names, (warmup, limit), cut, corpus=corpus, progress=progress, tick=tick
        )
    if plot is not None:
        from agentmesh.plots import plot_fidelity  # noqa: PLC0415  # matplotlib is slow to import

        plot_fidelity(figures, plot)
    _show(figures, format, fidelity_table(figures))


@app.command("ttft")
def ttft(
    model: Model = "smollm2-135m",
    dtype: DtypeOption = Dtype.FLOAT32,
    agents: Annotated[int, typer.Option(min=1, help="Fully connected agents.")] = 5,
    question: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 1024,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens of each agent's own fixed text.")] = 512,
    output: Annotated[int, typer.Option(min=1, help="Tokens of each message.")] = 512,
    presets: Presets = "dense,prefix,prefix@role-last,kvcomm,linear",
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that are not counted; slots warm up in them.")] = 5,
    repeat: Repeat = 5,
    layout: Annotated[
        str, typer.Option(help="role-first or role-last; a preset may say its own, as prefix@role-last.")
    ] = "role-first",
    passages: Annotated[
        str | None, typer.Option(help="COUNTxTOKENS: documents that stand before the question.")
    ] = None,
    corpus: Corpus = False,
    cost_gate: Annotated[
        bool, typer.Option(help="Compute what takes longer to place, as runs do; off, everything shareable is placed.")
    ] = True,
    budget: Budget = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="A mesh whose communicator is timed: its limits, and its choices for its own preset."),
    ] = None,
    set: Sets = None,
    library: Libraries = None,
    plot: Plot = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Time to first token of fully connected agents, by agent and preset, with its parts.

    Examples:
      agentmesh bench ttft --agents 5 --question 1024 --prefix 512 --output 512
      agentmesh bench ttft --mesh math-chain --presets dense,linear --set communicator.recompute.ratio=0.1
    """
    if mesh is None and (set or library):
        raise InputError(
            "--set and --library change a mesh; say which one's communicator is timed, as in --mesh debate"
        )
    loaded = budgeted(mesh, set or (), library or (), budget) if mesh else None
    from agentmesh.bench import session  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    names = preset_names(presets, session.LAYOUTS)
    base = session.timed(loaded, budget or DEFAULT_BUDGET, names, cost_gate=cost_gate)
    sizes = session.setting(agents, question, prefix, output, layout, passages, corpus=corpus)
    with _bars((warmup + repeat) * len(names)) as (progress, tick):
        figures = session.ttft(
            model_spec(model, dtype),
            names,
            sizes,
            warmup,
            repeat,
            base=base,
            progress=progress,
            tick=tick,
        )
    if plot is not None:
        from agentmesh.plots import plot_ttft  # noqa: PLC0415  # matplotlib is slow to import

        plot_ttft(figures, plot)
    _show(figures, format, ttft_table(figures))


@app.command("scaling")
def scaling(
    model: Model = "smollm2-135m",
    dtype: DtypeOption = Dtype.FLOAT32,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, separated by commas.")
    ] = "512,1024,2048,4096,7680",
    placed: Annotated[
        str, typer.Option(help="Shares of each prompt that are placed as one block; none is always measured.")
    ] = "0,0.5,0.9",
    repeat: Repeat = 3,
    budget: Annotated[str, typer.Option(help="Bytes that may be kept.")] = DEFAULT_BUDGET,
    plot: Plot = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Time to first token against the prompt's length: what a computed token and a placed byte cost.

    Example: agentmesh bench scaling --lengths 512,1024,2048,4096,7680 --placed 0,0.5,0.9 --plot scaling.png
    """
    tokens, portions = counts("--lengths", lengths, "512,1024"), shares(placed)
    from agentmesh.bench import session  # noqa: PLC0415  # keeps `agentmesh --help` free of torch
    from agentmesh.bench.scaling import Grid  # noqa: PLC0415

    grid = Grid(tuple(tokens), tuple(portions), repeat)
    with _bars(grid.ticks) as (progress, tick):
        figures = session.scaling(model_spec(model, dtype), grid, budget=budget, progress=progress, tick=tick)
    if plot is not None:
        from agentmesh.plots import plot_scaling  # noqa: PLC0415  # matplotlib is slow to import

        plot_scaling(figures, plot)
    _show(figures, format, scaling_table(figures))


@app.command("throughput")
def throughput(
    config: Config,
    data: Annotated[Path, typer.Option(help="JSONL file: a question on each line, and other inputs by name.")],
    warmup: Annotated[int, typer.Option(min=0, help="Questions before the clock starts; slots warm up in them.")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="Questions that are timed.")] = 16,
    concurrency: Annotated[str, typer.Option(help="Runs at once, separated by commas.")] = "1,4,16",
    presets: Presets = "dense,linear",
    baseline: Annotated[int, typer.Option(min=0, help="Timed questions that the baseline answers; 0: none.")] = 4,
    profile: ProfileOption = False,
    trace: TraceOption = DEFAULT_TRACE,
    set: Sets = None,
    library: Libraries = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Whole runs under load: tokens a second and samples a minute, against transformers' generate, one at a time.

    Example: agentmesh bench throughput math-fully-connected --data gsm8k.jsonl --warmup 8 --limit 16
    """
    widths, names = counts("--concurrency", concurrency, "1,4,16"), preset_names(presets)

    def mesh_of(width: int) -> LoadedMesh:
        return load_mesh(config, overrides=[*(set or ()), f"run.concurrency={width}"], libraries=library or ())

    mesh_of(widths[0])
    with profiling(trace if profile else None) as profiles:
        from agentmesh.bench import data as questions_of  # noqa: PLC0415  # keeps `agentmesh --help` free of torch
        from agentmesh.bench import throughput as load  # noqa: PLC0415

        found = questions_of.read_questions(data, warmup + limit)
        plan = load.Plan(names, widths, warmup, limit, min(baseline, limit))
        with _bars(plan.ticks) as (progress, tick):
            figures = load.measure(mesh_of, found, plan, profiles=profiles, progress=progress, tick=tick)
    _show(figures, format, throughput_table(figures), profiles)


@contextmanager
def _bars(rounds: int) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[], None]]]:
    """Progress of fetching the model, and of the measured rounds."""
    console = Console(stderr=True)
    with counting(console, "measuring", rounds) as tick, fetching(console, quiet=True) as progress:
        yield progress, tick


def _show(figures: Frozen, format: Format, table: RenderableType, profiles: Profiles | None = None) -> None:
    if format is Format.JSON:
        typer.echo(figures.model_dump_json(indent=2))
        return
    Console().print(table)
    if profiles is not None:
        show_profiles(profiles, Console())


def _rows(figures: Frozen) -> Table:
    """Figures without a table of their own, one a row."""
    table = Table(show_header=False)
    for name, value in figures.model_dump(exclude={"profile"}).items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    return table
