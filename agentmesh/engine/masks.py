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

ALIGNED = 8
"""On CUDA devices rows of a mask begin at multiples of so many numbers; fused attention would copy other masks."""

SLIDING = "sliding_attention"

Masks = torch.Tensor | dict[str, torch.Tensor]


def windows_of(config: Any) -> list[int | None]:
    """How many keys each layer's queries see, ``None`` for all; without layer types, one window for every layer."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers
    return [window if kind == SLIDING else None for kind in types]


def mask_of(positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """One mask ``[1, 1, T, length]`` for queries at ``positions [T]``: 0 where seen, else the lowest number.

    Args:
        positions: of the queries.
        length: how many keys there are.
        window: how many of them a query sees; ``None`` for all.
        dtype: of the scores, which the mask is added to.
    """
    keys = torch.arange(length, device=positions.device)[None, :]
    seen = keys <= positions[:, None]
    if window is not None:
        seen &= keys > positions[:, None] - window
    width = length if positions.device.type == "cpu" else -(-length // ALIGNED) * ALIGNED
    mask = torch.zeros((len(positions), width), dtype=dtype, device=positions.device)[:, :length]
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


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
        windows = self.windows.items()
        return self._as_taken({kind: mask_of(positions, length, window, self.dtype) for kind, window in windows})

    @property
    def sees_all(self) -> bool:
        """Whether every query of every layer sees all that lies before it."""
        return set(self.windows.values()) == {None}

    def stand_ins(self, device: torch.device) -> Masks:
        """Masks that hold nothing: ``[1, 1, 1, W]`` without memory, as wide as each layer type's window.

        transformers takes them as they are instead of making masks of its own; a batch reads their width, a prompt's
        rest behind a prefix needs none.
        """
        nothing = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=device)
        return self._as_taken(
            {kind: nothing.expand(1, 1, 1, window or UNLIMITED) for kind, window in self.windows.items()}
        )

    def _as_taken(self, masks: dict[str, torch.Tensor]) -> Masks:
        """Masks by layer type in the form that the model takes."""
        return masks if self.by_type else next(iter(masks.values()))
