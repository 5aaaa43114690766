"""A prompt on its way into a cache, one forward after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from transformers.cache_utils import Cache

from agentmesh.engine.composition import Parts
from agentmesh.engine.operations import settle
from agentmesh.engine.slices import Slices, at_once
from agentmesh.engine.spans import Part, Spans

Forward = Callable[[Any, Sequence[int], Sequence[int]], torch.Tensor]
"""Computes tokens at ascending positions in a cache of the runner's kind; logits ``[V]`` at the last one."""


@final
class Prefill:
    """A prompt on its way into a cache: what is placed is there, the rest is computed, one forward after the other.

    Args:
        cache: where it goes.
        tokens: the prompt.
        chunks: positions of each forward.
        forward: computes tokens at positions in a cache; logits ``[V]`` at the last one.
        spans: notes where the time goes.
        parts: gets the times.
    """

    def __init__(
        self,
        cache: Cache,
        tokens: Sequence[int],
        chunks: Iterable[Sequence[int]],
        forward: Forward,
        spans: Spans,
        parts: Parts,
    ) -> None:
        self.cache = cache
        self._tokens = tokens
        self._chunks = deque(chunks)
        self._forward = forward
        self._spans = spans
        self._parts = parts
        self._logits: torch.Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether everything is computed."""
        return not self._chunks

    @property
    def logits(self) -> torch.Tensor:
        """Logits ``[V]`` at the last position of the prompt, once it is done."""
        assert self.done, "some of the prompt is not computed yet"
        assert self._logits is not None, "the last token is always computed"
        return self._logits

    def go_on(self) -> int:
        """Run the next forward; how many tokens it computed."""
        chunk = self._chunks.popleft()
        spans, parts = self._spans, self._parts
        with spans.forward(Part.PREFILL, len(chunk)), spans.part(Part.PREFILL), parts.timed("forward"):
            self._logits = self._forward(self.cache, [self._tokens[position] for position in chunk], chunk)
            settle(self._logits.device)
        return len(chunk)

    def in_slices(self) -> Slices[torch.Tensor]:
        """Run all forwards that are left, a turn each; logits ``[V]`` at the last position of the prompt."""
        self.go_on()
        while not self.done:
            yield
            self.go_on()
        return self.logits

    def finish(self) -> torch.Tensor:
        """As ``in_slices``, at once."""
        return at_once(self.in_slices())
