"""Two evaluations of one task, compared preset by preset."""

from __future__ import annotations

from pathlib import Path

from agentmesh.errors import InputError
from agentmesh.evaluate.folder import read_settings
from agentmesh.evaluate.journal import by_preset, read_rows
from agentmesh.evaluate.results import Comparison, paired


def compare(first: Path, second: Path) -> Comparison:
    """Compare the evaluations in two folders; where each ran one preset only, these two.

    Raises:
        RecordError: one of them is no folder of an evaluation.
        InputError: they are of two tasks, or have no preset in common.
    """
    one, other = read_settings(first), read_settings(second)
    if one.task != other.task:
        raise InputError(f"{first.name} is of task {one.task}, {second.name} of {other.task}; compare two of one task")
    ours, theirs = (by_preset(read_rows(path).values()) for path in (first, second))
    if len(ours) == len(theirs) == 1:
        (a, left), (b, right) = next(iter(ours.items())), next(iter(theirs.items()))
        found = {a if a == b else f"{a} vs {b}": paired(left, right)}
    else:
        found = {name: paired(rows, theirs[name]) for name, rows in ours.items() if name in theirs}
    if not found:
        raise InputError(f"{first.name} ran {', '.join(ours)}, {second.name} ran {', '.join(theirs)}: none in common")
    return Comparison(task=one.task, first=first.name, second=second.name, presets=found)
