"""Evaluations: a suite's samples through a mesh under several presets, compared in pairs.

    journal     what was done so far, one synced line a sample
    choices     which candidates a judge chose
    subjects    what is evaluated: a mesh from a file or built in Python, for each preset
    session     runs what is not done yet
    statistics  intervals and paired tests
    results     from rows to figures
    breakdown   what lies behind them: reuse, time and differences by agent and by text
    findings    both of them, from a folder
    folder      the record of an evaluation
    tables      figures for people
    summary     the same in words, as Markdown
    page        all of it as one HTML page, with every sample
    report      the way in: evaluate, score again, read a report

From Python, for notebooks and a user's own tests:

    report = evaluate("mesh.yaml", task="gsm8k", data="gsm8k.jsonl", limit=100, presets=["dense", "linear"])
    report.assert_score_at_least(0.3, preset="linear")

A ``Mesh`` does instead of a file, with agents and a graph built in Python. In a notebook: ``await aevaluate(…)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmesh.evaluate.report import Report
    from agentmesh.evaluate.subjects import Request
    from agentmesh.mesh import Mesh


def evaluate(
    mesh: str | Path | Mesh,
    task: str | Path,
    *,
    data: str | Path | None = None,
    presets: Sequence[str] = ("dense", "linear"),
    limit: int | str | None = None,
    **more: Any,
) -> Report:
    """Evaluate a mesh on a task.

    Args:
        mesh: a mesh file, the name of a shipped one, or a ``Mesh``. Of a mesh that is loaded already the model is used,
            but nothing that it has kept or learned; agent objects of one are shared by all presets.
        task: a task's name, or the path of its folder.
        data: a JSONL file instead of the task's own samples.
        presets: their names; ``single`` stands for one agent alone with the token budget of the whole mesh.
        limit: how many samples behind the warm-up, or a range such as ``"10-20"``; all if ``None``.
        more: ``warmup``, ``seed``, ``epochs``, ``allow_code``, ``fail_on_error``, ``judge_check``, ``resume``,
            ``executor``, ``replicas``, ``runs_dir``, ``overrides``, ``libraries``; see ``subjects.Request``.

    Raises:
        UsageError: mesh, task, samples or presets do not fit each other, or an event loop is running here, as in a
            notebook (use ``aevaluate``); nothing ran.
        RunError: the weights cannot be read, the folder cannot be written, or a sample failed under ``fail_on_error``.
    """
    from agentmesh.evaluate.report import evaluate as work  # noqa: PLC0415  # torch takes seconds to import

    return work(_request(mesh, task, data, presets, limit, more))


async def aevaluate(
    mesh: str | Path | Mesh,
    task: str | Path,
    *,
    data: str | Path | None = None,
    presets: Sequence[str] = ("dense", "linear"),
    limit: int | str | None = None,
    **more: Any,
) -> Report:
    """As ``evaluate``, where an event loop is running: in a notebook, or an async test."""
    from agentmesh.evaluate.report import aevaluate as work  # noqa: PLC0415  # torch takes seconds to import

    return await work(_request(mesh, task, data, presets, limit, more))


def _request(
    mesh: str | Path | Mesh,
    task: str | Path,
    data: str | Path | None,
    presets: Sequence[str],
    limit: int | str | None,
    more: dict[str, Any],
) -> Request:
    from agentmesh.evaluate.subjects import Request  # noqa: PLC0415  # torch takes seconds to import

    return Request(
        mesh=str(mesh) if isinstance(mesh, Path) else mesh,
        task=str(task),
        data=None if data is None else Path(data),
        presets=tuple(presets),
        limit=None if limit is None else str(limit),
        **more,
    )
