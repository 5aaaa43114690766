"""``agentmesh serve``."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from agentmesh.cli.options import Libraries, Sets
from agentmesh.config.load import load_mesh
from agentmesh.display import fetching
from agentmesh.errors import UsageError


def serve(
    configs: Annotated[list[str], typer.Argument(help="Mesh files, or names of shipped ones; each is a model.")],
    set: Sets = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need API keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys, `tenant key` on each line; see also AGENTMESH_API_KEYS.")
    ] = None,
    library: Libraries = None,
) -> None:
    """Serve meshes: each is a model to OpenAI's clients, and a page shows their runs.

    Example: agentmesh serve demo math-debate
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UsageError(f"`serve` needs {', '.join(missing)}; install agentmesh-kv[serve]")
    from agentmesh.serve import server  # noqa: PLC0415  # an extra, and slow to import
    from agentmesh.serve.keys import VARIABLE, check_open, read_keys  # noqa: PLC0415  # the same
    from agentmesh.serve.limits import Limits  # noqa: PLC0415  # the same
    from agentmesh.serve.meshes import by_name, close, load_models  # noqa: PLC0415  # the same

    errors = Console(stderr=True)
    known = read_keys(keys, os.environ.get(VARIABLE))
    check_open(host, known)
    meshes = by_name([load_mesh(config, overrides=set or (), libraries=library or ()) for config in configs])
    with server.bound(host, port) as socket:
        try:
            with fetching(errors, quiet=False) as progress:
                load_models(meshes, progress)
            server.run(meshes, known, Limits(), socket, lambda line: errors.print(line, markup=False, highlight=False))
        finally:
            close(meshes)
