"""Arenas that lie side by side in a slab attend in one operation, as long as little of what it computes is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch.nn import functional

from agentmesh.kv.arena import Arena

WASTE = 1.5
"""Tokens, padding included, that arenas may attend over together for each that they would attend over one by one.
Together they use all cores for every token, in one call; see docs/method.md."""


@dataclass(frozen=True)
class Seen:
    """What a step of a group attends over: keys and values ``[S, H, T, D]`` by layer, and a mask ``[S, 1, 1, T]``."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask: torch.Tensor | None


@final
class Group:
    """One arena, or some of one slab, and what a decoding step attends over in them.

    Slots between them that are free, or whose sequences are not in the step, compute in vain.

    Args:
        arenas: each aimed at the row of its next token, in the order of their slots.
    """

    def __init__(self, arenas: Sequence[Arena]) -> None:
        self.arenas = arenas
        self._lengths = [arena.length for arena in arenas]
        self._places = _places(arenas)
        span, slot = self._places[-1] + 1, arenas[0].slot
        if slot is None:
            self._memory = arenas[0].both[None]
        else:
            self._memory = slot.slab.memory[slot.number : slot.number + span]
        self._spread: tuple[torch.Tensor, torch.Tensor] | None = None
        if span > len(arenas):
            sources = [max(index for index, place in enumerate(self._places) if place <= at) for at in range(span)]
            self._spread = torch.tensor(sources), torch.tensor(self._places)
        self._seen: dict[int, Seen] = {}

    def see(self, window: int) -> None:
        """Cut the views for layers whose queries see so many keys."""
        self._seen[window] = self._cut(window)

    def attend(self, layer: int, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of ``query [B, H, Hq / H, D]``, in the same shape."""
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
        if len(self.arenas) == 1 or (self._spread is None and len(set(self._lengths)) == 1):
            return Seen(keys, values, None)
        bounds = torch.tensor([(0, 1)]).repeat(len(self._memory), 1)  # a slot of nobody sees one token, for no result
        bounds[self._places] = torch.tensor(list(zip(begins, self._lengths, strict=True)))
        positions = torch.arange(low, high)
        hidden = (positions < bounds[:, :1]) | (positions >= bounds[:, 1:])
        mask = torch.zeros(hidden.shape, dtype=self._memory.dtype).masked_fill_(hidden, -torch.inf)
        return Seen(keys, values, mask[:, None, None])


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


def grouped(arenas: Sequence[Arena]) -> Iterator[Group]:
    """Groups of arenas that follow each other, as their slots do (``side_by_side``), each as large as pays."""
    group: list[Arena] = []
    for arena in arenas:
        if group and not _pays([*group, arena]):
            yield Group(group)
            group = []
        group.append(arena)
    yield Group(group)


def _pays(arenas: Sequence[Arena]) -> bool:
    """Whether arenas are of one slab, and attend together without too much padding."""
    slabs = [None if arena.slot is None else arena.slot.slab for arena in arenas]
    if any(slab is None or slab is not slabs[0] for slab in slabs):
        return False
    lengths, places = [arena.length for arena in arenas], _places(arenas)
    return places == sorted(places) and (places[-1] + 1) * max(lengths) <= WASTE * sum(lengths)


def _places(arenas: Sequence[Arena]) -> list[int]:
    """How many slots after the first one each arena lies."""
    numbers = [0 if arena.slot is None else arena.slot.number for arena in arenas]
    return [number - numbers[0] for number in numbers]
