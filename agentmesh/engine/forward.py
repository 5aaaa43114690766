"""One forward of the model over a cache, of one sequence or of many.

It knows token ids, positions and KV. It knows no prompts, agents or stores. ``ArenaRunner`` serves every model that the
probe accepts; ``PlainRunner`` serves the others whole, over the cache that transformers makes for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from agentmesh.engine.attention import has_flash, is_grouped
from agentmesh.engine.batch import BatchCache
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.group import side_by_side
from agentmesh.engine.masks import MaskPlan, Masks
from agentmesh.engine.operations import Mark, settle
from agentmesh.engine.prefill import Forward, Prefill
from agentmesh.engine.products import Switch
from agentmesh.engine.recorded import AnyStep, RecordedStep
from agentmesh.engine.spans import Part, Spans
from agentmesh.kv.arena import KVShape
from agentmesh.kv.pool import ArenaPool
from agentmesh.kv.rope import Rope

PLACED_AT_ONCE = {"cpu": 6 * 2**20, "cuda": 256 * 2**20}
"""Bytes realigned and placed at once: what a processor's cache holds; a CUDA device waits for launches."""

LAYERS_AT_ONCE = 2
"""Layers placed together at least, whatever their bytes: the few heads of one leave some threads idle."""


@dataclass(frozen=True)
class ArenaRunner:
    """A transformers model and what is needed to run it over arenas.

    Args:
        model: a causal language model in eval mode.
        shape: the size of one token's KV.
        masks: which attention masks the model wants for scattered positions.
        rope: how it rotates keys; ``None`` where that could not be established.
        batches: whether several sequences can decode in one forward.
        switch: how the model's linear layers multiply few rows, where that can be chosen.
        step: decodes in fewer operations than the model's own code, where there is one.
        pool: where arenas come from.
        spans: notes where the time goes, while a profile is on.
    """

    model: Any
    shape: KVShape
    masks: MaskPlan
    rope: Rope | None
    batches: bool = False
    switch: Switch | None = None
    step: AnyStep | None = None
    pool: ArenaPool = field(default_factory=ArenaPool)
    spans: Spans = field(default_factory=Spans)

    def open(self, capacity: int) -> ArenaCache:
        """An arena for one sequence of up to ``capacity`` tokens: one that was given back, or a fresh one."""
        return ArenaCache(self.pool.open(self.shape, capacity), self.spans)

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas, those that wait to be used again included."""
        return self.pool.lent_bytes + self.pool.nbytes

    def size(self, capacity: int) -> int:
        """Bytes of one sequence of so many tokens."""
        return capacity * self.shape.bytes_per_token

    def need(self, capacity: int) -> int:
        """Bytes that ``open`` would allocate: none where an arena that was given back fits."""
        return self.pool.need(self.shape, capacity)

    def side_by_side(self, caches: Sequence[ArenaCache]) -> list[int]:
        """The order in which ``decode`` is fastest: indices of ``caches``."""
        return side_by_side([cache.arena for cache in caches])

    def close(self, cache: ArenaCache) -> None:
        """Give an arena back; nobody may hold a view of it any more."""
        self.pool.give(cache.arena)

    @torch.inference_mode()
    def forward(self, cache: ArenaCache, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Compute tokens at ascending ``positions``; each attends to every earlier position of the arena.

        Returns:
            Logits ``[V]`` at the last of the positions.
        """
        return self.run(cache, tokens, positions, keep=1)[-1]

    @torch.inference_mode()
    def run(
        self, cache: ArenaCache, tokens: Sequence[int], positions: Sequence[int], *, keep: int, **options: Any
    ) -> torch.Tensor:
        """As ``forward``, with logits ``[keep, V]`` at the last ``keep`` positions; ``options`` go to the attention."""
        device = self.shape.device
        first, length = positions[0], positions[-1] + 1
        index = torch.tensor(positions, device=device)
        contiguous = length - first == len(positions)
        cache.arena.aim(slice(first, length) if contiguous else index, length)
        whole = cache.arena.shape.layers == self.shape.layers  # a look runs the first ones
        if isinstance(self.step, RecordedStep) and len(positions) <= self.step.most and whole and not options:
            return self.step.compute(cache.arena, tokens, positions, self.spans, keep)
        cache.begin(first)
        mask: Masks | None = None  # transformers' own: causal, or none for a single token
        if contiguous and not options and self._bare_behind_prefix(first, len(positions)):
            mask, options = self.masks.stand_ins(device), {"agentmesh_rest": True}
        elif not contiguous or (first and len(positions) > 1 and self.rope is not None):
            mask = self.masks.build(index, length)
        ids = torch.tensor([tokens], device=device)
        with nullcontext() if self.switch is None else self.switch.computing(), self.spans.mark(Mark.MODEL):
            output = self.model(
                input_ids=ids,
                position_ids=index[None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
                agentmesh_last=positions,
                **options,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _bare_behind_prefix(self, first: int, count: int) -> bool:
        """Whether the rest of a prompt behind what is cached needs no mask: flash attention has none, and is faster."""
        behind = first > 0 and count > 1 and self.masks.sees_all and self.rope is not None
        return behind and self.batches and is_grouped(self.model) and has_flash(self.shape)

    @torch.inference_mode()
    def decode(self, caches: Sequence[ArenaCache], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Compute one more token of each sequence, at its next position, in one pass over the weights if possible.

        In the order of ``side_by_side`` they attend together where that is faster.

        Returns:
            Logits ``[B, V]``.
        """
        with nullcontext() if self.switch is None else self.switch.decoding(len(caches) if self.batches else 1):
            if not self.batches:
                return _one_by_one(self.forward, caches, tokens, positions)
            return self._together(caches, tokens, positions)

    def _together(self, caches: Sequence[ArenaCache], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        for cache, position in zip(caches, positions, strict=True):
            cache.arena.aim(slice(position, position + 1), position + 1)
        arenas = [cache.arena for cache in caches]
        if self.step is not None:
            return self.step.run(arenas, tokens, positions, self.spans)
        batch = BatchCache(arenas, self.spans)
        device = self.shape.device
        ids = torch.tensor(tokens, device=device)[:, None]
        index = torch.tensor(positions, device=device)[:, None]
        masks = self.masks.stand_ins(device)
        with self.spans.mark(Mark.MODEL):
            output = self.model(
                input_ids=ids,
                position_ids=index,
                attention_mask=masks,
                past_key_values=batch,
                use_cache=True,
                agentmesh_batch=batch,
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _layer_groups(self, tokens: int) -> list[slice]:
        """Layers that are realigned and placed together: few enough for memory that is used again and again."""
        at_once = PLACED_AT_ONCE[self.shape.device.type]
        step = max(LAYERS_AT_ONCE, at_once * self.shape.layers // max(tokens * self.shape.bytes_per_token, 1))
        return [slice(low, low + step) for low in range(0, self.shape.layers, step)]

    def prefill(self, cache: ArenaCache, composition: Composition, parts: Parts | None = None) -> torch.Tensor:
        """Fill an arena with a prompt; as ``begin``, to its end.

        Returns:
            Logits ``[V]`` at the last position of the prompt.
        """
        return self.begin(cache, composition, parts).finish()

    @torch.inference_mode()
    def begin(self, cache: ArenaCache, composition: Composition, parts: Parts | None = None) -> Prefill:
        """Begin to fill an arena with a prompt: placed tokens are copied now (docs/method.md, 1).

        Args:
            cache: one whose rows nobody needs.
            composition: what is placed and where the computing is cut.
            parts: gets the times.
        """
        parts, device = Parts() if parts is None else parts, self.shape.device
        ready = composition.ready if composition.placed else None
        if ready is not None:
            with self.spans.part(Part.COMPOSE), parts.timed("compose"):
                cache.arena.copy(ready, composition.placed[-1].stop)
                settle(device)
        for piece in composition.placed if ready is None else ():
            for layers in self._layer_groups(piece.kv.tokens):
                with self.spans.part(Part.REALIGN), parts.timed("realign"):
                    kv = piece.kv.fetch(layers)
                    settle(device)
                with self.spans.part(Part.COMPOSE), parts.timed("compose"):
                    cache.arena.place(piece.start, kv, self.rope, layers)
                    settle(device)
        return Prefill(cache, composition.tokens, composition.chunks(device.type), self.forward, self.spans, parts)


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a cache that transformers makes: some however long it is, and some for each token."""

    fixed: float = 0.0
    token: float = 0.0

    def of(self, tokens: int) -> int:
        """Bytes of a cache of so many tokens."""
        return int(self.fixed + self.token * tokens)


@dataclass(frozen=True)
class PlainRunner:
    """A model whose KV cannot be sliced: every prompt is one forward over transformers' own cache.

    Args:
        model: a causal language model in eval mode.
        caches: their size, as measured.
        pool: stays empty: nothing that transformers makes is used again.
        spans: notes where the time goes, while a profile is on.
        lent: bytes that each cache which is open may come to, by its id.
    """

    model: Any
    caches: CacheSize = CacheSize()
    pool: ArenaPool = field(default_factory=ArenaPool)
    spans: Spans = field(default_factory=Spans)
    lent: dict[int, int] = field(default_factory=dict)

    @property
    def batches(self) -> bool:
        """Whether several sequences can decode in one forward: never."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all caches that are open, once they are as long as they may get."""
        return sum(self.lent.values())

    def open(self, capacity: int) -> Cache:
        """A fresh cache of the model's own kind."""
        cache = DynamicCache(config=self.model.config)
        self.lent[id(cache)] = self.size(capacity)
        return cache

    def size(self, capacity: int) -> int:
        """Bytes of one sequence of so many tokens."""
        return self.caches.of(capacity)

    def need(self, capacity: int) -> int:
        """As much: nothing is used again."""
        return self.size(capacity)

    def side_by_side(self, caches: Sequence[Cache]) -> list[int]:
        """Any order is as good as another."""
        return list(range(len(caches)))

    def close(self, cache: Cache) -> None:
        """Nothing is reused."""
        self.lent.pop(id(cache))

    @torch.inference_mode()
    def forward(self, cache: Cache, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Append tokens at the end of the cache; logits ``[V]`` at the last one."""
        device = self.model.device
        ids, index = (torch.tensor([list(one)], device=device) for one in (tokens, positions))
        with self.spans.mark(Mark.MODEL):
            output = self.model(
                input_ids=ids, position_ids=index, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def decode(self, caches: Sequence[Cache], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Append one token to each cache, one after the other; logits ``[B, V]``."""
        return _one_by_one(self.forward, caches, tokens, positions)

    def begin(self, cache: Cache, composition: Composition, parts: Parts | None = None) -> Prefill:
        """Begin to compute a whole prompt, in one forward."""
        assert not composition.placed, "nothing can be placed in this model's cache"
        whole = range(len(composition.tokens))
        return Prefill(cache, composition.tokens, [whole], self.forward, self.spans, parts or Parts())


def _one_by_one(
    forward: Forward,
    caches: Sequence[Cache],
    tokens: Sequence[int],
    positions: Sequence[int],
) -> torch.Tensor:
    """One more token of each sequence, one forward after the other; logits ``[B, V]``."""
    rows = zip(caches, tokens, positions, strict=True)
    return torch.stack([forward(cache, (token,), (position,)) for cache, token, position in rows])


Runner = ArenaRunner | PlainRunner
