"""``agentmesh calibrate``: let a mesh learn from example questions, so that its first real request already shares."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from agentmesh.blueprint import Blueprint, draft
from agentmesh.cli.options import Config, Libraries, Sets
from agentmesh.config.load import load_mesh
from agentmesh.config.presets import CommunicatorSpec, RealignerKind, Share, choices, specs
from agentmesh.display import counting, fetching
from agentmesh.errors import ConfigError, InputError, listing
from agentmesh.mesh import Mesh


def calibrate(
    config: Config,
    data: Annotated[Path, typer.Option(help="JSONL file: a question on each line, and other inputs by name.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write; name it under communicator.realigners.")
    ] = Path("realigners.safetensors"),
    limit: Annotated[int, typer.Option(min=1, help="How many questions to run; 10 to 20 are enough.")] = 20,
    set: Sets = None,
    library: Libraries = None,
) -> None:
    """Run a mesh on example questions, computing everything, and save what its realigners learn.

    As soon as a text that agents share is known well enough, each call is also composed as it would be shared, and the
    KL to what was computed is saved: the gates know then what sharing costs. A mesh that shares no slots (dense,
    prefix) is calibrated for the preset linear.

    Example: agentmesh calibrate math-fully-connected --data gsm8k.jsonl --limit 20 -o math.safetensors

    Then in the mesh file: communicator: {preset: linear, realigners: math.safetensors}
    """
    from agentmesh.bench.data import read_questions  # noqa: PLC0415  # keeps `agentmesh --help` free of torch
    from agentmesh.local import LocalBackend  # noqa: PLC0415

    if not output.resolve().parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.resolve().parent} does not exist; make it first")
    questions = read_questions(data, limit)
    console = Console(stderr=True)
    blueprint = _learning(draft(load_mesh(config, overrides=set or (), libraries=library or ())))
    with Mesh.from_blueprint(blueprint) as mesh:
        mesh.blueprint.local_model()
        with fetching(console, quiet=False) as progress:
            backend = mesh.load(progress)
        assert isinstance(backend, LocalBackend), "a model of this machine"
        with Progress(console=console, transient=True) as bars:
            task = bars.add_task("documents", total=None)
            mesh.ingest(lambda done, total: bars.update(task, completed=done, total=total))
        backend.observe_only(on=True, checked=True)
        with counting(console, "observing", limit) as tick:
            samples = [question.inputs(mesh.blueprint) for question in questions[:limit]]
            for wave in (samples[: len(samples) // 2], samples[len(samples) // 2 :]):  # runs see what ended before them
                asyncio.run(mesh.arun_all(wave, tick))
        for line in backend.save_realigners(output, mesh.blueprint.digests):
            typer.echo(line)
    use = f"preset: {blueprint.communicator.preset}, realigners: {output}"
    typer.echo(f"saved: {output}; use it with communicator: {{{use}}}")


def _learning(blueprint: Blueprint) -> Blueprint:
    """A mesh whose preset learns something that can be saved: its own, or `linear` where it shares no slots.

    It begins with nothing learned, whatever file the mesh names: that may be the one which is to be written.

    Raises:
        ConfigError: its preset shares slots and learns nothing that can be saved.
    """
    chosen = choices(blueprint.communicator)
    if chosen.share is not Share.SLOTS:
        return _afresh(blueprint, specs(blueprint.communicator, ["linear"])["linear"])
    if not chosen.realigner.learns:
        learning = listing(kind for kind in RealignerKind if kind.learns)
        raise ConfigError(
            f"preset {blueprint.communicator.preset!r} learns nothing that can be saved (realigner: "
            f"{chosen.realigner}); expected `realigner: {learning}`, as in --set communicator=linear"
        )
    return _afresh(blueprint, blueprint.communicator)


def _afresh(blueprint: Blueprint, communicator: CommunicatorSpec) -> Blueprint:
    return replace(blueprint, communicator=communicator.model_copy(update={"realigners": None}))
