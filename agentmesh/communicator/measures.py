"""What gates and audits measure: the cost of placing, the distance between two answers, and which calls are checked."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from statistics import median

import torch

from agentmesh.engine.composition import Parts


def draw(seed: int, tokens: Sequence[int]) -> float:
    """A number in [0, 1) that depends on a call's seed and prompt alone: runs share their seeds."""
    digest = hashlib.sha256(f"audit {seed} ".encode() + array("q", tokens).tobytes()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(wanted ‖ found) in nats of next-token distributions, from logits ``[T, V]``: ``[T]``."""
    log_p = wanted.float().log_softmax(dim=-1)
    log_q = found.float().log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@dataclass(frozen=True)
class Line:
    """Milliseconds that some tokens take: ``start`` whatever their number, and ``slope`` for each of them."""

    start: float
    slope: float

    def of(self, tokens: int) -> float:
        """Milliseconds for so many tokens."""
        return self.start + self.slope * tokens

    @staticmethod
    def through(points: Sequence[tuple[int, float]]) -> Line:
        """The line that most points ``(tokens, ms)`` lie near (Theil and Sen): medians, so that a few may be far off.

        Slopes count by how far apart their points are, and no tokens take no time: points of nearly one size, whose
        differences are noise, do not say much of a slope among themselves.
        """
        pairs = combinations([(0, 0.0), *points], 2)
        slopes = sorted(((b[1] - a[1]) / (b[0] - a[0]), abs(b[0] - a[0])) for a, b in pairs if a[0] != b[0])
        reached = list(accumulate(weight for _, weight in slopes))
        slope = max(slopes[bisect_left(reached, reached[-1] / 2)][0], 0.0)
        return Line(max(median(ms - slope * tokens for tokens, ms in points), 0.0), slope)


class Costs:
    """What computing and placing tokens takes on this machine, as measured (docs/method.md, 6.2).

    Placing has a price of its own however few tokens it is, so short prompts may be cheaper computed. Lines through the
    last prefills, so that one slow moment of the machine decides nothing; where placing does not pay, some call now and
    then is placed all the same, and half of what was measured before is forgotten: it need not hold for ever.
    """

    ENOUGH = 5
    WINDOW = 20
    TRY_AGAIN = 32

    def __init__(self) -> None:
        self._computed: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)
        self._placed: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)
        self._refused = 0

    def see(self, parts: Parts, computed: int, placed: int, look_ms: float = 0.0) -> None:
        """Learn from a prefill, if it was timed.

        Args:
            parts: what it took.
            computed: tokens that were computed.
            placed: tokens that were placed behind an exact prefix, whose rows are copied and tell nothing of that.
            look_ms: what picking tokens to be computed took before.
        """
        if not parts.forward:
            return
        self._computed.append((computed, parts.forward))
        if placed:
            self._placed.append((placed, look_ms + parts.realign + parts.compose))

    def placing_pays(self, tokens: int) -> bool:
        """Whether placing so many tokens takes less than computing them; yes where that is to be measured."""
        if len(self._placed) < self.ENOUGH:
            return True
        if Line.through(self._placed).of(tokens) < Line.through(self._computed).slope * tokens:
            return True
        self._refused = (self._refused + 1) % self.TRY_AGAIN
        if self._refused:
            return False
        for _ in range(min(len(self._placed) // 2, len(self._placed) - self.ENOUGH)):
            self._placed.popleft()
        return True
