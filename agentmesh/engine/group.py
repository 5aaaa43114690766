"""Arenas that lie side by side in a slab attend in one operation, as long as little of what it computes is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch.nn import functional

from agentmesh.kv.arena import Arena

WASTE = 1.5
"""Tokens, padding included, that arenas may attend over together for each that they would attend over one by one.
Together they use all cores for every token, in one call; see docs/figures.md."""


@dataclass(frozen=True)
class Seen:
    """What a step of a group attends over: keys and values ``[S, H, T, D]`` by layer, and a mask ``[S, 1, 1, T]``."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask: torch.Tensor | None


@final
class Group:
    """One arena, or some of one slab, and what a decoding step attends over in them.

    Slots between them that are free, or whose sequences are not in the step, compute in vain: with spare rows of the
    step where there are enough, else with copies of others' rows.

    Args:
        arenas: each aimed at the row of its next token, in the order of their slots.
        spare: how many rows the step has beyond those of its sequences.

    Attributes:
        places: the row of each arena in the group.
        rows: how many rows of the step are the group's.
    """

    def __init__(self, arenas: Sequence[Arena], spare: int) -> None:
        numbers, slot = _numbers(arenas), arenas[0].slot
        places = [number - numbers[0] for number in numbers]
        span = places[-1] + 1
        self._memory = arenas[0].both[None]
        if slot is not None:
            self._memory = slot.slab.memory[slot.number : slot.number + span]
        self._lengths = [arena.length for arena in arenas]
        self._slots = places
        self._spread: tuple[torch.Tensor, torch.Tensor] | None = None
        self.places, self.rows = places, span
        if span - len(arenas) > spare:
            sources = [max(index for index, place in enumerate(places) if place <= at) for at in range(span)]
            self._spread = torch.tensor(sources), torch.tensor(places)
            self.places, self.rows = list(range(len(arenas))), len(arenas)
        self._seen: dict[int, Seen] = {}

    def see(self, window: int) -> None:
        """Cut the views for layers whose queries see so many keys."""
        self._seen[window] = self._cut(window)

    def attend(self, layer: int, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of the group's rows ``query [R, H, Hq / H, D]``, in the same shape."""
        seen = self._seen[window]
        keys, values = seen.keys[layer], seen.values[layer]
        if self._spread is None:
            return functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen.mask, scale=scale)
        sources, places = self._spread
        mixed = functional.scaled_dot_product_attention(query[sources], keys, values, attn_mask=seen.mask, scale=scale)
        return mixed[places]

    def _cut(self, window: int) -> Seen:
        begins = [max(0, length - window) for length in self._lengths]
        low, high = min(begins), max(self._lengths)
        visible = self._memory[:, :, :, :, low:high]
        keys, values = visible[:, 0].unbind(1), visible[:, 1].unbind(1)
        if len(self._memory) == len(self._lengths) and len(set(self._lengths)) == 1:
            return Seen(keys, values, None)
        mask = np.full((len(self._memory), 1, 1, high - low), -np.inf, dtype=np.float32)
        mask[:, :, :, 0] = 0  # what is computed in vain sees any one token
        for slot, begin, end in zip(self._slots, begins, self._lengths, strict=True):
            mask[slot, :, :, : begin - low] = -np.inf
            mask[slot, :, :, begin - low : end - low] = 0
        return Seen(keys, values, torch.from_numpy(mask).to(self._memory.dtype))


def side_by_side(arenas: Sequence[Arena]) -> list[int]:
    """The order in which arenas of one slab follow each other as their slots do: indices of ``arenas``."""
    slabs: dict[int, int] = {}
    for arena in arenas:
        if arena.slot is not None:
            slabs.setdefault(id(arena.slot.slab), len(slabs))

    def place(index: int) -> tuple[int, int]:
        slot = arenas[index].slot
        return (len(slabs), 0) if slot is None else (slabs[id(slot.slab)], slot.number)

    return sorted(range(len(arenas)), key=place)


def grouped(arenas: Sequence[Arena], spare: int = 0) -> list[Group]:
    """Groups of arenas that follow each other, as their slots do (``side_by_side``), each as large as pays.

    Args:
        arenas: of one step.
        spare: how many rows the step has beyond theirs.
    """
    groups: list[Group] = []
    begin, longest, whole = 0, 0, 0
    for end, arena in enumerate(arenas):
        longest, whole = max(longest, arena.length), whole + arena.length
        pays = end == begin or (
            _follows(arenas[end - 1], arena) and _span(arenas[begin], arena) * longest <= WASTE * whole
        )
        if not pays:
            groups.append(Group(arenas[begin:end], spare))
            spare -= groups[-1].rows - (end - begin)
            begin, longest, whole = end, arena.length, arena.length
    return [*groups, Group(arenas[begin:], spare)]


def _follows(one: Arena, other: Arena) -> bool:
    """Whether an arena lies behind another one in the same slab."""
    first, second = one.slot, other.slot
    return first is not None and second is not None and first.slab is second.slab and first.number < second.number


def _span(first: Arena, last: Arena) -> int:
    """How many slots there are from one arena to another one of its slab."""
    low, high = _numbers((first, last))
    return high - low + 1


def _numbers(arenas: Sequence[Arena]) -> list[int]:
    return [0 if arena.slot is None else arena.slot.number for arena in arenas]
