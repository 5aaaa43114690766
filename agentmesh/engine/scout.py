"""Forwards beside the live sequence: looks at the cache before a prefill is decided, and dense checks afterwards.

The time of looks counts in TTFT. They write into arenas of their own; a check has its call's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from agentmesh.config.presets import Picking
from agentmesh.engine.attention import AttentionWatch, TextWatch, is_grouped
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.slices import Slices
from agentmesh.kv.arena import Arena

LOOK_LAYERS = 2
SINKS = 4

ASKING = 28
"""Queries of a look at the attention: more of them, of a long question, take time and pick nearly the same tokens.

With the sinks they are 32 rows, which a CPU multiplies in three quarters of the time of 36 (docs/figures.md).
"""


class _LookedEnough(Exception):  # noqa: N818  # it stops a forward early and is no error
    """Raised in front of the first layer that a look does not need."""


@dataclass(frozen=True)
class Look:
    """What a look saw: a score of every position, fp32 ``[T]``, and the arena in which everything was placed for it."""

    scores: torch.Tensor
    arena: Arena | None = None


@dataclass(frozen=True)
class Scout:
    """Looks and checks with one model.

    Args:
        runner: runs the model over arenas.
    """

    runner: ArenaRunner

    def can(self, by: Picking) -> bool:
        """Whether the model allows a look: at an attention that can be watched, or at one of more than two layers."""
        if by is Picking.ATTENTION:
            return is_grouped(self.runner.model)
        return self.runner.shape.layers > LOOK_LAYERS

    def composed(self, cache: ArenaCache, composition: Composition) -> Slices[torch.Tensor]:
        """Fill a cache, whose rows nobody needs any more, as a composition says; logits ``[V]`` of its last token."""
        return (yield from self.runner.begin(cache, composition).in_slices())

    def passage(self, cache: ArenaCache, header: Sequence[int], tokens: Sequence[int]) -> Slices[torch.Tensor | None]:
        """Fill a cache with a passage behind a header.

        Returns:
            What later text of the passage takes from each of its tokens, fp32 ``[T]``; ``None`` where the model's
            attention cannot be watched.
        """
        watch = TextWatch(len(header), len(tokens)) if self.can(Picking.ATTENTION) else None
        options = {} if watch is None else {"agentmesh_watch": watch}
        whole = Composition((*header, *tokens))
        for number, chunk in enumerate(whole.chunks(self.runner.shape.device.type)):
            if number:
                yield
            self.runner.run(cache, [whole.tokens[position] for position in chunk], chunk, keep=1, **options)
        return None if watch is None else watch.total

    @torch.inference_mode()
    def deviation(self, composition: Composition) -> Look:
        """How far placed keys are from computed ones in the second layer: their squared distance.

        Every token behind the first placement goes through the first two layers (CacheBlend, arXiv 2405.16444); tokens
        that are not placed get 0.
        """
        runner, begin = self.runner, composition.placed[0].stop if self._exact_lead(composition) else 0
        assert runner.rope is not None, "KV is placed in models with a known rotation only"
        rope, layers = runner.rope, slice(0, LOOK_LAYERS)
        arena = Arena(replace(runner.shape, layers=LOOK_LAYERS), len(composition.tokens))
        for piece in composition.placed:
            arena.place(piece.start, piece.kv.fetch(layers), rope, layers)
        placed = arena.keys[-1].clone()
        self._run_layers(ArenaCache(arena, runner.spans), composition.tokens, range(begin, len(composition.tokens)))
        distance = (arena.keys[-1].float() - placed.float()).square().sum(dim=(0, 2))
        seen = torch.zeros(len(composition.tokens), dtype=torch.bool, device=distance.device)
        for piece in composition.placed:
            seen[max(piece.start, begin) : piece.stop] = True
        return Look(torch.where(seen, distance, 0.0))

    @torch.inference_mode()
    def attention(self, composition: Composition, queries: Sequence[int]) -> Look:
        """What the last tokens at ``queries`` take from every position: attention times its value's norm, summed.

        Placed tokens are there to be seen, the queries themselves, and the prompt's first tokens, which models attend
        to whenever nothing else fits: without them everything else gets too much. Rows of other tokens are zero: they
        have no value to give, but take a little of the attention.
        """
        queries = queries[-ASKING:]
        covered = {position for piece in composition.placed[:1] for position in range(piece.start, piece.stop)}
        sinks = [position for position in range(min(SINKS, queries[0])) if position not in covered]
        positions = [*sinks, *queries]
        cache = self.runner.open(len(composition.tokens))
        cache.arena.both.zero_()
        for piece in composition.placed:
            cache.arena.place(piece.start, piece.kv.fetch(), self.runner.rope)
        watch = AttentionWatch(skip=len(sinks))
        tokens = [composition.tokens[position] for position in positions]
        self.runner.run(cache, tokens, positions, keep=1, agentmesh_watch=watch)
        found = torch.zeros(len(composition.tokens), device=self.runner.shape.device)
        found[: len(watch.total)] = watch.total
        return Look(found, cache.arena)

    @staticmethod
    def _exact_lead(composition: Composition) -> bool:
        return bool(composition.placed) and composition.placed[0].start == 0

    def _run_layers(self, cache: ArenaCache, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Run the first layers only."""
        handle = decoder_layers(self.runner.model)[LOOK_LAYERS].register_forward_pre_hook(_stop)
        try:
            self.runner.run(cache, [tokens[position] for position in positions], positions, keep=1)
        except _LookedEnough:
            return
        finally:
            handle.remove()


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The model's decoder layers: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def _stop(_module: torch.nn.Module, _arguments: Any) -> None:
    raise _LookedEnough
