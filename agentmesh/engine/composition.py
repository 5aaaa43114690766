"""What one prefill is made of: tokens, what is placed, and where the computing is cut."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

from typing_extensions import Self

from agentmesh.kv.arena import Arena
from agentmesh.kv.values import KVSource

AT_ONCE = {"cpu": 1024, "cuda": 4096}
"""Tokens of a prompt that one forward computes at most, by type of device, so that others can get their turn behind it.

On a fast CUDA device launching a forward's kernels takes as long as computing a thousand tokens (docs/figures.md).
"""


@dataclass(frozen=True)
class Placement:
    """KV that goes to positions ``start`` … ``stop`` of a prompt instead of being computed."""

    start: int
    kv: KVSource

    @property
    def stop(self) -> int:
        """Position after the last placed token."""
        return self.start + self.kv.tokens


@dataclass
class Parts:
    """Where the time before a first token went, in milliseconds (docs/method.md, 6.5).

    ``plan``: deciding, without the next; ``match``: looking into stores and at the cache; ``realign``: making placed
    rows; ``compose``: rotating and copying them; ``forward``: the model.
    """

    plan: float = 0.0
    match: float = 0.0
    realign: float = 0.0
    compose: float = 0.0
    forward: float = 0.0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time that a block of code takes to one part."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + (time.perf_counter() - begun) * 1e3)


@dataclass(frozen=True)
class Composition:
    """One prompt's prefill: every token is placed or computed (docs/method.md, 1).

    Args:
        tokens: the whole prompt's token ids.
        placed: placements in ascending order, without overlap; the last token is never placed.
        recomputed: positions inside placements that are computed all the same; their rows are overwritten before
            anybody reads them, which is cheaper than cutting placements into pieces.
        cuts: positions between which computed tokens go through the model in separate forwards, ascending. Reuse
            is bit-exact only when a prompt is cut at the same points with and without a hit, because the shape of a
            matrix product decides the order of its sums. No cut: one forward.
        ready: an arena of a look at the cache that holds everything that is placed; it is copied instead of made again.
    """

    tokens: tuple[int, ...]
    placed: tuple[Placement, ...] = ()
    cuts: tuple[int, ...] = ()
    recomputed: frozenset[int] = frozenset()
    ready: Arena | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.tokens, "a prompt has at least one token"
        ends = [0, *(piece.stop for piece in self.placed)]
        assert all(piece.start >= end for piece, end in zip(self.placed, ends, strict=False)), "placements overlap"
        assert ends[-1] < len(self.tokens), "the last token is always computed"
        assert list(self.cuts) == sorted(set(self.cuts)), "cuts ascend"
        assert all(0 < cut < len(self.tokens) for cut in self.cuts), "cuts lie inside the prompt"

    @property
    def placed_tokens(self) -> int:
        """How many tokens are placed."""
        return sum(piece.kv.tokens for piece in self.placed) - len(self.recomputed)

    def without_kv(self) -> Self:
        """The same tokens and cuts with nothing placed: it keeps no KV alive."""
        return replace(self, placed=(), recomputed=frozenset(), ready=None)

    @property
    def computed(self) -> list[int]:
        """Positions that are computed, ascending."""
        covered = {position for piece in self.placed for position in range(piece.start, piece.stop)}
        covered -= self.recomputed
        return [position for position in range(len(self.tokens)) if position not in covered]

    def chunks(self, device: str) -> list[list[int]]:
        """Computed positions of each forward on a type of device, ascending; the last one ends with the last position.

        What lies between two cuts is in as few forwards of at most ``AT_ONCE`` as will do, all of about one size: a few
        tokens left over for a forward of their own would read all weights once more. A hit that ends at a cut changes
        no other forward.
        """
        computed = self.computed
        edges = [bisect_left(computed, cut) for cut in (0, *self.cuts, len(self.tokens))]
        parts = [computed[low:high] for low, high in pairwise(edges)]
        return [chunk for part in parts for chunk in _evenly(part, AT_ONCE[device])]


def _evenly(part: list[int], most: int) -> Iterator[list[int]]:
    """A list in as few pieces of at most so many as will do, none longer than another by more than one."""
    pieces = -(-len(part) // most)
    for piece in range(pieces):
        yield part[piece * len(part) // pieces : (piece + 1) * len(part) // pieces]
