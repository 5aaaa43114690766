"""Many arenas at once: the next token of every sequence in one pass over the weights.

Sequences keep their own arenas and lengths. The model's matrix products see all of them at once; each attends over
its own arena, alone or with neighbours. ``BatchCache`` is what transformers' own code takes for this.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, final

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from agentmesh.engine.group import grouped
from agentmesh.engine.operations import Mark
from agentmesh.engine.spans import Spans
from agentmesh.kv.arena import Arena
from agentmesh.kv.slab import Bits, bits_of


@final
class NextRows:
    """The rows of several arenas that one decoding step writes, and the keys and values that it attends over.

    Views of all layers are cut once for the step: cutting them layer by layer takes longer than attending. On a CPU
    numpy writes the rows, in little more than half of torch's time.

    Args:
        arenas: one a sequence, each aimed at the row of its next token; see ``side_by_side``.
        spans: notes where the time goes.
        spare: how many rows the step has beyond theirs.

    Attributes:
        rows: the row of each arena in the step; the others are spare.
    """

    def __init__(self, arenas: Sequence[Arena], spans: Spans, spare: int = 0) -> None:
        self._shape = arenas[0].shape
        self._spans = spans
        self._groups = grouped(arenas, spare)
        counts = [group.rows for group in self._groups]
        begins = [sum(counts[:index]) for index in range(len(counts))]
        self.rows = [begin + at for begin, group in zip(begins, self._groups, strict=True) for at in group.places]
        self._counts = [*counts, len(arenas) + spare - sum(counts)]
        self._windows: set[int] = set()
        self._on_cpu: list[Bits] = []
        self._on_device: list[tuple[torch.Tensor, ...]] = []
        if self._shape.device.type == "cpu":
            self._on_cpu = [arena.bits[:, :, :, arena.length - 1] for arena in arenas]
        else:
            new = (arena.both[:, :, :, arena.length - 1].unbind(1) for arena in arenas)
            self._on_device = list(zip(*new, strict=True))

    def write(self, layer: int, heads: torch.Tensor) -> None:
        """Write one row to each arena: the last ``2 H`` of ``heads [R, …, D]``, its keys and values."""
        with self._spans.mark(Mark.CACHE):
            pairs = 2, self._shape.heads, heads.shape[-1]
            if self._on_device:
                rows = heads[: len(self.rows), -2 * pairs[1] :].reshape(-1, *pairs)
                torch._foreach_copy_(self._on_device[layer], rows.unbind(0))
                return
            bits = bits_of(heads)[:, -2 * pairs[1] :].reshape(-1, *pairs)
            for new, row in zip(self._on_cpu, self.rows, strict=True):
                new[:, layer] = bits[row]

    def attend(self, layer: int, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of ``query [R, H, Hq / H, D]``, each row over its own last ``window`` keys; the same shape.

        Query heads of one kv head are the rows of one product, so keys are read once and never repeated. What comes
        for spare rows means nothing.
        """
        if window not in self._windows:
            self._windows.add(window)
            with self._spans.mark(Mark.CACHE):
                for group in self._groups:
                    group.see(window)
        with self._spans.mark(Mark.ATTENTION):
            if len(self._groups) == 1 and not self._counts[-1]:
                return self._groups[0].attend(layer, query, window, scale)
            *given, spare = query.split_with_sizes(self._counts)
            mixed = [group.attend(layer, one, window, scale) for group, one in zip(self._groups, given, strict=True)]
            return torch.cat((*mixed, spare))


class BatchLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer of several arenas; each gets one row."""

    is_sliding = False

    def __init__(self, cache: BatchCache, layer: int) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # the cache owns its layers: no cycle keeps arenas alive
        self.layer = layer
        self.is_initialized = True

    @property
    def cache(self) -> BatchCache:
        """The cache that it is a layer of."""
        found = self._cache()
        assert found is not None, "a cache outlives its layers' use"
        return found

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
        self._shape = arenas[0].shape
        self._rows = NextRows(arenas, spans)
        self._layer = 0
        super().__init__(layers=[BatchLayer(self, layer) for layer in range(self._shape.layers)])

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the rows ``[B, H, 1, D]`` of the layer that runs now."""
        self._layer = layer
        self._rows.write(layer, torch.cat((keys, values), dim=1).squeeze(2))

    def attend(self, query: torch.Tensor, window: int, scale: float | None) -> torch.Tensor:
        """Attention of ``query [B, Hq, 1, D]``, each row over its own last ``window`` keys; ``[B, 1, Hq, D]``."""
        heads = query.view(len(query), self._shape.heads, -1, query.shape[-1])
        return self._rows.attend(self._layer, heads, window, scale).flatten(1, 2)[:, None]
