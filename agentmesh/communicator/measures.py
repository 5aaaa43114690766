"""What gates and audits measure: the cost of placing, the distance between two answers, and which calls are checked."""

from __future__ import annotations

import hashlib
from collections import deque
from statistics import median

import torch

from agentmesh.engine.composition import Parts


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
    """Milliseconds for each computed and each placed token, as measured on this machine (METHOD 6.2).

    Medians of the last prefills, so that one slow moment of the machine decides nothing; where placing does not
    pay, some call now and then is placed all the same: what was measured once need not hold for ever.
    """

    ENOUGH = 5
    WINDOW = 15
    TRY_AGAIN = 32

    def __init__(self) -> None:
        self._computed: deque[float] = deque(maxlen=self.WINDOW)
        self._placed: deque[float] = deque(maxlen=self.WINDOW)
        self._refused = 0

    def see(self, parts: Parts, computed: int, placed: int) -> None:
        """Learn from a prefill of so many tokens, if it was timed."""
        if not parts.forward:
            return
        self._computed.append(parts.forward / computed)
        if placed:
            self._placed.append((parts.realign + parts.compose) / placed)

    def placing_pays(self) -> bool:
        """Whether placing a token is cheaper than computing it; yes with too few measurements, or to measure again."""
        if len(self._placed) < self.ENOUGH or median(self._placed) < median(self._computed):
            return True
        self._refused = (self._refused + 1) % self.TRY_AGAIN
        return not self._refused
