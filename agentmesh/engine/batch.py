"""Many arenas at once: the next token of every sequence in one pass over the weights.

Sequences keep their own arenas and lengths. The model's matrix products see all of them at once; each attends over
its own arena, so nothing is padded and no mask is made. ``BatchCache`` is what transformers' own code takes for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

from agentmesh.engine.operations import Mark
from agentmesh.engine.spans import Spans
from agentmesh.kv.arena import Arena

Views = list[tuple[torch.Tensor, ...]]
"""Views of several arenas and all layers."""

Bits = np.ndarray[Any, np.dtype[Any]]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number has: numpy knows no bfloat16."""


@final
class NextRows:
    """The rows of several arenas that one decoding step writes, and the keys and values that it attends over.

    Views of all layers are cut once for the step: cutting them layer by layer takes longer than attending. On a CPU
    numpy writes the rows, in little more than half of torch's time.

    Args:
        arenas: one a sequence, each aimed at the row of its next token.
        spans: notes where the time goes.
    """

    def __init__(self, arenas: Sequence[Arena], spans: Spans) -> None:
        self.arenas = arenas
        self._spans = spans
        new = [arena.both[:, :, :, arena.length - 1] for arena in arenas]
        self._on_cpu = new[0].device.type == "cpu"
        self._new: list[Bits] = [_bits(row) for row in new] if self._on_cpu else []
        self._on_device: Views = [] if self._on_cpu else list(zip(*(row.unbind(1) for row in new), strict=True))
        self._seen: dict[int, Views] = {}

    def write(self, layer: int, heads: torch.Tensor) -> None:
        """Write one row to each arena: the last ``2 H`` of ``heads [≥ B, …, D]``, its keys and values."""
        with self._spans.mark(Mark.CACHE):
            pairs = 2, self.arenas[0].shape.heads, heads.shape[-1]
            if not self._on_cpu:
                rows = heads[: len(self.arenas), -2 * pairs[1] :].reshape(-1, *pairs)
                torch._foreach_copy_(self._on_device[layer], rows.unbind(0))
                return
            bits = _bits(heads)[:, -2 * pairs[1] :].reshape(-1, *pairs)
            for new, row in zip(self._new, bits, strict=False):
                new[:, layer] = row

    def attend(self, layer: int, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of ``query [≥ B, Hq, D]``, each row over its own last ``window`` keys; ``[≥ B, H, Hq / H, D]``.

        Query heads of one kv head are the rows of one product, so keys are read once and never repeated. Spare rows
        attend to nothing and get zeros.
        """
        if window not in self._seen:
            with self._spans.mark(Mark.CACHE):
                self._seen[window] = [_views(arena, window) for arena in self.arenas]
        shape = self.arenas[0].shape
        with self._spans.mark(Mark.ATTENTION):
            grouped = query.view(query.shape[0], 1, shape.heads, -1, query.shape[-1]).unbind(0)
            mixed = [
                functional.scaled_dot_product_attention(one, seen[layer], seen[shape.layers + layer], scale=scale)
                for one, seen in zip(grouped, self._seen[window], strict=False)
            ]
            if len(grouped) > len(mixed):
                mixed.append(query.new_zeros((len(grouped) - len(mixed), *mixed[0].shape[1:])))
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class BatchLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer of several arenas; each gets one row."""

    is_sliding = False

    def __init__(self, cache: BatchCache, layer: int) -> None:
        super().__init__()
        self.cache = cache
        self.layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the arenas are allocated before the model runs."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows ``[B, H, 1, D]``, one to each arena; the attention takes its keys from the cache."""
        self.cache.write(self.layer, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """The longest sequence, without the token that is running."""
        return self.cache.longest - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover."""
        return self.cache.longest - 1 + query_length, 0

    def get_max_length(self) -> int:
        """Rows of the largest arena."""
        return max(arena.capacity for arena in self.cache.arenas)


class BatchCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """The ``past_key_values`` of one decoding step of several sequences.

    Args:
        arenas: one a sequence, each aimed at the row of its next token.
        spans: notes where the time goes.
    """

    def __init__(self, arenas: Sequence[Arena], spans: Spans) -> None:
        self.arenas = arenas
        self.longest = max(arena.length for arena in arenas)
        self._rows = NextRows(arenas, spans)
        self._layer = 0
        super().__init__(layers=[BatchLayer(self, layer) for layer in range(arenas[0].shape.layers)])

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the rows ``[B, H, 1, D]`` of the layer that runs now."""
        self._layer = layer
        self._rows.write(layer, torch.cat((keys, values), dim=1).squeeze(2))

    def attend(self, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of ``query [B, Hq, 1, D]``, each row over its own last ``window`` keys; ``[B, 1, Hq, D]``."""
        return self._rows.attend(self._layer, query.squeeze(2), window, scale).flatten(1, 2)[:, None]


def _bits(rows: torch.Tensor) -> Bits:
    """Numbers on the CPU as numpy sees their bits; the same memory."""
    return rows.view(BITS[rows.dtype.itemsize]).numpy()


def _views(arena: Arena, last: int) -> tuple[torch.Tensor, ...]:
    """Keys of all layers ``[1, H, …, D]`` of an arena's last visible tokens, and then all values."""
    rows = slice(max(0, arena.length - last), arena.length)
    return arena.both[:, :, :, rows].flatten(0, 1).unsqueeze(1).unbind(0)
