"""``agentmesh run``."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.rule import Rule

from agentmesh.backend import Backend
from agentmesh.blueprint import Blueprint, draft
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
    StoreOption,
)
from agentmesh.cli.profiling import new_profiles, show_profiles
from agentmesh.config.load import LoadedMesh, dump, load_mesh
from agentmesh.display import Display, calls_table, fetching, showing
from agentmesh.errors import InputError
from agentmesh.executors import Job, Where
from agentmesh.mesh import Mesh
from agentmesh.record import Recorder
from agentmesh.results import RunResult, audits_line
from agentmesh.stream import Sink

if TYPE_CHECKING:
    from agentmesh.engine.profile import Profiles
    from agentmesh.sharing.tier.counts import Counts

RUN = "run"

Recording = Callable[[Job, Mapping[str, str]], AbstractContextManager[tuple[Recorder, Sequence[Sink]]]]
"""Opens the record of a run, whose model is described."""

Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="NAME=TEXT", help="A run input; NAME=@FILE reads a file, NAME=@- stdin."),
]


def run(
    config: Config,
    input: Inputs = None,
    set: Sets = None,
    preset: Annotated[str | None, typer.Option(help="Communicator preset, instead of the file's.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail instead of computing what an earlier agent has read or written.")
    ] = False,
    deterministic: Deterministic = False,
    store: StoreOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of this run, instead of the file's.")] = None,
    display: Annotated[Display, typer.Option(help="How to show the run while it goes on.")] = Display.AUTO,
    executor: ExecutorOption = Where.LOCAL,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time went; profile.json and trace.json go into the record.")
    ] = False,
    format: FormatOption = Format.TEXT,
    runs_dir: RunsDir = DEFAULT_RUNS,
    library: Libraries = None,
) -> None:
    """Run a mesh once and print the answer.

    Example: agentmesh run demo -i question="Tom has 3 apples and buys 4 more. How many has he?"
    """
    overrides = [*(set or ()), *([f"communicator.preset={preset}"] if preset else ())]
    overrides += ["communicator.strict=true"] if strict else []
    overrides += ["run.deterministic=true"] if deterministic else []
    overrides += [f"communicator.store={json.dumps(str(store.absolute()))}"] if store else []
    errors = Console(stderr=True)
    given = read_inputs(input or ())
    loaded = load_mesh(config, overrides=overrides, libraries=library or ())
    profiles = new_profiles() if profile else None
    blueprint = draft(loaded)
    blueprint.all_inputs(given)
    recording = partial(_recording, loaded, blueprint, runs_dir, display, errors)
    job = Job(given, blueprint.run.seed if seed is None else seed)
    told = None
    if executor is Where.RAY:
        if profile:
            raise InputError("--profile looks into this process, and --executor ray runs in another one; leave one out")
        result = asyncio.run(_on_a_replica(blueprint, job, recording))
    else:
        with Mesh.from_blueprint(blueprint) as mesh:
            if profile:
                blueprint.local_model()
            with fetching(errors, quiet=display is Display.NONE) as progress:
                backend = mesh.load(progress)
            told = _counts(backend) if blueprint.communicator.store is not None else None
            with recording(job, backend.describe()) as (recorder, sinks):
                with _profiled(backend, profiles):
                    result = mesh.run(job.inputs, seed=job.seed, sinks=sinks)
                recorder.finish(result)
                if profiles is not None:
                    recorder.attach("profile.json", profiles.taken[RUN].model_dump_json(indent=2) + "\n")
                    recorder.attach("trace.json", profiles.trace())
    if told is not None and display is not Display.NONE:
        errors.print(told.line, markup=False, highlight=False, soft_wrap=True)
    if profiles is not None:
        show_profiles(profiles, errors)
    if format is Format.JSON:
        typer.echo(result.model_dump_json(indent=2))
        return
    console = Console()
    console.print(calls_table(result.calls))
    audits = audits_line(result.calls)
    if audits:
        console.print(audits, markup=False, highlight=False, soft_wrap=True)
    console.print(Rule("answer"))
    console.print(result.answer, markup=False, highlight=False)


def _counts(backend: Backend) -> Counts | None:
    """What a mesh's store counts; whole when the mesh is closed."""
    from agentmesh.local import LocalBackend  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    return backend.kept.store.counts if isinstance(backend, LocalBackend) and backend.kept is not None else None


async def _on_a_replica(blueprint: Blueprint, job: Job, recording: Recording) -> RunResult:
    """Run a mesh once in another process, under Ray."""
    from agentmesh.executors.replicas import RayExecutor  # noqa: PLC0415  # an extra, and torch

    executor = RayExecutor(1)
    try:
        await executor.prepare(RUN, blueprint, None)
        with recording(job, executor.ready[RUN].model) as (recorder, sinks):
            result = await executor.run(RUN, job, sinks)
            recorder.finish(result)
    finally:
        await executor.close()
    return result


@contextmanager
def _recording(
    loaded: LoadedMesh,
    blueprint: Blueprint,
    runs_dir: Path,
    display: Display,
    errors: Console,
    job: Job,
    model: Mapping[str, str],
) -> Iterator[tuple[Recorder, Sequence[Sink]]]:
    """A run's record, and what takes its events: the record, and the display."""
    facts = {"seed": job.seed, "model": dict(model)}
    exact = blueprint.run.deterministic
    recorder = Recorder(runs_dir, blueprint.name, dump(loaded.spec), facts, deterministic=exact)
    try:
        with showing(display, errors) as sinks:
            yield recorder, (recorder.write, *sinks)
    finally:
        recorder.close()
        if display is not Display.NONE:
            errors.print(f"record: {recorder.path}", markup=False, highlight=False, soft_wrap=True)


def _profiled(backend: Backend, profiles: Profiles | None) -> AbstractContextManager[None]:
    """Takes a profile of a run, where one is asked for."""
    if profiles is None:
        return nullcontext()
    from agentmesh.local import LocalBackend  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    assert isinstance(backend, LocalBackend), "a model of this machine"
    return profiles.of(backend.engine, RUN)


def read_inputs(texts: list[str] | tuple[str, ...]) -> dict[str, str]:
    """``name=text`` options as a dict; ``@FILE`` and ``@-`` are read.

    Raises:
        InputError: no ``=``, a name given twice, or a file that cannot be read as UTF-8.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--input {text!r}: expected NAME=TEXT, such as question='How many?'")
        if name in found:
            raise InputError(f"--input {name} is given twice; give it once")
        found[name] = _read(value[1:], name) if value.startswith("@") else value
    return found


def _read(source: str, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"--input {name}=@{source}: cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--input {name}=@{source}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; "
            "save the file as UTF-8"
        ) from error
