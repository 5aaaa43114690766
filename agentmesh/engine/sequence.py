"""One live sequence: its cache, what it has generated, and when its message ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import torch
from transformers.cache_utils import Cache

from agentmesh.engine.sampling import Sampler, Sampling
from agentmesh.engine.tokenizer import TextStream
from agentmesh.errors import ModelError


class Sequence:
    """One live sequence, used on the engine's thread only.

    Args:
        cache: holds its prompt.
        length: tokens in the cache.
        logits: ``[V]``, of its first token.
        sampler: picks its tokens.
        text: turns tokens into text.
        sampling: how to decode.
        tell: called with every piece of text.

    Attributes:
        done: resolved when the message has ended, or with the error that ended it.
        ended: when it did.
    """

    def __init__(
        self,
        cache: Cache,
        length: int,
        logits: torch.Tensor,
        sampler: Sampler,
        text: TextStream,
        sampling: Sampling,
        tell: Callable[[str], object],
    ) -> None:
        self.cache = cache
        self.first_logits = logits
        self.length = length
        self.sampling = sampling
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.finish = ""
        self.done: Future[None] = Future()
        self.ended = 0.0
        self._sampler = sampler
        self._text = text
        self._tell = tell

    def accept(self, logits: torch.Tensor, stops: frozenset[int], context: int) -> None:
        """Pick the next token and decide whether the message ends with it.

        Raises:
            ModelError: there is none to pick.
        """
        token = self._sampler.pick(logits)
        if token in stops:
            self._end("stop")
            return
        self.tokens.append(token)
        self.pieces.append(self._text.push(token))
        if self.pieces[-1]:
            self._tell(self.pieces[-1])
        if self._completes_stop():
            self._end("stop")
        elif len(self.tokens) >= self.sampling.max_tokens:
            self._end("length")
        elif self.length + 1 >= context:
            self._end("context")

    def fail(self, error: ModelError) -> None:
        """End it, and no other one."""
        self.finish = "error"
        self.done.set_exception(error)

    def _end(self, finish: str) -> None:
        self.finish = finish
        rest = self._text.end()
        if rest:
            self.pieces.append(rest)
            self._tell(rest)
        self.ended = time.perf_counter()
        self.done.set_result(None)

    def _completes_stop(self) -> bool:
        if not self.sampling.stop or not self.pieces[-1]:
            return False
        reach = max(len(stop) for stop in self.sampling.stop) + len(self.pieces[-1])
        tail = "".join(self.pieces[-reach:])[-reach:]
        return any(stop in tail for stop in self.sampling.stop)
