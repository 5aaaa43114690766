"""The arena as a transformers cache: the model's own code writes into it and attends over its views."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from agentmesh.engine.operations import Mark
from agentmesh.engine.spans import Spans
from agentmesh.kv.arena import Arena


class ArenaLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer of an arena behind the interface of a transformers cache layer.

    Every layer keeps all its tokens, sliding-window layers too: their window is enforced by the mask.
    """

    is_sliding = False

    def __init__(self, arena: Arena, layer: int, spans: Spans) -> None:
        super().__init__()
        self.arena = arena
        self.spans = spans
        self.layer = layer
        self.start = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the arena is allocated before the model runs."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scatter rows ``[1, H, T, D]`` at the aimed positions; return the visible ``[1, H, length, D]``."""
        with self.spans.mark(Mark.CACHE):
            return self.arena.write_layer(self.layer, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens before the forward that is running: where transformers lets its positions and masks begin."""
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers."""
        return self.start + query_length, 0

    def get_max_length(self) -> int:
        """Rows the arena was allocated for."""
        return self.arena.capacity


class ArenaCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """All layers of one arena as the ``past_key_values`` of a transformers model."""

    def __init__(self, arena: Arena, spans: Spans) -> None:
        super().__init__(layers=[ArenaLayer(arena, layer, spans) for layer in range(arena.shape.layers)])
        self.arena = arena

    def begin(self, start: int) -> None:
        """Declare how many tokens precede the next forward (used where transformers makes the mask itself)."""
        for layer in self.layers:
            layer.start = start
