"""Where a model's arenas come from and go back to."""

from __future__ import annotations

from typing import final
from weakref import WeakSet, finalize

from agentmesh.kv.arena import Arena, KVShape
from agentmesh.kv.slab import Slab, Slot

SLOTS = 16
"""Arenas of one slab, at most."""

SLAB_BYTES = 2**29
"""Bytes that a slab may span. Long sequences get slabs of fewer arenas: they gain little by being seen together."""

SMALLEST = 512
"""Tokens of the smallest slots; the next ones have twice as many."""

SPARE, SPARE_BYTES = 2, 2**26
"""How many arenas that were given back are kept whatever their size, and up to how many bytes more of them are."""


@final
class ArenaPool:
    """Opens arenas, and keeps some that were given back: fresh memory costs as much time as filling it does.

    On the CPU arenas of similar capacity lie in one slab, so that a decoding step can see many of them at once.
    """

    def __init__(self) -> None:
        self._spare: list[Arena] = []
        self._lent: dict[int, int] = {}
        self._slabs: dict[int, WeakSet[Slab]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas that wait to be used again."""
        return sum(arena.nbytes for arena in self._spare)

    @property
    def lent_bytes(self) -> int:
        """Bytes of all arenas that were opened and neither given back nor forgotten."""
        return sum(self._lent.values())

    def clear(self) -> int:
        """Free all that wait; their bytes."""
        freed, self._spare = self.nbytes, []
        return freed

    def need(self, shape: KVShape, capacity: int) -> int:
        """Bytes that ``open`` would add: none where an arena that was given back fits."""
        return 0 if self._fitting(capacity) else capacity * shape.bytes_per_token

    def open(self, shape: KVShape, capacity: int) -> Arena:
        """An empty arena of at least ``capacity`` tokens: one that was given back, or a fresh one."""
        fitting = self._fitting(capacity)
        if fitting:
            found = min(fitting, key=lambda arena: arena.capacity)
            self._spare.remove(found)
            found.aim(slice(0, 0), 0)
        else:
            found = Arena(shape, capacity, self._slot(shape, capacity))
            finalize(found, self._lent.pop, id(found), None).atexit = False
        self._lent[id(found)] = found.nbytes
        return found

    def give(self, arena: Arena) -> None:
        """Keep an arena, instead of the smallest ones where there are too many; nobody may hold a view of it."""
        self._lent.pop(id(arena), None)
        self._spare.append(arena)
        while len(self._spare) > SPARE and self.nbytes > SPARE_BYTES:
            self._spare.remove(min(self._spare, key=lambda one: one.capacity))

    def _fitting(self, capacity: int) -> list[Arena]:
        """Arenas of at least ``capacity`` tokens and at most twice as many."""
        return [arena for arena in self._spare if capacity <= arena.capacity <= 2 * capacity]

    def _slot(self, shape: KVShape, capacity: int) -> Slot | None:
        """A place for an arena; ``None`` where it gets memory of its own."""
        most = max(SMALLEST, 1 << (capacity - 1).bit_length())
        count = min(SLOTS, SLAB_BYTES // (most * shape.bytes_per_token))
        size = shape.size(most)
        if count < 2 or not Slab.fits(size, shape.dtype, shape.device):
            return None
        slabs = self._slabs.setdefault(most, WeakSet())
        found = next((slot for slab in slabs if (slot := slab.take()) is not None), None)
        if found is None:
            try:
                slab = Slab(size, shape.dtype, count)
            except OSError:  # the system promises no more addresses than it has memory for
                return None
            slabs.add(slab)
            found = slab.take()
        return found
