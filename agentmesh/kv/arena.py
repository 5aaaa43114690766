"""The arena: the KV of one live sequence, allocated once and written in place.

It does not know the model, the store, or where positions come from. One sequence owns one arena from the start of its
prefill until it is released; nobody else writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from agentmesh.kv.rope import Rope
from agentmesh.kv.slab import Bits, Slot, bits_of
from agentmesh.kv.values import ALL, KV, Frame

Rows = slice | torch.Tensor


@dataclass(frozen=True)
class KVShape:
    """Size of one token's KV: layers ``L``, kv heads ``H``, head dims ``D``, dtype and device."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize

    def size(self, tokens: int) -> tuple[int, ...]:
        """``[2, L, H, T, D]`` of so many tokens."""
        return 2, self.layers, self.heads, tokens, self.head_dim


class Arena:
    """Keys and values ``[L, H, capacity, D]`` of one sequence, views of ``both [2, L, H, capacity, D]``.

    ``length`` tokens are visible to attention. Rows are aimed first (``aim``), then written layer by layer while the
    model runs (``write_layer``), or all at once from a store (``place``).

    Args:
        shape: of one token's KV.
        capacity: tokens.
        slot: its place in a slab, of at least so many tokens; without one it has memory of its own.
    """

    def __init__(self, shape: KVShape, capacity: int, slot: Slot | None = None) -> None:
        self.shape = shape
        self.capacity = capacity
        self.slot = slot
        own = torch.empty(shape.size(capacity), dtype=shape.dtype, device=shape.device) if slot is None else slot.memory
        self.both = own[:, :, :, :capacity]
        self.keys, self.values = self.both.unbind(0)
        self.length = 0
        self._rows: Rows = slice(0, 0)

    @cached_property
    def bits(self) -> Bits:
        """``both`` as numpy sees it, on a CPU."""
        return bits_of(self.both)

    @property
    def nbytes(self) -> int:
        """Bytes that it may take up."""
        return self.capacity * self.shape.bytes_per_token

    def claim(self, rows: slice) -> None:
        """Have memory for rows, as far as there are so many, before they are written one after the other."""
        stop = min(rows.stop, self.capacity)
        if self.slot is not None and rows.start < stop:
            row = self.shape.head_dim * self.shape.dtype.itemsize
            self.slot.claim(self.slot.memory.shape[3] * row, slice(rows.start * row, stop * row))

    def aim(self, rows: Rows, length: int) -> None:
        """Say where the next forward's rows go and how many tokens it attends over.

        Args:
            rows: a slice, or integer positions ``[T]`` in ascending order.
            length: number of visible tokens during that forward; no row may lie at or beyond it.
        """
        assert length <= self.capacity, f"{length} tokens do not fit an arena of {self.capacity}"
        self._rows = rows
        self.length = length

    def write_layer(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scatter one layer's new rows ``[1, H, T, D]`` at the aimed positions and return the visible views.

        Returns:
            Keys and values ``[1, H, length, D]``, views of the arena.
        """
        if isinstance(self._rows, slice):
            self.keys[layer, :, self._rows] = keys[0]
            self.values[layer, :, self._rows] = values[0]
        else:
            self.keys[layer].index_copy_(1, self._rows, keys[0])
            self.values[layer].index_copy_(1, self._rows, values[0])
        return self.keys[layer : layer + 1, :, : self.length], self.values[layer : layer + 1, :, : self.length]

    def place(self, start: int, kv: KV, rope: Rope | None, layers: slice = ALL) -> None:
        """Copy stored KV to rows ``start`` …, rotating position-free keys to their new positions.

        Args:
            start: first row.
            kv: what to place; in the absolute frame it must have been computed at these very positions.
            rope: the model's rotation; needed for position-free keys only.
            layers: which layers ``kv`` holds.
        """
        stop = start + kv.tokens
        assert stop <= self.capacity, f"rows up to {stop} do not fit an arena of {self.capacity}"
        if kv.frame is Frame.FREE:
            assert rope is not None, "position-free keys need the model's rotation"
            positions = torch.arange(start, stop, device=kv.keys.device)
            rope.of(layers).rotate_into(self.keys[layers, :, start:stop], kv.keys, positions)
        else:
            self.keys[layers, :, start:stop] = kv.keys
        self.values[layers, :, start:stop] = kv.values

    def copy(self, other: Arena, rows: int) -> None:
        """Copy the first rows of another arena."""
        assert rows <= min(self.capacity, other.capacity), f"{rows} rows do not fit"
        self.both[:, :, :, :rows] = other.both[:, :, :, :rows]

    def read(self, start: int, stop: int) -> KV:
        """Rows ``start`` to ``stop`` as they are cached, as a view: copy it (``owned``) to keep it."""
        assert 0 <= start <= stop <= self.length, f"rows {start}:{stop} of {self.length} visible tokens"
        return KV(self.keys[:, :, start:stop], self.values[:, :, start:stop], Frame.ABSOLUTE)

    def read_free(self, start: int, stop: int, rope: Rope) -> KV:
        """Rows ``start`` to ``stop`` with position-free keys, as a copy."""
        view = self.read(start, stop)
        positions = torch.arange(start, stop, device=self.keys.device)
        return KV(rope.unrotate(view.keys, positions), view.values.clone(), Frame.FREE)
