"""What ``--profile`` does in the commands that have it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from agentmesh.errors import InputError
from agentmesh.tables import profile_table

if TYPE_CHECKING:
    from agentmesh.engine.profile import Profiles


def new_profiles() -> Profiles:
    """Nothing yet. Torch's own profiler keeps quiet if torch was not loaded before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from agentmesh.engine.profile import Profiles  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    return Profiles()


@contextmanager
def profiling(trace: Path | None) -> Iterator[Profiles | None]:
    """Profiles that are taken meanwhile, whose trace is written in the end; nothing where there is no ``trace``.

    Raises:
        InputError: the trace cannot be written, which is tried before anything else.
    """
    if trace is None:
        yield None
        return
    _write(trace, "")
    profiles = new_profiles()
    yield profiles
    _write(trace, profiles.trace())


def show_profiles(profiles: Profiles, console: Console) -> None:
    """Print every profile's table."""
    for name, profile in profiles.taken.items():
        console.print(profile_table(profile, name))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--trace {path}: cannot be written: {error.strerror or error}; give a file in a folder that is there"
        ) from error
