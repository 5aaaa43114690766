"""An evaluation as one HTML page that needs nothing beside it: no network, no server, no other file.

samples     what the page's script shows of each sample
plots       where things stand in its plots
report.*    the page itself: template, style, script
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from agentmesh.evaluate.findings import Findings, read_findings
from agentmesh.evaluate.folder import finished, made_by
from agentmesh.evaluate.page import plots
from agentmesh.evaluate.page.samples import Samples
from agentmesh.evaluate.summary import sentences, summary_markdown
from agentmesh.evaluate.tables import audited, judge_cells, stable
from agentmesh.reasons import Reason
from agentmesh.record import disk, write_whole

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "queue": "waiting for the engine",
        "plan": "deciding what to place",
        "match": "looking for text that was read or written before",
        "realign": "correcting placed keys and values",
        "compose": "moving them to their place",
        "forward": "the model computes the rest",
    }
)
"""The parts of a time to first token, in words."""

PROMPTS_LIMIT = 8_000_000
"""Characters that texts and prompts of samples may take in a page."""


@dataclass(frozen=True)
class Origin:
    """Where an evaluation comes from.

    Args:
        command: the command that made it; empty where it was made from Python.
        manifest: versions and platform; what is missing is not shown.
        mesh: the mesh file as it was resolved.
        whole: whether it came to its end.
    """

    command: str
    manifest: Mapping[str, Any]
    mesh: str
    whole: bool = True


def write_report(path: Path, output: Path | None = None) -> tuple[Path, Path]:
    """Write the page and the summary of an evaluation.

    Args:
        path: the evaluation's folder.
        output: the page's file; ``report.html`` in the folder if ``None``.

    Returns:
        the paths of the page and of the summary.

    Raises:
        RecordError: it is no folder of an evaluation, or cannot be written.
    """
    found = read_findings(path)
    command, manifest = made_by(path)
    page = path / "report.html" if output is None else output
    summary = path / "summary.md"
    with disk(path):
        write_whole(summary, summary_markdown(found, command))
        mesh = (path / "mesh.yaml").read_text(encoding="utf-8")
    with disk(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, html(found, Origin(command, manifest, mesh, whole=finished(path))))
    return page, summary


def html(found: Findings, origin: Origin, limit: int = PROMPTS_LIMIT) -> str:
    """The page of an evaluation.

    Args:
        found: the evaluation.
        origin: where it comes from.
        limit: characters that texts and prompts may take; later samples are shown without their prompts, which the
            page says.
    """
    results = found.results
    metric = next((name for one in results.presets.values() for name in one.metrics), "")
    samples = Samples(found.rows, list(results.presets), metric, limit)
    judged_head, judged_rows = judge_cells(results.judge or {})
    reach, intervals = plots.spans(results.paired)
    here = files(__name__)
    environment = Environment(
        loader=PackageLoader(__name__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment.get_template("report.html.jinja").render(
        found=found,
        settings=found.settings,
        results=results,
        breakdown=found.breakdown,
        metric=metric,
        sentences=sentences(found),
        origin=origin,
        task=Path(results.task).name,
        samples=samples,
        scatter=plots.scatter(results.presets, metric),
        reach=reach,
        intervals=intervals,
        plots=plots,
        metrics=plots.names({name: one.metrics for name, one in results.presets.items()}),
        judged_head=judged_head,
        judged_rows=judged_rows,
        stable=stable(results),
        audited=audited(results),
        about={str(reason): reason.about for reason in Reason},
        used={str(row.reason) for one in found.rows for call in one.calls for row in call.plan if row.tokens},
        part_words=PARTS,
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=(here / "report.js").read_text(encoding="utf-8"),
    )
