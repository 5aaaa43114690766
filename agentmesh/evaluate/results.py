"""From an evaluation's rows to its figures: metrics with intervals, reuse, time, and presets compared in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import mean, median

from agentmesh.bench.figures import Percentiles, refused
from agentmesh.config.base import Frozen
from agentmesh.evaluate.choices import WORD
from agentmesh.evaluate.journal import Row, by_preset
from agentmesh.evaluate.statistics import interval, mcnemar, paired_interval, standard_error


class Metric(Frozen):
    """The mean of a metric over samples, its standard error and 95 % interval."""

    value: float
    stderr: float
    ci95: tuple[float, float]


class PresetResult(Frozen):
    """One preset over all samples.

    ``calls_shared`` of ``calls_shareable`` calls shared a slot; ``placed_slots`` of ``slot_tokens`` shareable tokens
    were placed, ``tokens_placed`` and ``tokens_computed`` count whole prompts. ``reasons``: shareable tokens that were
    computed, by reason. ``wall_s`` counts time in which at least one sample ran. ``order_stable``: share of the samples
    whose judges were asked once more in which they chose the same candidates both times. ``links_above``: links whose
    audits pass the limits; an evaluation learns nothing, so they stay shared.
    """

    n: int
    errors: int
    metrics: dict[str, Metric]
    calls: int
    calls_shareable: int
    calls_shared: int
    slot_tokens: int
    placed_slots: int
    tokens_placed: int
    tokens_computed: int
    output_tokens: int
    reasons: dict[str, int]
    audits: int
    audit_kl: float | None
    audit_flips: int = 0
    links_above: tuple[str, ...] = ()
    ttft_ms: Percentiles
    tokens_per_s: float
    wall_s: float
    order_stable: float | None = None


class Paired(Frozen):
    """Two presets on the samples that both answered: the first minus the second, in the primary metric.

    ``n`` samples have that metric under both (there is no recall where no passage is named); figures are about them.
    ``p_mcnemar`` is exact, and ``None`` where values are not 0 or 1. ``same_answer``: share of samples with the same
    extracted answer; ``same_text`` with the same text; ``first_divergence``: median of the words in common before two
    answers differ, over answers that do, and ``None`` where none does.
    """

    n: int
    delta: float
    ci95: tuple[float, float]
    p_mcnemar: float | None
    same_answer: float
    same_text: float
    first_divergence: float | None


class Comparison(Frozen):
    """The first evaluation minus the second, under each preset that both ran; see ``Paired``."""

    task: str
    first: str
    second: str
    presets: dict[str, Paired]


class Judged(Frozen):
    """A judge's choices under two presets: the share of samples in which it chose the same candidates.

    ``n`` samples have its choice under both, in ``undecided`` of them it agreed with no candidate under either, which
    counts as the same. ``same_choice_shuffled`` is the same of its answer to its inbox in another order, which
    ``n_shuffled`` samples have under both. ``None`` where no sample has it.
    """

    n: int
    same_choice: float | None
    undecided: int
    n_shuffled: int
    same_choice_shuffled: float | None


class Results(Frozen):
    """An evaluation. Metric values are between 0 and 1, the primary metric comes first."""

    task: str
    mesh: str
    model: str
    n: int
    presets: dict[str, PresetResult]
    paired: dict[str, Paired]
    judge: dict[str, Judged] | None = None


def summarise(
    rows: Iterable[Row], task: str, mesh: str, model: str, judges: Mapping[str, Sequence[str]] | None = None
) -> Results:
    """The figures of all rows.

    Args:
        rows: one for each sample, preset and epoch.
        task: its name.
        mesh: its name.
        model: its name.
        judges: judge → the nodes whose messages it chooses from; what they chose stands in the rows.
    """
    ours = by_preset(rows)
    pairs = [(a, b) for b, a in combinations(ours, 2)]
    return Results(
        task=task,
        mesh=mesh,
        model=model,
        n=len({row.sample for found in ours.values() for row in found}),
        presets={name: _preset(found) for name, found in ours.items()},
        paired={f"{a} vs {b}": paired(ours[a], ours[b]) for a, b in pairs},
        judge={f"{a} vs {b}": _judged(ours[a], ours[b]) for a, b in pairs} if judges else None,
    )


def paired(ours: Sequence[Row], theirs: Sequence[Row]) -> Paired:
    """Compare two sets of rows on the samples and epochs that both have, without an error, in the primary metric."""
    metric = next(iter(_metric_names([row for pair in both(ours, theirs) for row in pair])), "")
    shared = [pair for pair in both(ours, theirs) if all(metric in row.scores for row in pair)]
    if not shared:
        return Paired(n=0, delta=0, ci95=(0, 0), p_mcnemar=None, same_answer=0, same_text=0, first_divergence=None)
    a = list(_by_sample([row for row, _ in shared], metric).values())
    b = list(_by_sample([row for _, row in shared], metric).values())
    differing = [words_before(one.answer, other.answer) for one, other in shared if one.answer != other.answer]
    return Paired(
        n=len(a),
        delta=mean(a) - mean(b),
        ci95=paired_interval(a, b),
        p_mcnemar=mcnemar(a, b),
        same_answer=mean(_found(one) == _found(other) for one, other in shared),
        same_text=1 - len(differing) / len(shared),
        first_divergence=median(differing) if differing else None,
    )


def both(ours: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the samples and epochs that both sides have without an error."""
    left = {(row.sample, row.epoch): row for row in ours if not row.error}
    right = {(row.sample, row.epoch): row for row in theirs if not row.error}
    return [(left[key], right[key]) for key in left if key in right]


def _preset(rows: Sequence[Row]) -> PresetResult:
    good = [row for row in rows if not row.error]
    calls = [call for row in good for call in row.calls]
    wall, output = _covered(good), sum(call.output_tokens for call in calls)
    audits = [call.audit for call in calls if call.audit is not None]
    return PresetResult(
        n=len({row.sample for row in good}),
        errors=len(rows) - len(good),
        metrics={name: _metric(list(_by_sample(good, name).values())) for name in _metric_names(good)},
        calls=len(calls),
        calls_shareable=sum(call.slot_tokens > 0 for call in calls),
        calls_shared=sum(call.placed_slots > 0 for call in calls),
        slot_tokens=sum(call.slot_tokens for call in calls),
        placed_slots=sum(call.placed_slots for call in calls),
        tokens_placed=sum(call.placed_exact + call.placed_realigned for call in calls),
        tokens_computed=sum(call.computed for call in calls),
        output_tokens=output,
        reasons=refused(call.plan for call in calls),
        audits=len(audits),
        audit_kl=mean(audit.kl for audit in audits) if audits else None,
        audit_flips=sum(audit.flip for audit in audits),
        links_above=tuple(sorted({name for audit in audits for name in audit.above})),
        ttft_ms=Percentiles.of([call.ttft_ms for call in calls]),
        tokens_per_s=output / wall if wall else 0.0,
        wall_s=wall,
        order_stable=_order_stable(good),
    )


def _metric_names(rows: Sequence[Row]) -> list[str]:
    """All metrics, the primary one first: rows name them in the scorers' order, and leave out what a sample has not."""
    fullest = max((row.scores for row in rows), key=len, default={})
    return list(dict.fromkeys((*fullest, *(name for row in rows for name in row.scores))))


def _metric(values: Sequence[float]) -> Metric:
    return Metric(value=mean(values), stderr=standard_error(values), ci95=interval(values))


def _by_sample(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Sample → mean of a metric over epochs."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if metric in row.scores:
            found.setdefault(row.sample, []).append(row.scores[metric])
    return {sample: mean(values) for sample, values in found.items()}


def _covered(rows: Sequence[Row]) -> float:
    """Seconds in which at least one row ran; an evaluation that was interrupted has gaps."""
    total, until = 0.0, 0.0
    for begun, ended in sorted((row.begun, row.ended) for row in rows):
        total += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return total


def _found(row: Row) -> str:
    """What the first scorer took for the answer, or the whole text where it found none."""
    return next(iter(row.extracted.values()), "") or row.answer


def words_before(one: str, other: str) -> int:
    """How many words two texts have in common before they differ."""
    left, right = WORD.findall(one), WORD.findall(other)
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _judged(ours: Sequence[Row], theirs: Sequence[Row]) -> Judged:
    shared = both(ours, theirs)
    plain = [(one.chosen, other.chosen) for one, other in shared if one.chosen and other.chosen]
    again = [(one.chosen_shuffled, other.chosen_shuffled) for one, other in shared]
    shuffled = [(one, other) for one, other in again if one and other]
    return Judged(
        n=len(plain),
        same_choice=_share([one == other for one, other in plain]),
        undecided=sum(not any((*one.values(), *other.values())) for one, other in plain),
        n_shuffled=len(shuffled),
        same_choice_shuffled=_share([one == other for one, other in shuffled]),
    )


def _order_stable(rows: Sequence[Row]) -> float | None:
    """How often judges chose the same candidates whatever the order, where they were asked twice."""
    asked = [row for row in rows if row.chosen_shuffled]
    return _share([row.chosen_shuffled == {name: row.chosen[name] for name in row.chosen_shuffled} for row in asked])


def _share(found: Sequence[bool]) -> float | None:
    return mean(found) if found else None
