"""What measured calls say of a preset: means over tokens, intervals over questions, and pairs of presets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from agentmesh.bench.figures import AgentFidelity, KLDifference, PresetFidelity, Shared
from agentmesh.reasons import PlanRow, Treatment

RESAMPLES = 1000


@dataclass(frozen=True)
class Measured:
    """One call under one preset: KL by token ``[T]``, agreement of the likeliest token, and what its plan counted.

    The plan itself would hold the KV that it placed.
    """

    question: int
    node: str
    place: int
    kl: torch.Tensor
    top1: float
    rows: tuple[PlanRow, ...]
    slot_tokens: int
    placed_slots: int

    @property
    def shares(self) -> bool:
        """Whether any slot was placed."""
        return self.placed_slots > 0

    @property
    def computed(self) -> dict[str, int]:
        """Computed tokens by their reason."""
        found: dict[str, int] = {}
        for row in self.rows:
            if row.kind is Treatment.COMPUTED and row.tokens:
                found[str(row.reason)] = found.get(str(row.reason), 0) + row.tokens
        return found


def common_calls(found: Sequence[Sequence[Measured]]) -> set[tuple[int, int]]:
    """Calls (question, place) that share under every preset that shares slots at all."""
    sets = [{(m.question, m.place) for m in results if m.shares} for results in found]
    sharing = [one for one in sets if one]
    return set.intersection(*sharing) if sharing else set()


def summary(
    results: Sequence[Measured], chained: Sequence[Measured], common: set[tuple[int, int]], anchors_held: int
) -> PresetFidelity:
    """A preset's figures.

    Args:
        results: of all its calls, with exact bases.
        chained: the same, with what it made itself.
        common: calls that share under every preset.
        anchors_held: at the end.
    """
    shared = [m for m in results if m.shares]
    own = [m for m in chained if m.shares]
    tokens = torch.cat([m.kl for m in shared]) if shared else torch.zeros(1)
    agents = list(dict.fromkeys(m.node for m in results))
    return PresetFidelity(
        kl_mean=_mean(shared),
        kl_chained=_mean(own),
        kl_common=_mean([m for m in shared if (m.question, m.place) in common]),
        kl_first=float(torch.stack([m.kl[0] for m in shared]).mean()) if shared else 0.0,
        kl_p99=float(tokens.quantile(0.99)),
        ci95=_interval(shared),
        top1=_top1(shared),
        computed_tokens=sum(sum(m.computed.values()) for m in shared),
        calls=len(results),
        anchors_held=anchors_held,
        by_agent={node: _agent([m for m in results if m.node == node]) for node in agents},
        chained_by_agent={node: _mean([m for m in own if m.node == node]) for node in agents},
        chained=_shared(chained),
        **_shared(results).model_dump(),
    )


def _shared(results: Sequence[Measured]) -> Shared:
    reasons: Counter[str] = Counter()
    for measured in results:
        reasons.update(measured.computed)
    return Shared(
        slot_tokens=sum(m.slot_tokens for m in results),
        placed_tokens=sum(m.placed_slots for m in results),
        calls_shareable=sum(m.slot_tokens > 0 for m in results),
        calls_shared=sum(m.shares for m in results),
        reasons=dict(reasons),
    )


def _agent(results: Sequence[Measured]) -> AgentFidelity:
    shared = [m for m in results if m.shares]
    return AgentFidelity(
        kl_mean=_mean(shared),
        top1=_top1(shared),
        placed_tokens=sum(m.placed_slots for m in results),
        slot_tokens=sum(m.slot_tokens for m in results),
    )


def _mean(results: Sequence[Measured]) -> float:
    """Mean KL over all tokens; 0 where nothing shares."""
    return float(torch.cat([m.kl for m in results]).mean()) if results else 0.0


def mean_of_sharing(results: Sequence[Measured]) -> float | None:
    """Mean KL over the calls that share; ``None`` where none does."""
    shared = [m for m in results if m.shares]
    return _mean(shared) if shared else None


def _top1(results: Sequence[Measured]) -> float:
    """Share of tokens whose likeliest next token is dense's; 1 where nothing shares."""
    total = sum(len(m.kl) for m in results)
    return sum(m.top1 * len(m.kl) for m in results) / total if total else 1.0


def difference(results: Sequence[Measured], others: Sequence[Measured]) -> KLDifference | None:
    """How much farther from dense one preset is than another one, over the calls that share under both."""
    theirs = {(m.question, m.place): m for m in others if m.shares}
    pairs = [(m, theirs[m.question, m.place]) for m in results if m.shares and (m.question, m.place) in theirs]
    if not pairs:
        return None
    minus = [replace(mine, kl=mine.kl - other.kl) for mine, other in pairs]
    return KLDifference(calls=len(minus), kl_mean=_mean(minus), ci95=_interval(minus))


def _interval(results: Sequence[Measured]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean KL, resampling questions."""
    questions = sorted({m.question for m in results})
    if not questions:
        return 0.0, 0.0
    sums = torch.tensor([sum(float(m.kl.sum()) for m in results if m.question == q) for q in questions])
    sizes = torch.tensor([float(sum(len(m.kl) for m in results if m.question == q)) for q in questions])
    picks = torch.randint(len(questions), (RESAMPLES, len(questions)), generator=torch.Generator().manual_seed(0))
    means = sums[picks].sum(dim=1) / sizes[picks].sum(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
