"""What benchmarks give back: plain data, for tables, plots and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from agentmesh.config.base import Frozen
from agentmesh.prompt import FIXED
from agentmesh.reasons import SHAREABLE, PlanRow, Treatment
from agentmesh.results import Profile


def refused(plans: Iterable[Sequence[PlanRow]]) -> dict[str, int]:
    """Shareable tokens that were computed, by reason, the most first."""
    found: Counter[str] = Counter()
    for plan in plans:
        for row in plan:
            if row.kind is Treatment.COMPUTED and row.tokens and row.reason in SHAREABLE and row.segment != FIXED:
                found[str(row.reason)] += row.tokens
    return dict(found.most_common())


class AgentFidelity(Frozen):
    """One agent's figures; see ``PresetFidelity``."""

    kl_mean: float
    top1: float
    placed_tokens: int
    slot_tokens: int


class Shared(Frozen):
    """How much was shared: tokens and calls as in ``PresetFidelity``, and why tokens were computed."""

    slot_tokens: int
    placed_tokens: int
    calls_shareable: int
    calls_shared: int
    reasons: dict[str, int]


class PresetFidelity(Frozen):
    """One preset's figures over the measured questions. KL(dense ‖ preset) in nats a token.

    ``kl_mean``, ``kl_first`` (first tokens), ``kl_p99``, ``ci95`` (bootstrap over questions) and ``top1`` are over the
    calls that share; ``kl_common`` over those that share under every preset. ``slot_tokens`` are shareable,
    ``placed_tokens`` of them were placed; ``computed_tokens`` counts whole prompts of the sharing calls. All that is
    with exact bases; ``kl_chained`` is over the calls that share in the preset's own run, and ``chained`` says what it
    shared there. ``prefix`` knows of no shareable tokens but those that it places, so it always places all of them.
    """

    kl_mean: float
    kl_chained: float
    kl_common: float
    kl_first: float
    kl_p99: float
    ci95: tuple[float, float]
    top1: float
    slot_tokens: int
    placed_tokens: int
    computed_tokens: int
    calls: int
    calls_shareable: int
    calls_shared: int
    anchors_held: int
    reasons: dict[str, int]
    by_agent: dict[str, AgentFidelity]
    chained_by_agent: dict[str, float]
    chained: Shared


class KLDifference(Frozen):
    """KL of a preset minus another's, nats a token, over ``calls`` that share under both; bootstrap over questions."""

    calls: int
    kl_mean: float
    ci95: tuple[float, float]


class Fidelity(Frozen):
    """All presets' figures, and negative controls: what must be worse than ``linear``; ``None`` where none shared.

    ``minus_linear``: how much farther from dense the other presets are than ``linear``, call by call;
    ``controls_minus_linear``: the same of the controls, and over how many calls.
    """

    model: str
    dtype: str
    n: int
    settings: dict[str, Any]
    presets: dict[str, PresetFidelity]
    minus_linear: dict[str, KLDifference]
    controls: dict[str, float | None]
    controls_minus_linear: dict[str, KLDifference]


class PresetTimes(Frozen):
    """One preset's medians over the measured rounds, in milliseconds; by agent, the first one first.

    ``parts_ms`` are sums over the agents of the medians; ``learn_ms`` is the sum over the warm-up rounds of what was
    spent outside TTFT on keeping and learning, committing what a round taught included, ``keep_ms`` the same for one
    measured round, ``ingest_ms`` what making the KV of a round's passages took ahead. ``anchors_held``: at the end, by
    ``kvcomm``; too few of them say that its budget was short. ``placed`` and ``computed`` tokens are the last round's;
    ``reasons``: why shareable tokens were computed, summed over the measured rounds, as ``calls_shared`` is.
    """

    by_agent_ms: tuple[float, ...]
    sum_ms: float
    parts_ms: dict[str, float]
    parts_by_agent_ms: tuple[dict[str, float], ...]
    learn_ms: float
    keep_ms: float
    ingest_ms: float
    kv_bytes: int
    placed: tuple[int, ...]
    computed: tuple[int, ...]
    calls_shared: tuple[int, ...]
    anchors_held: int
    reasons: tuple[dict[str, int], ...]


class Speedup(Frozen):
    """Times of ``dense`` over a preset's."""

    by_agent: tuple[float, ...]
    sum: float


class Times(Frozen):
    """Figures of one run; every preset on the same text, interleaved."""

    model: str
    dtype: str
    settings: dict[str, Any]
    presets: dict[str, PresetTimes]
    speedup: dict[str, Speedup]


class Percentiles(Frozen):
    """Median and ninth decile."""

    p50: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Of some values; zeros where there are none."""
        ordered = sorted(values) or [0.0]
        return cls(p50=ordered[len(ordered) // 2], p90=ordered[len(ordered) * 9 // 10])


class Baseline(Frozen):
    """One call at a time. ``tokens_per_s`` are output tokens by wall time, ``decode_…`` by time in decoding."""

    name: str
    questions: int
    tokens_per_s: float
    decode_tokens_per_s: float
    samples_per_min: float


class Load(Frozen):
    """One preset at one concurrency, of which ``at_once`` runs may overlap; rates as in ``Baseline``.

    The shares are of wall time: prefills with their planning, decoding steps, and keeping and learning.
    ``peak_bytes`` of KV, in live sequences and in stores. ``placed_share`` of shareable slot tokens, and ``reasons``
    why the others were computed, in tokens. ``profile`` where one was asked for; it makes everything a little slower.
    """

    preset: str
    concurrency: int
    at_once: int
    tokens_per_s: float
    decode_tokens_per_s: float
    samples_per_min: float
    prefill_share: float
    decode_share: float
    keep_share: float
    placed_share: float
    calls_shareable: int
    calls_shared: int
    reasons: dict[str, int]
    peak_bytes: int
    ttft_ms: Percentiles
    wall_s: float
    profile: Profile | None = None


class Throughput(Frozen):
    """Figures of one run; every preset on the same questions, the baseline on the first of them."""

    model: str
    dtype: str
    settings: dict[str, Any]
    baseline: Baseline | None
    runs: tuple[Load, ...]


class ScalingPoint(Frozen):
    """One length of prompt and one share of it that was placed as one realigned block; times in milliseconds, medians.

    ``attended`` is the number of pairs of a computed token and a token it attends to: half the square of the length
    where everything is computed. ``matching_share`` (plan, match) and ``realigning_share`` (realign, compose) are of
    ``dense``'s time at this length; ``fitted_ms`` is what ``Fit`` says.
    """

    prompt_tokens: int
    share: float
    placed: int
    computed: int
    attended: int
    bytes_placed: int
    ttft_ms: float
    parts_ms: dict[str, float]
    speedup: float
    matching_share: float
    realigning_share: float
    fitted_ms: float


class Fit(Frozen):
    """Least squares over all points: milliseconds for a prompt, a computed token, attended pairs and placed KV.

    ``worst`` is the largest distance from a measured time, as a share of it.
    """

    base_ms: float
    ms_per_token: float
    ms_per_million_pairs: float
    ms_per_mib: float
    r2: float
    worst: float


class Scaling(Frozen):
    """How the time to first token grows with the prompt."""

    model: str
    dtype: str
    settings: dict[str, Any]
    points: tuple[ScalingPoint, ...]
    fit: Fit
