"""The folder of an evaluation: what was asked for, so that it can be resumed and scored again.

manifest.json           versions, model, settings, digests of mesh and samples
mesh.yaml               the mesh as it was resolved
samples.jsonl           one line for each sample under each preset (the journal)
learned-PRESET.safetensors   what the warm-up taught
results.json            the figures
summary.md              the same for people
report.html             everything on one page, once `agentmesh report` has made it
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentmesh.config.base import Frozen
from agentmesh.errors import InputError, RecordError
from agentmesh.evaluate.journal import Row
from agentmesh.evaluate.results import Results
from agentmesh.record import disk, new_folder, write_whole
from agentmesh.suites.samples import Sample, read_samples
from agentmesh.suites.task import Task, load_task


class Settings(Frozen):
    """What an evaluation was asked for; two with the same settings give the same samples the same treatment."""

    task: str
    data: str | None
    samples_sha256: str
    mesh: str
    mesh_sha256: str
    model: str
    presets: tuple[str, ...]
    warmup: int
    limit: str | None
    seed: int
    epochs: int
    judges: dict[str, tuple[str, ...]]
    judge_check: bool = False


def digest(samples: Sequence[Sample]) -> str:
    """Of all samples that an evaluation uses."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(sample.model_dump_json().encode())
    return found.hexdigest()


def create(
    root: Path, name: str, settings: Settings, mesh_yaml: str, facts: dict[str, Any], *, deterministic: bool = False
) -> Path:
    """A new folder under ``root``, named after a task.

    Raises:
        RecordError: it cannot be written.
    """
    return new_folder(
        root,
        f"eval-{name}",
        mesh_yaml,
        {"eval": settings.model_dump(mode="json"), **facts},
        deterministic=deterministic,
    )


def read_settings(path: Path) -> Settings:
    """What the evaluation in a folder was asked for.

    Raises:
        RecordError: it is no folder of an evaluation.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if "eval" not in manifest:
            raise RecordError(
                f"{path} is no folder of an `agentmesh eval`, but of a single run (`agentmesh runs show`); "
                "`agentmesh runs ls` lists both"
            )
        return Settings.model_validate(manifest["eval"])
    except (OSError, ValueError, ValidationError) as error:
        raise RecordError(f"{path} is no folder of an `agentmesh eval`: {error}") from error


def check_resumed(path: Path, wanted: Settings) -> None:
    """Compare what is asked for now with what a folder was made for.

    Raises:
        InputError: something differs; says what.
    """
    made = read_settings(path).model_dump()
    differing = [name for name, value in wanted.model_dump().items() if made[name] != value]
    if differing:
        raise InputError(
            f"--resume {path.name}: this evaluation differs in {', '.join(differing)}; "
            + "; ".join(f"{name} was {made[name]!r}, now {getattr(wanted, name)!r}" for name in differing[:3])
            + ". Ask for the same, or start a new one without --resume"
        )


def made_by(path: Path) -> tuple[str, dict[str, Any]]:
    """The command that made an evaluation, empty where it was made from Python, and its manifest.

    Raises:
        RecordError: the manifest cannot be read.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        words = manifest.get("argv", [])
    except (OSError, ValueError, AttributeError) as error:
        raise RecordError(f"{path / 'manifest.json'} cannot be read: {error}") from error
    return (shlex.join(["agentmesh", *words]) if words[:1] == ["eval"] else ""), manifest


def finished(path: Path) -> bool:
    """Whether an evaluation came to its end."""
    return (path / "results.json").is_file()


def samples_for(settings: Settings, rows: Iterable[Row], data: Path | None) -> tuple[Task, dict[str, Sample]]:
    """An evaluation's task and its samples by id.

    Args:
        settings: what it was asked for.
        rows: whose samples must be there.
        data: where its samples are now, if they were moved.

    Raises:
        UsageError: the task is not there any more, or one of the samples.
    """
    task = load_task(settings.task)
    where = data if data is not None or settings.data is None else Path(settings.data)
    samples = {sample.id: sample for sample in read_samples(task, where)}
    for row in rows:
        if row.sample not in samples:
            raise InputError(f"sample {row.sample!r} is no longer in {where or task.folder}; give it with --data")
    return task, samples


def write_results(path: Path, results: Results, summary: str) -> None:
    """Write figures and summary into the folder of an evaluation that has come to its end.

    Raises:
        RecordError: it cannot be written.
    """
    with disk(path):
        write_whole(path / "results.json", results.model_dump_json(indent=2) + "\n")
        write_whole(path / "summary.md", summary)
