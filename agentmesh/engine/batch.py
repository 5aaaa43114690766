"""Many arenas as one transformers cache: the next token of every sequence in one pass over the weights.

Sequences keep their own arenas and lengths. The model's matrix products see all of them at once; each attends over
its own arena, so nothing is padded and no mask is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

from agentmesh.kv.arena import Arena


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
        """Write rows ``[B, H, 1, D]``, one to each arena; the attention takes its keys from the cache's ``views``."""
        self.cache.views = [
            arena.write_layer(self.layer, key_states[row : row + 1], value_states[row : row + 1])
            for row, arena in enumerate(self.cache.arenas)
        ]
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

    Attributes:
        views: keys and values ``[1, H, length, D]`` of every sequence in the layer that is running.
    """

    def __init__(self, arenas: Sequence[Arena]) -> None:
        self.arenas = arenas
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []
        super().__init__(layers=[BatchLayer(self, layer) for layer in range(arenas[0].shape.layers)])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with the one that is running."""
        return max(arena.length for arena in self.arenas)

    def attend(self, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of ``query [B, Hq, 1, D]``, each row over its own last ``window`` keys; ``[B, 1, Hq, D]``.

        Query heads of one kv head are the rows of one product, so keys are read once and never repeated.
        """
        mixed = []
        for row, (keys, values) in enumerate(self.views):
            begin = max(0, keys.shape[2] - window)
            grouped = query[row].view(1, keys.shape[1], -1, query.shape[3])
            mixed.append(
                functional.scaled_dot_product_attention(grouped, keys[:, :, begin:], values[:, :, begin:], scale=scale)
            )
        return torch.cat(mixed).flatten(1, 2)[:, None]
