"""What gates and audits measure: the cost of placing, the distance between two answers, and which calls are checked."""

from __future__ import annotations

import hashlib

import torch

from agentmesh.communicator.base import Plan


def draw(seed: int) -> float:
    """A number in [0, 1) that depends on a call's seed alone."""
    digest = hashlib.sha256(f"audit {seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(wanted ‖ found) in nats of next-token distributions, from logits ``[T, V]``: ``[T]``."""
    log_p = wanted.float().log_softmax(dim=-1)
    log_q = found.float().log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class Costs:
    """Milliseconds for each computed and each placed token, as measured on this machine (METHOD 6.2)."""

    def __init__(self) -> None:
        self._computed = 0.0
        self._placed = 0.0

    def see(self, plan: Plan) -> None:
        """Learn from a prefill that was timed."""
        placed = plan.composition.placed_tokens
        rest = len(plan.composition.tokens) - placed
        self._computed = _smooth(self._computed, plan.parts.forward / rest)
        if placed:
            self._placed = _smooth(self._placed, (plan.parts.realign + plan.parts.compose) / placed)

    @property
    def placing_pays(self) -> bool:
        """Whether placing a token is cheaper than computing it; yes while nothing is measured."""
        return not self._computed or self._placed < self._computed


def _smooth(old: float, new: float) -> float:
    return new if not old else 0.8 * old + 0.2 * new
