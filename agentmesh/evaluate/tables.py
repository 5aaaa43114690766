"""An evaluation's figures for people: tables for the terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from agentmesh.evaluate.results import Comparison, Judged, Paired, PresetResult, Results

Cells = list[tuple[str, ...]]


def results_table(results: Results) -> Group:
    """Presets, and their paired comparisons."""
    title = f"{results.task}, {results.mesh}, {results.model}: {results.n} samples"
    parts: list[Table] = [_table(title, *_scores(results)), _table("reuse and time", *_costs(results))]
    if results.paired:
        parts.append(_table("paired, first minus second", *_pairs(results)))
    if results.judge is not None and any(one.n for one in results.judge.values()):
        parts.append(_table("the judge, under both presets", *judge_cells(results.judge)))
    return Group(*parts, *filter(None, [stable(results), audited(results)]))


def results_markdown(results: Results) -> str:
    """The same tables as Markdown."""
    lines = [f"# {results.task}, {results.mesh}, {results.model}: {results.n} samples", ""]
    lines += [*markdown(*_scores(results)), "", "Reuse and time:", "", *markdown(*_costs(results))]
    if results.paired:
        lines += ["", "Paired, first minus second:", "", *markdown(*_pairs(results))]
    if results.judge is not None and any(one.n for one in results.judge.values()):
        lines += ["", "The judge, under both presets:", "", *markdown(*judge_cells(results.judge))]
    lines += [f"\n{line}" for line in filter(None, [stable(results), audited(results)])]
    refused = {name: one.reasons for name, one in results.presets.items() if one.reasons}
    if refused:
        lines += ["", "Shareable tokens that were computed, by reason:", ""]
        lines += [f"- {name}: {', '.join(f'{k} {v}' for k, v in why.items())}" for name, why in refused.items()]
    return "\n".join(lines) + "\n"


def comparison_table(found: Comparison) -> Table:
    """Two evaluations, preset by preset."""
    head = ("preset", "n", "difference", "95 %", "p (McNemar)", "same answer", "same text", "parts at word")
    cells: Cells = [(name, *_pair(one)) for name, one in found.presets.items()]
    return _table(f"{found.task}: {found.first} minus {found.second}", head, cells)


def _scores(results: Results) -> tuple[Sequence[str], Cells]:
    """Metrics with their intervals, the primary one first."""
    metrics = list(dict.fromkeys(name for one in results.presets.values() for name in one.metrics))
    cells = []
    for name, one in results.presets.items():
        found = [one.metrics.get(metric) for metric in metrics]
        shown = [f"{m.value:.3f} [{m.ci95[0]:.3f}, {m.ci95[1]:.3f}]" if m else "" for m in found]
        cells.append((name, *shown, str(one.errors)))
    return ["preset", *metrics, "errors"], cells


def _costs(results: Results) -> tuple[Sequence[str], Cells]:
    head = ("preset", "calls shared", "placed", "TTFT p50 ms", "p90", "tokens/s", "wall s")
    return head, [(name, *_cost(one)) for name, one in results.presets.items()]


def _cost(one: PresetResult) -> list[str]:
    placed = f"{one.placed_slots / one.slot_tokens:.0%}" if one.slot_tokens else "-"
    return [
        f"{one.calls_shared}/{one.calls_shareable}",
        placed,
        f"{one.ttft_ms.p50:.0f}",
        f"{one.ttft_ms.p90:.0f}",
        f"{one.tokens_per_s:.1f}",
        f"{one.wall_s:.0f}",
    ]


def _pairs(results: Results) -> tuple[Sequence[str], Cells]:
    head = ["pair", "n", "difference", "95 %", "p (McNemar)", "same answer", "same text", "parts at word"]
    cells = [(name, *_pair(one)) for name, one in results.paired.items()]
    return head, cells


def judge_cells(judged: Mapping[str, Judged]) -> tuple[Sequence[str], Cells]:
    """Head and rows of the table about judges."""
    head = ("pair", "n", "same choice", "chose nobody", "n, other order", "same choice then")
    return head, [
        (
            name,
            str(one.n),
            _percent(one.same_choice),
            str(one.undecided),
            str(one.n_shuffled),
            _percent(one.same_choice_shuffled),
        )
        for name, one in judged.items()
        if one.n
    ]


def stable(results: Results) -> str:
    """How often judges chose the same whatever the order; empty where none was asked twice."""
    found = {name: one.order_stable for name, one in results.presets.items() if one.order_stable is not None}
    shares = ", ".join(f"{name} {_percent(share)}" for name, share in found.items())
    return f"same choice in both orders, by preset: {shares}" if shares else ""


def audited(results: Results) -> str:
    """What the audits of calls that reused KV found; empty where there were none."""
    told = []
    for name, one in results.presets.items():
        if one.audit_kl is not None:
            above = f", above the limits: {', '.join(one.links_above)}" if one.links_above else ""
            told.append(
                f"{name} {one.audits} call(s), mean KL {one.audit_kl:.4f} nats, {one.audit_flips} flip(s){above}"
            )
    return f"checked against dense, by preset: {'; '.join(told)}" if told else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _pair(one: Paired) -> tuple[str, ...]:
    return (
        str(one.n),
        f"{one.delta:+.3f}",
        f"[{one.ci95[0]:+.3f}, {one.ci95[1]:+.3f}]",
        "" if one.p_mcnemar is None else f"{one.p_mcnemar:.2f}",
        f"{one.same_answer:.0%}",
        f"{one.same_text:.0%}",
        "" if one.first_divergence is None else f"{one.first_divergence:.0f}",
    )


def _table(title: str, head: Sequence[str], cells: Cells) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in cells:
        table.add_row(*row)
    return table


def markdown(head: Sequence[str], cells: Cells) -> list[str]:
    """A table's lines."""
    rows = [head, ["---"] * len(head), *cells]
    return [f"| {' | '.join(row)} |" for row in rows]
