"""One hard limit in bytes for everything that is kept for reuse.

Stores join a budget and ask it for room before they keep something; it makes them give up what is worth least. Eviction
begins when the limit would be passed and goes on down to the low watermark, so that it does not run on every insert; of
what running agents wait for no more is given up than has to be.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol


class Worth(IntEnum):
    """How much a store's entry is worth to those who run; what is worth less is evicted first."""

    IDLE = 0
    """Nothing that runs is known to read it again."""

    LATER = 1
    """It saves time later: prefixes, anchors."""

    AWAITED = 2
    """A run that goes on will read it."""

    TAUGHT = 3
    """What overlapping runs have taught and is not learned yet: given up for a request that has no room otherwise."""


class Store(Protocol):
    """Something that keeps KV or statistics under a budget."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""

    def evict(self, wanted: int, worth: Worth) -> int:
        """Give up entries of one worth until ``wanted`` bytes are free or none is left; the bytes freed."""


class Budget:
    """A hard limit that several stores share.

    Args:
        limit: bytes that all stores hold together at most, whenever they asked for room.
        low: share of the limit down to which eviction goes once it has begun, but for what is awaited.
    """

    def __init__(self, limit: int, low: float = 1.0) -> None:
        self.limit = limit
        self._low = int(limit * low)
        self._stores: list[Store] = []

    @property
    def used(self) -> int:
        """Bytes that all stores hold now."""
        return sum(store.nbytes for store in self._stores)

    def join(self, store: Store, *, first: bool = False) -> None:
        """Count a store from now on; with ``first`` it is asked before others to give up what is worth the same."""
        self._stores.insert(0 if first else len(self._stores), store)

    def room(self, need: int, most: Worth = Worth.AWAITED) -> bool:
        """Make room for ``need`` bytes, giving up nothing that is worth more than ``most``; False where that fails."""
        if need > self.limit:
            return False
        if self.used + need <= self.limit:
            return True
        for worth in (worth for worth in Worth if worth <= most):
            goal = self.limit if worth >= Worth.AWAITED else self._low
            for store in self._stores:
                over = self.used + need - goal
                if over > 0:
                    store.evict(over, worth)
            if self.used + need <= self.limit:
                return True
        return False
