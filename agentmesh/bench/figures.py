"""What benchmarks give back: plain data, for tables, plots and JSON."""

from __future__ import annotations

from typing import Any

from agentmesh.config.base import Frozen


class AgentFidelity(Frozen):
    """One agent's figures; see ``PresetFidelity``."""

    kl_mean: float
    top1: float
    placed_tokens: int
    slot_tokens: int


class PresetFidelity(Frozen):
    """One preset's figures over the measured questions. KL(dense ‖ preset) in nats a token.

    ``kl_mean``, ``kl_first`` (first tokens), ``kl_p99``, ``ci95`` (bootstrap over questions) and ``top1`` are over the
    calls that share; ``kl_common`` over those that share under every preset. ``slot_tokens`` are shareable,
    ``placed_tokens`` of them were placed; ``computed_tokens`` counts whole prompts of the sharing calls.
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


class Fidelity(Frozen):
    """All presets' figures, and negative controls: what must be worse than ``linear``."""

    model: str
    dtype: str
    n: int
    settings: dict[str, Any]
    presets: dict[str, PresetFidelity]
    controls: dict[str, float]


class PresetTimes(Frozen):
    """One preset's medians over the measured rounds, in milliseconds; by agent, the first one first.

    ``parts_ms`` are sums over the agents of the medians; ``learn_ms`` is the sum over the warm-up rounds of what was
    spent outside TTFT on keeping and learning, ``keep_ms`` the same for one measured round.
    """

    by_agent_ms: tuple[float, ...]
    sum_ms: float
    parts_ms: dict[str, float]
    parts_by_agent_ms: tuple[dict[str, float], ...]
    learn_ms: float
    keep_ms: float
    kv_bytes: int
    placed: tuple[int, ...]
    computed: tuple[int, ...]
    calls_shared: tuple[int, ...]


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
