"""An evaluation in words: the sentences that a report begins with, and the whole of it as Markdown."""

from __future__ import annotations

from agentmesh.evaluate.breakdown import Breakdown
from agentmesh.evaluate.findings import Findings
from agentmesh.evaluate.results import Paired, PresetResult, Results
from agentmesh.evaluate.tables import markdown, results_markdown
from agentmesh.reasons import Treatment


def sentences(found: Findings) -> dict[str, str]:
    """What each preset but the first one gave, compared with the first."""
    results = found.results
    if len(results.presets) < 2:
        return {}
    first, *others = results.presets
    return {name: _compared(results, found.breakdown, name, first) for name in others}


def summary_markdown(found: Findings, command: str) -> str:
    """The figures as Markdown.

    Args:
        found: the evaluation.
        command: the command that made it; empty where it was made from Python.
    """
    lines = [results_markdown(found.results)]
    told = [f"- **{name}** {said}" for name, said in sentences(found).items()]
    lines += ["In words:", "", *told, ""] if told else []
    lines += ["Prompt tokens by agent:", "", *markdown(*_reuse(found.breakdown))]
    lines += ["", "Median time to first token by agent and part, ms:", "", *markdown(*_waits(found.breakdown))]
    asked = found.settings
    lines += ["", f"Seed {asked.seed}, warm-up {asked.warmup}, epochs {asked.epochs}."]
    lines += [f"Made by `{command}`."] if command else []
    return "\n".join(lines) + "\n"


def _compared(results: Results, breakdown: Breakdown, name: str, first: str) -> str:
    one, other = results.presets[name], results.presets[first]
    pair = results.paired[f"{name} vs {first}"]
    if not pair.n:
        return f"has no sample in common with {first} that both answered."
    parts = [_score(pair, one, other, first), _texts(pair)]
    placed = breakdown.placed(name)
    if placed:
        shared = f" ({one.placed_slots / one.slot_tokens:.0%} of what could be shared)" if one.slot_tokens else ""
        parts.append(f"It placed {placed:.0%} of its prompt tokens{shared} and computed the rest.")
    parts.append(f"Median time to first token: {one.ttft_ms.p50:,.0f} ms against {other.ttft_ms.p50:,.0f} ms.")
    return " ".join(parts)


def _score(pair: Paired, one: PresetResult, other: PresetResult, first: str) -> str:
    metric = next(iter(one.metrics), "")
    if not metric or metric not in other.metrics:
        return f"was not scored as {first} was."
    low, high = pair.ci95
    told = (
        f"scores {one.metrics[metric].value:.3f} ({metric}), {first} {other.metrics[metric].value:.3f}; difference "
        f"{pair.delta:+.3f}, 95 % between {low:+.3f} and {high:+.3f}"
    )
    chance = f"{pair.n} samples do not tell them apart" if low <= 0 <= high else "that is more than chance"
    return f"{told}: {chance}."


def _texts(pair: Paired) -> str:
    if pair.first_divergence is None:
        return "All answers are the same text."
    common = f"{pair.first_divergence:g} word{'' if pair.first_divergence == 1 else 's'}"
    return f"{pair.same_text:.0%} of the answers are the same text; the others part after {common} (median)."


def _reuse(breakdown: Breakdown) -> tuple[list[str], list[tuple[str, ...]]]:
    cells = [
        (preset, agent, f"{one.tokens:,}", *(f"{one.of(kind) / one.tokens:.0%}" for kind in Treatment))
        for preset, agents in breakdown.by_agent.items()
        for agent, one in agents.items()
    ]
    return ["preset", "agent", "tokens", *map(str, Treatment)], cells


def _waits(breakdown: Breakdown) -> tuple[list[str], list[tuple[str, ...]]]:
    waits = [one for agents in breakdown.waits.values() for one in agents.values()]
    names = list(dict.fromkeys(name for one in waits for name in one.parts_ms))
    cells = [
        (preset, agent, f"{one.ttft_ms:.1f}", *(f"{one.parts_ms.get(name, 0.0):.1f}" for name in names))
        for preset, agents in breakdown.waits.items()
        for agent, one in agents.items()
    ]
    return ["preset", "agent", "TTFT", *names], cells
