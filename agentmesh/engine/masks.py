"""Attention masks for computed tokens at any positions: a key is seen when it is not in the query's future.

``mask[q, k] = key position ≤ query position``, and inside a sliding window also ``key position > query - window``.
Correct for scattered positions, where transformers' own masks (derived from the cache's length) are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

UNLIMITED = 1 << 40
"""Width of a stand-in mask where a layer sees everything."""

SLIDING = "sliding_attention"

Masks = torch.Tensor | dict[str, torch.Tensor]


def windows_of(config: Any) -> list[int | None]:
    """How many keys each layer's queries see, ``None`` for all; without layer types, one window for every layer."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers
    return [window if kind == SLIDING else None for kind in types]


@dataclass(frozen=True)
class MaskPlan:
    """Which masks a model wants.

    Args:
        windows: layer type → window in tokens, ``None`` for full attention.
        by_type: whether the model takes one mask for each layer type (a dict) or one mask for all layers.
        dtype: of the scores, which a mask is added to. A boolean mask would be turned into this anew by every layer.
    """

    windows: dict[str, int | None]
    by_type: bool
    dtype: torch.dtype

    def build(self, positions: torch.Tensor, length: int) -> Masks:
        """Masks ``[1, 1, T, length]`` for queries at ``positions [T]``: 0 where seen, else the lowest number."""
        keys = torch.arange(length, device=positions.device)[None, :]
        causal = keys <= positions[:, None]
        masks = {}
        for kind, window in self.windows.items():
            seen = causal if window is None else causal & (keys > positions[:, None] - window)
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[None, None]
        return self._as_taken(masks)

    def stand_ins(self, device: torch.device) -> Masks:
        """Masks that hold nothing: ``[1, 1, 1, W]`` without memory, as wide as each layer type's window.

        transformers takes them as they are instead of making masks of its own; a batch reads their width.
        """
        nothing = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=device)
        return self._as_taken(
            {kind: nothing.expand(1, 1, 1, window or UNLIMITED) for kind, window in self.windows.items()}
        )

    def _as_taken(self, masks: dict[str, torch.Tensor]) -> Masks:
        """Masks by layer type in the form that the model takes."""
        return masks if self.by_type else next(iter(masks.values()))
