"""Slabs: memory for many tensors of one size at regular distances, so that one operation can see several of them."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

Bits = np.ndarray[Any, np.dtype[Any]]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number has: numpy knows no bfloat16."""


def bits_of(numbers: torch.Tensor) -> Bits:
    """Numbers on the CPU as numpy sees their bits; the same memory."""
    return numbers.view(BITS[numbers.dtype.itemsize]).numpy()


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one tensor in a slab."""

    slab: Slab
    number: int

    @property
    def memory(self) -> torch.Tensor:
        """The tensor."""
        return self.slab.memory[self.number]

    def empty(self) -> None:
        """Give the place back, and what it takes up; nobody may hold a view of it."""
        self.slab.empty(self.number)


@final
class Slab:
    """Slots for tensors on the CPU, ``memory [S, …]``.

    It takes up only what was written to: the system gives a page of zeros when one is first touched, and gets the pages
    of a slot back when that is emptied. So what nobody has written is zero, or was written before.

    Args:
        size: of one tensor; ``fits`` says whether slabs can be made of such.
        dtype: its numbers.
        slots: how many there are.
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, slots: int) -> None:
        self._slot_bytes = math.prod(size) * dtype.itemsize
        self._map = mmap.mmap(-1, slots * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = torch.frombuffer(self._map, dtype=dtype).view(slots, *size)
        self._free = set(range(slots))

    @staticmethod
    def fits(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the system can give and take the pages of single slots: on a CPU, for whole pages, not on Windows."""
        whole = math.prod(size) * dtype.itemsize % mmap.PAGESIZE == 0
        return device.type == "cpu" and whole and hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MAP_ANONYMOUS")

    @property
    def unused(self) -> bool:
        """Whether no slot is taken."""
        return len(self._free) == len(self.memory)

    def take(self) -> Slot | None:
        """The first free slot, if there is one: so those that are taken lie close together."""
        if not self._free:
            return None
        number = min(self._free)
        self._free.remove(number)
        return Slot(self, number)

    def empty(self, number: int) -> None:
        """Free a slot, and what it takes up."""
        self._free.add(number)
        self._map.madvise(mmap.MADV_DONTNEED, number * self._slot_bytes, self._slot_bytes)
