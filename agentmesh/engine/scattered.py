"""The rows of one arena that one forward computes, wherever they stand, and what they attend over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch.nn import functional

from agentmesh.engine.attention import has_flash, rest
from agentmesh.engine.masks import UNLIMITED, mask_of
from agentmesh.engine.operations import Mark
from agentmesh.engine.spans import Spans
from agentmesh.kv.arena import Arena


@final
class ScatteredRows:
    """Tokens of one prompt that are computed behind and between what is placed; see ``NextRows`` for the interface.

    Args:
        arena: aimed at their rows.
        positions: where they stand, ascending.
        group: query heads to a kv head, ``Hq / H``.
        spans: notes where the time goes.

    Attributes:
        rows: the row of each token in the forward; the others are spare.
    """

    def __init__(self, arena: Arena, positions: Sequence[int], group: int, spans: Spans) -> None:
        self._arena = arena
        self._spans = spans
        self._group = group
        self._positions = torch.tensor(positions, device=arena.shape.device).repeat(group)
        together = positions[-1] - positions[0] + 1 == len(positions)
        self._bare = together and has_flash(arena.shape)
        self._masks: dict[int, torch.Tensor] = {}
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        self.rows = list(range(len(positions)))

    def write(self, layer: int, heads: torch.Tensor) -> None:
        """Write a row for each token: the last ``2 H`` of ``heads [R, …, D]``, its keys and values."""
        with self._spans.mark(Mark.CACHE):
            count, pairs = len(self.rows), self._arena.shape.heads
            keys, values = heads[:count, -2 * pairs :].transpose(0, 1).split_with_sizes((pairs, pairs))
            self._seen = self._arena.write_layer(layer, keys[None], values[None])

    def attend(self, _layer: int, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of ``query [R, H, Hq / H, D]``, each row over the keys up to its own; ``[T, …, D]``.

        Query heads of one kv head are rows of one product, so that no key is repeated.
        """
        with self._spans.mark(Mark.ATTENTION):
            assert self._seen is not None, "keys are written before they are seen"
            keys, values = self._seen
            count = len(self.rows)
            if self._bare and window == UNLIMITED:
                return rest(query[:count].flatten(1, 2).transpose(0, 1)[None], keys, values, scale)[0]
            rows = query[:count].permute(1, 2, 0, 3).flatten(1, 2)[None]
            mask = self._mask(window, keys)
            mixed = functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
            return mixed.view(len(mixed[0]), self._group, count, -1).permute(2, 0, 1, 3)

    def _mask(self, window: int, keys: torch.Tensor) -> torch.Tensor:
        if window not in self._masks:
            limit = None if window == UNLIMITED else window
            self._masks[window] = mask_of(self._positions, keys.shape[2], limit, keys.dtype)
        return self._masks[window]
