"""The command line: ``agentmesh VERB``. Exit codes: 0 ok, 1 run failed, 2 usage or config, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version as installed
from typing import Annotated

import typer
from rich.console import Console
from typer.main import get_command

from agentmesh.cli import bench, cache, calibrate, doctor, evaluate, look, models, plan, run, runs, serve
from agentmesh.errors import AgentmeshError

INTERRUPTED = 130

app = typer.Typer(
    name="agentmesh",
    help="Run meshes of agents that hand each other KV caches instead of text to read again.",
    epilog="Every option can also be set as AGENTMESH_<VERB>_<OPTION>, such as AGENTMESH_RUN_PRESET=dense.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("validate")(look.validate)
app.command("plan")(plan.plan)
app.command("graph")(look.graph)
app.command("schema")(look.schema)
app.command("ls")(look.ls)
app.command("cp")(look.cp)
app.command("calibrate")(calibrate.calibrate)
app.command("eval")(evaluate.evaluate)
app.command("score")(evaluate.score)
app.command("report")(evaluate.report)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(runs.app, name="runs")
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:  # typer hands over the option's value
    if asked:
        typer.echo(f"agentmesh {installed('agentmesh-kv')}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, allow_from_autoenv=False, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    sys.exit(invoke(arguments))


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    errors = Console(stderr=True)
    try:
        get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name="agentmesh", auto_envvar_prefix="AGENTMESH"
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        errors.print("interrupted")
        return INTERRUPTED
    except AgentmeshError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        return error.exit_code
    return 0
