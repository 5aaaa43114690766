"""The interface of an executor: make meshes ready, run them, be closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agentmesh.blueprint import Blueprint
from agentmesh.config.base import Choice
from agentmesh.results import RunResult
from agentmesh.stream import Sink

Inputs = Mapping[str, str]


class Where(Choice):
    """Which executor."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class Job:
    """One run; see ``Mesh.arun``."""

    inputs: Inputs
    seed: int | None = None
    sample: str = ""
    check_judges: bool = False


@dataclass(frozen=True)
class Course:
    """What a mesh learns before it is frozen, so that what a run gives depends on no run before it.

    Args:
        samples: inputs of runs that are computed and observed.
        kept: a file with what they taught, where the preset can save it; made if it is not there.
        taken: whether they have taught elsewhere already, so that without the file nothing was learned.
    """

    samples: Sequence[Inputs]
    kept: Path
    taken: bool = False


class Executor(Protocol):
    """Runs meshes, each under a name."""

    async def prepare(
        self, name: str, blueprint: Blueprint, course: Course | None, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Make a mesh ready.

        Args:
            name: what it is called from now on.
            blueprint: the mesh.
            course: what it learns first; ``None`` for a mesh that learns as it runs.
            tick: called after each sample of the course.

        Raises:
            ModelError: the weights cannot be fetched or read.
            RunError, UsageError: a sample of the course failed.
        """

    async def run(self, name: str, job: Job, sinks: Sequence[Sink] = ()) -> RunResult:
        """Run a mesh once; as many at once as it is wide, the others wait for their turn.

        Raises:
            RunError, UsageError: the run failed.
        """

    async def close(self) -> None:
        """Free everything."""
