"""Everything an evaluation's report says, worked out from its folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentmesh.evaluate.breakdown import Breakdown, break_down
from agentmesh.evaluate.folder import Settings, read_settings
from agentmesh.evaluate.journal import Row, read_rows
from agentmesh.evaluate.results import Results, summarise


@dataclass(frozen=True)
class Findings:
    """What was asked for and what came out.

    Args:
        settings: what was asked for.
        rows: what each sample gave, in the order of the presets.
        results: the figures.
        breakdown: what lies behind them, by agent and by text.
    """

    settings: Settings
    rows: Sequence[Row]
    results: Results
    breakdown: Breakdown

    @classmethod
    def of(cls, settings: Settings, rows: Iterable[Row]) -> Findings:
        """Work out the figures of some rows."""
        order = {name: place for place, name in enumerate(settings.presets)}
        ordered = sorted(rows, key=lambda row: order.get(row.preset, len(order)))
        results = summarise(ordered, settings.task, settings.mesh, settings.model, settings.judges)
        return cls(settings, ordered, results, break_down(ordered))


def read_findings(path: Path) -> Findings:
    """Of the evaluation in a folder.

    Raises:
        RecordError: it is no folder of an evaluation.
    """
    settings = read_settings(path)
    return Findings.of(settings, read_rows(path).values())
