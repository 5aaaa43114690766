"""Slabs: memory for many tensors of one size at regular distances, so that one operation can see several of them."""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

Bits = np.ndarray[Any, np.dtype[Any]]

POPULATE = 23
"""Linux' ``MADV_POPULATE_WRITE`` (since 5.14), for which Python has no name."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number has: numpy knows no bfloat16."""


def bits_of(numbers: torch.Tensor) -> Bits:
    """Numbers on the CPU as numpy sees their bits; the same memory."""
    return numbers.view(BITS[numbers.dtype.itemsize]).numpy()


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one tensor in a slab: taken as long as anybody holds the tensor or a view of it."""

    slab: Slab
    number: int
    memory: torch.Tensor

    def claim(self, run: int, part: slice) -> None:
        """Get the pages of some bytes of each ``run`` now: together they take half of the time."""
        self.slab.claim(self.number, run, part)


@final
class Slab:
    """Slots for tensors on the CPU, ``memory [S, …]``.

    It takes up only what was written to or claimed: the system gives a page of zeros when one is first touched, and
    gets the pages of a slot back when the last view of its tensor is gone. So what nobody has written is zero.

    Args:
        size: of one tensor; ``fits`` says whether slabs can be made of such.
        dtype: its numbers.
        slots: how many there are.
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, slots: int) -> None:
        self._slot_bytes = math.prod(size) * dtype.itemsize
        self._map = mmap.mmap(-1, slots * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = torch.frombuffer(self._map, dtype=dtype).view(slots, *size)
        self._bits = bits_of(self.memory)
        self._free = set(range(slots))
        self._claims = sys.platform == "linux"

    @staticmethod
    def fits(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the system can give and take the pages of single slots: on a CPU, for whole pages, not on Windows."""
        whole = math.prod(size) * dtype.itemsize % mmap.PAGESIZE == 0
        return device.type == "cpu" and whole and hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MAP_ANONYMOUS")

    def take(self) -> Slot | None:
        """The first free slot, if there is one: so those that are taken lie close together."""
        if not self._free:
            return None
        number = min(self._free)
        self._free.remove(number)
        bits = self._bits[number]  # torch keeps this array as long as any view of the tensor below
        gone = weakref.finalize(bits, _empty, self._map, self._free, number, self._slot_bytes)
        gone.atexit = False
        return Slot(self, number, torch.from_numpy(bits).view(self.memory.dtype))

    def claim(self, number: int, run: int, part: slice) -> None:
        """See ``Slot.claim``; where the system cannot, pages come as they are touched."""
        if not self._claims or run % mmap.PAGESIZE:
            return
        begin, low = number * self._slot_bytes, part.start - part.start % mmap.PAGESIZE
        try:
            for offset in range(begin, begin + self._slot_bytes, run):
                self._map.madvise(POPULATE, offset + low, part.stop - low)
        except OSError:
            self._claims = False


def _empty(whole: mmap.mmap, free: set[int], number: int, slot_bytes: int) -> None:
    """Free a slot, and what it takes up."""
    whole.madvise(mmap.MADV_DONTNEED, number * slot_bytes, slot_bytes)
    free.add(number)
