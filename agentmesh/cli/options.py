"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentmesh.config.base import Choice
from agentmesh.executors import Where


class Format(Choice):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"


Config = Annotated[str, typer.Argument(help="A mesh file, or the name of a shipped one (see `agentmesh ls configs`).")]
Libraries = Annotated[
    list[Path] | None,
    typer.Option("--library", help="A folder of your own topologies/ and configs/; the last one given wins."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change an entry, e.g. agents.agent.generate.max_tokens=32."),
]
FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for programs.")]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Say where the time goes, part by part, and write a trace. Costs some time.")
]
TraceOption = Annotated[
    Path, typer.Option("--trace", help="Where --profile writes its trace; Perfetto and chrome://tracing open it.")
]
DEFAULT_TRACE = Path("trace.json")
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", envvar="AGENTMESH_STORE", help="Folder that keeps KV and what was learned beyond a run."),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Same seed, inputs and order of runs, same tokens, whatever runs beside them: sequences decode one by one "
        "(slower where many run at once), and measured time decides nothing.",
    ),
]
ExecutorOption = Annotated[Where, typer.Option(help="Where runs happen: in this process, or on replicas under Ray.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of all run records.")]
DEFAULT_RUNS = Path("runs")
