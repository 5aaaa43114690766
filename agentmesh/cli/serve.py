"""``agentmesh serve``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from agentmesh.cli.options import Libraries, Sets
from agentmesh.config.load import load_mesh
from agentmesh.display import fetching
from agentmesh.errors import UsageError
from agentmesh.serve.asked import Unheard
from agentmesh.serve.keys import VARIABLE, check_open, read_keys
from agentmesh.serve.limits import Limits
from agentmesh.serve.meshes import by_name, close, load_models, width

if TYPE_CHECKING:
    from agentmesh.serve.spans import Spans

MIB = 2**20


def serve(
    configs: Annotated[list[str], typer.Argument(help="Mesh files, or names of shipped ones; each is a model.")],
    set: Sets = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others can reach needs API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help=f"File of API keys, `tenant key` on each line; see also {VARIABLE}.")
    ] = None,
    max_runs: Annotated[
        int | None, typer.Option(min=1, help="Runs at work at once; as many as the models serve well, if not given.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Runs that may wait for their turn; what comes then gets 429.")
    ] = Limits.queue,
    max_tenant_runs: Annotated[
        int, typer.Option(min=1, help="Runs that one tenant may have at work and waiting together.")
    ] = Limits.tenant_runs,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds that a run waits for its turn before it gets 429.")
    ] = Limits.wait_s,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that a run may take, waiting included.")
    ] = Limits.run_s,
    max_body: Annotated[float, typer.Option(min=0, help="MiB of a request's body.")] = Limits.body_bytes / MIB,
    max_input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a run's inputs.")] = Limits.input_tokens,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that runs may go on after SIGTERM.")] = Limits.drain_s,
    unheard: Annotated[
        Unheard, typer.Option(help="What to do with system and earlier messages that a mesh has no input for.")
    ] = Unheard.REFUSE,
    otel: Annotated[
        bool, typer.Option("--otel", help="Send OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT.")
    ] = False,
    otel_content: Annotated[
        bool, typer.Option("--otel-content", help="With the texts of inputs, prompts and messages in them.")
    ] = False,
    library: Libraries = None,
) -> None:
    """Serve meshes: each is a model to OpenAI's clients, and a page shows their runs.

    Example: agentmesh serve demo math-debate
    """
    _need("serve", "fastapi", "uvicorn", "prometheus_client")
    from agentmesh.serve import server  # noqa: PLC0415  # an extra, and slow to import
    from agentmesh.serve.app import Service  # noqa: PLC0415  # the same

    errors = Console(stderr=True)
    known = read_keys(keys, os.environ.get(VARIABLE))
    check_open(host, known)
    meshes = by_name([load_mesh(name, overrides=set or (), libraries=library or ()) for name in configs])
    with server.bound(host, port) as listen, _spans(on=otel, content=otel_content) as spans:
        try:
            with fetching(errors, quiet=False) as progress:
                load_models(meshes, progress)
            limits = Limits(
                runs=max_runs or width(meshes),
                queue=max_queue,
                tenant_runs=max_tenant_runs,
                wait_s=wait,
                run_s=timeout,
                body_bytes=int(max_body * MIB),
                input_tokens=max_input_tokens,
                drain_s=drain,
            )
            service = Service(meshes, known, limits, unheard, spans)
            server.run(service, listen, lambda line: errors.print(line, markup=False, highlight=False, soft_wrap=True))
        finally:
            close(meshes)


@contextmanager
def _spans(*, on: bool, content: bool) -> Iterator[tuple[Spans, ...]]:
    """What makes spans of runs, where that is asked for."""
    if not on:
        yield ()
        return
    _need("otel", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    from agentmesh.serve.spans import Spans  # noqa: PLC0415  # an extra

    spans = Spans.to_collector(content=content)
    try:
        yield (spans,)
    finally:
        spans.close()


def _need(extra: str, *modules: str) -> None:
    """Refuse where an extra is not installed.

    Raises:
        UsageError: it is not.
    """
    missing = [name for name in modules if not _found(name)]
    if missing:
        raise UsageError(f"{', '.join(missing)} cannot be found; install agentmesh-kv[{extra}]")


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would lie in
        return False
